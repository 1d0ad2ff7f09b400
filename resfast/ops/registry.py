"""How an op of resfast is defined: schema, kernel, fake, autograd, autocast, in one call each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# FRAGMENT: the native library defines its raw ops in the same namespace
LIBRARY = torch.library.Library("resfast", "FRAGMENT")


# each op's kernel, for who runs an op's schedule without a device (diagnostics/traffic.py)
KERNELS: dict[Any, Callable] = {}


class FusedOp:
    """An op ``resfast::<name>`` whose kernel picks a backend below the op boundary.

    ``schema`` is the part behind the name. ``kernel`` runs on any device; ``fake`` gives shapes
    and strides. Differentiable ops add ``autograd``; ops that take activations add ``autocast``.
    """

    def __init__(self, name: str, schema: str, kernel: Callable, fake: Callable) -> None:
        self.name = name
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"resfast::{name}", fake, lib=LIBRARY)
        self.op = getattr(torch.ops.resfast, name).default
        KERNELS[self.op] = kernel

    def __call__(self, *args: Any) -> Any:
        return self.op(*args)

    def autograd(self, setup_context: Callable, backward: Callable) -> None:
        """Register the formula; ``backward`` calls an op, so that it differentiates in turn.

        Both have the form ``torch.library.register_autograd`` asks for, with lists of tensors as
        arguments and outputs; that one walks generic trees of lists on every call.
        """
        kernel = _autograd_kernel(self.op, setup_context, backward)
        LIBRARY.impl(self.name, kernel, "Autograd", with_keyset=True)

    def autocast(self, activations: Sequence[int]) -> None:
        """Cast the arguments at ``activations`` to the autocast dtype; all others stay.

        Norm parameters and statistics so stay fp32. As in stock PyTorch, float64 is not cast.
        """
        positions = frozenset(activations)

        def register(device: str, key: str) -> None:
            excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

            def kernel(_, *args):
                dtype = torch.get_autocast_dtype(device)
                cast = [
                    _cast(a, dtype, device) if i in positions else a for i, a in enumerate(args)
                ]
                with torch._C._ExcludeDispatchKeyGuard(excluded):
                    return self.op(*cast)

            LIBRARY.impl(self.name, kernel, key, with_keyset=True)

        register("cpu", "AutocastCPU")
        register("cuda", "AutocastCUDA")


class _Call:
    """One call of an op on its way through autograd, which itself sees flat tensors only."""

    def __init__(self, op: Any, keyset: Any, args: tuple[Any, ...]) -> None:
        self.op = op
        self.keyset = keyset
        self.args = args
        self.output_lengths: list[int | None] = []

    def run(self) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            keyset = self.keyset & torch._C._after_autograd_keyset
            return self.op.redispatch(keyset, *self.args)


def _grouped(flat: Iterable[Any], lengths: Sequence[int | None]) -> tuple[Any, ...]:
    """Flat values as one value (length None) or a list of so many, in turn."""
    rest = iter(flat)
    return tuple(next(rest) if n is None else [next(rest) for _ in range(n)] for n in lengths)


def _autograd_kernel(op: Any, setup_context: Callable, backward: Callable) -> Callable:
    """The Autograd kernel of ``op``: an autograd Function over its tensors, laid out flat."""
    types = [str(a.type) for a in op._schema.arguments]
    is_list = [t == "List[Tensor]" for t in types]
    holds_tensors = [
        k or t in ("Tensor", "Optional[Tensor]") for k, t in zip(is_list, types, strict=True)
    ]

    def flatten(values: Sequence[Any]) -> list[Any]:
        flat: list[Any] = []
        for value, lists, wanted in zip(values, is_list, holds_tensors, strict=True):
            if lists:
                flat.extend(value)
            elif wanted:
                flat.append(value)
        return flat

    def forward(ctx: Any, call: _Call, *_tensors: Tensor | None) -> tuple[Tensor, ...]:
        outputs = call.run()
        setup_context(ctx, call.args, outputs)
        lengths = [len(a) if k else None for a, k in zip(call.args, is_list, strict=True)]
        ctx.argument_lengths = [n for n, k in zip(lengths, holds_tensors, strict=True) if k]
        call.output_lengths = [len(o) if isinstance(o, list) else None for o in outputs]
        ctx.output_lengths = call.output_lengths
        return tuple(t for o in outputs for t in (o if isinstance(o, list) else (o,)))

    def run_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        flat_needs = ctx.needs_input_grad
        needs = iter(_grouped(flat_needs[1:], ctx.argument_lengths))
        ctx.needs_input_grad = tuple(next(needs) if k else False for k in holds_tensors)
        try:
            return None, *flatten(backward(ctx, *_grouped(grads, ctx.output_lengths)))
        finally:
            ctx.needs_input_grad = flat_needs

    methods = {"forward": staticmethod(forward), "backward": staticmethod(run_backward)}
    function: Any = type(f"Autograd_{op._opname}", (torch.autograd.Function,), methods)

    def kernel(keyset: Any, *args: Any) -> Any:
        call = _Call(op, keyset, args)
        tensors = flatten(args)
        if not needs_grad(*tensors):
            return call.run()
        return _grouped(function.apply(call, *tensors), call.output_lengths)

    return kernel


def _cast(a: Any, dtype: torch.dtype, device: str) -> Any:
    if isinstance(a, (list, tuple)):
        return [_cast(t, dtype, device) for t in a]
    if (
        isinstance(a, Tensor)
        and a.is_floating_point()
        and a.dtype != torch.float64
        and a.device.type == device
    ):
        return a.to(dtype)
    return a


def needs_grad(*values: Any) -> bool:
    """Whether autograd would record an op on these values (tensors, None, or lists of them)."""
    if not torch.is_grad_enabled():
        return False
    for v in values:
        if isinstance(v, (list, tuple)):
            if needs_grad(*v):
                return True
        elif isinstance(v, Tensor) and v.requires_grad:
            return True
    return False


def absent(like: Tensor) -> Tensor:
    """What an op returns for an output nobody asked for: schemas have no optional outputs."""
    return like.new_empty(0)


def present(t: Tensor, wanted: bool) -> Tensor | None:
    """The gradient, or None where it was not asked for."""
    return t if wanted else None


def double_backward(
    forward: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    dy: Tensor,
    grad_grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of g = VJP(forward; inputs, dy) with respect to dy and the inputs.

    ``forward`` is a differentiable composition of stock ops over ``inputs``; ``grad_grads[i]``
    is the gradient arriving at g's i-th output, the gradient of ``inputs[i]``.
    """
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        dy_leaf = dy.detach().requires_grad_()
        real = [t for t in leaves if t is not None]
        first = torch.autograd.grad(
            forward(*leaves), real, dy_leaf, create_graph=True, allow_unused=True
        )
        incoming = [g for g, t in zip(grad_grads, leaves, strict=True) if t is not None]
        pairs = [
            (f, g)
            for f, g in zip(first, incoming, strict=True)
            if f is not None and g is not None and g.shape == f.shape and f.requires_grad
        ]
        if not pairs:
            return None, [None] * len(inputs)
        second = torch.autograd.grad(
            [f for f, _ in pairs], [dy_leaf, *real], [g for _, g in pairs], allow_unused=True
        )
    rest = iter(second[1:])
    return second[0], [None if t is None else next(rest) for t in leaves]

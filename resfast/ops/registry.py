"""How an op of resfast is defined: schema, kernel, fake, autograd, autocast, in one call each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# FRAGMENT: the native library defines its raw ops in the same namespace
LIBRARY = torch.library.Library("resfast", "FRAGMENT")


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

    def __call__(self, *args: Any) -> Any:
        return self.op(*args)

    def autograd(self, setup_context: Callable, backward: Callable) -> None:
        """Register the formula; ``backward`` calls an op, so that it differentiates in turn."""
        torch.library.register_autograd(
            f"resfast::{self.name}", backward, setup_context=setup_context, lib=LIBRARY
        )

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
            if f is not None and g is not None and g.numel() and f.requires_grad
        ]
        if not pairs:
            return None, [None] * len(inputs)
        second = torch.autograd.grad(
            [f for f, _ in pairs], [dy_leaf, *real], [g for _, g in pairs], allow_unused=True
        )
    rest = iter(second[1:])
    return second[0], [None if t is None else next(rest) for t in leaves]

"""optimize_for_inference(model): the same outputs with no module, check or lookup between layers.

The first call with an input of a new size traces the model to a flat graph, prepares every
convolution for its size (by the fastest kernel, its weights folded and packed, or transformed for
Winograd), plans the memory of the activations and compiles the graph to one Python function. Later
calls run that function.
"""

from __future__ import annotations

import copy
import operator
import threading
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from resfast.backends.cpu_engines import CpuEngines, Layer, Prepared, samples
from resfast.backends.engines import plan_convolution
from resfast.backends.interface import ConvGeometry, NormVectors, nhwc
from resfast.backends.packed import PackedConvolution, packing_declines
from resfast.backends.packed_pool import (
    Window,
    images_at_a_time,
    max_pool,
    native_window,
    pooled_convolution,
)
from resfast.backends.pointwise import prepare_linear
from resfast.backends.select import find
from resfast.inference_memory import PREPARED, Memory, plan_memory

MAX_PLANS = 8
# of a mean that becomes a pooling: it adds them up one by one, and rounding errors with them
MAX_POOLED_PIXELS = 64
Plan = Callable[[Tensor], Any]
_Run = TypeVar("_Run", bound=Callable[..., Tensor])
_CONVOLUTION = torch.ops.resfast.conv_bn_act_inference.default
# One plan is made at a time, of whatever model, since tracing has global state.
_planning = threading.RLock()


class OptimizedModel(nn.Module):
    """What ``optimize_for_inference`` returns. ``forward`` takes one tensor, without gradients.

    ``plans`` has a compiled function for each input size met so far, up to ``MAX_PLANS``; further
    sizes, and models that cannot be traced, run the copied model itself. Threads may share it.
    A copy, and what is loaded from a file, makes plans of its own.
    """

    def __init__(
        self, model: nn.Module, batch_sizes: Sequence[int] = (), cuda_graphs: bool = False
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.batch_sizes = sorted(set(batch_sizes))
        self.cuda_graphs = cuda_graphs
        self._forget_plans()
        # In a CUDA build without a device, the first thread to trace leaves the others a device
        # guard that dies with it, and they crash: let it be this one, not some worker's.
        with FakeTensorMode():
            pass
        super().train(False)

    def _forget_plans(self) -> None:
        self.plans: dict[tuple, Plan] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "plans"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_plans()

    def _apply(self, *args: Any, **kwargs: Any) -> OptimizedModel:
        super()._apply(*args, **kwargs)  # .to(), .half(): the plans hold the old parameters
        self._forget_plans()
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        keys = super().load_state_dict(*args, **kwargs)
        self._forget_plans()
        return keys

    def train(self, mode: bool = True) -> OptimizedModel:
        if mode:
            raise RuntimeError("a model optimized for inference cannot train; train the original")
        return self

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        if not self.batch_sizes or x.dim() == 0 or len(x) == 0:
            return self._run(x)
        pieces = [self._run_padded(piece) for piece in x.split(self.batch_sizes[-1])]
        return pieces[0] if len(pieces) == 1 else _concatenated(pieces)

    def _run_padded(self, x: Tensor) -> Any:
        """The next batch size's plan, on x and zeros behind it."""
        n, size = len(x), self.batch_sizes[bisect_left(self.batch_sizes, len(x))]
        if n < size:
            x = _padded(x, size)
        y = self._run(x)
        return y if n == size else tree_map_only(Tensor, lambda t: t[:n], y)

    def _run(self, x: Tensor) -> Any:
        key = (x.shape, x.stride(), x.dtype, x.device, _autocast_dtype(x.device.type))
        plan = self.plans.get(key)
        if plan is None:
            with _planning:
                plan = self.plans.get(key)
                if plan is None:
                    if len(self.plans) >= MAX_PLANS:
                        return self.model(x)
                    plan = self.plans[key] = self._plan(x)
        return plan(x)

    def _plan(self, x: Tensor) -> Plan:
        plan: Plan = _plan(self.model, x)
        if self.batch_sizes:
            _check_independent(plan, x, type(self.model).__name__)
        return _CudaGraph(plan, x) if self.cuda_graphs and x.is_cuda else plan


def optimize_for_inference(
    model: nn.Module, *, batch_sizes: Sequence[int] = (), cuda_graphs: bool = False
) -> OptimizedModel:
    """A copy of ``model`` for inference: equal outputs, less time a call, a plan per input size.

    Later changes of ``model`` do not reach the copy, which keeps its prepared weights.

    Args:
        batch_sizes: plan for these alone; other batches are padded with zeros, or cut. Samples
            must not depend on each other, which the first call checks.
        cuda_graphs: on CUDA, replay each plan as one graph; never run so far.

    Raises:
        RuntimeError: a module is in training mode; at a call, samples that depend on each other.
        ValueError: a batch size below 1.
    """
    training = [name or "the model" for name, m in model.named_modules() if m.training]
    if training:
        raise RuntimeError(f"call model.eval() first: {training[0]} is in training mode")
    if any(n < 1 for n in batch_sizes):
        raise ValueError(f"batch_sizes must be at least 1, got {tuple(batch_sizes)}")
    return OptimizedModel(model, batch_sizes, cuda_graphs)


def _autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to here, since a plan has the casts in it; None where it is off."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def _padded(x: Tensor, size: int) -> Tensor:
    """x in its own layout, so that padded batches and full ones share a plan."""
    nhwc = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    shape = (size, *x.shape[1:])
    padded = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    padded[: len(x)] = x
    padded[len(x) :] = 0
    return padded


def _concatenated(pieces: list[Any]) -> Any:
    leaves, structures = zip(*(tree_flatten(piece) for piece in pieces), strict=True)
    return tree_unflatten([torch.cat(parts) for parts in zip(*leaves, strict=True)], structures[0])


def _check_independent(plan: Plan, x: Tensor, name: str) -> None:
    """The first sample's output stays the same, bit by bit, when the other samples are zeros."""
    alone = torch.zeros_like(x)
    alone[:1] = x[:1]
    for a, b in zip(tree_flatten(plan(x))[0], tree_flatten(plan(alone))[0], strict=True):
        if not isinstance(a, Tensor) or a.dim() == 0 or len(a) != len(x):
            raise RuntimeError(f"batch_sizes: an output of {name} has no batch dimension")
        if not torch.equal(a[:1].nan_to_num(), b[:1].nan_to_num()):
            raise RuntimeError(
                f"batch_sizes: the output of {name} for one sample depends on the others in its "
                "batch, so padding would change it"
            )


class _CudaGraph:
    """A plan captured once and replayed, on memory of its own. Never executed so far."""

    def __init__(self, plan: Plan, x: Tensor) -> None:
        self.x = x.clone()
        self.replaying = threading.Lock()
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # what a first call tunes and allocates must be over
                plan(self.x)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.y = plan(self.x)

    def __call__(self, x: Tensor) -> Any:
        with self.replaying:
            self.x.copy_(x)
            self.graph.replay()
            return tree_map_only(Tensor, Tensor.clone, self.y)


class _Planned:
    """A compiled graph whose inner activations live in planned memory.

    Each call at a time has memory of its own, which the next call takes over.
    """

    def __init__(self, graph: fx.GraphModule, memory: Memory) -> None:
        self.graph = graph
        self.memory = memory
        self.idle: list[list[Tensor]] = []

    def __call__(self, x: Tensor) -> Any:
        try:
            tensors = self.idle.pop()
        except IndexError:
            tensors = self.memory.allocate(x)
        try:
            return self.graph(x, tensors)
        finally:
            self.idle.append(tensors)


def _plan(model: nn.Module, x: Tensor) -> Plan:
    try:
        with samples(x) as arrived:
            graph = make_fx(model)(x)
    except Exception as error:
        model(x)  # a wrong input fails here, with the model's own error
        reason = str(error).splitlines()[0] if str(error) else ""
        warnings.warn(
            f"not optimized, {type(model).__name__} cannot be traced: "
            f"{type(error).__name__}: {reason}",
            stacklevel=8,
        )
        return model
    convolutions = [node for node in graph.graph.nodes if node.target is _CONVOLUTION]
    sample = dict(zip(convolutions, arrived or [None] * len(convolutions), strict=True))
    graph.graph.eliminate_dead_code()
    engines = CpuEngines(_traffic(model, graph), measuring=arrived is not None)
    for node in list(graph.graph.nodes):
        if node.target is _CONVOLUTION:
            _prepare(graph, node, engines, sample[node])
        elif node.target is torch.ops.aten.addmm.default:
            _prepare_linear(graph, node)
        elif node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.max_pool2d_with_indices.default:
            _prepare_pool(graph, node)
        elif node.target is torch.ops.aten.mean.dim:
            _prepare_mean(graph, node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    memory = _use_planned_memory(graph)
    graph.recompile()
    return _Planned(graph, memory)


def _traffic(model: nn.Module, graph: fx.GraphModule) -> int:
    """Bytes that a call reads or writes at least once: parameters, and results of the graph's."""
    results = (node.meta.get("val") for node in graph.graph.nodes if node.op != "get_attr")
    tensors = [*model.parameters(), *(t for t in results if isinstance(t, Tensor))]
    return sum(t.numel() * t.element_size() for t in tensors)


def _use_planned_memory(graph: fx.GraphModule) -> Memory:
    """Adds the plan's second argument, and hands each prepared convolution its tensor."""
    memory, positions = plan_memory(graph.graph)
    last_input = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    with graph.graph.inserting_after(last_input):
        tensors = graph.graph.placeholder("memory")
    for node, position in positions.items():
        with graph.graph.inserting_before(node):
            out = graph.graph.call_function(operator.getitem, (tensors, position))
        node.args = (*node.args[:3], out)
    return memory


def _like(activation: Any) -> Tensor | None:
    """A tensor like an argument's."""
    if activation is None:
        return None
    like = activation.meta["val"]
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _parameter(graph: fx.GraphModule, argument: Any) -> Tensor | None:
    """A parameter's tensor as the module has it, before autocast's cast; None of anything else."""
    if not isinstance(argument, fx.Node):
        return None
    if argument.target is torch.ops.aten._to_copy.default:
        return _parameter(graph, argument.args[0])
    return getattr(graph, str(argument.target)) if argument.op == "get_attr" else None


def _channels_last(graph: fx.GraphModule, node: fx.Node, activation: Any) -> Any:
    """An argument of ``node`` as kernels read it, which the op would see to itself."""
    if activation is None:
        return None
    like = activation.meta["val"]
    dense = nhwc(like)
    if dense.stride() == like.stride():
        return activation
    with graph.graph.inserting_before(node):
        call = graph.graph.call_function(nhwc, (activation,))
    call.meta = {"val": dense}
    return call


def _prepare(
    graph: fx.GraphModule, node: fx.Node, engines: CpuEngines, sample: Tensor | None
) -> None:
    """Replace the op by its convolution, prepared; the trace has checked the arguments.

    One whose parameters the graph computes stays an op.
    """
    x, residual = _like(node.args[0]), _like(node.args[7])
    assert x is not None
    parameters = [_parameter(graph, a) for a in node.args[1:7]]
    if any(a is not None and p is None for a, p in zip(node.args[1:7], parameters, strict=True)):
        return
    weight, bias, gamma, beta, mean, var = cast(Any, parameters)
    stride, padding, dilation, groups, eps, relu, add_after_act = cast(Any, node.args[8:])
    geometry = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    norm = NormVectors(gamma, beta, mean, var, eps)
    if find("conv_fprop", x)[0].name != "cpu":
        run = plan_convolution(x, weight, bias, geometry, norm, residual, relu, add_after_act)
        if run is not None:
            _replace(graph, node, run, relu, None, False)
        return
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if packing_declines(x, weight, geometry, residual) is not None or (
        residual is not None and add_after_act
    ):
        return
    for i in (0, 7):
        node.update_arg(i, _channels_last(graph, node, node.args[i]))
    if (pool := _pool_behind(node)) is not None and relu and residual is None:
        count = images_at_a_time(node.meta["val"])
        piece = Layer(x[:count], weight, bias, geometry, norm, None, True, False, sample)
        _prepare_pooled(graph, node, *pool, engines.prepare(piece), count)
        return
    # the residual's memory, where nothing reads it afterwards
    out = node.args[7] if _is_last_use(node, node.args[7]) else None
    layer = Layer(x, weight, bias, geometry, norm, residual, relu, out is not None, sample)
    prepared = engines.prepare(layer)
    _replace(graph, node, prepared.reporting(prepared.run), relu, out, prepared.own)


def _prepare_linear(graph: fx.GraphModule, node: fx.Node) -> None:
    """Replace a linear layer by one on a packed weight."""
    bias, x, transposed = cast(Any, node.args)
    if node.kwargs or transposed.target is not torch.ops.aten.t.default:
        return
    parameters = [_parameter(graph, a) for a in (transposed.args[0], bias)]
    like = _like(x)
    if None in parameters or like is None or find("conv_fprop", like)[0].name != "cpu":
        return
    weight, shift = cast(Any, parameters)
    run = prepare_linear(like, weight, shift)
    if run is None:
        return
    with graph.graph.inserting_before(node):
        call = graph.graph.call_function(_named(run, node.name), (x,))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.graph.erase_node(node)


def _replace(
    graph: fx.GraphModule,
    node: fx.Node,
    run: PackedConvolution,
    relu: bool,
    out: Any,
    own: bool,
) -> None:
    """``own``: the convolution takes memory for its result."""
    arguments = (node.args[0], node.args[7], relu, out)
    with graph.graph.inserting_before(node):
        call = graph.graph.call_function(_named(run, node.name), arguments)
    # its consumers ask for its shape
    call.meta = {**node.meta, PREPARED: own}
    node.replace_all_uses_with(call)
    graph.graph.erase_node(node)


def _pool_behind(node: fx.Node) -> tuple[fx.Node, Window] | None:
    """The max-pool that alone reads this large convolution, if its maxima alone are read."""
    pool = next(iter(node.users)) if len(node.users) == 1 else None
    if pool is None or pool.target is not torch.ops.aten.max_pool2d_with_indices.default:
        return None
    if len(node.meta["val"]) <= images_at_a_time(node.meta["val"]):
        return None
    window = _window(pool)
    return None if window is None else (pool, window)


def _window(pool: fx.Node) -> Window | None:
    """Of a max-pool whose maxima alone are read, where the native one runs it."""
    if not all(u.target is operator.getitem and u.args[1] == 0 for u in pool.users):
        return None
    return native_window(*cast(Any, pool.args[1:]))


def _prepare_pooled(
    graph: fx.GraphModule,
    node: fx.Node,
    pool: fx.Node,
    window: Window,
    prepared: Prepared,
    count: int,
) -> None:
    """``_prepare`` of a convolution and the max-pool behind it, ``count`` images at a time."""
    shape = pool.meta["val"][0].shape
    run = prepared.reporting(pooled_convolution(prepared.run, count, shape, window))
    _replace_pool(graph, pool, run, f"{node.name}_max_pool", (node.args[0], None, True, None))
    graph.graph.erase_node(node)


def _prepare_pool(graph: fx.GraphModule, pool: fx.Node) -> None:
    """Replace a max-pool by the native one."""
    x, window = _like(pool.args[0]), _window(pool)
    if x is None or x.dim() != 4 or window is None:
        return
    if find("conv_fprop", x)[0].name != "cpu":
        return
    run = max_pool(pool.meta["val"][0].shape, window)
    arguments = (_channels_last(graph, pool, pool.args[0]), None, False, None)
    _replace_pool(graph, pool, run, pool.name, arguments)


def _replace_pool(
    graph: fx.GraphModule, pool: fx.Node, run: PackedConvolution, name: str, arguments: tuple
) -> None:
    with graph.graph.inserting_before(pool):
        call = graph.graph.call_function(_named(run, name), arguments)
    call.meta = {**pool.meta, "val": pool.meta["val"][0], PREPARED: True}
    for maxima in list(pool.users):
        maxima.replace_all_uses_with(call)
        graph.graph.erase_node(maxima)
    graph.graph.erase_node(pool)


def _prepare_mean(graph: fx.GraphModule, mean: fx.Node) -> None:
    """Replace the mean over small images by a pooling, whose call costs less."""
    x, dims, keep = cast(Any, (*mean.args, False)[:3])
    like = x.meta["val"]
    if mean.kwargs or keep is not True or not like.is_cpu or like.dim() != 4:
        return
    if sorted(d % 4 for d in dims) != [2, 3] or not 0 < prod(like.shape[2:]) <= MAX_POOLED_PIXELS:
        return
    with graph.graph.inserting_before(mean):
        window = list(like.shape[2:])
        call = graph.graph.call_function(torch.ops.aten.avg_pool2d.default, (x, window))
    call.meta = dict(mean.meta)
    mean.replace_all_uses_with(call)
    graph.graph.erase_node(mean)
    # adaptive pooling ends by making the result channels_last, which this one is
    n, c = like.shape[:2]
    if like.is_contiguous(memory_format=torch.channels_last):
        for user in list(call.users):
            if user.args[1:] == ([n, c, 1, 1], [c, 1, c, c]):
                user.replace_all_uses_with(call)
                graph.graph.erase_node(user)


def _is_last_use(node: fx.Node, residual: Any) -> bool:
    """The residual is a prepared convolution's output, read by no other kind of call (which might
    keep a view of it), and by nothing from here on.
    """
    if not isinstance(residual, fx.Node) or PREPARED not in residual.meta:
        return False
    others = [user for user in residual.users if user is not node]
    return residual is not node.args[0] and all(
        PREPARED in user.meta and user < node for user in others
    )


def _named(run: _Run, name: str) -> _Run:
    for attribute in ("__name__", "__qualname__"):
        setattr(run, attribute, f"run_{name}")
    run.__module__ = __name__
    return run

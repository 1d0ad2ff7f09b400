"""optimize_for_inference(model): the same outputs with no module, check or lookup between layers.

The first call with an input of a new size traces the model to a flat graph, prepares every
convolution for its size (weights folded and packed, or transformed for Winograd) and compiles the
graph to one Python function. Later calls run that function.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from resfast.backends.interface import ConvGeometry, NormVectors
from resfast.backends.packed import (
    PackedConvolution,
    packing_declines,
    prepare_convolution,
)
from resfast.backends.select import select

MAX_PLANS = 8
_PREPARED = "resfast prepared convolution"


class OptimizedModel(nn.Module):
    """What ``optimize_for_inference`` returns. ``forward`` takes one tensor, without gradients.

    ``plans`` has a compiled function for each input size met so far, up to ``MAX_PLANS``; further
    sizes, and models that cannot be traced, run the copied model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.plans: dict[tuple, fx.GraphModule | nn.Module] = {}
        super().train(False)

    def train(self, mode: bool = True) -> OptimizedModel:
        if mode:
            raise RuntimeError("a model optimized for inference cannot train; train the original")
        return self

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        key = (x.shape, x.stride(), x.dtype, x.device)
        plan = self.plans.get(key)
        if plan is None:
            if len(self.plans) >= MAX_PLANS:
                return self.model(x)
            plan = self.plans[key] = _plan(self.model, x)
        return plan(x)


def optimize_for_inference(model: nn.Module) -> OptimizedModel:
    """A copy of ``model`` for inference: equal outputs, less time a call.

    Later changes of ``model`` do not reach the copy. Weights are prepared once for each input
    size, and kept as long as the copy lives.

    Raises:
        RuntimeError: a module in model is in training mode.
    """
    training = [name or "the model" for name, m in model.named_modules() if m.training]
    if training:
        raise RuntimeError(f"call model.eval() first: {training[0]} is in training mode")
    return OptimizedModel(model)


def _plan(model: nn.Module, x: Tensor) -> fx.GraphModule | nn.Module:
    try:
        graph = make_fx(model)(x)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        warnings.warn(
            f"not optimized, {type(model).__name__} cannot be traced: "
            f"{type(error).__name__}: {reason}",
            stacklevel=4,
        )
        return model
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.resfast.conv_bn_act_inference.default:
            _prepare(graph, node)
        elif node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def _value(graph: fx.GraphModule, argument: Any) -> Any:
    """A parameter's tensor; of an activation, one like it."""
    if not isinstance(argument, fx.Node):
        return argument
    if argument.op == "get_attr":
        return getattr(graph, str(argument.target))
    like = argument.meta["val"]
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _prepare(graph: fx.GraphModule, node: fx.Node) -> None:
    """Replace the op by its convolution, prepared; the trace has checked the arguments."""
    x, weight, bias, gamma, beta, mean, var, residual, *options = (
        _value(graph, a) for a in node.args
    )
    stride, padding, dilation, groups, eps, relu, add_after_act = options
    if (
        select("conv_fprop", x).name != "cpu"
        or packing_declines(x, weight, residual) is not None
        or (residual is not None and add_after_act)
    ):
        return
    geometry = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    run = prepare_convolution(x, weight, bias, geometry, NormVectors(gamma, beta, mean, var, eps))
    arguments = (node.args[0], node.args[7], relu, _is_last_use(node, node.args[7]))
    with graph.graph.inserting_before(node):
        call = graph.graph.call_function(_named(run, node.name), arguments)
    call.meta = {**node.meta, _PREPARED: True}  # its consumers ask for its shape
    node.replace_all_uses_with(call)
    graph.graph.erase_node(node)


def _is_last_use(node: fx.Node, residual: Any) -> bool:
    """The residual is a prepared convolution's output, read by no other kind of call (which might
    keep a view of it), and by nothing from here on.
    """
    if not isinstance(residual, fx.Node) or not residual.meta.get(_PREPARED):
        return False
    others = [user for user in residual.users if user is not node]
    return residual is not node.args[0] and all(
        user.meta.get(_PREPARED) and user < node for user in others
    )


def _named(run: PackedConvolution, name: str) -> PackedConvolution:
    for attribute in ("__name__", "__qualname__"):
        setattr(run, attribute, f"run_{name}")
    run.__module__ = __name__
    return run

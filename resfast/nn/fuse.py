"""From stock child modules to fused ops: read their parameters, or say why they run themselves.

A layer is fused only when nobody could tell the difference: exact stock types, no hooks; of norms
BatchNorm2d, SyncBatchNorm (with a collective where it has one) and torchvision's FrozenBatchNorm2d.
Whatever else a user puts in a child's place (GroupNorm, a parametrised convolution, a module with a
hook) is called as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as _module

from resfast.ops import (
    ConvParams,
    NormParams,
    bn_act,
    bn_act_synchronised,
    conv_bn_act,
    conv_bn_act_synchronised,
)


class PlanRow(NamedTuple):
    """One step of a forward pass: the children it covers, the op that runs them, and why not more.

    op is the fused op's name or ``"unfused"``; reason is None where nothing prevented fusion.
    """

    children: tuple[str, ...]
    op: str
    reason: str | None


class Fusible(nn.Module):
    """Base of the modules whose forward may call fused ops. ``fused=False``: stock layers only."""

    fused: bool = True


def set_fused(model: nn.Module, fused: bool) -> nn.Module:
    """Switch every resfast module in model between fused ops and stock children, in place."""
    for m in model.modules():
        if isinstance(m, Fusible):
            m.fused = bool(fused)
    return model


def unfused(model: nn.Module) -> nn.Module:
    """A deep copy that runs the stock layers: reference and benchmark peer."""
    return set_fused(copy.deepcopy(model), False)


def traced(x: Tensor) -> bool:
    """x is recorded by torch.fx, torch.jit or torch.onnx, whose graphs are to hold the stock
    layers, or is inside a torch.func transform, which the fused ops have no rules for.
    """
    return (
        isinstance(x, fx.Proxy)
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        # the first is a flag, the second a call with an import in it
        or (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())
    )


def _hook_reason(m: nn.Module) -> str | None:
    if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
        return f"a hook on the {type(m).__name__}"
    if "forward" in m.__dict__:
        return f"the {type(m).__name__}'s forward was replaced"
    return None


def _global_hook_reason() -> str | None:
    return "a global module hook" if _module._has_any_global_hook() else None


def plain_reason(m: nn.Module, kind: type) -> str | None:
    """None where m is exactly of this kind and calling it has no other effect than its forward."""
    if type(m) is not kind:
        return f"{type(m).__name__} is not a plain {kind.__name__}"
    return _hook_reason(m) or _global_hook_reason()


# Below, ``X | Any`` costs nothing on every call's path: a caller has an ``nn.Module``, a tensor or
# None, and a ``…_reason`` that returned None has told that it is an X.


def _pair(value: Any) -> tuple[int, int]:
    """An int for both directions, or the pair itself."""
    return value if type(value) is tuple else (value, value)


def _resolve_padding(conv: nn.Conv2d | Any) -> tuple[int, int] | Any:
    """Numbers for ``padding="valid"`` and ``"same"``; None where 'same' is one-sided."""
    padding = conv.padding
    if not isinstance(padding, str):
        return _pair(padding)
    if padding == "valid":
        return (0, 0)
    (dh, dw), (kh, kw) = _pair(conv.dilation), _pair(conv.kernel_size)
    h, w = dh * (kh - 1), dw * (kw - 1)
    return None if h % 2 or w % 2 else (h // 2, w // 2)


def read(m: nn.Module, table: Mapping[str, Tensor | None], name: str) -> Tensor | Any:
    """``getattr(m, name)``, a tensor or None, several times faster where table (m's own) has it.

    It has not in ``nn.DataParallel``'s replicas and under FSDP, which set plain attributes.
    """
    return table[name] if name in table else getattr(m, name)


def conv_params(conv: nn.Conv2d | Any) -> ConvParams:
    """What a fused op needs of a convolution that ``conv_reason`` accepts."""
    parameters = conv._parameters
    return ConvParams(
        read(conv, parameters, "weight"),
        read(conv, parameters, "bias"),
        _pair(conv.stride),
        _resolve_padding(conv),
        _pair(conv.dilation),
        conv.groups,
    )


def is_frozen_norm(m: nn.Module) -> bool:
    """torchvision.ops.FrozenBatchNorm2d, told by name: torchvision need not be installed."""
    kind = type(m)
    return kind.__name__ == "FrozenBatchNorm2d" and kind.__module__.startswith("torchvision.")


def norm_params(bn: nn.BatchNorm2d | nn.SyncBatchNorm | Any) -> NormParams:
    """What a fused op needs of a batch norm, with the rules of ``BatchNorm2d.forward``."""
    if type(bn) is not nn.BatchNorm2d and is_frozen_norm(bn):
        vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)  # buffers, all four
        return NormParams(*vectors, None, False, None, bn.eps)
    training = bn.training
    parameters, buffers = bn._parameters, bn._buffers
    mean = var = batches = None
    if not training or bn.track_running_stats:  # else the buffers are not even passed
        mean = read(bn, buffers, "running_mean")
        var = read(bn, buffers, "running_var")
        batches = read(bn, buffers, "num_batches_tracked")
    return NormParams(
        read(bn, parameters, "weight"),
        read(bn, parameters, "bias"),
        mean,
        var,
        batches,
        training or (mean is None and var is None),
        bn.momentum,
        bn.eps,
    )


def conv_reason(conv: nn.Module) -> str | None:
    """Why a convolution cannot be read by a fused op, or None."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is not a plain Conv2d"
    if conv.padding_mode != "zeros":
        return f"padding_mode {conv.padding_mode!r}"
    if isinstance(conv.padding, str) and _resolve_padding(conv) is None:
        return "padding 'same' with an even kernel is one-sided"
    return _hook_reason(conv)


def norm_reason(bn: nn.Module, synchronises: bool = False) -> str | None:
    """Why a norm cannot be read by a fused op, or None. Eval and frozen norms can.

    ``synchronises``: by an op that has a form for norms synchronised between ranks.
    """
    if type(bn) is not nn.BatchNorm2d and type(bn) is not nn.SyncBatchNorm:
        if not is_frozen_norm(bn):
            return f"{type(bn).__name__} is not a plain BatchNorm2d or SyncBatchNorm"
        if torch.is_autocast_enabled(read(bn, bn._buffers, "weight").device.type):
            return "FrozenBatchNorm2d returns float32 under autocast"
    if not synchronises and synchronised_group(bn) is not None:
        return "a norm synchronised between ranks"
    return _hook_reason(bn)


def synchronised_group(bn: nn.Module) -> str | None:
    """The name of the process group whose ranks bn normalises together now, or None.

    By the rules of ``SyncBatchNorm.forward``: not in eval, nor without peers.
    """
    if type(bn) is not nn.SyncBatchNorm or not bn.training:
        return None
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    group: Any = bn.process_group or torch.distributed.group.WORLD
    return group.group_name if torch.distributed.get_world_size(group) > 1 else None


def unfused_reason(conv: nn.Module, bn: nn.Module) -> str | None:
    """Why this pair runs as two stock modules, or None where it becomes one ``conv_bn_act``."""
    return conv_reason(conv) or norm_reason(bn, synchronises=True) or _global_hook_reason()


def unfused_norm_reason(bn: nn.Module) -> str | None:
    """Why a norm without a convolution runs as a stock module, or None: it becomes a ``bn_act``."""
    return norm_reason(bn, synchronises=True) or _global_hook_reason()


def layer_op(norm: nn.Module, convolved: bool = True) -> str:
    """The op that ``run_conv_bn_act``, or ``run_bn_act``, calls where no reason is against it."""
    op = "conv_bn_act" if convolved else "bn_act"
    return op if synchronised_group(norm) is None else f"{op}_synchronised"


def _split_activation(relu: bool | nn.Module) -> tuple[bool, nn.Module | None]:
    """(a plain ReLU follows, the module to call instead)."""
    if isinstance(relu, nn.Module):
        return (True, None) if plain_reason(relu, nn.ReLU) is None else (False, relu)
    return relu, None


def _may_overwrite(norm: nn.Module) -> bool:
    """Batch norm saves its input, not its output: add and ReLU may work in place, as stock does."""
    return type(norm) is nn.BatchNorm2d and not (
        norm._backward_hooks or norm._backward_pre_hooks or norm._forward_hooks
    )


def stock_tail(
    y: Tensor,
    norm: nn.Module,
    residual: Tensor | None,
    relu: bool | nn.Module,
    add_after_act: bool,
) -> Tensor:
    """Addition and activation after a norm's output y, in either order, by stock functions."""
    in_place = _may_overwrite(norm) and not isinstance(y, fx.Proxy)
    plain, act = _split_activation(relu)
    if residual is not None and not add_after_act:
        y = y.add_(residual) if in_place and y.dtype == residual.dtype else y + residual
        in_place = True
    if plain:
        y = F.relu(y, inplace=in_place and not isinstance(y, fx.Proxy))
    elif act is not None:
        y = act(y)
    if residual is not None and add_after_act:
        y = y + residual  # ReLU's backward reads its output
    return y


def _fused_tail(
    layer: Callable[..., Tensor],
    residual: Tensor | None,
    relu: bool | nn.Module,
    add_after_act: bool,
) -> Tensor:
    """A fused layer with as much of addition and activation as it takes."""
    plain, act = _split_activation(relu)
    if act is None:
        return layer(residual, relu=plain, add_after_act=add_after_act)
    if add_after_act:
        y = act(layer(relu=False))
        return y if residual is None else y + residual
    return act(layer(residual, relu=False))


def run_conv_bn_act(
    conv: nn.Module,
    bn: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    relu: bool | nn.Module = True,
    add_after_act: bool = False,
    *,
    fused: bool = True,
) -> Tensor:
    """relu(bn(conv(x)) + residual), or relu(bn(conv(x))) + residual with ``add_after_act``.

    One ``conv_bn_act`` where both children allow it, else the children themselves. ``relu`` may be
    a module: anything but a plain ``nn.ReLU`` is called after a fused conv+bn.
    """
    if not fused or traced(x) or unfused_reason(conv, bn) is not None:
        return stock_tail(bn(conv(x)), bn, residual, relu, add_after_act)
    params, norm, group = conv_params(conv), norm_params(bn), synchronised_group(bn)

    def layer(residual: Tensor | None = None, **options: bool) -> Tensor:
        if group is not None:
            return conv_bn_act_synchronised(x, params, norm, group, residual, **options)
        return conv_bn_act(x, params, norm, residual, **options)

    return _fused_tail(layer, residual, relu, add_after_act)


def run_bn_act(
    bn: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    relu: bool | nn.Module = True,
    add_after_act: bool = False,
    *,
    fused: bool = True,
) -> Tensor:
    """relu(bn(x) + residual): one ``bn_act`` where the norm allows it, else the norm itself."""
    if not fused or traced(x) or unfused_norm_reason(bn) is not None:
        return stock_tail(bn(x), bn, residual, relu, add_after_act)
    norm, group = norm_params(bn), synchronised_group(bn)

    def layer(residual: Tensor | None = None, **options: bool) -> Tensor:
        if group is not None:
            return bn_act_synchronised(x, norm, group, residual, **options)
        return bn_act(x, norm, residual, **options)

    return _fused_tail(layer, residual, relu, add_after_act)

"""What a converted forward calls: layers and blocks of stock modules, read anew on every call.

They differ from what resfast's own blocks do only in the residual: a user's addition may broadcast
or promote types, which the ops refuse, and then it runs by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resfast.nn.blocks import _block_layer_reason
from resfast.nn.fuse import (
    _global_hook_reason,
    _split_activation,
    conv_params,
    conv_reason,
    norm_params,
    plain_reason,
    run_bn_act,
    run_conv_bn_act,
)
from resfast.ops import ConvParams, residual_block

BlockLayer = tuple[nn.Module, nn.Module, "bool | nn.Module"]  # convolution, norm, activation


def _size_after(size: Sequence[int], conv: ConvParams) -> Sequence[int]:
    """``[N, K, P, Q]`` of a convolution's output."""
    spatial = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            size[2:], conv.weight.shape[2:], conv.stride, conv.padding, conv.dilation, strict=True
        )
    ]
    return size[0], conv.weight.shape[0], *spatial


def _joins(residual: Tensor, size: Sequence[int], x: Tensor, convolved: bool) -> bool:
    """The addition neither broadcasts nor promotes: residual is like the norm's output."""
    dtype = x.dtype
    if convolved and dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(residual.shape) == tuple(size) and residual.dtype == dtype


def run_layer(
    conv: nn.Module | None,
    norm: nn.Module,
    x: Tensor,
    residual: Tensor | None,
    relu: bool | nn.Module,
) -> Tensor:
    """relu(norm(conv(x)) + residual); conv and residual may be None."""
    if residual is not None and not _layer_joins(conv, x, residual):
        y = run_layer(conv, norm, x, None, False) + residual
        plain, act = _split_activation(relu)
        return y.relu() if plain else y if act is None else act(y)
    if conv is None:
        return run_bn_act(norm, x, residual, relu)
    return run_conv_bn_act(conv, norm, x, residual, relu)


def _layer_joins(conv: nn.Module | None, x: Tensor, residual: Tensor) -> bool:
    if x.dim() != 4:
        return False  # the norm says what is wrong with it
    if conv is None:
        return _joins(residual, x.shape, x, False)
    if conv_reason(conv) is not None:
        return False
    return _joins(residual, _size_after(x.shape, conv_params(conv)), x, True)


def block_reason(
    layers: Sequence[BlockLayer], shortcut: tuple[nn.Module, nn.Module] | None
) -> str | None:
    """Why these layers are not one ``residual_block`` now, or None."""
    reason = _global_hook_reason()
    for conv, norm, act in layers:
        reason = reason or _block_layer_reason(conv, norm)
        if isinstance(act, nn.Module):
            reason = reason or plain_reason(act, nn.ReLU)
    if shortcut is not None:
        reason = reason or _block_layer_reason(*shortcut)
    return reason


def run_block(
    x: Tensor,
    shortcut_input: Tensor,
    layers: Sequence[BlockLayer],
    shortcut: tuple[nn.Module, nn.Module] | None,
) -> Tensor:
    """relu(norm(conv(… relu(norm(conv(x))))) + shortcut), one op where every layer allows it."""
    if block_reason(layers, shortcut) is None:
        convs = [conv_params(conv) for conv, _, _ in layers]
        projection = None if shortcut is None else conv_params(shortcut[0])
        if _block_joins(x, convs, shortcut_input, projection):
            return residual_block(
                x,
                convs,
                [norm_params(norm) for _, norm, _ in layers],
                shortcut_conv=projection,
                shortcut_norm=None if shortcut is None else norm_params(shortcut[1]),
                shortcut_input=None if shortcut_input is x else shortcut_input,
            )
    y = x
    for conv, norm, act in layers[:-1]:
        y = run_layer(conv, norm, y, None, act)
    residual = shortcut_input
    if shortcut is not None:
        residual = run_layer(*shortcut, shortcut_input, None, False)
    conv, norm, act = layers[-1]
    return run_layer(conv, norm, y, residual, act)


def _block_joins(
    x: Tensor, convs: Sequence[ConvParams], shortcut_input: Tensor, projection: ConvParams | None
) -> bool:
    if x.dim() != 4 or shortcut_input.dim() != 4:
        return False
    size: Sequence[int] = x.shape
    for conv in convs:
        size = _size_after(size, conv)
    if projection is not None:
        return tuple(_size_after(shortcut_input.shape, projection)) == tuple(size)
    return _joins(shortcut_input, size, x, True)

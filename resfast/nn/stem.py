"""Convolution, norm, ReLU and max-pool of stock modules as one op, or why not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resfast.nn.fuse import (
    PlanRow,
    conv_params,
    conv_reason,
    layer_op,
    norm_params,
    norm_reason,
    plain_reason,
    run_conv_bn_act,
    traced,
    unfused_reason,
)
from resfast.ops import bn_act_max_pool, conv_bn_act_max_pool


def pool_reason(bn: nn.Module, relu: bool | nn.Module, pool: nn.Module) -> str | None:
    """Why norm, ReLU and max-pool are not one op in this very state, or None."""
    # In inference the norm joins the convolution; with statistics to take it cannot anyway.
    if not torch.is_grad_enabled() and not bn.training:
        return "inference: the norm joins the convolution"
    reason = norm_reason(bn) or plain_reason(pool, nn.MaxPool2d)
    if reason is None and isinstance(relu, nn.Module):
        reason = plain_reason(relu, nn.ReLU)
    if reason is None:
        window: Any = pool
        square = all(type(n) is int for n in (window.kernel_size, window.stride, window.padding))
        if not square or window.dilation != 1 or window.ceil_mode or window.return_indices:
            reason = "a max-pool that is not square, or has dilation, ceil_mode or indices"
        elif window.kernel_size > 15:
            reason = "a max-pool of more than 15×15"
    return reason


def _conv_reason(conv: nn.Module) -> str | None:
    """Why the convolution runs beside its norm, ReLU and max-pool, or None."""
    reason = conv_reason(conv)
    return "a convolution with bias" if reason is None and conv.bias is not None else reason


def run_conv_bn_pool(
    conv: nn.Module,
    bn: nn.Module,
    x: Tensor,
    relu: bool | nn.Module,
    pool: nn.Module,
    *,
    fused: bool = True,
) -> Tensor:
    """pool(relu(bn(conv(x)))): one op where every child allows it, else as few as may be."""
    if not fused or traced(x) or pool_reason(bn, relu, pool) is not None:
        return pool(run_conv_bn_act(conv, bn, x, relu=relu, fused=fused))
    plain: Any = pool
    window = {name: getattr(plain, name) for name in ("kernel_size", "stride", "padding")}
    norm = norm_params(bn)
    if _conv_reason(conv) is not None:
        return bn_act_max_pool(conv(x), norm, **window)
    return conv_bn_act_max_pool(x, conv_params(conv), norm, **window)


def pool_rows(
    module: nn.Module, conv: str, bn: str, relu: str | None, pool: str, off: str | None
) -> list[PlanRow]:
    """The plan of ``run_conv_bn_pool``, by the names of module's children."""
    modules = {name: module.get_submodule(name) for name in (conv, bn, pool)}
    act: bool | nn.Module = True if relu is None else module.get_submodule(relu)
    reason = off or pool_reason(modules[bn], act, modules[pool])
    if reason is None:
        why = _conv_reason(modules[conv])
        op = "bn_act_max_pool" if why else "conv_bn_act_max_pool"
        return [PlanRow((conv, bn, *([] if relu is None else [relu]), pool), op, why)]
    why = off or unfused_reason(modules[conv], modules[bn])
    rows = [PlanRow((conv, bn), "unfused" if why else layer_op(modules[bn]), why or reason)]
    if type(modules[pool]) is not nn.Identity:
        rows.append(PlanRow((pool,), "unfused", reason))
    return rows

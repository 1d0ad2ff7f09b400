"""1×1 convolution on CPU as a product of matrices: which ones it runs, and its packed weights.

Pixels of an NHWC activation are the rows of a matrix as they lie in memory, so nothing is copied
but the weights, into panels of as many columns as the registers hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from resfast import native
from resfast.backends.interface import ConvGeometry, empty_nhwc, empty_packed, nhwc

_LANES = 16  # of the widest instruction set: vectors of channels are full


def is_pointwise(x: Tensor, weight: Tensor, g: ConvGeometry) -> bool:
    """Whether the functions of this file run this convolution."""
    return (
        x.dtype == torch.float32
        and weight.dtype == torch.float32
        and tuple(weight.shape[2:]) == (1, 1)
        and g.padding == (0, 0)
        and g.groups == 1
        and weight.shape[0] % _LANES == 0
        and weight.shape[1] % _LANES == 0
        and x.numel() > 0
        and native.is_available()
    )


def pointwise_weight(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """The weight times scale ``[K]`` in panels, to keep."""
    columns = torch.ops.resfast.panel_columns()
    shape = (math.ceil(weight.shape[0] / columns), weight.shape[1], columns)
    packed = empty_packed(shape, weight)
    torch.ops.resfast.pointwise_weight(weight.detach(), scale, packed)
    return packed


def pointwise_output(x: Tensor, channels: int, g: ConvGeometry) -> Tensor:
    """Memory for the output."""
    n, _, h, w = x.shape
    p, q = math.ceil(h / g.stride[0]), math.ceil(w / g.stride[1])
    return empty_nhwc((n, channels, p, q), x)


def prepare_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor] | None:
    """``F.linear`` on a weight ``[K, C]`` packed to keep, for inputs like x ``[N, C]``; None where
    nothing of this file runs it.

    The last layer of a classifier: few rows, and a weight that comes from memory at every call.
    """
    k, c = weight.shape
    dtypes = {x.dtype, weight.dtype, bias.dtype}
    if dtypes != {torch.float32} or c % _LANES or x.numel() == 0 or not native.is_available():
        return None
    rows = math.ceil(k / _LANES) * _LANES
    padded = weight.new_zeros(rows, c)
    padded[:k] = weight
    packed = pointwise_weight(padded.view(rows, c, 1, 1))
    shift = weight.new_zeros(rows)
    shift[:k] = bias

    def run(x: Tensor) -> Tensor:
        out = x.new_empty(len(x), rows, 1, 1)
        pixels = x.contiguous().view(len(x), c, 1, 1)
        torch.ops.resfast.pointwise_conv(pixels, packed, shift, None, False, 1, 1, out)
        return out.view(len(x), rows)[:, :k].contiguous()

    return run


def pointwise_fprop(x: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
    """conv(x, weight) on a weight packed for this call."""
    return _convolve(x, weight, g, False, None)


def pointwise_dgrad(dz: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """The gradient with respect to x, at stride 1, + residual: dz times the transposed weight."""
    return _convolve(dz, weight, ConvGeometry((1, 1), (0, 0), (1, 1), 1), True, residual)


def _convolve(
    x: Tensor, weight: Tensor, g: ConvGeometry, transposed: bool, residual: Tensor | None
) -> Tensor:
    x = nhwc(x)
    out = pointwise_output(x, weight.shape[1 if transposed else 0], g)
    residual = None if residual is None else nhwc(residual)
    torch.ops.resfast.pointwise_conv_once(x, weight.detach(), transposed, residual, *g.stride, out)
    return out

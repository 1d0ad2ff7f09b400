"""Gradients of strided convolutions on CPU, and of 1×1 weights, as products with gathered windows.

Windows are gathered a block at a time (im2col), so that they stay in cache. The gradient of the
input at stride s is s·s convolutions of stride 1 side by side, none of which multiplies zeros.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resfast import native
from resfast.backends.interface import ConvGeometry, empty_nhwc, nhwc
from resfast.backends.scratch import flat_scratch

_LANES = 16  # of the widest instruction set: vectors of channels are full


def is_gathered(x: Tensor, weight: Tensor, g: ConvGeometry) -> bool:
    """Whether the functions of this file run this convolution's gradients."""
    return (
        x.dtype == torch.float32
        and weight.dtype == torch.float32
        and (g.stride != (1, 1) or tuple(weight.shape[2:]) == (1, 1))
        and g.dilation == (1, 1)
        and g.groups == 1
        and weight.shape[1] % _LANES == 0
        and x.numel() > 0
        and native.is_available()
    )


def im2col_dgrad(dz: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
    """The gradient with respect to x, of which the shape is read."""
    k, c, r, s = weight.shape
    columns = torch.ops.resfast.panel_columns()
    size = r * s * k * math.ceil(c / columns) * columns
    packed = flat_scratch("im2col weight", size, weight.dtype)
    dx = empty_nhwc(x.shape, dz)
    torch.ops.resfast.im2col_dgrad(nhwc(dz), weight.detach(), *g.stride, *g.padding, packed, dx)
    return dx


def im2col_wgrad(dz: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
    """The gradient with respect to the weight, in its layout."""
    dweight = torch.empty_like(weight)
    dense = dweight.permute(0, 2, 3, 1).is_contiguous()
    out = dweight if dense else torch.empty_like(weight, memory_format=torch.channels_last)
    torch.ops.resfast.im2col_wgrad(nhwc(x), nhwc(dz), *g.stride, *g.padding, out)
    return dweight if dense else dweight.copy_(out)

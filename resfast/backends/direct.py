"""Direct convolution on CPU, of windows larger than a pixel at a stride, and its packed weights.

Windows are multiplied as they lie in an NHWC activation: nothing is copied but the weights, into
panels of as many columns as the registers hold, and the windows over an image's sides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resfast import native
from resfast.backends.interface import (
    ConvGeometry,
    conv_output_shape,
    empty_nhwc,
    empty_packed,
    nhwc,
)
from resfast.backends.scratch import flat_scratch

_LANES = 16  # of the widest instruction set: vectors of channels are full


def is_direct(x: Tensor, weight: Tensor, g: ConvGeometry) -> bool:
    """Whether the functions of this file run this convolution."""
    return (
        x.dtype == torch.float32
        and weight.dtype == torch.float32
        and g.stride != (1, 1)
        and tuple(weight.shape[2:]) != (1, 1)
        and g.dilation == (1, 1)
        and g.groups == 1
        and weight.shape[0] % _LANES == 0
        and x.numel() > 0
        and native.is_available()
    )


def direct_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """The weight times scale ``[K]`` in panels, to keep."""
    packed = empty_packed(_packed_shape(weight), weight)
    torch.ops.resfast.direct_weight(weight.detach(), scale, packed)
    return packed


def direct_fprop(x: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
    """conv(x, weight) on a weight packed for this call."""
    shape = _packed_shape(weight)
    packed = flat_scratch("direct weight", math.prod(shape), weight.dtype).view(shape)
    torch.ops.resfast.direct_weight(weight.detach(), None, packed)
    out = empty_nhwc(conv_output_shape(x, weight, g), x)
    torch.ops.resfast.direct_conv(
        nhwc(x), packed, *weight.shape[2:], *g.stride, *g.padding, None, None, False, out
    )
    return out


def _packed_shape(weight: Tensor) -> tuple[int, int, int]:
    k, columns = weight.shape[0], torch.ops.resfast.panel_columns()
    return math.ceil(k / columns), weight[0].numel(), columns

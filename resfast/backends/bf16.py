"""bfloat16 convolution for inference on CPU: which ones it runs, and its packed weights.

Where the processor multiplies pairs of bfloat16 (AVX512-BF16), windows times weights with float32
sums; the norm's affine, the residual and ReLU follow in float32, and the result is rounded once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resfast import native
from resfast.backends.interface import ConvGeometry

_LANES = 16


def bf16_declines(weight: Tensor, g: ConvGeometry) -> str | None:
    """Why the kernel does not run this convolution, or None."""
    if not native.bf16_products():
        return "no products of bfloat16 pairs here"
    if g.groups != 1 or g.dilation != (1, 1):
        return "the bfloat16 kernel takes neither groups nor dilation"
    if weight.shape[0] % _LANES:
        return f"the bfloat16 kernel takes output channels in multiples of {_LANES}"
    return None


def bf16_weight(weight: Tensor) -> Tensor:
    """The weight in panels of pairs, to keep."""
    columns = torch.ops.resfast.panel_columns()
    panels, pairs = math.ceil(weight.shape[0] / columns), math.ceil(weight[0].numel() / 2)
    packed = weight.new_empty(panels, pairs, columns, 2)
    torch.ops.resfast.bf16_weight(weight.detach(), packed)
    return packed

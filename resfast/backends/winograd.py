"""Winograd convolution on CPU: which convolutions it runs, and its transformed weights.

F(m×m, 3×3) takes (m + 2)² multiplications for m² outputs instead of 9·m²: 2.25 times fewer for
m = 2, 4 times for m = 4. Its filters need (m + 2)²/9 times the memory of the weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resfast import native
from resfast.backends.interface import ConvGeometry, empty_nhwc, empty_packed, nhwc

# Below this many tiles the transformed filters cost more to read than multiplications save; in
# training they are also made anew for every step.
_LEAST_TILES = {4: 8, 2: 16}
_LEAST_TILES_IN_TRAINING = 32
# floats between points: a transform writes to all of them, which would share a few cache sets
_POINT_PADDING = 16
_LEAST_SAVING = 1.25  # in multiplications: what pays for the transforms


def is_winograd(x: Tensor, weight: Tensor, g: ConvGeometry) -> bool:
    """Whether the functions of this file run this convolution, in tiles of either size."""
    k, c = weight.shape[:2]
    return (
        x.dtype == torch.float32
        and weight.dtype == torch.float32
        and tuple(weight.shape[2:]) == (3, 3)
        and g == ConvGeometry((1, 1), (1, 1), (1, 1), 1)
        and c % 16 == 0
        and k % 16 == 0
        and x.numel() > 0
        and native.is_available()
    )


def winograd_tile(x: Tensor, weight: Tensor, g: ConvGeometry, training: bool = False) -> int | None:
    """The m of F(m×m, 3×3) for this convolution, or None where it is better run directly."""
    if not is_winograd(x, weight, g):
        return None
    n, _, h, w = x.shape
    best, saved = None, _LEAST_SAVING
    for m, least in _LEAST_TILES.items():
        tiles = n * math.ceil(h / m) * math.ceil(w / m)
        fewer = 9 * n * h * w / ((m + 2) ** 2 * tiles)
        if tiles >= max(least, training * _LEAST_TILES_IN_TRAINING) and fewer > saved:
            best, saved = m, fewer
    return best


def winograd_weight(weight: Tensor, tile: int) -> Tensor:
    """The filters at the points, to keep."""
    k, c = weight.shape[:2]
    columns = torch.ops.resfast.panel_columns()
    shape = (math.ceil(k / columns), c, columns)
    values, points = math.prod(shape), (tile + 2) ** 2
    memory = empty_packed((points, values + _POINT_PADDING), weight)
    filters = memory[:, :values].view(points, *shape)
    torch.ops.resfast.winograd_weight(weight.detach(), tile, filters)
    return filters


def winograd_fprop(x: Tensor, weight: Tensor, tile: int) -> Tensor:
    """conv(x, weight) on filters transformed for this call."""
    return _convolve(x, weight, tile, False, None)


def winograd_dgrad(dz: Tensor, weight: Tensor, tile: int, residual: Tensor | None = None) -> Tensor:
    """The gradient with respect to x, + residual: dz convolved with filters turned by 180°."""
    return _convolve(dz, weight, tile, True, residual)


def winograd_wgrad(dz: Tensor, x: Tensor, weight: Tensor, tile: int) -> Tensor:
    """The gradient with respect to the weight, in its layout."""
    dweight = torch.empty_like(weight)
    torch.ops.resfast.winograd_wgrad(nhwc(x), nhwc(dz), tile, dweight)
    return dweight


def _convolve(
    x: Tensor, weight: Tensor, tile: int, transposed: bool, residual: Tensor | None
) -> Tensor:
    n, _, h, w = x.shape
    out = empty_nhwc((n, weight.shape[1 if transposed else 0], h, w), x)
    residual = None if residual is None else nhwc(residual)
    torch.ops.resfast.winograd_conv_once(nhwc(x), weight.detach(), transposed, residual, tile, out)
    return out

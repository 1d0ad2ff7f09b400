"""Winograd convolution on CPU: which convolutions it runs, and its transformed weights.

F(m×m, 3×3) takes (m + 2)² multiplications for m² outputs instead of 9·m²: 2.25 times fewer for
m = 2, 4 times for m = 4. Its filters need (m + 2)²/9 times the memory of the weights. At stride 2
only the two outer taps of a line share inputs with those of its neighbour: 25 multiplications for
4 outputs instead of 36, with the filters of m = 2.
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

# Below this many tiles the transformed filters cost more to read than multiplications save; in
# training they are also made anew for every step.
_LEAST_TILES = {4: 8, 2: 16}
_LEAST_TILES_IN_TRAINING = 32
# floats between points: a transform writes to all of them, which would share a few cache sets
_POINT_PADDING = 16
_LEAST_SAVING = 1.25  # in multiplications: what pays for the transforms


def tiles_of(g: ConvGeometry) -> tuple[int, ...]:
    """The sizes of tiles, outputs a side, that run a convolution of this stride."""
    return {(1, 1): (4, 2), (2, 2): (2,)}.get(g.stride, ())


def is_winograd(x: Tensor, weight: Tensor, g: ConvGeometry) -> bool:
    """Whether the functions of this file run this convolution, in tiles of any of its sizes."""
    k, c = weight.shape[:2]
    return (
        x.dtype == torch.float32
        and weight.dtype == torch.float32
        and tuple(weight.shape[2:]) == (3, 3)
        and tiles_of(g) != ()
        and g[1:] == ((1, 1), (1, 1), 1)
        and c % 16 == 0
        and k % 16 == 0
        and x.numel() > 0
        and native.is_available()
    )


def winograd_tile(x: Tensor, weight: Tensor, g: ConvGeometry, training: bool = False) -> int | None:
    """The m of F(m×m, 3×3) for this convolution, or None where it is better run directly."""
    if not is_winograd(x, weight, g):
        return None
    n, _, p, q = conv_output_shape(x, weight, g)
    best, saved = None, _LEAST_SAVING
    for m in tiles_of(g):
        tiles = n * math.ceil(p / m) * math.ceil(q / m)
        # as many points a side as a tile has inputs
        fewer = 9 * n * p * q / (((m - 1) * g.stride[0] + 3) ** 2 * tiles)
        least = max(_LEAST_TILES[m], training * _LEAST_TILES_IN_TRAINING)
        if tiles >= least and fewer > saved:
            best, saved = m, fewer
    return best


def winograd_weight(weight: Tensor, tile: int, stride: int = 1) -> Tensor:
    """The filters at the points, to keep."""
    k, c = weight.shape[:2]
    columns = torch.ops.resfast.panel_columns()
    shape = (math.ceil(k / columns), c, columns)
    values, count = math.prod(shape), (tile + 2) ** 2
    memory = empty_packed((count, values + _POINT_PADDING), weight)
    filters = memory[:, :values].view(count, *shape)
    torch.ops.resfast.winograd_weight(weight.detach(), tile, stride, filters)
    return filters


def winograd_fprop(x: Tensor, weight: Tensor, tile: int, stride: int = 1) -> Tensor:
    """conv(x, weight) on filters transformed for this call."""
    return _convolve(x, weight, False, None, tile, stride)


def winograd_dgrad(dz: Tensor, weight: Tensor, tile: int, residual: Tensor | None = None) -> Tensor:
    """The gradient with respect to x, + residual, at stride 1: dz convolved with filters turned by
    180°.
    """
    return _convolve(dz, weight, True, residual, tile, 1)


def winograd_wgrad(dz: Tensor, x: Tensor, weight: Tensor, tile: int) -> Tensor:
    """The gradient with respect to the weight, at stride 1, in its layout."""
    dweight = torch.empty_like(weight)
    torch.ops.resfast.winograd_wgrad(nhwc(x), nhwc(dz), tile, dweight)
    return dweight


def _convolve(
    x: Tensor, weight: Tensor, transposed: bool, residual: Tensor | None, tile: int, stride: int
) -> Tensor:
    out = winograd_output(x, weight.shape[1 if transposed else 0], stride)
    residual = None if residual is None else nhwc(residual)
    arguments = (nhwc(x), weight.detach(), transposed, residual, tile, stride, out)
    torch.ops.resfast.winograd_conv_once(*arguments)
    return out


def winograd_output(x: Tensor, channels: int, stride: int) -> Tensor:
    """Memory for a result."""
    n, _, h, w = x.shape
    return empty_nhwc((n, channels, math.ceil(h / stride), math.ceil(w / stride)), x)

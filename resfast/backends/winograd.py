"""Winograd convolution on CPU: which convolutions it runs, and its transformed weights.

F(m×m, 3×3) takes (m + 2)² multiplications for m² outputs instead of 9·m²: 2.25 times fewer for
m = 2, 4 times for m = 4. Its filters need (m + 2)²/9 times the memory of the weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resfast import native
from resfast.backends.interface import ConvGeometry

# Below this many tiles the transformed filters cost more to read than multiplications save.
_LEAST_TILES = {4: 8, 2: 16}


def winograd_tile(x: Tensor, weight: Tensor, g: ConvGeometry) -> int | None:
    """The m of F(m×m, 3×3) for this convolution, or None where it is better run directly."""
    k, c = weight.shape[:2]
    if (
        x.dtype != torch.float32
        or weight.dtype != torch.float32
        or tuple(weight.shape[2:]) != (3, 3)
        or g != ConvGeometry((1, 1), (1, 1), (1, 1), 1)
        or c % 16
        or k % 16
        or x.numel() == 0
        or not native.is_available()
    ):
        return None
    n, _, h, w = x.shape
    best, saved = None, 1.25  # the least that pays for the transforms
    for m in (2, 4):
        tiles = n * math.ceil(h / m) * math.ceil(w / m)
        fewer = 9 * n * h * w / ((m + 2) ** 2 * tiles)
        if tiles >= _LEAST_TILES[m] and fewer > saved:
            best, saved = m, fewer
    return best


def winograd_weight(weight: Tensor, tile: int, transposed: bool = False) -> Tensor:
    """The filters at the points; ``transposed``: those of the gradient with respect to x."""
    k, c = weight.shape[:2] if not transposed else (weight.shape[1], weight.shape[0])
    columns = torch.ops.resfast.winograd_columns()
    packed = weight.new_empty((tile + 2) ** 2, math.ceil(k / columns), c, columns)
    torch.ops.resfast.winograd_weight(weight.detach(), transposed, tile, packed)
    return packed

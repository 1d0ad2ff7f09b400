"""A prepared convolution with its ReLU and the max-pool behind it, a few images at a time.

The convolution's output, a network's largest tensor, is then still in a cache when it is pooled,
and its memory is used again for the next images.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from resfast.backends.interface import empty_nhwc
from resfast.backends.packed import PackedConvolution, writing_convolution

_PIECE_BYTES = 8 * 2**20  # of the convolution's output
_LARGEST_WINDOW = 15  # as in csrc/cpu/norm_pool_kernels.h


class Window(NamedTuple):
    """A square max-pool's, in pixels."""

    kernel: int
    stride: int
    padding: int


def native_window(
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Window | None:
    """Of ``max_pool2d``'s arguments, or None where the native max-pool does not run them."""
    stride = stride or kernel
    square = all(len(set(values)) == 1 for values in (kernel, stride, padding))
    if not square or set(dilation) != {1} or ceil_mode or kernel[0] > _LARGEST_WINDOW:
        return None
    return Window(kernel[0], stride[0], padding[0])


def images_at_a_time(y: Tensor) -> int:
    """How many images of a convolution's output ``[N, C, H, W]`` make a piece."""
    return max(1, _PIECE_BYTES // (prod(y.shape[1:]) * y.element_size()))


def max_pool(shape: Sequence[int], window: Window) -> PackedConvolution:
    """maxpool(x), of that shape: called as a prepared convolution is."""

    def write(x: Tensor, residual: Tensor | None, relu: bool, out: Tensor) -> None:
        torch.ops.resfast.max_pool(x, *window, out)

    return writing_convolution(write, lambda x: empty_nhwc(tuple(shape), x))


def pooled_convolution(
    convolution: PackedConvolution, count: int, shape: Sequence[int], window: Window
) -> PackedConvolution:
    """maxpool(relu(convolution(x))), of that shape, ``count`` images at a time."""

    def write(x: Tensor, residual: Tensor | None, relu: bool, out: Tensor) -> None:
        for piece, pooled in zip(x.split(count), out.split(count), strict=True):
            y = convolution(piece, None, True)
            torch.ops.resfast.max_pool(y, *window, pooled)

    return writing_convolution(write, lambda x: empty_nhwc(tuple(shape), x))

"""CUTLASS's convolutions for Hopper with resfast's epilogues; chosen only where measured faster.

Built where ``RESFAST_BUILD_CUTLASS=1`` (see setup.py). 1×1 convolutions of stride 1 are persistent
products, others implicit ones with im2col by the tensor memory accelerator. They compile for sm_90a
and have never been executed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resfast import native
from resfast.backends import tuning
from resfast.backends.fusion import current_fusion
from resfast.backends.interface import (
    Affine,
    Backend,
    ConvGeometry,
    Kernel,
    NormVectors,
    empty_nhwc,
    nhwc,
)

NAME = "cutlass"
_DTYPES = (torch.bfloat16, torch.float16)
_CAPABILITY = (9, 0)
_native = torch.ops.resfast


class Tile(NamedTuple):
    """Pixels by output channels of one block."""

    m: int
    n: int


# kConvTiles in csrc/cuda/conv.h
TILES = (Tile(128, 128), Tile(128, 64), Tile(64, 64))
# stands for whatever runs where nothing is measured
OTHER = Tile(0, 0)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def cutlass_declines(x: Tensor, weight: Tensor, g: ConvGeometry) -> str | None:
    """Why no kernel takes this convolution, or None."""
    if current_fusion().convolutions == "library":
        return "the library's convolutions were asked for"
    missing = native.cutlass_missing()
    if missing is not None:
        return missing
    if x.device.type != "cuda":
        return f"it runs on cuda, the tensor is on {x.device.type}"
    if _capability(x.device.index) != _CAPABILITY:
        return f"it needs compute capability 9.0, device {x.device.index} has another"
    return native.cuda_unusable(x.device.index) or size_declines(x, weight, g)


def size_declines(x: Tensor, weight: Tensor, g: ConvGeometry) -> str | None:
    """``cutlass_declines`` but for the machine: dtypes, and sizes as csrc/cuda/conv.h has them."""
    (n, c, *size), (k, _, *window) = x.shape, weight.shape
    if x.dtype not in _DTYPES:
        return f"no kernel for {x.dtype}"
    if weight.dtype != x.dtype:
        return f"input {x.dtype}, weight {weight.dtype}"
    if x.numel() == 0:
        return "an empty batch"
    if g.groups != 1:
        return f"{g.groups} groups"
    if c < 8 or c % 8 or k % 8:
        return "channels must be multiples of 8"
    axes = list(zip(size, window, *g[:3], strict=True))
    p, q = ((i + 2 * pad - d * (r - 1) - 1) // step + 1 for i, r, step, pad, d in axes)
    if n * max(size[0] * size[1], p * q) >= 2**31:
        return "pixels are counted in 32 bits"
    if all(r == step == 1 and pad == 0 for _, r, step, pad, _ in axes):
        return None
    for _, r, step, pad, d in axes:
        if step > 8:
            return "strides must be at most 8"
        if pad > 127:
            return "padding must be at most 127"
        if d * (r - 1) > 254:
            return "dilated filters must span at most 255 pixels"
        if d * (r - 1) - pad > 128:
            return "windows must reach at most 128 past the padding"
    return None


def conv_affine(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    norm: Affine,
    residual: Tensor | None,
    relu: bool,
    add_after_act: bool,
    tile: Tile = TILES[0],
) -> Tensor:
    """y = act(u + r) or act(u) + r, ``[N, K, P, Q]``; u = norm(conv(x, weight) + bias) in float32.

    x ``[N, C, H, W]``, weight ``[K, C, R, S]``, residual r like y: bfloat16 or float16.

    Raises:
        RuntimeError: an argument is not as the kernels take it, or a launch fails.
    """
    x, weight = _aligned(x), _aligned(weight)
    residual = None if residual is None else _aligned(residual)
    if bias is not None:
        norm = Affine(norm.mean - bias.detach().to(norm.mean.dtype), norm.scale, norm.beta)
    y = _empty_output(x, weight, g)
    vectors = (v.contiguous() for v in norm)
    _native.cuda_conv_affine(
        *(x, weight, *vectors, residual, relu, add_after_act),
        *(*g.stride, *g.padding, *g.dilation, *tile, y),
    )
    return y


def conv_stats(
    x: Tensor, weight: Tensor, g: ConvGeometry, *, tile: Tile = TILES[0]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(z, (mean, M2) of z as stored), z = conv(x, weight); the statistics ``[K]`` in float32.

    Raises:
        RuntimeError: an argument is not as the kernels take it, or a launch fails.
    """
    x, weight = _aligned(x), _aligned(weight)
    z = _empty_output(x, weight, g)
    mean, m2 = (x.new_empty(weight.shape[0], dtype=torch.float32) for _ in range(2))
    _native.cuda_conv_stats(
        *(x, weight, *g.stride, *g.padding, *g.dilation, *tile, z, mean, m2),
    )
    return z, (mean, m2)


def affine_kernel(
    backend: Backend,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    norm: NormVectors,
    residual: Tensor | None,
    relu: bool,
    add_after_act: bool,
    other: Kernel | str,
) -> Kernel | str:
    """``conv_affine`` with the fastest tile, or ``other``, whichever was measured to be faster.

    ``other``: a kernel, or why the backend has none; then its passes are what is measured. It is
    returned too where nothing is.
    """

    def run(tile: Tile) -> Tensor:
        if tile == OTHER and isinstance(other, Kernel):
            y: Tensor = other.run()
            return y
        affine, _ = backend.norm_prepare(norm.mean, norm.var, norm.weight, norm.bias, norm.eps)
        arguments = (x, weight, bias, g, affine, residual, relu, add_after_act)
        return _in_passes(backend, *arguments) if tile == OTHER else conv_affine(*arguments, tile)

    tile = _choose(x, weight, g, _variant(residual), (OTHER, *TILES), run)
    if tile != OTHER:
        return Kernel(NAME, lambda: run(tile))
    if isinstance(other, Kernel):
        return other
    return f"{other}; CUTLASS's was not measured to be faster"


def stats_kernel(x: Tensor, weight: Tensor, g: ConvGeometry, other: Kernel) -> Kernel:
    """``conv_stats`` as ``affine_kernel`` has ``conv_affine``."""

    def run(tile: Tile) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        return other.run() if tile == OTHER else conv_stats(x, weight, g, tile=tile)

    tile = _choose(x, weight, g, "stats", (OTHER, *TILES), run)
    return other if tile == OTHER else Kernel(NAME, lambda: run(tile))


def conv_affine_tiled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    norm: Affine,
    residual: Tensor | None,
    relu: bool,
    add_after_act: bool,
) -> Tensor:
    """``conv_affine`` with the tile measured to be the fastest; unmeasured, the first."""

    def run(tile: Tile) -> Tensor:
        return conv_affine(x, weight, bias, g, norm, residual, relu, add_after_act, tile)

    return run(_choose(x, weight, g, f"{_variant(residual)} tile", TILES, run))


def _variant(residual: Tensor | None) -> str:
    return "affine" if residual is None else "affine residual"


def _choose(
    x: Tensor,
    weight: Tensor,
    g: ConvGeometry,
    variant: str,
    tiles: Sequence[Tile],
    run: Callable[[Tile], Any],
) -> Tile:
    key = f"{tuning.convolution_key('conv_fprop', x, weight, g)} {NAME} {variant}"
    tile: Tile = tuning.choose(key, tiles, run, x.device)
    return tile


def _in_passes(
    backend: Backend,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    norm: Affine,
    residual: Tensor | None,
    relu: bool,
    add_after_act: bool,
) -> Tensor:
    """What ``conv_affine`` computes, by the library's convolution and a pass of the norm's."""
    z = Backend.conv_fprop(backend, x, weight, bias, g)
    return backend.norm_apply(z, norm, residual, None, relu, add_after_act, out=z)


def _empty_output(x: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
    p, q = (
        max(0, (i + 2 * pad - d * (r - 1) - 1) // step + 1)
        for i, r, step, pad, d in zip(x.shape[2:], weight.shape[2:], *g[:3], strict=True)
    )
    return empty_nhwc((x.shape[0], weight.shape[0], p, q), x)


def _aligned(t: Tensor) -> Tensor:
    """Dense, at a multiple of 16 bytes, which a view may miss."""
    t = nhwc(t)
    return t if t.data_ptr() % 16 == 0 else t.clone()

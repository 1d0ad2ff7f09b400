"""Convolution with norm, residual and ReLU in its epilogue, on weights prepared once.

3×3 convolutions of stride 1 run by Winograd's algorithm, the others by oneDNN. Its post-ops reach
PyTorch through ``mkldnn::_convolution_pointwise``. They take no per-channel scale, so scale is
folded into the weights, in fp32. Transforming or packing costs a pass over the weights each, hence
the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from resfast import native
from resfast.backends.interface import ConvGeometry, NormVectors, empty_nhwc
from resfast.backends.winograd import winograd_tile, winograd_weight

PackedConvolution = Callable[[Tensor, "Tensor | None", bool], Tensor]

_SAMPLES = 64


class _Key(NamedTuple):
    version: int
    data_ptr: int
    geometry: ConvGeometry
    eps: float
    given: tuple[bool, bool, bool]  # convolution bias, norm weight, norm bias
    # oneDNN picks its blocking for an input size; another batch runs, with a slower layout
    input_shape: tuple[int, ...]
    tile: int | None  # of Winograd's algorithm
    isa: str | None  # which lays out Winograd's filters


class _Entry(NamedTuple):
    key: _Key
    # writes through .data leave the version counter alone; values catch those
    sample: Tensor
    run: PackedConvolution


_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()


def clear_packed_weights() -> None:
    """Free every folded and packed weight; the next inference call packs again."""
    _cache.clear()


def _sample(weight: Tensor, bias: Tensor | None, norm: NormVectors) -> Tensor:
    """Values spread over the weight, and every per-channel vector."""
    w = weight.detach()
    if w.is_contiguous() or w.is_contiguous(memory_format=torch.channels_last):
        # in memory order: flattening a channels_last weight would copy it
        step = max(1, w.numel() // _SAMPLES)
        w = w.as_strided((w.numel() // step,), (step,))
    vectors = (w.flatten(), bias, norm.weight, norm.bias, norm.mean, norm.var)
    return torch.cat([v.detach() for v in vectors if v is not None])


def packing_declines(x: Tensor, weight: Tensor, residual: Tensor | None) -> str | None:
    """Why oneDNN cannot run this convolution with its norm as a post-op, or None."""
    if x.dtype != torch.float32:
        return f"oneDNN post-ops take no per-channel scale, and {x.dtype} weights do not bear one"
    if not torch.backends.mkldnn.enabled or not torch.backends.mkldnn.is_available():
        return "oneDNN is off"
    if x.numel() == 0:
        return "an empty batch"
    if weight.is_inference():
        return "an inference tensor's weights have no version to cache by"
    if residual is not None and residual.shape[2:] == (1, 1):
        return "oneDNN's binary post-op cannot describe a 1×1 residual"
    return None


def packed_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry, norm: NormVectors
) -> PackedConvolution:
    """A function (x, residual, relu) → y, where ``packing_declines`` has no objection."""
    given = (bias is not None, norm.weight is not None, norm.bias is not None)
    tile = winograd_tile(x, weight, g)
    # Winograd's filters serve every input size
    shape, isa = (tuple(x.shape), None) if tile is None else ((), native.cpu_isa())
    key = _Key(weight._version, weight.data_ptr(), g, norm.eps, given, shape, tile, isa)
    entry = _cache.get(weight)
    sample = _sample(weight, bias, norm)
    if entry is None or entry.key != key or not torch.equal(entry.sample, sample):
        affine = norm.affine(x.dtype)
        offset = affine.beta - affine.mean * affine.scale
        if bias is not None:
            offset = offset + bias.detach() * affine.scale
        if tile is None:
            run = _onednn(x, weight, g, affine.scale, offset)
        else:
            run = _winograd(weight, tile, affine.scale, offset)
        entry = _Entry(key, sample, run)
        _cache[weight] = entry
    return entry.run


def _winograd(weight: Tensor, tile: int, scale: Tensor, shift: Tensor) -> PackedConvolution:
    filters, channels = winograd_weight(weight, tile), weight.shape[0]

    def run(x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        n, _, h, w = x.shape
        out = empty_nhwc((n, channels, h, w), x)
        torch.ops.resfast.winograd_conv(x, filters, scale, shift, residual, relu, False, out)
        return out

    return run


def _onednn(
    x: Tensor, weight: Tensor, g: ConvGeometry, scale: Tensor, shift: Tensor
) -> PackedConvolution:
    geometry = (g.padding, g.stride, g.dilation, g.groups)
    folded = weight.detach() * scale.view(-1, 1, 1, 1)
    packed = torch.ops.mkldnn._reorder_convolution_weight(folded, *geometry, x.shape)

    def run(x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        attr: str | None
        if residual is None:
            attr = "relu" if relu else "none"
            return torch.ops.mkldnn._convolution_pointwise(
                x, packed, shift, *geometry, attr, [], ""
            )
        attr = "relu" if relu else None
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, packed, shift, *geometry, "add", 1.0, attr, [], ""
        )

    return run

"""Convolution with norm, residual and ReLU in its epilogue, on weights prepared once.

float32 3×3 convolutions run by Winograd's algorithm, 1×1 convolutions as products and other strided
ones directly, bfloat16 convolutions as products of pairs, all in kernels of our own; the
others by oneDNN, whose post-ops reach PyTorch through ``mkldnn::_convolution_pointwise``. Those
take no per-channel scale, so scale is folded into the weights, in fp32. Transforming or packing
costs a pass over the weights each, hence the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from resfast import native
from resfast.backends.bf16 import bf16_declines, bf16_weight
from resfast.backends.direct import direct_weight, is_direct
from resfast.backends.interface import ConvGeometry, NormVectors, conv_output_shape, empty_nhwc
from resfast.backends.pointwise import is_pointwise, pointwise_output, pointwise_weight
from resfast.backends.winograd import winograd_output, winograd_tile, winograd_weight

_SAMPLES = 64  # as in csrc/cpu/sample.cpp
_NO_SCALE = "oneDNN post-ops take no per-channel scale, and 16-bit weights do not bear one"


class PackedConvolution(Protocol):
    """act(conv(x) + residual), with everything else prepared.

    ``out`` is memory for the result: the residual itself, or, for the kernels of our own alone,
    any that is not x.
    """

    def __call__(
        self, x: Tensor, residual: Tensor | None, relu: bool, out: Tensor | None = None
    ) -> Tensor: ...


class _Key(NamedTuple):
    version: int
    data_ptr: int
    geometry: ConvGeometry
    eps: float
    given: tuple[bool, bool, bool]  # convolution bias, norm weight, norm bias
    # oneDNN picks its blocking for an input size; another batch runs, with a slower layout
    input_shape: tuple[int, ...]
    own: str | None  # which of our kernels
    isa: str | None  # which lays out what those read


@dataclass
class _Entry:
    key: _Key
    # writes through .data leave the version counter alone; values catch those
    sample: Tensor
    run: PackedConvolution
    # of the last call, whose arguments were all checked
    input_shape: torch.Size
    output_shape: tuple[int, ...]


_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()


def clear_packed_weights() -> None:
    """Free every folded and packed weight; the next inference call packs again."""
    _cache.clear()


def _sample(weight: Tensor, bias: Tensor | None, norm: NormVectors) -> Tensor | None:
    """Values spread over the weight, and every per-channel vector; None where it is not dense."""
    vectors = (bias, norm.weight, norm.bias, norm.mean, norm.var)
    size = 2 * _SAMPLES + sum(v.numel() for v in vectors if v is not None)
    sample = torch.empty(size)
    return sample if torch.ops.resfast.take_sample(weight, *vectors, sample) else None


def _unchanged(entry: _Entry, weight: Tensor, bias: Tensor | None, norm: NormVectors) -> bool:
    same: bool = torch.ops.resfast.same_sample(weight, bias, *norm[:4], entry.sample)
    return same


def recall_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    norm: NormVectors,
    residual: Tensor | None,
) -> PackedConvolution | None:
    """What ``packed_convolution`` would give, for arguments like those of the call before; or None.

    Those arguments were checked then, so these need no further check.
    """
    entry = _cache.get(weight)
    if entry is None:
        return None
    key = entry.key
    if (
        x.shape != entry.input_shape
        or x.dtype != weight.dtype
        or not x.is_cpu
        or key.version != weight._version
        or key.data_ptr != weight.data_ptr()
        or key.geometry != g
        or key.eps != norm.eps
        or key.given != (bias is not None, norm.weight is not None, norm.bias is not None)
        or not torch.backends.mkldnn.enabled
        or (key.isa is not None and key.isa != native.cpu_isa())
        or (
            residual is not None
            and (
                residual.shape != entry.output_shape
                or residual.dtype != weight.dtype
                or not residual.is_cpu
                or residual.shape[2:] == (1, 1)
            )
        )
        or not _unchanged(entry, weight, bias, norm)
    ):
        return None
    return entry.run


def packing_declines(
    x: Tensor, weight: Tensor, g: ConvGeometry, residual: Tensor | None
) -> str | None:
    """Why this convolution cannot run with its norm in its epilogue, or None."""
    if x.numel() == 0:
        return "an empty batch"
    if weight.is_inference():
        return "an inference tensor's weights have no version to cache by"
    if x.dtype == torch.bfloat16 and weight.dtype == torch.bfloat16:
        reason = bf16_declines(weight, g)
        if reason is None:
            return None
        return f"{reason}; {_NO_SCALE}"
    if x.dtype != torch.float32:
        return _NO_SCALE
    if not torch.backends.mkldnn.enabled or not torch.backends.mkldnn.is_available():
        return "oneDNN is off"
    if residual is not None and residual.shape[2:] == (1, 1):
        return "oneDNN's binary post-op cannot describe a 1×1 residual"
    return None


def packed_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry, norm: NormVectors
) -> PackedConvolution:
    """A function (x, residual, relu) → y, where ``packing_declines`` has no objection."""
    given = (bias is not None, norm.weight is not None, norm.bias is not None)
    own = own_kernel(x, weight, g)
    # what our kernels read serves every input size
    shape, isa = (tuple(x.shape), None) if own is None else ((), native.cpu_isa())
    key = _Key(weight._version, weight.data_ptr(), g, norm.eps, given, shape, own, isa)
    entry = _cache.get(weight)
    if entry is None or entry.key != key or not _unchanged(entry, weight, bias, norm):
        run = prepare_convolution(x, weight, bias, g, norm, own)
        sample = _sample(weight, bias, norm)
        if sample is None:
            return run
        entry = _cache[weight] = _Entry(key, sample, run, x.shape, ())
    entry.input_shape = x.shape
    entry.output_shape = conv_output_shape(x, weight, g)
    return entry.run


TILES = {"winograd2": 2, "winograd4": 4}


def own_kernel(x: Tensor, weight: Tensor, g: ConvGeometry) -> str | None:
    """Which kernel of our own runs this convolution: bf16, pointwise, direct, winograd2 or 4."""
    if x.dtype == torch.bfloat16:
        return "bf16"
    if is_pointwise(x, weight, g):
        return "pointwise"
    tile = winograd_tile(x, weight, g)
    if tile is not None:
        return f"winograd{tile}"
    return "direct" if is_direct(x, weight, g) else None


def prepare_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    norm: NormVectors,
    own: str | None,
) -> PackedConvolution:
    """``packed_convolution`` without memory, by a kernel that runs it, named as in ``own_kernel``.

    Of ``x`` only the shape matters.
    """
    scale, shift = norm.scale_and_shift(bias, x.dtype)
    if own is None:
        return _onednn(x, weight, g, scale, shift)
    if own == "bf16":
        return _bf16(weight, g, scale, shift)
    if own == "pointwise":
        return _pointwise(weight, g, scale, shift)
    if own == "direct":
        return _direct(weight, g, scale, shift)
    return _winograd(weight, g, TILES[own], scale, shift)


def writing_convolution(
    write: Callable[[Tensor, Tensor | None, bool, Tensor], None],
    output: Callable[[Tensor], Tensor],
) -> PackedConvolution:
    """Of a kernel that writes (x, residual, relu) to memory it is given; else to ``output(x)``."""

    def run(x: Tensor, residual: Tensor | None, relu: bool, out: Tensor | None = None) -> Tensor:
        out = output(x) if out is None else out
        write(x, residual, relu, out)
        return out

    return run


def _winograd(
    weight: Tensor, g: ConvGeometry, tile: int, scale: Tensor, shift: Tensor
) -> PackedConvolution:
    channels, stride = weight.shape[0], g.stride[0]
    filters = winograd_weight(weight, tile, stride)

    def write(x: Tensor, residual: Tensor | None, relu: bool, out: Tensor) -> None:
        torch.ops.resfast.winograd_conv(
            x, filters, scale, shift, residual, relu, False, stride, out
        )

    return writing_convolution(write, lambda x: winograd_output(x, channels, stride))


def _pointwise(weight: Tensor, g: ConvGeometry, scale: Tensor, shift: Tensor) -> PackedConvolution:
    packed, channels = pointwise_weight(weight, scale), weight.shape[0]

    def write(x: Tensor, residual: Tensor | None, relu: bool, out: Tensor) -> None:
        torch.ops.resfast.pointwise_conv(x, packed, shift, residual, relu, *g.stride, out)

    return writing_convolution(write, lambda x: pointwise_output(x, channels, g))


def _direct(weight: Tensor, g: ConvGeometry, scale: Tensor, shift: Tensor) -> PackedConvolution:
    packed, kernel = direct_weight(weight, scale), weight.shape[2:]

    def write(x: Tensor, residual: Tensor | None, relu: bool, out: Tensor) -> None:
        torch.ops.resfast.direct_conv(
            x, packed, *kernel, *g.stride, *g.padding, shift, residual, relu, out
        )

    return writing_convolution(write, lambda x: empty_nhwc(conv_output_shape(x, weight, g), x))


def _bf16(weight: Tensor, g: ConvGeometry, scale: Tensor, shift: Tensor) -> PackedConvolution:
    packed, kernel = bf16_weight(weight), weight.shape[2:]

    def write(x: Tensor, residual: Tensor | None, relu: bool, out: Tensor) -> None:
        torch.ops.resfast.bf16_conv(
            x, packed, *kernel, *g.stride, *g.padding, scale, shift, residual, relu, out
        )

    def output(x: Tensor) -> Tensor:
        return empty_nhwc(conv_output_shape(x, weight, g), x)

    return writing_convolution(write, output)


def _onednn(
    x: Tensor, weight: Tensor, g: ConvGeometry, scale: Tensor, shift: Tensor
) -> PackedConvolution:
    geometry = (g.padding, g.stride, g.dilation, g.groups)
    folded = weight.detach() * scale.view(-1, 1, 1, 1)
    packed = torch.ops.mkldnn._reorder_convolution_weight(folded, *geometry, x.shape)

    def run(x: Tensor, residual: Tensor | None, relu: bool, out: Tensor | None = None) -> Tensor:
        assert out is residual or out is None
        attr: str | None
        if residual is None:
            attr = "relu" if relu else "none"
            return torch.ops.mkldnn._convolution_pointwise(
                x, packed, shift, *geometry, attr, [], ""
            )
        attr = "relu" if relu else None
        if out is residual:
            return torch.ops.mkldnn._convolution_pointwise_.binary(
                residual, x, packed, shift, *geometry, "add", 1.0, attr, [], ""
            )
        # copies the residual first: its post-op adds to what the output holds
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, packed, shift, *geometry, "add", 1.0, attr, [], ""
        )

    return run

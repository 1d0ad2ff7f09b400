"""The calls of the Triton kernels that are compiled ahead of time, on meta tensors.

Every launcher with its options, every shipped convolution tile, and whole networks: what training
and inference of ResNets launch, as their own schedules ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

import resfast
from resfast.backends.fusion import STEPS
from resfast.backends.interface import Affine, Below, ConvGeometry, NormGradient, mask_shape
from resfast.diagnostics.traffic import inference_traffic, training_traffic
from resfast.kernels import conv_dgrad, conv_fprop, conv_wgrad, norm, norm_pool
from resfast.kernels.tiles import CONV_TILES


class Specimen(NamedTuple):
    """A launcher's call on meta tensors."""

    name: str
    call: Callable[[], object]


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Shape = tuple[int, ...]


def _nhwc(shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def _float32(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="meta")


def _affine(c: int) -> Affine:
    return Affine(_float32(c), _float32(c), _float32(c))


def _mask(shape: Shape) -> Tensor:
    return torch.empty(mask_shape(shape), dtype=torch.uint8, device="meta")


def _sizes(quick: bool, *shapes: Shape) -> Iterator[tuple[str, Shape, torch.dtype]]:
    """(name, shape, dtype): each in each dtype; ``quick``: the first in bf16."""
    for name, dtype in DTYPES.items():
        for n, c, h, w in shapes:
            yield f"{name} {n}×{c}×{h}²", (n, c, h, w), dtype
            if quick:
                return


def _norm(quick: bool) -> Iterator[Specimen]:
    shapes: tuple[Shape, ...] = (256, 256, 56, 56), (256, 64, 112, 112), (8, 2048, 7, 7)
    for name, shape, dtype in _sizes(quick, *shapes):
        c = shape[1]
        z, r, dy, dy2, y, z2 = (_nhwc(shape, dtype) for _ in range(6))
        affine, r_affine, coef, mask = _affine(c), _affine(c), _float32(c), _mask(shape)
        batch = {"coef_z": coef, "coef_1": coef}
        second = (z2, coef, coef, coef, coef, z2)
        apply = partial(norm.norm_apply, z, affine)
        reduce = partial(norm.norm_backward_reduce, dy, z, affine)
        join = partial(reduce, du=dy)
        gradient = partial(norm.norm_backward_apply, dy, z, affine, dz=dy)
        yield Specimen(f"{name}", partial(norm.norm_stats, z))
        yield Specimen(f"{name} relu", apply)
        yield Specimen(f"{name}", partial(apply, relu=False))
        yield Specimen(f"{name} +r relu", partial(apply, r))
        yield Specimen(f"{name} +norm(r) relu", partial(apply, r, r_affine))
        yield Specimen(f"{name} +r relu mask", partial(apply, r, mask=mask))
        yield Specimen(f"{name} +norm(r) relu mask", partial(apply, r, r_affine, mask=mask))
        yield Specimen(f"{name} relu +r", partial(apply, r, add_after_act=True))
        yield Specimen(f"{name} relu +norm(r)", partial(apply, r, r_affine, add_after_act=True))
        yield Specimen(f"{name} relu", reduce)
        yield Specimen(f"{name}", partial(reduce, relu=False))
        yield Specimen(f"{name} relu by y", partial(reduce, y=y))
        yield Specimen(f"{name} relu activation", partial(reduce, activation=y))
        yield Specimen(f"{name} join by mask", partial(join, mask=mask))
        yield Specimen(f"{name} join of 2 by mask", partial(join, mask=mask, z2=z2, mean2=coef))
        yield Specimen(f"{name} join of dy+dy2 by mask", partial(join, mask=mask, dy2=dy2))
        yield Specimen(
            f"{name} join of 2, dy+dy2 by y", partial(join, y=y, dy2=dy2, z2=z2, mean2=coef)
        )
        yield Specimen(f"{name} relu", partial(gradient, **batch))
        yield Specimen(f"{name} running relu", gradient)
        yield Specimen(f"{name}", partial(gradient, **batch, relu=False))
        yield Specimen(f"{name} relu by y, du", partial(gradient, **batch, y=y, du=dy2))
        yield Specimen(f"{name} of 2", partial(gradient, **batch, relu=False, second=second))
    for t, c in ((16, 2048), (512, 256), (6272, 256)):
        tiles = norm.TileStats(_float32(t, c), _float32(t, c), 128, 128 * t)
        exact = tiles._replace(rest=_float32(t, c))
        yield Specimen(f"{t} tiles", partial(norm.merge_stats, tiles))
        yield Specimen(f"{t} tiles, rest", partial(norm.merge_stats, exact))
        unrounded = partial(norm.merge_stats, exact, torch.float64)
        yield Specimen(f"{t} tiles, rest, unrounded", unrounded)
        yield Specimen(f"{t} tiles", partial(norm.merge_sums, norm.TileSums(_float32(3, t, c))))
    v = _float32(256)
    yield Specimen("", partial(norm.norm_prepare, v, v, v, v, 1e-5))
    yield Specimen("affine=False", partial(norm.norm_prepare, v, v, None, None, 1e-5))
    yield Specimen("", partial(norm.norm_coefficients, v, v, v, v, 100))


def _norm_persistent(quick: bool) -> Iterator[Specimen]:
    shapes: tuple[Shape, ...] = (16, 512, 7, 7), (4, 512, 7, 7), (1, 2048, 7, 7)
    for name, shape, dtype in _sizes(quick, *shapes):
        c = shape[1]
        z, r, dy, dy2, y = (_nhwc(shape, dtype) for _ in range(5))
        affine, v, mask = _affine(c), _float32(c), _mask(shape)
        forward = partial(norm.norm_forward_persistent, z, v, v, 1e-5)
        backward = partial(norm.norm_backward_persistent, dy, z, affine, v)
        yield Specimen(f"{name} relu", forward)
        yield Specimen(f"{name}", partial(forward, relu=False))
        yield Specimen(f"{name} +r relu mask", partial(forward, r, mask=mask))
        yield Specimen(f"{name} relu +r", partial(forward, r, add_after_act=True))
        yield Specimen(f"{name} relu", backward)
        yield Specimen(f"{name}", partial(backward, relu=False))
        yield Specimen(f"{name} relu by y, du", partial(backward, y=y, du=dy2))
        yield Specimen(f"{name} relu activation", partial(backward, activation=y))
        yield Specimen(f"{name} dy+dy2 by mask, du", partial(backward, dy2=dy2, mask=mask, du=dy))


def _norm_pool(quick: bool) -> Iterator[Specimen]:
    for name, shape, dtype in _sizes(quick, (256, 64, 112, 112), (1, 64, 112, 112)):
        n, c, h, w = shape
        z, dy = _nhwc(shape, dtype), _nhwc((n, c, h // 2, w // 2), dtype)
        index, v, affine, window = _nhwc(dy.shape, torch.uint8), _float32(c), _affine(c), (3, 2, 1)
        reduce, gradient = (
            norm_pool.norm_max_pool_backward_reduce,
            norm_pool.norm_max_pool_backward_apply,
        )
        yield Specimen(name, partial(norm_pool.norm_apply_max_pool, z, affine, *window))
        yield Specimen(name, partial(reduce, dy, z, affine, index, *window))
        yield Specimen(name, partial(gradient, dy, z, affine, index, *window, v, v))
        yield Specimen(
            f"{name} running", partial(gradient, dy, z, affine, index, *window, None, None)
        )


class Layer(NamedTuple):
    """A convolution; ``size``: its input's height and width."""

    n: int
    c: int
    k: int
    size: int
    window: int
    stride: int

    @property
    def geometry(self) -> ConvGeometry:
        stride, padding = (self.stride,) * 2, (self.window // 2,) * 2
        return ConvGeometry(stride, padding, (1, 1), 1)

    @property
    def input(self) -> Shape:
        return self.n, self.c, self.size, self.size

    @property
    def output(self) -> Shape:
        return self.n, self.k, self.size // self.stride, self.size // self.stride

    @property
    def weight(self) -> Shape:
        return self.k, self.c, self.window, self.window


KINDS = (
    ("half", torch.bfloat16, "ieee"),
    ("tf32", torch.float32, "tf32"),
    ("exact", torch.float32, "tf32x3"),
)
USUAL = Layer(256, 128, 128, 56, 3, 1)


def _tiles(
    quick: bool, kernel: str, normed: bool
) -> Iterator[tuple[str, torch.dtype, dict[str, Any]]]:
    """(name, dtype, options): every tile, for the usual layer."""
    for kind, dtype, precision in KINDS[: 1 if quick else None]:
        tiles = CONV_TILES[kernel][f"{kind} normed" if normed else kind]
        for tile in tiles[: 1 if quick else None]:
            yield f"{kind} {USUAL.window}²", dtype, {"tile": tile, "precision": precision}


def _conv_fprop(quick: bool) -> Iterator[Specimen]:
    layer = USUAL
    before, above = _affine(layer.c), _affine(layer.k)
    for normed in (False, True):
        for name, dtype, options in _tiles(quick, "conv_fprop", normed):
            x, w = _nhwc(layer.input, dtype), _nhwc(layer.weight, dtype)
            r, bias = _nhwc(layer.output, dtype), torch.empty(layer.k, dtype=dtype, device="meta")
            call = partial(conv_fprop.conv_fprop, x, w, None, layer.geometry, **options)
            if normed:
                call = partial(call, prologue=before)
                yield Specimen(f"{name}: prologue, stats", partial(call, stats=True))
                yield Specimen(f"{name}: prologue", call)
                continue
            yield Specimen(f"{name}: stats", partial(call, stats=True))
            yield Specimen(
                f"{name}: norm +r relu", partial(call, norm=above, residual=r, relu=True)
            )
            biased = partial(conv_fprop.conv_fprop, x, w, bias, layer.geometry, **options)
            yield Specimen(f"{name}: bias, norm relu", partial(biased, norm=above, relu=True))


def _norm_gradient(dz: Tensor) -> NormGradient:
    v = _float32(dz.shape[1])
    return NormGradient(dz, torch.empty_like(dz), v, v, v, v)


def _conv_dgrad(quick: bool) -> Iterator[Specimen]:
    layer = USUAL
    for normed in (False, True):
        for name, dtype, options in _tiles(quick, "conv_dgrad", normed):
            dz, w, z = (_nhwc(s, dtype) for s in (layer.output, layer.weight, layer.input))
            below = Below(z, _affine(layer.c), None)
            join = below._replace(mask=_mask(layer.input), z2=z, mean2=_float32(layer.c))
            lazy, prologue = _norm_gradient(dz), "norm's dz, " if normed else ""
            shapes = (w, layer.input, layer.geometry)
            call = partial(conv_dgrad.conv_dgrad, lazy if normed else dz, *shapes, **options)
            yield Specimen(f"{name}: {prologue}relu, sums", partial(call, below=below))
            yield Specimen(
                f"{name}: {prologue}+r mask, 3 sums", partial(call, below=join, residual=z)
            )
            yield Specimen(f"{name}: {prologue}no epilogue", call)
            if normed:
                running = lazy._replace(coef_z=None, coef_1=None)
                call = partial(conv_dgrad.conv_dgrad, running, *shapes, **options)
                yield Specimen(f"{name}: running norm's dz, relu", partial(call, below=below))


def _conv_wgrad(quick: bool) -> Iterator[Specimen]:
    layer = USUAL
    for normed in (False, True):
        for name, dtype, options in _tiles(quick, "conv_wgrad", normed):
            dz, x = _nhwc(layer.output, dtype), _nhwc(layer.input, dtype)
            shapes = {"x": x, "weight_shape": layer.weight, "g": layer.geometry}
            call = partial(conv_wgrad.conv_wgrad, **shapes, **options)
            if not normed:
                yield Specimen(f"{name}: x", partial(call, dz))
                continue
            prologue = partial(call, prologue=_affine(layer.c))
            lazy = _norm_gradient(dz)
            yield Specimen(f"{name}: relu(norm(x))", partial(prologue, dz))
            yield Specimen(f"{name}: norm's dz, relu(norm(x))", partial(prologue, lazy))
            yield Specimen(f"{name}: norm's dz, x", partial(call, lazy))


# ---- networks


def _network(
    name: str,
    batch: int,
    dtype: torch.dtype,
    step: str = "c",
    *,
    inference: bool = False,
    frozen: bool = False,
    precision: str = "ieee",
    **options: Any,
) -> None:
    """One step of a model; ``frozen``: its norms keep their statistics; ``precision``: of fp32."""
    model = resfast.create_model(name, **options).train(not frozen)
    flags = cast(Any, torch.backends.cudnn).conv  # not in the stubs
    before, flags.fp32_precision = flags.fp32_precision, precision
    count = inference_traffic if inference else training_traffic
    try:
        with resfast.fusion(step, "own"):
            count(model, (batch, 3, 224, 224), dtype)
    finally:
        flags.fp32_precision = before


def _networks(quick: bool) -> Iterator[Specimen]:
    if quick:
        return
    bf16, fp16, fp32 = DTYPES.values()

    def make(name: str, batch: int, dtype: torch.dtype, step: str = "c", **options: Any):
        words = [*(f"{k}={v}" for k, v in options.items())]
        title = " ".join([name, str(dtype).removeprefix("torch."), f"×{batch}", step, *words])
        return Specimen(title, partial(_network, name, batch, dtype, step, **options))

    for step in STEPS:
        yield make("resnet50", 256, bf16, step)
        yield make("resnet18", 256, bf16, step)
    for step in ("c", "c+"):
        yield make("resnet50", 8, bf16, step)
        yield make("resnet50", 256, fp16, step)
        yield make("resnet50", 64, fp32, step, precision="tf32")
        yield make("resnet50", 64, fp32, step)
        yield make("resnet50", 256, bf16, step, frozen=True)
    yield make("resnet50", 1, bf16)
    yield make("resnet50", 256, bf16, "c+", memory_efficient=True)
    yield make("resnet50", 256, bf16, stem="deep", shortcut="d")
    for batch, dtype in ((128, bf16), (1, bf16), (128, fp16), (32, fp32)):
        yield make("resnet50", batch, dtype, inference=True)
    yield make("resnet18", 128, bf16, inference=True)


def specimens(quick: bool = False) -> list[Specimen]:
    """All of them. ``quick``: of each launcher the first shape in bf16 and the usual tile only."""
    files = _norm, _norm_persistent, _norm_pool, _conv_fprop, _conv_dgrad, _conv_wgrad, _networks
    return [each for file in files for each in file(quick)]

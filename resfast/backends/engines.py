"""A convolution of an inference plan on CUDA: by the fastest of these engines for its size.

triton: resfast's own, norm, residual and ReLU in its epilogue. cutlass: the same with CUTLASS's
mainloop, in a build that has it (see ``cutlass``). cudnn: the library's fused one, on folded
weights. passes: the library's, and a norm kernel behind it in place.

``resfast.fusion(convolutions=…)`` says which may run: "own" leaves triton, and cutlass beside it,
alone wherever it can, "library" the last two, "auto" all. They are measured when the plan is made,
as tiles are (see ``tuning``). Where nothing is measured triton runs 1×1 convolutions, and others
run on cudnn, or else by passes; never on cutlass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from resfast import native
from resfast.backends import cutlass, tuning
from resfast.backends.cudnn_convolution import cudnn_convolution, cudnn_declines
from resfast.backends.fusion import current_fusion
from resfast.backends.interface import Affine, Backend, ConvGeometry, NormVectors, nhwc
from resfast.backends.packed import PackedConvolution
from resfast.backends.select import find, report, select
from resfast.backends.triton import TritonBackend

TRITON, CUTLASS, CUDNN, PASSES = "triton", cutlass.NAME, "cudnn", "passes"


class _Ending(NamedTuple):
    """What follows the convolution. residual: a tensor like it."""

    norm: NormVectors
    residual: Tensor | None
    relu: bool
    add_after_act: bool


def plan_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    norm: NormVectors,
    residual: Tensor | None,
    relu: bool,
    add_after_act: bool,
) -> PackedConvolution | None:
    """A function (x, residual, relu) → y, or None where plain PyTorch runs, or nothing.

    Of x and the residual only shapes and dtypes matter. ``weight`` and ``bias`` may be more exact
    than x.
    """
    backend, declined = find("conv_fprop", x)
    if not tuning.measures(x.device) or backend.name == "eager" or x.numel() == 0:
        return None
    ending = _Ending(norm, residual, relu, add_after_act)
    rounded = nhwc(weight.detach().to(x.dtype))
    runs: dict[str, PackedConvolution] = {}
    allowed = current_fusion().convolutions
    if isinstance(backend, TritonBackend) and allowed != "library":
        reason = backend.kernel_declines(x, rounded, g)
        if reason is None:
            rounded_bias = None if bias is None else bias.detach().to(x.dtype)
            runs[TRITON] = _triton(backend, rounded, rounded_bias, g, ending)
        else:
            declined[f"{backend.name} convolution"] = reason
    # the backends that CUTLASS's convolutions stand beside
    if backend.name in ("triton", "cuda") and allowed != "library":
        reason = cutlass.cutlass_declines(x, rounded, g)
        if reason is None:
            runs[CUTLASS] = _cutlass(rounded, bias, g, ending)
        elif native.cutlass_missing() is None:
            declined[CUTLASS] = reason
    if allowed != "own" or TRITON not in runs:
        fused, reason = _cudnn(x, weight, bias, g, ending)
        if fused is not None:
            runs[CUDNN] = fused
        elif reason is not None:
            declined["cudnn"] = reason
        runs[PASSES] = _passes(backend, rounded, bias, g, ending)
    engine = _fastest(x, rounded, g, ending, runs)
    chosen = runs[engine]
    rest = ", ".join(e for e in runs if e != engine)
    if rest:
        declined[rest] = f"{engine} is faster here, or expected to be"
    fuses = () if engine == PASSES else ("epilogue",)
    name = backend.name if engine == PASSES else engine

    def run(x: Tensor, residual: Tensor | None, relu: bool, out: Tensor | None = None) -> Tensor:
        report("conv_fprop", name, x, declined, fuses)
        return chosen(x, residual, relu, out)

    return run


def _fastest(
    x: Tensor,
    weight: Tensor,
    g: ConvGeometry,
    ending: _Ending,
    runs: dict[str, PackedConvolution],
) -> str:
    pointwise = tuple(weight.shape[2:]) == (1, 1)
    order = (TRITON, CUDNN, PASSES) if pointwise else (CUDNN, PASSES, TRITON)
    candidates = [engine for engine in (*order, CUTLASS) if engine in runs]
    if len(candidates) == 1:
        return candidates[0]
    joined = ending.residual is not None and ("after" if ending.add_after_act else "before")
    size = tuning.convolution_key("conv_fprop", x, weight, g)
    key = f"{size} relu {ending.relu} residual {joined} engine"
    generator = torch.Generator(x.device).manual_seed(0)  # nobody's random numbers change

    def random(like: Tensor | None) -> Tensor | None:
        return None if like is None else nhwc(torch.empty_like(like).normal_(generator=generator))

    like, residual = random(x), random(ending.residual)
    assert like is not None

    def run(engine: str) -> Callable[[], Tensor]:
        return lambda: runs[engine](like, residual, ending.relu)

    return tuning.choose_name(key, {engine: run(engine) for engine in candidates}, x.device)


def _triton(
    backend: TritonBackend, weight: Tensor, bias: Tensor | None, g: ConvGeometry, ending: _Ending
) -> PackedConvolution:
    norm, _, _, add_after_act = ending

    def run(x: Tensor, residual: Tensor | None, relu: bool, out: Tensor | None = None) -> Tensor:
        assert out is None
        return backend.conv_fprop_affine(x, weight, bias, g, norm, residual, relu, add_after_act)

    return run


def _cutlass(
    weight: Tensor, bias: Tensor | None, g: ConvGeometry, ending: _Ending
) -> PackedConvolution:
    norm, _, _, add_after_act = ending
    affine = norm.affine(weight.dtype)

    def run(x: Tensor, residual: Tensor | None, relu: bool, out: Tensor | None = None) -> Tensor:
        assert out is None
        return cutlass.conv_affine_tiled(x, weight, bias, g, affine, residual, relu, add_after_act)

    return run


def _cudnn(
    x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry, ending: _Ending
) -> tuple[PackedConvolution | None, str | None]:
    """cuDNN's, after one run: which sizes it has a kernel for, it alone knows. Or why not."""
    norm, residual, relu, add_after_act = ending
    reason = cudnn_declines(x, residual, relu, add_after_act)
    if reason is not None:
        return None, reason
    try:
        run = cudnn_convolution(weight, bias, g, norm, x.dtype, residual is not None)
        run(x, residual, relu)
    except (ArithmeticError, RuntimeError) as error:
        return None, str(error).splitlines()[0]
    return run, None


def _passes(
    backend: Backend, weight: Tensor, bias: Tensor | None, g: ConvGeometry, ending: _Ending
) -> PackedConvolution:
    norm, _, _, add_after_act = ending
    mean, scale, beta = norm.affine(weight.dtype)
    # the library would add the bias in another pass
    affine = Affine(mean if bias is None else mean - bias.detach().to(mean.dtype), scale, beta)

    def run(x: Tensor, residual: Tensor | None, relu: bool, out: Tensor | None = None) -> Tensor:
        assert out is None
        z = Backend.conv_fprop(backend, x, weight, None, g)
        return select("norm_apply", z).norm_apply(
            z, affine, residual, None, relu, add_after_act, out=z
        )

    return run

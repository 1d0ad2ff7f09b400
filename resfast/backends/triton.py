"""Triton kernels on CUDA devices; in Triton's interpreter (TRITON_INTERPRET=1) on CPU too."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from resfast.backends.fusion import current_fusion
from resfast.backends.interface import (
    Affine,
    Backend,
    Below,
    ConvGeometry,
    NormGradient,
    NormVectors,
    nhwc,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def _kernels() -> Any:
    """The kernels' modules, loaded at first use: importing resfast needs no Triton."""
    from types import SimpleNamespace

    from resfast.kernels import conv_dgrad, conv_fprop, conv_wgrad, launch, norm, norm_pool

    return SimpleNamespace(
        norm=norm,
        norm_pool=norm_pool,
        conv_fprop=conv_fprop.conv_fprop,
        conv_dgrad=conv_dgrad.conv_dgrad,
        conv_wgrad=conv_wgrad.conv_wgrad,
        counting=launch.counting,
    )


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        _kernels()
    except Exception as error:
        return f"Triton does not load: {type(error).__name__}: {error}".splitlines()[0]
    return None


@functools.cache
def _too_old(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability >= _LEAST_CAPABILITY:
        return None
    return f"it needs compute capability 8.0, device {index} has {'.'.join(map(str, capability))}"


class TritonBackend(Backend):
    name = "triton"
    joins = True

    def unavailable_reason(self) -> str | None:
        reason = _missing()
        if reason is None and not interpreted() and not torch.cuda.is_available():
            return None if _kernels().counting() else "no CUDA device"
        return reason

    def declines(self, function: str, z: Tensor) -> str | None:
        kind = z.device.type
        if kind == "cuda":
            reason = _too_old(z.device.index)
            if reason is not None:
                return reason
        elif kind == "cpu":
            if not interpreted():
                return "it runs on cuda, the tensor is on cpu"
        elif kind != "meta" or not _kernels().counting():
            return f"it runs on cuda, the tensor is on {kind}"
        if z.dtype not in _DTYPES:
            return f"no kernel for {z.dtype}"
        return None

    def emulates(self, z: Tensor) -> bool:
        return z.device.type == "cpu"

    # ---- convolutions

    def fusing_declines(
        self, function: str, x: Tensor, weight: Tensor, g: ConvGeometry
    ) -> str | None:
        choice = current_fusion().convolutions
        if g.groups != 1:
            return f"{g.groups} groups"
        if choice == "library":
            return "the library's convolutions were asked for"
        if weight.dtype != x.dtype:
            return f"input {x.dtype}, weight {weight.dtype}"
        if choice == "auto" and tuple(weight.shape[2:]) != (1, 1):
            return "only 1×1 convolutions are expected to be faster than the library's"
        return None

    def conv_fprop(self, x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
        if self.fusing_declines("conv_fprop", x, weight, g) is not None:
            return super().conv_fprop(x, weight, bias, g)
        return self.conv_fprop_fused(x, weight, bias, g, None, False)[0]

    def conv_dgrad(self, dz: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
        if self.fusing_declines("conv_dgrad", dz, weight, g) is not None:
            return super().conv_dgrad(dz, x, weight, g)
        n, c, h, w = x.shape
        return self.conv_dgrad_fused(dz, weight, (n, c, h, w), g, None, (1, 1), None)[0]

    def conv_wgrad(self, dz: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
        if self.fusing_declines("conv_wgrad", dz, weight, g) is not None:
            return super().conv_wgrad(dz, x, weight, g)
        return self.conv_wgrad_fused(dz, x, weight, g, None)

    def conv_fprop_fused(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        g: ConvGeometry,
        prologue: Affine | None,
        statistics: bool,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        kernels = _kernels()
        z, tiles = kernels.conv_fprop(
            nhwc(x),
            nhwc(weight),
            bias,
            g,
            prologue=prologue,
            stats=statistics,
            precision=_precision(x),
        )
        return z, None if tiles is None else kernels.norm.merge_stats(tiles)

    def conv_dgrad_fused(
        self,
        dz: Tensor | NormGradient,
        weight: Tensor,
        shape: tuple[int, int, int, int],
        g: ConvGeometry,
        residual: Tensor | None,
        residual_stride: tuple[int, int],
        below: Below | None,
    ) -> tuple[Tensor, Tensor | None]:
        kernels = _kernels()
        dx, tiles = kernels.conv_dgrad(
            _dense(dz),
            nhwc(weight),
            shape,
            g,
            residual=None if residual is None else nhwc(residual),
            residual_stride=residual_stride,
            below=below,
            precision=_precision(weight),
        )
        return dx, None if tiles is None else kernels.norm.merge_sums(tiles)

    def conv_wgrad_fused(
        self,
        dz: Tensor | NormGradient,
        x: Tensor,
        weight: Tensor,
        g: ConvGeometry,
        prologue: Affine | None,
    ) -> Tensor:
        dw = _kernels().conv_wgrad(
            _dense(dz),
            nhwc(x),
            tuple(weight.shape),
            g,
            prologue=prologue,
            precision=_precision(weight),
        )
        return _laid_out_as(dw, weight)

    def conv_fprop_affine(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        g: ConvGeometry,
        norm: NormVectors,
        residual: Tensor | None,
        relu: bool,
        add_after_act: bool,
    ) -> Tensor:
        affine, _ = self.norm_prepare(norm.mean, norm.var, norm.weight, norm.bias, norm.eps)
        y, _ = _kernels().conv_fprop(
            nhwc(x),
            nhwc(weight),
            bias,
            g,
            norm=affine,
            residual=None if residual is None else nhwc(residual),
            relu=relu,
            add_after_act=add_after_act,
            precision=_precision(x),
        )
        return y

    def epilogue_declines(
        self, x: Tensor, weight: Tensor, g: ConvGeometry, residual: Tensor | None
    ) -> str | None:
        return self.fusing_declines("conv_fprop", x, weight, g)

    # ---- normalisation

    def norm_prepare(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Affine, Tensor]:
        return _kernels().norm.norm_prepare(mean, var, weight, bias, eps)

    def norm_coefficients(
        self, scale: Tensor, rstd: Tensor, sum_du: Tensor, sum_du_centred: Tensor, n: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _kernels().norm.norm_coefficients(scale, rstd, sum_du, sum_du_centred, max(1, n))

    def norm_join_reduce(
        self, dy: Tensor, dy2: Tensor | None, y: Tensor, end: Below, du: Tensor
    ) -> Tensor:
        norm = _kernels().norm
        tiles = norm.norm_backward_reduce(
            nhwc(dy),
            end.z,
            end.affine,
            dy2=None if dy2 is None else nhwc(dy2),
            y=y if end.mask is None else None,
            mask=end.mask,
            du=du,
            z2=end.z2,
            mean2=end.mean2,
        )
        return norm.merge_sums(tiles)

    def norm_join_apply(
        self, gradient: NormGradient, dz: Tensor, second: NormGradient | None, dz2: Tensor | None
    ) -> None:
        du, z, mean, scale, coef_z, coef_1 = gradient
        _kernels().norm.norm_backward_apply(
            du,
            z,
            Affine(mean, scale, mean),  # no mask is recomputed: beta is not read
            relu=False,
            coef_z=coef_z,
            coef_1=coef_1,
            dz=dz,
            second=None if second is None else (*second[1:], dz2),
        )

    def norm_stats(self, z: Tensor) -> tuple[Tensor, Tensor]:
        norm = _kernels().norm
        return norm.merge_stats(norm.norm_stats(nhwc(z)))

    def norm_apply(
        self,
        z: Tensor,
        affine: Affine,
        residual: Tensor | None,
        residual_affine: Affine | None,
        relu: bool,
        add_after_act: bool,
        out: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return _kernels().norm.norm_apply(
            nhwc(z),
            affine,
            None if residual is None else nhwc(residual),
            residual_affine,
            relu,
            add_after_act,
            out,
            mask,
        )

    def norm_backward_reduce(
        self,
        dy: Tensor,
        z: Tensor,
        affine: Affine,
        rstd: Tensor,
        y: Tensor | None,
        relu: bool,
        activation: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        norm = _kernels().norm
        tiles = norm.norm_backward_reduce(
            nhwc(dy),
            nhwc(z),
            affine,
            y=None if y is None else nhwc(y),
            relu=relu,
            activation=activation,
        )
        sums = norm.merge_sums(tiles)
        return sums[0], sums[1] * rstd

    def norm_backward_apply(
        self,
        dy: Tensor,
        z: Tensor,
        affine: Affine,
        y: Tensor | None,
        relu: bool,
        coef_z: Tensor | None,
        coef_1: Tensor | None,
        dz: Tensor,
        du: Tensor | None,
    ) -> None:
        _kernels().norm.norm_backward_apply(
            nhwc(dy),
            nhwc(z),
            affine,
            y=None if y is None else nhwc(y),
            relu=relu,
            coef_z=coef_z,
            coef_1=coef_1,
            dz=dz,
            du=du,
        )

    def norm_apply_max_pool(
        self, z: Tensor, affine: Affine, kernel: int, stride: int, padding: int
    ) -> tuple[Tensor, Tensor]:
        return _kernels().norm_pool.norm_apply_max_pool(nhwc(z), affine, kernel, stride, padding)

    def norm_max_pool_backward_reduce(
        self,
        dy: Tensor,
        z: Tensor,
        affine: Affine,
        rstd: Tensor,
        index: Tensor,
        kernel: int,
        stride: int,
        padding: int,
    ) -> tuple[Tensor, Tensor]:
        kernels = _kernels()
        tiles = kernels.norm_pool.norm_max_pool_backward_reduce(
            nhwc(dy), nhwc(z), affine, index, kernel, stride, padding
        )
        sums = kernels.norm.merge_sums(tiles)
        return sums[0], sums[1] * rstd

    def norm_max_pool_backward_apply(
        self,
        dy: Tensor,
        z: Tensor,
        affine: Affine,
        index: Tensor,
        kernel: int,
        stride: int,
        padding: int,
        coef_z: Tensor | None,
        coef_1: Tensor | None,
    ) -> Tensor:
        return _kernels().norm_pool.norm_max_pool_backward_apply(
            nhwc(dy), nhwc(z), affine, index, kernel, stride, padding, coef_z, coef_1
        )


def _dense(dz: Tensor | NormGradient) -> Tensor | NormGradient:
    return dz if isinstance(dz, NormGradient) else nhwc(dz)


def _precision(t: Tensor) -> str:
    """How float32 matrices multiply: as cuDNN's flag says; exact is three passes of TF32."""
    if t.dtype != torch.float32:
        return "ieee"
    flags: Any = torch.backends.cudnn
    return "tf32" if flags.conv.fp32_precision == "tf32" else "tf32x3"


def _laid_out_as(dw: Tensor, weight: Tensor) -> Tensor:
    """dw with weight's strides, which autograd and the op's fake expect."""
    if dw.stride() == weight.stride():
        return dw
    return torch.empty_like(weight).copy_(dw)

"""CUDA C++ norm kernels on CUDA devices, beside the library's convolutions or CUTLASS's."""

from __future__ import annotations

import torch
from torch import Tensor

from resfast import native
from resfast.backends import cutlass
from resfast.backends.interface import (
    Affine,
    Below,
    ConvGeometry,
    Kernel,
    NormGradient,
    NormVectors,
    empty_nhwc,
    nhwc,
)
from resfast.backends.library_pool import LibraryPool

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# pixels that one block holds on chip, kHeldPixels in csrc/cuda/tiling.h
HELD_PIXELS = 1024
_native = torch.ops.resfast


class CudaBackend(LibraryPool):
    name = "cuda"
    joins = True

    def unavailable_reason(self) -> str | None:
        library = native.cuda_library()
        if not library["built"]:
            return f"no CUDA library: {library['reason']}"
        return None if torch.cuda.is_available() else "no CUDA device"

    def declines(self, function: str, z: Tensor) -> str | None:
        if z.device.type != "cuda":
            return f"it runs on cuda, the tensor is on {z.device.type}"
        reason = native.cuda_unusable(z.device.index)
        if reason is not None:
            return f"device {z.device.index}: {reason}"
        return None if z.dtype in _DTYPES else f"no kernel for {z.dtype}"

    # ---- convolutions

    def affine_kernel(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        g: ConvGeometry,
        norm: NormVectors,
        residual: Tensor | None,
        relu: bool,
        add_after_act: bool,
    ) -> Kernel | str:
        arguments = (x, weight, bias, g, norm, residual, relu, add_after_act)
        own = super().affine_kernel(*arguments)
        reason = cutlass.cutlass_declines(x, weight, g)
        return reason or cutlass.affine_kernel(self, *arguments, own)

    # ---- per-channel vectors

    def norm_prepare(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Affine, Tensor]:
        mean, var = _vector(mean), _vector(var)
        scale, beta, rstd = (torch.empty_like(var) for _ in range(3))
        _native.cuda_norm_prepare(
            var, _optional_vector(weight), _optional_vector(bias), eps, scale, beta, rstd
        )
        return Affine(mean, scale, beta), rstd

    def norm_coefficients(
        self, scale: Tensor, rstd: Tensor, sum_du: Tensor, sum_du_centred: Tensor, n: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        sum_du_xhat, coef_z, coef_1 = (torch.empty_like(scale) for _ in range(3))
        _native.cuda_norm_coefficients(
            scale, rstd, sum_du, sum_du_centred, max(1, n), sum_du_xhat, coef_z, coef_1
        )
        return sum_du_xhat, coef_z, coef_1

    # ---- a block's end

    def norm_join_reduce(
        self, dy: Tensor, dy2: Tensor | None, y: Tensor, end: Below, du: Tensor
    ) -> Tensor:
        z2 = None if end.z2 is None else nhwc(end.z2)
        y_read = nhwc(y) if end.mask is None else None
        return self._reduce(
            dy, dy2, end.z, end.affine, y_read, end.mask, True, z2, end.mean2, du, None
        )

    def norm_join_apply(
        self, gradient: NormGradient, dz: Tensor, second: NormGradient | None, dz2: Tensor | None
    ) -> None:
        du, z, mean, scale, coef_z, coef_1 = gradient
        # no mask is recomputed: beta is not used
        operands = (nhwc(du), nhwc(z), mean, scale, mean, None, False, coef_z, coef_1)
        if second is None:
            _native.cuda_norm_backward_apply(*operands, *[None] * 5, dz, None, None)
            return
        _, z2, mean2, scale2, coef_z2, coef_12 = second
        _native.cuda_norm_backward_apply(
            *operands, nhwc(z2), mean2, scale2, coef_z2, coef_12, dz, None, dz2
        )

    # ---- normalisation

    def norm_stats(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return _moments(z, torch.float32)

    def norm_stats_exact(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return _moments(z, torch.float64)

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
        z = nhwc(z)
        residual = None if residual is None else nhwc(residual)
        if mask is not None:
            z = _aligned(z)
            residual = None if residual is None else _aligned(residual)
        out = empty_nhwc(z.shape, z) if out is None else out
        _native.cuda_norm_apply(
            z,
            *affine,
            residual,
            *(residual_affine or (None, None, None)),
            relu,
            add_after_act,
            out,
            mask,
        )
        return out

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
        y = None if y is None else nhwc(y)
        sums = self._reduce(dy, None, nhwc(z), affine, y, None, relu, None, None, None, activation)
        return sums[0], sums[1] * rstd

    def _reduce(
        self,
        dy: Tensor,
        dy2: Tensor | None,
        z: Tensor,
        affine: Affine,
        y: Tensor | None,
        mask: Tensor | None,
        relu: bool,
        z2: Tensor | None,
        mean2: Tensor | None,
        du: Tensor | None,
        activation: Tensor | None,
    ) -> Tensor:
        """Σdu, Σdu·(z − mean) and, with z2, Σdu·(z2 − mean2): ``[S, C]``."""
        sums = z.new_empty(2 if z2 is None else 3, z.shape[1], dtype=torch.float32)
        dy2 = None if dy2 is None else nhwc(dy2)
        _native.cuda_norm_backward_reduce(
            *(nhwc(dy), dy2, z, *affine, y, mask, relu, z2, mean2, sums, du, activation)
        )
        return sums

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
        y = None if y is None else nhwc(y)
        _native.cuda_norm_backward_apply(
            *(nhwc(dy), nhwc(z), *affine, y, relu, coef_z, coef_1, *[None] * 5, dz, du, None)
        )

    # ---- both passes at once

    def reads_once(self, z: Tensor) -> bool:
        return 0 < z.shape[0] * z.shape[2] * z.shape[3] <= HELD_PIXELS

    def norm_forward(
        self,
        z: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None,
        relu: bool,
        add_after_act: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        z = nhwc(z)
        residual = None if residual is None else nhwc(residual)
        if mask is not None:
            z = _aligned(z)
            residual = None if residual is None else _aligned(residual)
        y, mean, var = empty_nhwc(z.shape, z), _new_vector(z), _new_vector(z)
        _native.cuda_norm_forward(
            *(z, _optional_vector(weight), _optional_vector(bias), eps, residual, relu),
            *(add_after_act, y, mask, mean, var),
        )
        return y, mean, var

    def norm_backward(
        self,
        dy: Tensor,
        z: Tensor,
        affine: Affine,
        rstd: Tensor,
        y: Tensor | None,
        relu: bool,
        activation: Tensor | None,
        du: Tensor | None,
        dy2: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        z = nhwc(z)
        dy2 = None if dy2 is None else nhwc(dy2)
        y = None if y is None else nhwc(y)
        dz, sum_du, sum_du_xhat = empty_nhwc(z.shape, z), _new_vector(z), _new_vector(z)
        _native.cuda_norm_backward(
            *(nhwc(dy), dy2, z, *affine, rstd, y, mask, relu),
            *(dz, du, activation, sum_du, sum_du_xhat),
        )
        return dz, sum_du, sum_du_xhat


def _vector(v: Tensor) -> Tensor:
    """As the kernels read it: norms may be kept in 16 bits."""
    return v.to(torch.float32).contiguous()


def _optional_vector(v: Tensor | None) -> Tensor | None:
    return None if v is None else _vector(v)


def _moments(z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mean, m2 = (z.new_empty(z.shape[1], dtype=dtype) for _ in range(2))
    _native.cuda_norm_stats(nhwc(z), mean, m2)
    return mean, m2


def _new_vector(z: Tensor) -> Tensor:
    return z.new_empty(z.shape[1], dtype=torch.float32)


def _aligned(t: Tensor) -> Tensor:
    """A whole byte of a mask is made of 16 bytes read at once: a view may start between them."""
    return t if t.data_ptr() % 16 == 0 else t.clone()

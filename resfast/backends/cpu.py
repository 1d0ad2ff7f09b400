"""C++ norm and convolution kernels on CPU, and oneDNN's convolutions, with fused epilogues."""

from __future__ import annotations

import torch
from torch import Tensor

from resfast import native
from resfast.backends.direct import direct_fprop, is_direct
from resfast.backends.im2col import im2col_dgrad, im2col_wgrad, is_gathered
from resfast.backends.interface import (
    Affine,
    Backend,
    ConvGeometry,
    NormVectors,
    acc_dtype,
    conv_output_shape,
    empty_nhwc,
    nhwc,
    pack_mask,
)
from resfast.backends.packed import (
    PackedConvolution,
    packed_convolution,
    packing_declines,
    recall_convolution,
)
from resfast.backends.pointwise import is_pointwise, pointwise_dgrad, pointwise_fprop
from resfast.backends.winograd import (
    winograd_dgrad,
    winograd_fprop,
    winograd_tile,
    winograd_wgrad,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_native = torch.ops.resfast


def _fits(x: Tensor, weight: Tensor, g: ConvGeometry) -> bool:
    channels = weight.dim() == 4 and x.shape[1] == weight.shape[1] * g.groups
    if not channels or min(g.stride) < 1 or min(g.padding) < 0:
        return False
    return min(conv_output_shape(x, weight, g)[2:]) > 0


def _run_packed(
    packed: PackedConvolution, x: Tensor, residual: Tensor | None, relu: bool, add_after_act: bool
) -> Tensor:
    y = packed(nhwc(x), None if add_after_act or residual is None else nhwc(residual), relu)
    if add_after_act and residual is not None:
        y.add_(residual)
    return nhwc(y)


class CpuBackend(Backend):
    name = "cpu"

    def unavailable_reason(self) -> str | None:
        return None if native.is_available() else native.load_error()

    def declines(self, function: str, z: Tensor) -> str | None:
        if z.device.type != "cpu":
            return f"it runs on cpu, the tensor is on {z.device.type}"
        if z.dtype not in _DTYPES:
            return f"no kernel for {z.dtype}"
        return None

    def conv_fprop(self, x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
        if bias is not None or not _fits(x, weight, g):  # stock has the error to raise
            return super().conv_fprop(x, weight, bias, g)
        if is_pointwise(x, weight, g):
            return pointwise_fprop(x, weight, g)
        tile = winograd_tile(x, weight, g, training=True)
        if tile is not None:
            return winograd_fprop(x, weight, tile, g.stride[0])
        if is_direct(x, weight, g):
            return direct_fprop(x, weight, g)
        return super().conv_fprop(x, weight, bias, g)

    def conv_dgrad(self, dz: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
        if is_gathered(dz, weight, g) and g.stride != (1, 1):
            return im2col_dgrad(dz, x, weight, g)
        dx = self._own_dgrad(dz, weight, g, None)
        return super().conv_dgrad(dz, x, weight, g) if dx is None else dx

    def conv_dgrad_add(
        self, dz: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, residual: Tensor
    ) -> Tensor | None:
        return self._own_dgrad(dz, weight, g, residual)

    def _own_dgrad(
        self, dz: Tensor, weight: Tensor, g: ConvGeometry, residual: Tensor | None
    ) -> Tensor | None:
        """Of a kernel with an epilogue, if one runs this convolution."""
        if g.stride != (1, 1):
            return None
        if is_pointwise(dz, weight, g):
            return pointwise_dgrad(dz, weight, residual)
        tile = winograd_tile(dz, weight, g, training=True)
        return None if tile is None else winograd_dgrad(dz, weight, tile, residual)

    def conv_wgrad(self, dz: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
        if dz.dtype != x.dtype:
            return super().conv_wgrad(dz, x, weight, g)
        if is_gathered(x, weight, g):
            return im2col_wgrad(dz, x, weight, g)
        tile = winograd_tile(x, weight, g, training=True)
        if tile is None:
            return super().conv_wgrad(dz, x, weight, g)
        return winograd_wgrad(dz, x, weight, tile)

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
        packed = packed_convolution(x, weight, bias, g, norm)
        return _run_packed(packed, x, residual, relu, add_after_act)

    def conv_fprop_affine_again(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        g: ConvGeometry,
        norm: NormVectors,
        residual: Tensor | None,
        relu: bool,
        add_after_act: bool,
    ) -> Tensor | None:
        packed = recall_convolution(x, weight, bias, g, norm, residual)
        return None if packed is None else _run_packed(packed, x, residual, relu, add_after_act)

    def epilogue_declines(
        self, x: Tensor, weight: Tensor, g: ConvGeometry, residual: Tensor | None
    ) -> str | None:
        return packing_declines(x, weight, g, residual)

    def norm_stats(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._moments(z, acc_dtype(z.dtype))

    def norm_stats_exact(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._moments(z, torch.float64)

    def _moments(self, z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        mean = torch.empty(z.shape[1], dtype=dtype)
        m2 = torch.empty_like(mean)
        _native.norm_stats(nhwc(z), mean, m2)
        return mean, m2

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
        out = empty_nhwc(z.shape, z) if out is None else out
        _native.norm_apply(
            z,
            *affine,
            None if residual is None else nhwc(residual),
            *(residual_affine or (None, None, None)),
            relu,
            add_after_act,
            out,
        )
        if mask is not None:
            mask.copy_(pack_mask(out))
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
        sum_du, sum_du_xhat = torch.empty_like(rstd), torch.empty_like(rstd)
        _native.norm_backward_reduce(
            nhwc(dy),
            nhwc(z),
            affine.mean,
            rstd,
            None if y is None else nhwc(y),
            affine.scale,
            affine.beta,
            relu,
            sum_du,
            sum_du_xhat,
            activation,
        )
        return sum_du, sum_du_xhat

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
        _native.norm_backward_apply(
            nhwc(dy),
            nhwc(z),
            affine.mean,
            affine.scale,
            affine.beta,
            None if y is None else nhwc(y),
            relu,
            coef_z,
            coef_1,
            dz,
            du,
        )

    def norm_apply_max_pool(
        self, z: Tensor, affine: Affine, kernel: int, stride: int, padding: int
    ) -> tuple[Tensor, Tensor]:
        n, c, h, w = z.shape
        p, q = ((s + 2 * padding - kernel) // stride + 1 for s in (h, w))
        out = empty_nhwc((n, c, p, q), z)
        index = torch.empty_like(out, dtype=torch.uint8)
        _native.norm_apply_max_pool(nhwc(z), *affine, kernel, stride, padding, out, index)
        return out, index

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
        sum_du, sum_du_xhat = torch.empty_like(rstd), torch.empty_like(rstd)
        _native.norm_max_pool_backward_reduce(
            nhwc(dy),
            nhwc(z),
            affine.mean,
            rstd,
            affine.scale,
            affine.beta,
            index,
            kernel,
            stride,
            padding,
            sum_du,
            sum_du_xhat,
        )
        return sum_du, sum_du_xhat

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
        dz = empty_nhwc(z.shape, z)
        _native.norm_max_pool_backward_apply(
            nhwc(dy), nhwc(z), *affine, index, kernel, stride, padding, coef_z, coef_1, dz
        )
        return dz

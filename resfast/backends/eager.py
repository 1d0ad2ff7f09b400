"""The seven functions in plain PyTorch: the fallback everywhere, readable beside the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resfast.backends.interface import Affine, Backend, acc_dtype, nhwc, pack_mask
from resfast.backends.library_pool import max_pool, unpool


def _channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def _normalise(z: Tensor, affine: Affine) -> Tensor:
    z = z.to(acc_dtype(z.dtype))
    return (z - _channel(affine.mean)) * _channel(affine.scale) + _channel(affine.beta)


def _masked(dy: Tensor, z: Tensor, affine: Affine, y: Tensor | None, relu: bool) -> Tensor:
    dy = dy.to(acc_dtype(dy.dtype))
    if not relu:
        return dy
    u = _normalise(z, affine) if y is None else y
    return torch.where(u <= 0, 0, dy)  # a NaN passes its gradient on, as torch.relu's backward does


class EagerBackend(Backend):
    name = "eager"

    def declines(self, function: str, z: Tensor) -> str | None:
        return None

    def norm_stats(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, m2 = self.norm_stats_exact(z)
        return mean.to(m2.dtype), m2

    def norm_stats_exact(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.to(acc_dtype(z.dtype))
        if z.shape[0] * z.shape[2] * z.shape[3] == 0:
            return z.new_zeros(z.shape[1]), z.new_zeros(z.shape[1])
        pilot = z.mean((0, 2, 3), keepdim=True)
        rest = z - pilot  # its mean corrects the pilot's rounding
        correction = rest.mean((0, 2, 3), keepdim=True)
        mean = (pilot.double() + correction.double()).flatten()
        return mean, (rest - correction).square_().sum((0, 2, 3))

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
        u = _normalise(z, affine)
        if residual is not None:
            r = _normalise(residual, residual_affine) if residual_affine else residual
            u = F.relu(u) + r if relu and add_after_act else u + r
        if relu and not (add_after_act and residual is not None):
            u = F.relu(u)
        y = nhwc(u.to(z.dtype)) if out is None else out.copy_(u)
        if mask is not None:
            mask.copy_(pack_mask(y))
        return y

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
        du = _masked(dy, z, affine, y, relu)
        xhat = (z.to(du.dtype) - _channel(affine.mean)) * _channel(rstd)
        if activation is not None:
            self.norm_apply(z, affine, None, None, relu, False, out=activation)
        return du.sum((0, 2, 3)), (du * xhat).sum((0, 2, 3))

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
        gradient = _masked(dy, z, affine, y, relu)
        dz.copy_(_norm_gradient(gradient, z, affine, coef_z, coef_1))
        if du is not None:
            du.copy_(gradient)

    def norm_apply_max_pool(
        self, z: Tensor, affine: Affine, kernel: int, stride: int, padding: int
    ) -> tuple[Tensor, Tensor]:
        a = F.relu(_normalise(z, affine))
        y, index = max_pool(a, kernel, stride, padding)
        return nhwc(y.to(z.dtype)), nhwc(index)

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
        da = unpool(dy, z, index, kernel, stride, padding)
        return self.norm_backward_reduce(da, z, affine, rstd, None, True, None)

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
        da = unpool(dy, z, index, kernel, stride, padding)
        du = _masked(da, z, affine, None, True)
        return _norm_gradient(du, z, affine, coef_z, coef_1)


def _norm_gradient(
    du: Tensor, z: Tensor, affine: Affine, coef_z: Tensor | None, coef_1: Tensor | None
) -> Tensor:
    dz = du * _channel(affine.scale)
    if coef_z is not None:
        dz = dz + (z.to(du.dtype) - _channel(affine.mean)) * _channel(coef_z)
    if coef_1 is not None:
        dz = dz + _channel(coef_1)
    return nhwc(dz.to(z.dtype))

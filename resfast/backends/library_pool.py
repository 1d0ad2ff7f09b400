"""PyTorch's own max-pool with the window positions of its maxima, for backends without a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resfast.backends.interface import Affine, Backend, acc_dtype, empty_nhwc, nhwc


def max_pool(a: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """(maxpool(a), uint8 position of each maximum in its window), both ``[N, C, P, Q]``."""
    y, flat = F.max_pool2d(a, kernel, stride, padding, return_indices=True)
    # torch counts positions in the whole plane; one byte within the window is enough
    p, q = _corners(y, stride, padding)
    index = (flat // a.shape[3] - p) * kernel + flat % a.shape[3] - q
    return y, index.to(torch.uint8)


def unpool(
    dy: Tensor, like: Tensor, index: Tensor, kernel: int, stride: int, padding: int
) -> Tensor:
    """dy added up at the positions of ``index``, of like's shape, in the accumulation dtype."""
    n, c, h, w = like.shape
    index = index.long()
    p, q = _corners(dy, stride, padding)
    flat = (index // kernel + p) * w + index % kernel + q
    acc = acc_dtype(dy.dtype)
    da = torch.zeros(n, c, h * w, dtype=acc, device=like.device)
    da.scatter_add_(2, flat.flatten(2), dy.to(acc).flatten(2))
    return da.view(n, c, h, w)


def _corners(y: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """First row ``[P, 1]`` and column ``[Q]`` of each window."""
    p = torch.arange(y.shape[2], device=y.device).view(-1, 1) * stride - padding
    return p, torch.arange(y.shape[3], device=y.device) * stride - padding


class LibraryPool(Backend):
    """The stem's max-pool by the library, beside a backend's own norm."""

    pool_reason = "it has no kernel: the norm's, then PyTorch's max-pool"

    def norm_apply_max_pool(
        self, z: Tensor, affine: Affine, kernel: int, stride: int, padding: int
    ) -> tuple[Tensor, Tensor]:
        a = self.norm_apply(z, affine, None, None, True, False)
        y, index = max_pool(a, kernel, stride, padding)
        return nhwc(y), nhwc(index)

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
        da = unpool(dy, z, index, kernel, stride, padding).to(z.dtype)
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
        da = unpool(dy, z, index, kernel, stride, padding).to(z.dtype)
        dz = empty_nhwc(z.shape, z)
        self.norm_backward_apply(da, z, affine, None, True, coef_z, coef_1, dz, None)
        return dz

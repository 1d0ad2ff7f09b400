"""The seven functions every backend computes, and the library convolutions they share.

Tensors are logical NCHW, physical NHWC (``channels_last``). z is a raw convolution output. All
per-channel vectors are of the accumulation dtype: float32, or float64 for float64 activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resfast import native

FUNCTIONS = (
    "conv_fprop",
    "norm_stats",
    "norm_apply",
    "norm_backward_reduce",
    "norm_backward_apply",
    "conv_dgrad",
    "conv_wgrad",
)


class ConvGeometry(NamedTuple):
    """Stride, padding and dilation as (height, width), and groups."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class Affine(NamedTuple):
    """u = (z − mean)·scale + beta per channel, each ``[C]`` in the accumulation dtype.

    Subtracting the mean first, rather than folding it into one shift, keeps a channel whose
    mean is large beside its spread exact.
    """

    mean: Tensor
    scale: Tensor
    beta: Tensor


class NormVectors(NamedTuple):
    """A norm with fixed statistics as it stands in a module: ``[C]`` each, weight, bias or None."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float

    def affine(self, dtype: torch.dtype) -> Affine:
        """What it applies to activations of ``dtype``."""
        acc = acc_dtype(dtype)
        mean, var = self.mean.to(acc), self.var.to(acc)
        return make_affine(mean, var, self.weight, self.bias, self.eps)[0]

    def scale_and_shift(self, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """For ``dtype``, of z·scale + shift, where ``bias`` is still to be added to z."""
        affine = self.affine(dtype)
        shift = affine.beta - affine.mean * affine.scale
        if bias is not None:
            shift = shift + bias.detach() * affine.scale
        return affine.scale, shift


class NormGradient(NamedTuple):
    """dz that is not stored: scale·du + coef_z·(z − mean) + coef_1, rounded to du's dtype.

    du and z ``[N, K, P, Q]``, vectors ``[K]``; a coefficient that is None is 0.
    """

    du: Tensor
    z: Tensor
    mean: Tensor
    scale: Tensor
    coef_z: Tensor | None
    coef_1: Tensor | None


class Below(NamedTuple):
    """The norm and ReLU that made a convolution's input, for its input gradient's epilogue.

    z is what the norm read. mask: one bit a value, uint8 ``[N·H·W, C/8]``, else the ReLU's mask is
    recomputed. z2, mean2: a second norm joined at the same place, a projection's.
    """

    z: Tensor
    affine: Affine
    mask: Tensor | None
    z2: Tensor | None = None
    mean2: Tensor | None = None


class Kernel(NamedTuple):
    """A call about to be made, and whose kernel it runs, as reported."""

    name: str
    run: Callable[[], Any]


def make_affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Affine, Tensor]:
    """(affine, rstd): scale = weight·rstd, rstd = 1/√(var + eps); mean and var set the dtype."""
    rstd = (var + eps).rsqrt_()
    scale = rstd if weight is None else weight.to(rstd.dtype) * rstd
    beta = torch.zeros_like(rstd) if bias is None else bias.to(rstd.dtype)
    return Affine(mean, scale, beta.contiguous()), rstd


def mask_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Of the bit mask of a tensor ``[N, C, H, W]``; no bytes where C is not a multiple of 8."""
    n, c, h, w = shape
    return (n * h * w, c // 8) if c % 8 == 0 else (0, 0)


def pack_mask(y: Tensor) -> Tensor:
    """y > 0 (or NaN) as a bit mask: bit i of byte j of a row is channel 8·j + i."""
    rows, columns = mask_shape(y.shape)
    if rows == 0:
        return y.new_empty(rows, columns, dtype=torch.uint8)
    bits = torch.where(y <= 0, 0, 1).permute(0, 2, 3, 1).reshape(rows, columns, 8)
    weights = 1 << torch.arange(8, device=y.device)
    return (bits * weights).sum(2).to(torch.uint8)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums, statistics and norm parameters are kept in for activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def takes_tf32(t: Tensor) -> bool:
    """Whether convolutions on CUDA multiply t in TF32: as cuDNN's flag says."""
    flags: Any = torch.backends.cudnn
    return t.dtype == torch.float32 and flags.conv.fp32_precision == "tf32"


def nhwc(t: Tensor) -> Tensor:
    """``t`` as dense channels_last with canonical strides, copied only if its memory differs.

    Size-1 dimensions make NCHW and NHWC strides ambiguous; the canonical ones keep the next
    convolution from choosing NCHW and keep real strides equal to those of the fakes.
    """
    t = t.contiguous(memory_format=torch.channels_last)
    _, c, h, w = t.shape
    strides = (h * w * c, 1, w * c, c)
    return t if t.stride() == strides else t.as_strided(t.shape, strides)


_PLAIN = (Tensor, torch.nn.Parameter)  # no fake, no proxy
_KEPT_BYTES = 2**20


def empty_nhwc(shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
    """Uninitialised channels_last tensor of ``shape`` with dtype and device of ``like``.

    On CPU a large one lives in memory that is kept when it dies (csrc/cpu/kept_memory.cpp).
    """
    if (
        type(like) in _PLAIN
        and like.is_cpu
        and math.prod(shape) * like.element_size() >= _KEPT_BYTES
        and native.is_available()
    ):
        kept: Tensor = torch.ops.resfast.empty_kept(like, *shape)
        return kept
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def conv_output_shape(x: Tensor, weight: Tensor, g: ConvGeometry) -> tuple[int, ...]:
    """``[N, K, P, Q]``; P or Q is below 1 where the window does not fit."""
    sizes = zip(x.shape[2:], weight.shape[2:], *g[:3], strict=True)
    return (
        x.shape[0],
        weight.shape[0],
        *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes),
    )


def empty_packed(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised contiguous tensor for packed weights: a large one in huge pages, as above."""
    return empty_nhwc((1, math.prod(shape), 1, 1), like).view(shape)


class Backend:
    """One implementation of the seven functions; the convolutions default to the library's.

    ``conv_*`` here call the convolution PyTorch dispatches to (oneDNN on CPU, cuDNN on CUDA).
    """

    name: str
    # whether a block's end runs as norm_join_reduce and norm_join_apply
    joins = False
    # whether its statistics are known to be as docs/numerics.md has them
    exact_statistics = True
    # why norm, ReLU and max-pool are not one kernel, of a backend that has kernels
    pool_reason: str | None = None

    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run on this machine at all, or None."""
        return None

    def declines(self, function: str, z: Tensor) -> str | None:
        """Why this backend does not take ``function`` for a tensor like ``z``, or None."""
        raise NotImplementedError

    def emulates(self, z: Tensor) -> bool:
        """Whether it would run far slower here than on the device it is for."""
        return False

    # ---- convolutions

    def conv_fprop(self, x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
        """z = conv(x, weight) + bias, ``[N, K, P, Q]``; weight ``[K, C/groups, R, S]``."""
        return nhwc(
            torch.ops.aten.convolution(
                nhwc(x), weight, bias, g.stride, g.padding, g.dilation, False, (0, 0), g.groups
            )
        )

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
        """conv_fprop with the norm, residual and ReLU in the convolution's own epilogue."""
        raise NotImplementedError

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
        """``conv_fprop_affine`` where an earlier call's checks cover these arguments, else None.

        Only then may the arguments be unchecked.
        """
        return None

    def epilogue_declines(
        self, x: Tensor, weight: Tensor, g: ConvGeometry, residual: Tensor | None
    ) -> str | None:
        """Why ``conv_fprop_affine`` does not take these, or None."""
        return "its convolution is the library's, without such an epilogue"

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
        """``conv_fprop_affine``, or a kernel that does the same faster; or why there is none."""
        reason = self.epilogue_declines(x, weight, g, residual)
        if reason is not None:
            return reason
        arguments = (x, weight, bias, g, norm, residual, relu, add_after_act)
        return Kernel(self.name, lambda: self.conv_fprop_affine(*arguments))

    def conv_dgrad(self, dz: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
        """dx ``[N, C, H, W]`` from dz ``[N, K, P, Q]``; of ``x`` only shape and layout matter."""
        return nhwc(_convolution_backward(dz, x, weight, g, (True, False))[0])

    def conv_dgrad_add(
        self, dz: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, residual: Tensor
    ) -> Tensor | None:
        """conv_dgrad + residual, or None where the addition is no part of the kernel."""
        return None

    def conv_wgrad(self, dz: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
        """dweight, of ``weight``'s shape, from dz and the convolution's input x."""
        return _convolution_backward(dz, x, weight, g, (False, True))[1]

    # ---- convolutions with the norms around them fused in

    def fusing_declines(
        self, function: str, x: Tensor, weight: Tensor, g: ConvGeometry
    ) -> str | None:
        """Why ``conv_*_fused`` does not take this convolution, or None."""
        return "its convolution is the library's, without the norms around it"

    def conv_fprop_fused(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        g: ConvGeometry,
        prologue: Affine | None,
        statistics: bool,
        exact: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """(z, (mean, M2) of z if asked for); the input is relu(affine(x)) with a prologue.

        ``exact``: as of ``norm_stats_exact``.
        """
        raise NotImplementedError

    def fprop_kernel(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        g: ConvGeometry,
        prologue: Affine | None,
        statistics: bool,
        exact: bool,
    ) -> Kernel:
        """``conv_fprop_fused``, or a kernel that does the same faster."""
        arguments = (x, weight, bias, g, prologue, statistics, exact)
        return Kernel(self.name, lambda: self.conv_fprop_fused(*arguments))

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
        """(dx + residual, None), or with ``below`` (du, sums ``[S, C]``): masked by its ReLU.

        The residual belongs to every residual_stride-th pixel. Sums: Σdu, Σdu·(z − mean), and with
        a second norm Σdu·(z2 − mean2).
        """
        raise NotImplementedError

    def conv_wgrad_fused(
        self,
        dz: Tensor | NormGradient,
        x: Tensor,
        weight: Tensor,
        g: ConvGeometry,
        prologue: Affine | None,
    ) -> Tensor:
        """dweight; the convolution's input is relu(affine(x)) with a prologue."""
        raise NotImplementedError

    # ---- normalisation

    def norm_prepare(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Affine, Tensor]:
        """(affine, rstd), see ``make_affine``."""
        return make_affine(mean, var, weight, bias, eps)

    def norm_coefficients(
        self, scale: Tensor, rstd: Tensor, sum_du: Tensor, sum_du_centred: Tensor, n: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(Σdu·x̂, coef_z, coef_1) of n values a channel, from Σdu and Σdu·(z − mean)."""
        sum_du_xhat = rstd * sum_du_centred
        scale = scale / max(1, n)
        return sum_du_xhat, -(scale * rstd * sum_du_xhat), -(scale * sum_du)

    def norm_join_reduce(
        self, dy: Tensor, dy2: Tensor | None, y: Tensor, end: Below, du: Tensor
    ) -> Tensor:
        """Writes du = (dy + dy2) behind the ReLU at a block's end, of output y; sums ``[S, C]``."""
        raise NotImplementedError

    def norm_join_apply(
        self, gradient: NormGradient, dz: Tensor, second: NormGradient | None, dz2: Tensor | None
    ) -> None:
        """Writes dz, and dz2 of a second norm with the same du."""
        raise NotImplementedError

    def norm_stats(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, M2) per channel over N, H, W; M2 = Σ(z − mean)²."""
        raise NotImplementedError

    def norm_stats_exact(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``norm_stats`` whose mean is not rounded to fp32, where the backend can."""
        return self.norm_stats(z)

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
        """y = act(u + r), or act(u) + r; r is the residual, or its affine. ``out`` may be z.

        ``mask`` receives y's bit mask, see ``pack_mask``.
        """
        raise NotImplementedError

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
        """(Σdu, Σdu·x̂); du is dy where y is positive, u where y is None. Writes act(u) if asked."""
        raise NotImplementedError

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
        """Writes dz = scale·du + coef_z·(z − mean) + coef_1, and du itself if asked for.

        dz may be dy's memory, where the caller owns that.
        """
        raise NotImplementedError

    # ---- both passes of a norm at once, where a channel's values fit on chip

    def reads_once(self, z: Tensor) -> bool:
        """Whether ``norm_forward`` and ``norm_backward`` take z, in one read of it."""
        return False

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
        """(y, mean, var): norm_stats and norm_apply; ``mask`` receives y's bit mask."""
        raise NotImplementedError

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
        """(dz, Σdu, Σdu·x̂) in training: norm_backward_reduce and norm_backward_apply.

        The gradient is dy + dy2; ``mask`` stands for y.
        """
        raise NotImplementedError

    # ---- the stem's max-pool, on top of the norm

    def norm_apply_max_pool(
        self, z: Tensor, affine: Affine, kernel: int, stride: int, padding: int
    ) -> tuple[Tensor, Tensor]:
        """(maxpool(relu(u)), uint8 window position of each maximum), both ``[N, C, P, Q]``."""
        raise NotImplementedError

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
        """(Σdu, Σdu·x̂) with du = dy scattered to its maxima and masked by u > 0."""
        raise NotImplementedError

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
        """dz = scale·du + coef_z·(z − mean) + coef_1 for that du."""
        raise NotImplementedError


def _convolution_backward(
    dz: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, mask: tuple[bool, bool]
) -> tuple[Tensor, ...]:
    return torch.ops.aten.convolution_backward(
        dz,
        nhwc(x),
        weight,
        None,
        g.stride,
        g.padding,
        g.dilation,
        False,
        (0, 0),
        g.groups,
        (*mask, False),
    )

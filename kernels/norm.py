"""BatchNorm forward and backward around the convolutions, on activations viewed as [M, C].

Every reduction over pixels writes one partial result a tile, and a second kernel merges the tiles
in a fixed order: no atomics, the same bits on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfast.backends.interface import Affine, empty_nhwc
from resfast.kernels.launch import launch
from resfast.kernels.math import (
    affine,
    centred,
    chan_merge,
    pack_mask,
    positive,
    relu,
    unpack_mask,
)
from resfast.kernels.tiles import NormTile, chip


class TileStats(NamedTuple):
    """Statistics of tiles of consecutive pixels, the last tile being what is left.

    A mean rounded to float32 is off by up to |mean|·2⁻²⁴, which the variance between the tiles
    then contains: at mean/std = 1e4 that shows. ``rest`` is what the rounding lost.
    """

    mean: Tensor  # [T, C] float32
    m2: Tensor  # [T, C] float32, Σ(z − mean)² in the tile
    rows: int  # pixels per tile
    count: int  # type: ignore[assignment]  # pixels in all; not tuple's method
    rest: Tensor | None = None  # [T, C] float32, to be added to mean


class TileSums(NamedTuple):
    """Sums of a norm's backward per tile of pixels.

    S = 2: Σdu, Σdu·(z − mean); S = 3: also Σdu·(z2 − mean2) of a second norm.
    """

    sums: Tensor  # [S, T, C] float32


# a reduction's tiles of pixels: what one launch still merges
MAX_TILES = 512
# tiles that one program of a merge takes at most
MERGE_GROUP = 256
# pixels a one-read program holds in registers: 32 KiB of z, by 512 threads
PERSISTENT_PIXELS = 1024


def pixels_channels(z: Tensor) -> tuple[int, int]:
    """(M, C) of ``[N, C, H, W]``."""
    n, c, h, w = z.shape
    m = n * h * w
    assert m < 2**31, "pixels are counted in int32"
    return m, c


def programs(device: torch.device) -> int:
    """Of a reduction: four to each multiprocessor."""
    return 4 * chip(device).processors


def default_tile(
    m: int, c: int, itemsize: int, device: torch.device, loads: int = 4, warps: int = 4
) -> NormTile:
    """Of a pass over ``[m, c]`` in blocks of ``loads`` 16-byte loads a thread and operand.

    Rows are of up to 128 channels. Few blocks are made smaller, to occupy more multiprocessors.
    """
    block_c = min(128, max(8, triton.next_power_of_2(c)))
    block_m = loads * warps * 32 * 16 // itemsize // block_c
    if triton.cdiv(m, block_m) * triton.cdiv(c, block_c) < programs(device) // 2:
        block_m //= loads
    return NormTile(max(1, block_m), block_c, warps)


def rows_per_program(m: int, c: int, tile: NormTile, device: torch.device) -> int:
    """Pixels of one program of a reduction, a multiple of the tile's."""
    each = max(1, programs(device) // triton.cdiv(c, tile.block_c))
    tiles = min(each, MAX_TILES)
    return max(1, triton.cdiv(triton.cdiv(m, tiles), tile.block_m)) * tile.block_m


def mask_source(
    c: int, y: Tensor | None, mask: Tensor | None, relu: bool
) -> tuple[str, Tensor | None]:
    """Where a ReLU's mask comes from, as the constexpr MASK, and the tensor to read for it."""
    if not relu:
        return "none", None
    if mask is not None:
        check_mask(c, mask)
        return "bits", mask
    return ("affine", None) if y is None else ("output", y)


def check_mask(c: int, mask: Tensor | None) -> None:
    """Raises ValueError where whole bytes of mask bits do not make up a pixel's channels."""
    if mask is not None and c % 8:
        raise ValueError(f"a bit mask needs channels in multiples of 8, got {c}")


@triton.jit
def vector(ptr, o_c, m_c):
    """Per-channel values, float32; 0 where there is no channel."""
    return tl.load(ptr + o_c, mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def block(ptr, row, o, inside, C):
    """Values at offsets ``o`` from pixel ``row``, float32; 0 outside."""
    return tl.load(ptr + row.to(tl.int64) * C + o, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def put(ptr, row, o, inside, C, values):
    """Stores ``values`` rounded to the pointer's dtype."""
    p = ptr + row.to(tl.int64) * C + o
    tl.store(p, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def offsets(rows, i_c, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """(offsets from a pixel, which of them exist); ``rows`` pixels are left."""
    o_m = tl.arange(0, BLOCK_M)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    return o_m[:, None] * C + o_c[None, :], (o_m < rows)[:, None] & (o_c < C)[None, :]


@triton.jit
def put_mask(mask_ptr, row, rows, i_c, C, keep, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Stores bools as bits."""
    o, inside = offsets(rows, i_c, C // 8, BLOCK_M, BLOCK_C // 8)
    p = mask_ptr + row.to(tl.int64) * (C // 8) + o
    tl.store(p, pack_mask(keep, BLOCK_M, BLOCK_C), mask=inside)


@triton.jit
def passed(
    b_z,
    mean,
    scale,
    beta,
    mask_ptr,
    row,
    rows,
    i_c,
    C,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Where the ReLU let its input through: by the affine of z, the output, or bits of it."""
    if MASK == "affine":
        keep = positive(affine(b_z, mean[None, :], scale[None, :], beta[None, :]))
    elif MASK == "output":
        o, inside = offsets(rows, i_c, C, BLOCK_M, BLOCK_C)
        keep = positive(block(mask_ptr, row, o, inside, C))
    else:
        o, inside = offsets(rows, i_c, C // 8, BLOCK_M, BLOCK_C // 8)
        b_bits = tl.load(mask_ptr + row.to(tl.int64) * (C // 8) + o, mask=inside, other=0)
        keep = unpack_mask(b_bits, BLOCK_M, BLOCK_C)
    return keep


@triton.jit
def reciprocal_std(var, eps):
    """1/√(var + eps), both operations correctly rounded."""
    return tl.div_rn(tl.full(var.shape, 1.0, tl.float32), tl.sqrt_rn(var + eps))


# ---- statistics


@triton.jit
def _norm_stats_kernel(
    z_ptr,
    mean_ptr,
    m2_ptr,
    rest_ptr,
    M,
    C,
    rows,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_c, i_t = tl.program_id(0), tl.program_id(1)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    begin = i_t * rows
    left = tl.minimum(M - begin, rows)

    # differences to one value of the tile are exact, or nearly: the mean's size drops out
    pilot = vector(z_ptr + begin.to(tl.int64) * C, o_c, m_c)
    # Chan's rule value by value at each place of the block: the loop needs no other thread's
    means = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    m2s = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in tl.range(0, left, BLOCK_M, num_stages=3):
        o, inside = offsets(left - start, i_c, C, BLOCK_M, BLOCK_C)
        b_z = block(z_ptr, begin + start, o, inside, C) - pilot[None, :]
        delta = tl.where(inside, b_z - means, 0.0)
        means += delta * (BLOCK_M / (start + BLOCK_M))
        m2s += delta * (b_z - means)

    # the places joined; what is left of their means corrects the first mean's rounding
    n = left.to(tl.float32)
    ns = (tl.maximum(left - tl.arange(0, BLOCK_M) + BLOCK_M - 1, 0) // BLOCK_M).to(tl.float32)
    mean = tl.sum(means * ns[:, None], axis=0) / n
    means -= mean[None, :]
    shift = tl.sum(means * ns[:, None], axis=0) / n
    means -= shift[None, :]
    m2 = tl.sum(m2s + means * means * ns[:, None], axis=0)
    mean += shift
    whole = pilot + mean
    o_out = i_t * C + o_c
    tl.store(mean_ptr + o_out, whole, mask=m_c)
    tl.store(rest_ptr + o_out, (pilot - whole) + mean, mask=m_c)
    tl.store(m2_ptr + o_out, m2, mask=m_c)


def norm_stats(z: Tensor, tile: NormTile | None = None) -> TileStats:
    """Mean and M2 = Σ(z − mean)² of ``[N, C, H, W]`` per channel, in up to 512 tiles."""
    m, c = pixels_channels(z)
    tile = tile or default_tile(m, c, z.element_size(), z.device, loads=2, warps=8)
    rows = rows_per_program(m, c, tile, z.device)
    tiles = triton.cdiv(m, rows)
    mean, m2, rest = torch.empty(3, tiles, c, dtype=torch.float32, device=z.device).unbind()
    launch(
        _norm_stats_kernel,
        (triton.cdiv(c, tile.block_c), tiles),
        *(z, mean, m2, rest, m, c, rows),
        reads=(z,),
        writes=(mean, m2, rest),
        BLOCK_M=tile.block_m,
        BLOCK_C=tile.block_c,
        num_warps=tile.warps,
    )
    return TileStats(mean, m2, rows, m, rest)


@triton.jit
def _merge_stats_kernel(
    mean_ptr,
    m2_ptr,
    rest_ptr,
    out_mean_ptr,
    out_m2_ptr,
    T,
    C,
    rows,
    count,
    group,
    HAS_REST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_c, i_g = tl.program_id(0), tl.program_id(1)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    begin = i_g * group
    end = tl.minimum(begin + group, T)
    mean = tl.zeros([BLOCK_C], tl.float64)
    m2 = tl.zeros([BLOCK_C], tl.float64)
    n = tl.full([BLOCK_C], 0, tl.float64)
    for i_t in range(0, end - begin, BLOCK_T):
        o_t = begin + i_t + tl.arange(0, BLOCK_T)
        inside = (o_t < end)[:, None] & m_c[None, :]
        o = o_t.to(tl.int64)[:, None] * C + o_c[None, :]
        left = count - o_t.to(tl.int64) * rows
        b_n = tl.where(o_t < end, tl.minimum(left, rows), 0).to(tl.float64)
        # as differences to the first tile's mean: exactly 0 in a constant channel
        p_pilot = mean_ptr + (begin + i_t).to(tl.int64) * C + o_c
        pilot = tl.load(p_pilot, mask=m_c, other=0.0).to(tl.float64)
        delta = tl.load(mean_ptr + o, mask=inside, other=0.0).to(tl.float64) - pilot[None, :]
        if HAS_REST:
            delta += tl.load(rest_ptr + o, mask=inside, other=0.0).to(tl.float64)
        b_m2 = tl.load(m2_ptr + o, mask=inside, other=0.0).to(tl.float64)
        n_b = tl.sum(b_n, axis=0)
        shift = tl.sum(delta * b_n[:, None], axis=0) / n_b
        delta -= shift[None, :]
        m2_b = tl.sum(b_m2 + delta * delta * b_n[:, None], axis=0)
        mean, m2, n = chan_merge(mean, m2, n, pilot + shift, m2_b, n_b)

    o_out = i_g * C + o_c
    tl.store(out_mean_ptr + o_out, mean.to(out_mean_ptr.dtype.element_ty), mask=m_c)
    tl.store(out_m2_ptr + o_out, m2.to(out_m2_ptr.dtype.element_ty), mask=m_c)


def merge_stats(tiles: TileStats, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(mean, M2), each ``[C]`` of dtype, by Chan's rule in float64, the tiles in their order.

    Many tiles are merged in groups first, side by side.
    """
    mean, m2, rows, count, rest = tiles
    t, c = mean.shape
    groups = triton.cdiv(t, MERGE_GROUP) if t > 2 * MERGE_GROUP else 1
    group = MERGE_GROUP if groups > 1 else max(1, t)
    out = {"dtype": torch.float64 if groups > 1 else dtype, "device": mean.device}
    # apart: ops return them, and an op's outputs may not share memory
    out_mean, out_m2 = (torch.empty(groups, c, **out) for _ in range(2))
    launch(
        _merge_stats_kernel,
        (triton.cdiv(c, 8), groups),
        *(mean, m2, mean if rest is None else rest, out_mean, out_m2),
        *(t, c, rows, count, group),
        reads=(mean, m2, rest),
        writes=(out_mean, out_m2),
        HAS_REST=rest is not None,
        BLOCK_T=MERGE_GROUP if t > 32 else 32,
        BLOCK_C=8,
        num_warps=4 if t > 32 else 1,
    )
    if groups > 1:
        return merge_stats(TileStats(out_mean, out_m2, rows * group, count), dtype)
    return out_mean[0], out_m2[0]


@triton.jit
def _merge_sums_kernel(
    sums_ptr, out_ptr, T, C, group, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    i_c, i_g, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    begin = i_g * group
    end = tl.minimum(begin + group, T)
    p_sums = sums_ptr + i_s.to(tl.int64) * T * C
    total = tl.zeros([BLOCK_C], tl.float64)
    for i_t in range(0, end - begin, BLOCK_T):
        o_t = begin + i_t + tl.arange(0, BLOCK_T)
        inside = (o_t < end)[:, None] & m_c[None, :]
        o = o_t.to(tl.int64)[:, None] * C + o_c[None, :]
        b_sums = tl.load(p_sums + o, mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(b_sums, axis=0)
    p_out = out_ptr + (i_s * tl.num_programs(1) + i_g) * C + o_c
    tl.store(p_out, total.to(out_ptr.dtype.element_ty), mask=m_c)


def merge_sums(sums: TileSums) -> Tensor:
    """``[S, C]`` float32: each sum over the tiles, in float64 and in their order."""
    s, t, c = sums.sums.shape
    groups = triton.cdiv(t, MERGE_GROUP) if t > 2 * MERGE_GROUP else 1
    dtype = torch.float64 if groups > 1 else torch.float32
    out = torch.empty(s, groups, c, dtype=dtype, device=sums.sums.device)
    launch(
        _merge_sums_kernel,
        (triton.cdiv(c, 8), groups, s),
        *(sums.sums, out, t, c, MERGE_GROUP if groups > 1 else max(1, t)),
        reads=(sums.sums,),
        writes=(out,),
        BLOCK_T=MERGE_GROUP if t > 32 else 32,
        BLOCK_C=8,
        num_warps=4 if t > 32 else 1,
    )
    return merge_sums(TileSums(out)) if groups > 1 else out[:, 0]


# ---- per-channel vectors


@triton.jit
def _norm_prepare_kernel(
    var_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    beta_ptr,
    rstd_ptr,
    C,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    rstd = reciprocal_std(vector(var_ptr, o_c, m_c), eps)
    scale = rstd
    if HAS_WEIGHT:
        scale = vector(weight_ptr, o_c, m_c) * rstd
    beta = tl.zeros([BLOCK_C], tl.float32)
    if HAS_BIAS:
        beta = vector(bias_ptr, o_c, m_c)
    tl.store(rstd_ptr + o_c, rstd, mask=m_c)
    tl.store(scale_ptr + o_c, scale, mask=m_c)
    tl.store(beta_ptr + o_c, beta, mask=m_c)


def norm_prepare(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Affine, Tensor]:
    """(affine, rstd): rstd = 1/√(var + eps), scale = weight·rstd, beta = bias, all float32."""
    mean, var = mean.float(), var.float()
    (c,) = var.shape
    scale, beta, rstd = torch.empty(3, c, dtype=torch.float32, device=var.device).unbind()
    launch(
        _norm_prepare_kernel,
        (triton.cdiv(c, 128),),
        var,
        var if weight is None else weight,
        var if bias is None else bias,
        *(scale, beta, rstd, c, float(eps)),
        reads=(var, weight, bias),
        writes=(scale, beta, rstd),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        BLOCK_C=128,
        num_warps=4,
    )
    return Affine(mean, scale, beta), rstd


@triton.jit
def coefficients(scale, rstd, sum_du, sum_du_centred, n):
    """(Σdu·x̂, coef_z, coef_1) of n values a channel."""
    sum_du_xhat = rstd * sum_du_centred
    share = scale / n
    return sum_du_xhat, -(share * rstd * sum_du_xhat), -(share * sum_du)


@triton.jit
def _norm_coefficients_kernel(
    scale_ptr,
    rstd_ptr,
    sum_du_ptr,
    sum_du_centred_ptr,
    sum_du_xhat_ptr,
    coef_z_ptr,
    coef_1_ptr,
    C,
    n,
    BLOCK_C: tl.constexpr,
):
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    sum_du_xhat, coef_z, coef_1 = coefficients(
        vector(scale_ptr, o_c, m_c),
        vector(rstd_ptr, o_c, m_c),
        vector(sum_du_ptr, o_c, m_c),
        vector(sum_du_centred_ptr, o_c, m_c),
        n,
    )
    tl.store(sum_du_xhat_ptr + o_c, sum_du_xhat, mask=m_c)
    tl.store(coef_z_ptr + o_c, coef_z, mask=m_c)
    tl.store(coef_1_ptr + o_c, coef_1, mask=m_c)


def norm_coefficients(
    scale: Tensor, rstd: Tensor, sum_du: Tensor, sum_du_centred: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(Σdu·x̂, coef_z, coef_1) of n values a channel, from Σdu and Σdu·(z − mean).

    Σdu·x̂ = rstd·Σdu·(z − mean), coef_z = −scale·rstd·Σdu·x̂/n, coef_1 = −scale·Σdu/n.
    """
    (c,) = scale.shape
    sum_du_xhat, coef_z, coef_1 = torch.empty(
        3, c, dtype=torch.float32, device=scale.device
    ).unbind()
    launch(
        _norm_coefficients_kernel,
        (triton.cdiv(c, 128),),
        *(scale, rstd, sum_du, sum_du_centred, sum_du_xhat, coef_z, coef_1),
        *(c, float(max(1, n))),
        reads=(scale, rstd, sum_du, sum_du_centred),
        writes=(sum_du_xhat, coef_z, coef_1),
        BLOCK_C=128,
        num_warps=4,
    )
    return sum_du_xhat, coef_z, coef_1


# ---- forward


@triton.jit
def _norm_apply_kernel(
    z_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    r_ptr,
    r_mean_ptr,
    r_scale_ptr,
    r_beta_ptr,
    y_ptr,
    mask_ptr,
    M,
    C,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    ADD_AFTER_ACT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks_c = tl.cdiv(C, BLOCK_C)
    i_m, i_c = tl.program_id(0) // blocks_c, tl.program_id(0) % blocks_c
    row = i_m * BLOCK_M
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o, inside = offsets(M - row, i_c, C, BLOCK_M, BLOCK_C)

    b_z = block(z_ptr, row, o, inside, C)
    mean, scale = vector(mean_ptr, o_c, m_c), vector(scale_ptr, o_c, m_c)
    beta = vector(beta_ptr, o_c, m_c)
    b_y = affine(b_z, mean[None, :], scale[None, :], beta[None, :])
    if RELU and (ADD_AFTER_ACT or RESIDUAL == "none"):
        b_y = relu(b_y)
    if RESIDUAL != "none":
        b_r = block(r_ptr, row, o, inside, C)
        if RESIDUAL == "affine":
            r_mean, r_scale = vector(r_mean_ptr, o_c, m_c), vector(r_scale_ptr, o_c, m_c)
            r_beta = vector(r_beta_ptr, o_c, m_c)
            b_r = affine(b_r, r_mean[None, :], r_scale[None, :], r_beta[None, :])
        b_y += b_r
        if RELU and not ADD_AFTER_ACT:
            b_y = relu(b_y)
    b_y = b_y.to(y_ptr.dtype.element_ty)
    put(y_ptr, row, o, inside, C, b_y)
    if HAS_MASK:
        keep = positive(b_y.to(tl.float32))
        put_mask(mask_ptr, row, M - row, i_c, C, keep, BLOCK_M, BLOCK_C)


def norm_apply(
    z: Tensor,
    affine: Affine,
    residual: Tensor | None = None,
    residual_affine: Affine | None = None,
    relu: bool = True,
    add_after_act: bool = False,
    out: Tensor | None = None,
    mask: Tensor | None = None,
    tile: NormTile | None = None,
) -> Tensor:
    """y = act(u + r), or act(u) + r, u = affine(z); r is the residual, or its affine.

    ``out`` may be z or the residual. ``mask`` receives the bits of y's positivity, y as stored.
    """
    m, c = pixels_channels(z)
    check_mask(c, mask)
    tile = tile or default_tile(m, c, z.element_size(), z.device)
    y = empty_nhwc(z.shape, z) if out is None else out
    if residual is None:
        kind = "none"
    else:
        kind = "raw" if residual_affine is None else "affine"
    launch(
        _norm_apply_kernel,
        (triton.cdiv(m, tile.block_m) * triton.cdiv(c, tile.block_c),),
        *(z, *affine, z if residual is None else residual, *(residual_affine or affine)),
        *(y, y if mask is None else mask, m, c),
        reads=(z, *affine, residual, *(residual_affine or ())),
        writes=(y, mask),
        RESIDUAL=kind,
        RELU=relu,
        ADD_AFTER_ACT=add_after_act and residual is not None,
        HAS_MASK=mask is not None,
        BLOCK_M=tile.block_m,
        BLOCK_C=tile.block_c,
        num_warps=tile.warps,
    )
    return y


# ---- backward


@triton.jit
def _norm_backward_reduce_kernel(
    dy_ptr,
    dy2_ptr,
    z_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    mask_ptr,
    z2_ptr,
    mean2_ptr,
    du_ptr,
    activation_ptr,
    sums_ptr,
    M,
    C,
    rows,
    HAS_DY2: tl.constexpr,
    MASK: tl.constexpr,
    HAS_Z2: tl.constexpr,
    HAS_DU: tl.constexpr,
    HAS_ACTIVATION: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_c, i_t = tl.program_id(0), tl.program_id(1)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    begin = i_t * rows
    left = tl.minimum(M - begin, rows)

    mean, scale = vector(mean_ptr, o_c, m_c), vector(scale_ptr, o_c, m_c)
    beta = vector(beta_ptr, o_c, m_c)
    mean2 = vector(mean2_ptr, o_c, m_c)
    # summed per place in the block, so that the loop needs no exchange between threads
    sum_du = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_du_z = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_du_z2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in tl.range(0, left, BLOCK_M, num_stages=3):
        row = begin + start
        o, inside = offsets(left - start, i_c, C, BLOCK_M, BLOCK_C)
        b_du = block(dy_ptr, row, o, inside, C)
        b_z = block(z_ptr, row, o, inside, C)
        if HAS_DY2:
            b_du += block(dy2_ptr, row, o, inside, C)
        if MASK != "none":
            keep = passed(
                b_z, mean, scale, beta, mask_ptr, row, left - start, i_c, C, MASK, BLOCK_M, BLOCK_C
            )
            b_du = tl.where(keep, b_du, 0.0)
        if HAS_DU:
            b_stored = b_du.to(du_ptr.dtype.element_ty)
            put(du_ptr, row, o, inside, C, b_stored)
            b_du = b_stored.to(tl.float32)
        if HAS_ACTIVATION:
            b_a = affine(b_z, mean[None, :], scale[None, :], beta[None, :])
            if RELU:
                b_a = relu(b_a)
            put(activation_ptr, row, o, inside, C, b_a)
        sum_du += b_du
        sum_du_z += b_du * (b_z - mean[None, :])
        if HAS_Z2:
            sum_du_z2 += b_du * (block(z2_ptr, row, o, inside, C) - mean2[None, :])

    o_out = i_t * C + o_c
    step = tl.num_programs(1) * C
    tl.store(sums_ptr + o_out, tl.sum(sum_du, axis=0), mask=m_c)
    tl.store(sums_ptr + step + o_out, tl.sum(sum_du_z, axis=0), mask=m_c)
    if HAS_Z2:
        tl.store(sums_ptr + 2 * step + o_out, tl.sum(sum_du_z2, axis=0), mask=m_c)


def norm_backward_reduce(
    dy: Tensor,
    z: Tensor,
    affine: Affine,
    *,
    dy2: Tensor | None = None,
    y: Tensor | None = None,
    mask: Tensor | None = None,
    relu: bool = True,
    activation: Tensor | None = None,
    du: Tensor | None = None,
    z2: Tensor | None = None,
    mean2: Tensor | None = None,
    tile: NormTile | None = None,
) -> TileSums:
    """Σdu, Σdu·(z − mean) and, with z2, Σdu·(z2 − mean2), per tile of pixels.

    du = dy + dy2 where the ReLU's mask holds: mask's bits, else y > 0, else affine(z) > 0. It is
    written to ``du`` if given, and the sums are then those of what was stored; du may be dy or dy2.
    ``activation`` receives act(affine(z)).
    """
    m, c = pixels_channels(z)
    tile = tile or default_tile(m, c, z.element_size(), z.device, loads=2, warps=8)
    rows = rows_per_program(m, c, tile, z.device)
    tiles = triton.cdiv(m, rows)
    source, keeper = mask_source(c, y, mask, relu)
    sums = torch.empty(2 if z2 is None else 3, tiles, c, dtype=torch.float32, device=z.device)
    launch(
        _norm_backward_reduce_kernel,
        (triton.cdiv(c, tile.block_c), tiles),
        *(dy, dy if dy2 is None else dy2, z, *affine, z if keeper is None else keeper),
        *(z if z2 is None else z2, affine.mean if mean2 is None else mean2),
        *(dy if du is None else du, z if activation is None else activation, sums, m, c, rows),
        reads=(dy, dy2, z, *affine, keeper, z2, mean2),
        writes=(du, activation, sums),
        HAS_DY2=dy2 is not None,
        MASK=source,
        HAS_Z2=z2 is not None,
        HAS_DU=du is not None,
        HAS_ACTIVATION=activation is not None,
        RELU=relu,
        BLOCK_M=tile.block_m,
        BLOCK_C=tile.block_c,
        num_warps=tile.warps,
    )
    return TileSums(sums)


@triton.jit
def _norm_backward_apply_kernel(
    dy_ptr,
    z_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    mask_ptr,
    coef_z_ptr,
    coef_1_ptr,
    dz_ptr,
    du_ptr,
    z2_ptr,
    mean2_ptr,
    scale2_ptr,
    coef_z2_ptr,
    coef_12_ptr,
    dz2_ptr,
    M,
    C,
    MASK: tl.constexpr,
    HAS_COEF_Z: tl.constexpr,
    HAS_COEF_1: tl.constexpr,
    HAS_DU: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    HAS_COEF_Z2: tl.constexpr,
    HAS_COEF_12: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks_c = tl.cdiv(C, BLOCK_C)
    i_m, i_c = tl.program_id(0) // blocks_c, tl.program_id(0) % blocks_c
    row = i_m * BLOCK_M
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o, inside = offsets(M - row, i_c, C, BLOCK_M, BLOCK_C)

    mean, scale = vector(mean_ptr, o_c, m_c), vector(scale_ptr, o_c, m_c)
    b_du = block(dy_ptr, row, o, inside, C)
    b_z = b_du
    if HAS_COEF_Z or MASK == "affine":
        b_z = block(z_ptr, row, o, inside, C)
    if MASK != "none":
        beta = vector(beta_ptr, o_c, m_c)
        keep = passed(
            b_z, mean, scale, beta, mask_ptr, row, M - row, i_c, C, MASK, BLOCK_M, BLOCK_C
        )
        b_du = tl.where(keep, b_du, 0.0)
    b_dz = b_du * scale[None, :]
    if HAS_COEF_Z:
        b_dz += (b_z - mean[None, :]) * vector(coef_z_ptr, o_c, m_c)[None, :]
    if HAS_COEF_1:
        b_dz += vector(coef_1_ptr, o_c, m_c)[None, :]
    if HAS_SECOND:
        b_dz2 = b_du * vector(scale2_ptr, o_c, m_c)[None, :]
        if HAS_COEF_Z2:
            b_z2 = block(z2_ptr, row, o, inside, C) - vector(mean2_ptr, o_c, m_c)[None, :]
            b_dz2 += b_z2 * vector(coef_z2_ptr, o_c, m_c)[None, :]
        if HAS_COEF_12:
            b_dz2 += vector(coef_12_ptr, o_c, m_c)[None, :]
        put(dz2_ptr, row, o, inside, C, b_dz2)
    if HAS_DU:
        put(du_ptr, row, o, inside, C, b_du)
    put(dz_ptr, row, o, inside, C, b_dz)


def norm_backward_apply(
    dy: Tensor,
    z: Tensor,
    affine: Affine,
    *,
    y: Tensor | None = None,
    relu: bool = True,
    coef_z: Tensor | None = None,
    coef_1: Tensor | None = None,
    dz: Tensor,
    du: Tensor | None = None,
    second: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor] | None = None,
    tile: NormTile | None = None,
) -> None:
    """Writes dz = scale·du + coef_z·(z − mean) + coef_1, du = dy behind the ReLU's mask.

    Also du itself if asked. ``second``: (z, mean, scale, coef_z, coef_1, dz) of another norm with
    the same du. A coefficient that is None is 0; relu=False takes dy as it is. Every output may be
    one of the tensors read.
    """
    m, c = pixels_channels(z)
    tile = tile or default_tile(m, c, z.element_size(), z.device)
    source, keeper = mask_source(c, y, None, relu)
    z2, mean2, scale2, coef_z2, coef_12, dz2 = second or (z, *affine[:2], None, None, dz)
    used = () if second is None else (None if coef_z2 is None else z2, *second[1:5])
    launch(
        _norm_backward_apply_kernel,
        (triton.cdiv(m, tile.block_m) * triton.cdiv(c, tile.block_c),),
        *(dy, z, *affine, z if keeper is None else keeper),
        *(affine.mean if coef is None else coef for coef in (coef_z, coef_1)),
        *(dz, dz if du is None else du, z2, mean2, scale2),
        *(affine.mean if coef is None else coef for coef in (coef_z2, coef_12)),
        *(dz2, m, c),
        reads=(
            *(dy, None if coef_z is None and source != "affine" else z),
            *(*affine, keeper, coef_z, coef_1, *used),
        ),
        writes=(dz, du, None if second is None else dz2),
        MASK=source,
        HAS_COEF_Z=coef_z is not None,
        HAS_COEF_1=coef_1 is not None,
        HAS_DU=du is not None,
        HAS_SECOND=second is not None,
        HAS_COEF_Z2=coef_z2 is not None,
        HAS_COEF_12=coef_12 is not None,
        BLOCK_M=tile.block_m,
        BLOCK_C=tile.block_c,
        num_warps=tile.warps,
    )


# ---- one program per few channels, which holds all their pixels: what is read is read once


def persistent_tile(m: int, itemsize: int) -> NormTile:
    """All m pixels × 32 bytes of channels."""
    block_m = triton.next_power_of_2(max(1, m))
    return NormTile(block_m, 32 // itemsize, max(1, min(16, block_m // 32)))


def persistent_fits(z: Tensor) -> bool:
    """Whether the one-read forms take z."""
    return 0 < pixels_channels(z)[0] <= PERSISTENT_PIXELS


@triton.jit
def _norm_forward_persistent_kernel(
    z_ptr,
    weight_ptr,
    bias_ptr,
    r_ptr,
    y_ptr,
    mask_ptr,
    mean_ptr,
    var_ptr,
    M,
    C,
    eps,
    n,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    ADD_AFTER_ACT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_c, row = tl.program_id(0), tl.program_id(1)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o, inside = offsets(M, i_c, C, BLOCK_M, BLOCK_C)
    b_z = block(z_ptr, row, o, inside, C)
    if HAS_RESIDUAL:
        b_r = block(r_ptr, row, o, inside, C)

    pilot = vector(z_ptr, o_c, m_c)
    offset, m2 = centred(b_z - pilot[None, :], inside, n)
    mean = pilot + offset
    var = tl.div_rn(m2, tl.full([BLOCK_C], 1.0, tl.float32) * n)
    tl.store(mean_ptr + o_c, mean, mask=m_c)
    tl.store(var_ptr + o_c, var, mask=m_c)

    scale = reciprocal_std(var, eps)
    if HAS_WEIGHT:
        scale = vector(weight_ptr, o_c, m_c) * scale
    beta = tl.zeros([BLOCK_C], tl.float32)
    if HAS_BIAS:
        beta = vector(bias_ptr, o_c, m_c)
    b_y = affine(b_z, mean[None, :], scale[None, :], beta[None, :])
    if RELU and (ADD_AFTER_ACT or not HAS_RESIDUAL):
        b_y = relu(b_y)
    if HAS_RESIDUAL:
        b_y += b_r
        if RELU and not ADD_AFTER_ACT:
            b_y = relu(b_y)
    b_y = b_y.to(y_ptr.dtype.element_ty)
    put(y_ptr, row, o, inside, C, b_y)
    if HAS_MASK:
        put_mask(mask_ptr, row, M, i_c, C, positive(b_y.to(tl.float32)), BLOCK_M, BLOCK_C)


def norm_forward_persistent(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = True,
    add_after_act: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, var): statistics, ``norm_prepare`` and ``norm_apply`` in one pass over z.

    Needs ``persistent_fits(z)``. var is M2/M, biased.
    """
    m, c = pixels_channels(z)
    check_mask(c, mask)
    tile = persistent_tile(m, z.element_size())
    y = empty_nhwc(z.shape, z)
    # apart: ops return them, and an op's outputs may not share memory
    mean, var = (torch.empty(c, dtype=torch.float32, device=z.device) for _ in range(2))
    launch(
        _norm_forward_persistent_kernel,
        (triton.cdiv(c, tile.block_c), 1),
        *(z, mean if weight is None else weight, mean if bias is None else bias),
        *(z if residual is None else residual, y, y if mask is None else mask, mean, var),
        *(m, c, float(eps), float(m)),
        reads=(z, weight, bias, residual),
        writes=(y, mask, mean, var),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        RELU=relu,
        ADD_AFTER_ACT=add_after_act and residual is not None,
        HAS_MASK=mask is not None,
        BLOCK_M=tile.block_m,
        BLOCK_C=tile.block_c,
        num_warps=tile.warps,
    )
    return y, mean, var


@triton.jit
def _norm_backward_persistent_kernel(
    dy_ptr,
    dy2_ptr,
    z_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    rstd_ptr,
    mask_ptr,
    du_ptr,
    activation_ptr,
    dz_ptr,
    sum_du_ptr,
    sum_du_xhat_ptr,
    M,
    C,
    n,
    HAS_DY2: tl.constexpr,
    MASK: tl.constexpr,
    HAS_DU: tl.constexpr,
    HAS_ACTIVATION: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_c, row = tl.program_id(0), tl.program_id(1)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o, inside = offsets(M, i_c, C, BLOCK_M, BLOCK_C)
    b_du = block(dy_ptr, row, o, inside, C)
    b_z = block(z_ptr, row, o, inside, C)
    mean, scale = vector(mean_ptr, o_c, m_c), vector(scale_ptr, o_c, m_c)
    beta = vector(beta_ptr, o_c, m_c)
    if HAS_DY2:
        b_du += block(dy2_ptr, row, o, inside, C)
    if MASK != "none":
        keep = passed(b_z, mean, scale, beta, mask_ptr, row, M, i_c, C, MASK, BLOCK_M, BLOCK_C)
        b_du = tl.where(keep, b_du, 0.0)
    if HAS_DU:
        b_stored = b_du.to(du_ptr.dtype.element_ty)
        put(du_ptr, row, o, inside, C, b_stored)
        b_du = b_stored.to(tl.float32)
    if HAS_ACTIVATION:
        b_a = affine(b_z, mean[None, :], scale[None, :], beta[None, :])
        if RELU:
            b_a = relu(b_a)
        put(activation_ptr, row, o, inside, C, b_a)

    b_z -= mean[None, :]
    sum_du = tl.sum(b_du, axis=0)
    sum_du_xhat, coef_z, coef_1 = coefficients(
        scale, vector(rstd_ptr, o_c, m_c), sum_du, tl.sum(b_du * b_z, axis=0), n
    )
    tl.store(sum_du_ptr + o_c, sum_du, mask=m_c)
    tl.store(sum_du_xhat_ptr + o_c, sum_du_xhat, mask=m_c)
    b_dz = b_du * scale[None, :] + b_z * coef_z[None, :] + coef_1[None, :]
    put(dz_ptr, row, o, inside, C, b_dz)


def norm_backward_persistent(
    dy: Tensor,
    z: Tensor,
    affine: Affine,
    rstd: Tensor,
    *,
    dy2: Tensor | None = None,
    y: Tensor | None = None,
    mask: Tensor | None = None,
    relu: bool = True,
    du: Tensor | None = None,
    activation: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, Σdu, Σdu·x̂) with batch statistics: both backward passes in one over dy and z.

    Needs ``persistent_fits(z)``. Arguments as in ``norm_backward_reduce``.
    """
    m, c = pixels_channels(z)
    tile = persistent_tile(m, z.element_size())
    source, keeper = mask_source(c, y, mask, relu)
    dz = empty_nhwc(z.shape, z)
    # apart: ops return them, and an op's outputs may not share memory
    sum_du, sum_du_xhat = (torch.empty(c, dtype=torch.float32, device=z.device) for _ in range(2))
    launch(
        _norm_backward_persistent_kernel,
        (triton.cdiv(c, tile.block_c), 1),
        *(dy, dy if dy2 is None else dy2, z, *affine, rstd, z if keeper is None else keeper),
        *(dz if du is None else du, dz if activation is None else activation, dz),
        *(sum_du, sum_du_xhat, m, c, float(m)),
        reads=(dy, dy2, z, *affine, rstd, keeper),
        writes=(du, activation, dz, sum_du, sum_du_xhat),
        HAS_DY2=dy2 is not None,
        MASK=source,
        HAS_DU=du is not None,
        HAS_ACTIVATION=activation is not None,
        RELU=relu,
        BLOCK_M=tile.block_m,
        BLOCK_C=tile.block_c,
        num_warps=tile.warps,
    )
    return dz, sum_du, sum_du_xhat

"""The stem's norm, ReLU and max-pool in one pass each way; the activation is never stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfast.backends.interface import Affine, empty_nhwc
from resfast.kernels.launch import launch
from resfast.kernels.math import affine, positive, relu
from resfast.kernels.norm import (
    TileSums,
    block,
    default_tile,
    offsets,
    pixels_channels,
    put,
    rows_per_program,
    vector,
)
from resfast.kernels.tiles import NormTile


@triton.jit
def _norm_apply_max_pool_kernel(
    z_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    y_ptr,
    index_ptr,
    M,
    C,
    H,
    W,
    P,
    Q,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks_c = tl.cdiv(C, BLOCK_C)
    i_m, i_c = tl.program_id(0) // blocks_c, tl.program_id(0) % blocks_c
    row = i_m * BLOCK_M
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o, inside = offsets(M - row, i_c, C, BLOCK_M, BLOCK_C)
    o_m = row + tl.arange(0, BLOCK_M)
    o_n, o_h = o_m // (P * Q), o_m // Q % P * STRIDE - PADDING
    o_w = o_m % Q * STRIDE - PADDING
    m_m = o_m - row < M - row

    mean, scale = vector(mean_ptr, o_c, m_c), vector(scale_ptr, o_c, m_c)
    beta = vector(beta_ptr, o_c, m_c)
    best = tl.full([BLOCK_M, BLOCK_C], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK_M, BLOCK_C], tl.int32)
    for r in tl.static_range(KERNEL):
        for s in tl.static_range(KERNEL):
            h, w = o_h + r, o_w + s
            exists = m_m & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            pixel = (o_n.to(tl.int64) * H + h) * W + w
            p_z = z_ptr + pixel[:, None] * C + o_c[None, :]
            b_z = tl.load(p_z, mask=exists[:, None] & m_c[None, :], other=0.0).to(tl.float32)
            b_a = relu(affine(b_z, mean[None, :], scale[None, :], beta[None, :]))
            # the first maximum, but the last NaN, as torch has it
            better = exists[:, None] & ((b_a > best) | (b_a != b_a))
            best = tl.where(better, b_a, best)
            index = tl.where(better, r * KERNEL + s, index)
    put(y_ptr, row, o, inside, C, best)
    put(index_ptr, row, o, inside, C, index)


def norm_apply_max_pool(
    z: Tensor,
    affine: Affine,
    kernel: int,
    stride: int,
    padding: int,
    tile: NormTile | None = None,
) -> tuple[Tensor, Tensor]:
    """(maxpool(relu(affine(z))), uint8 window position r·kernel + s of each maximum).

    Both ``[N, C, P, Q]`` channels_last; the window's first maximum, and NaN above all, count.
    """
    n, c, h, w = z.shape
    p, q = ((size + 2 * padding - kernel) // stride + 1 for size in (h, w))
    y = empty_nhwc((n, c, p, q), z)
    index = empty_nhwc(y.shape, torch.empty(0, dtype=torch.uint8, device=z.device))
    m, _ = pixels_channels(y)
    # half the usual block: a maximum and its place are kept beside what is loaded
    tile = tile or default_tile(m, c, z.element_size(), z.device, loads=2)
    launch(
        _norm_apply_max_pool_kernel,
        (triton.cdiv(m, tile.block_m) * triton.cdiv(c, tile.block_c),),
        *(z, *affine, y, index, m, c, h, w, p, q),
        reads=(z, *affine),
        writes=(y, index),
        KERNEL=kernel,
        STRIDE=stride,
        PADDING=padding,
        BLOCK_M=tile.block_m,
        BLOCK_C=tile.block_c,
        num_warps=tile.warps,
    )
    return y, index


@triton.jit
def _unpooled(
    dy_ptr,
    index_ptr,
    o_m,
    m_m,
    o_c,
    m_c,
    C,
    H,
    W,
    P,
    Q,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[BLOCK_M, BLOCK_C]: dy of the windows whose maximum each pixel of z was."""
    REACH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    h, w = o_m // W % H + PADDING, o_m % W + PADDING
    first = (o_m // (H * W)).to(tl.int64) * P
    b_da = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for i in tl.static_range(REACH):
        for j in tl.static_range(REACH):
            # the windows in ascending order, as a loop over them would add
            p, q = h // STRIDE - (REACH - 1 - i), w // STRIDE - (REACH - 1 - j)
            r, s = h - p * STRIDE, w - q * STRIDE
            exists = m_m & (p >= 0) & (p < P) & (q >= 0) & (q < Q) & (r < KERNEL) & (s < KERNEL)
            o = ((first + p) * Q + q)[:, None] * C + o_c[None, :]
            inside = exists[:, None] & m_c[None, :]
            b_index = tl.load(index_ptr + o, mask=inside, other=255).to(tl.int32)
            b_dy = tl.load(dy_ptr + o, mask=inside, other=0.0).to(tl.float32)
            b_da += tl.where(inside & (b_index == (r * KERNEL + s)[:, None]), b_dy, 0.0)
    return b_da


@triton.jit
def _norm_max_pool_backward_reduce_kernel(
    dy_ptr,
    z_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    index_ptr,
    sums_ptr,
    M,
    C,
    H,
    W,
    P,
    Q,
    rows,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
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
    sum_du = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_du_z = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, left, BLOCK_M):
        row = begin + start
        o, inside = offsets(left - start, i_c, C, BLOCK_M, BLOCK_C)
        b_z = block(z_ptr, row, o, inside, C)
        o_m = tl.arange(0, BLOCK_M)
        b_du = _unpooled(
            dy_ptr,
            index_ptr,
            row + o_m,
            o_m < left - start,
            o_c,
            m_c,
            C,
            H,
            W,
            P,
            Q,
            KERNEL,
            STRIDE,
            PADDING,
            BLOCK_M,
            BLOCK_C,
        )
        keep = positive(affine(b_z, mean[None, :], scale[None, :], beta[None, :]))
        b_du = tl.where(keep, b_du, 0.0)
        sum_du += b_du
        sum_du_z += b_du * (b_z - mean[None, :])

    o_out = i_t * C + o_c
    tl.store(sums_ptr + o_out, tl.sum(sum_du, axis=0), mask=m_c)
    tl.store(sums_ptr + tl.num_programs(1) * C + o_out, tl.sum(sum_du_z, axis=0), mask=m_c)


def norm_max_pool_backward_reduce(
    dy: Tensor,
    z: Tensor,
    affine: Affine,
    index: Tensor,
    kernel: int,
    stride: int,
    padding: int,
    tile: NormTile | None = None,
) -> TileSums:
    """Σdu, Σdu·(z − mean) per tile of z's pixels.

    du is dy gathered from the windows whose maximum the pixel was, where affine(z) > 0.
    """
    m, c = pixels_channels(z)
    tile = tile or default_tile(m, c, z.element_size(), z.device, loads=1, warps=8)
    rows = rows_per_program(m, c, tile, z.device)
    tiles = triton.cdiv(m, rows)
    sums = torch.empty(2, tiles, c, dtype=torch.float32, device=z.device)
    launch(
        _norm_max_pool_backward_reduce_kernel,
        (triton.cdiv(c, tile.block_c), tiles),
        *(dy, z, *affine, index, sums, m, c, *z.shape[2:], *dy.shape[2:], rows),
        reads=(dy, z, *affine, index),
        writes=(sums,),
        KERNEL=kernel,
        STRIDE=stride,
        PADDING=padding,
        BLOCK_M=tile.block_m,
        BLOCK_C=tile.block_c,
        num_warps=tile.warps,
    )
    return TileSums(sums)


@triton.jit
def _norm_max_pool_backward_apply_kernel(
    dy_ptr,
    z_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    index_ptr,
    coef_z_ptr,
    coef_1_ptr,
    dz_ptr,
    M,
    C,
    H,
    W,
    P,
    Q,
    HAS_COEF_Z: tl.constexpr,
    HAS_COEF_1: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks_c = tl.cdiv(C, BLOCK_C)
    i_m, i_c = tl.program_id(0) // blocks_c, tl.program_id(0) % blocks_c
    row = i_m * BLOCK_M
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o, inside = offsets(M - row, i_c, C, BLOCK_M, BLOCK_C)
    o_m = tl.arange(0, BLOCK_M)

    mean, scale = vector(mean_ptr, o_c, m_c), vector(scale_ptr, o_c, m_c)
    beta = vector(beta_ptr, o_c, m_c)
    b_z = block(z_ptr, row, o, inside, C)
    b_du = _unpooled(
        dy_ptr,
        index_ptr,
        row + o_m,
        o_m < M - row,
        o_c,
        m_c,
        C,
        H,
        W,
        P,
        Q,
        KERNEL,
        STRIDE,
        PADDING,
        BLOCK_M,
        BLOCK_C,
    )
    keep = positive(affine(b_z, mean[None, :], scale[None, :], beta[None, :]))
    b_dz = tl.where(keep, b_du, 0.0) * scale[None, :]
    if HAS_COEF_Z:
        b_dz += (b_z - mean[None, :]) * vector(coef_z_ptr, o_c, m_c)[None, :]
    if HAS_COEF_1:
        b_dz += vector(coef_1_ptr, o_c, m_c)[None, :]
    put(dz_ptr, row, o, inside, C, b_dz)


def norm_max_pool_backward_apply(
    dy: Tensor,
    z: Tensor,
    affine: Affine,
    index: Tensor,
    kernel: int,
    stride: int,
    padding: int,
    coef_z: Tensor | None,
    coef_1: Tensor | None,
    tile: NormTile | None = None,
) -> Tensor:
    """dz = scale·du + coef_z·(z − mean) + coef_1, du as in the reduce pass; None is 0."""
    m, c = pixels_channels(z)
    tile = tile or default_tile(m, c, z.element_size(), z.device, loads=2)
    dz = empty_nhwc(z.shape, z)
    launch(
        _norm_max_pool_backward_apply_kernel,
        (triton.cdiv(m, tile.block_m) * triton.cdiv(c, tile.block_c),),
        *(dy, z, *affine, index),
        *(affine.mean if coef is None else coef for coef in (coef_z, coef_1)),
        *(dz, m, c, *z.shape[2:], *dy.shape[2:]),
        reads=(dy, z, *affine, index, coef_z, coef_1),
        writes=(dz,),
        HAS_COEF_Z=coef_z is not None,
        HAS_COEF_1=coef_1 is not None,
        KERNEL=kernel,
        STRIDE=stride,
        PADDING=padding,
        BLOCK_M=tile.block_m,
        BLOCK_C=tile.block_c,
        num_warps=tile.warps,
    )
    return dz

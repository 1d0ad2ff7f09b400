"""Convolution forward as an implicit matrix product: pixels × output channels over taps × channels.

The norm before it is applied on the way in; on the way out either each tile's statistics are
taken, for the norm after it in training, or that norm itself is applied, in inference.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfast.backends.interface import Affine, ConvGeometry, empty_nhwc
from resfast.kernels.launch import launch
from resfast.kernels.math import affine, centred, relu
from resfast.kernels.norm import TileStats, block, put, vector
from resfast.kernels.tiles import ConvTile, likely


def conv_output_size(
    size: tuple[int, int], g: ConvGeometry, window: tuple[int, int]
) -> tuple[int, int]:
    """(P, Q) from the input's (H, W) and the window's (R, S)."""
    p, q = (
        (i + 2 * pad - d * (k - 1) - 1) // stride + 1
        for i, k, stride, pad, d in zip(size, window, *g[:3], strict=True)
    )
    return p, q


@functools.cache
def _touched(size: int, out: int, window: int, stride: int, padding: int, dilation: int) -> int:
    """How many of ``size`` positions any of ``out`` windows covers."""
    taps = range(0, window * dilation, dilation)
    return len({i * stride - padding + t for i in range(out) for t in taps} & set(range(size)))


@triton.jit
def _finish(
    acc,
    bias_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    r_ptr,
    y_ptr,
    tile_mean_ptr,
    tile_m2_ptr,
    tile_rest_ptr,
    i_m,
    column,
    M,
    K,
    HAS_BIAS: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_REST: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    ADD_AFTER_ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EPILOGUE_N: tl.constexpr,
):
    """Everything after the product, from channel ``column`` on, EPILOGUE_N channels at a time."""
    if BLOCK_N > EPILOGUE_N:
        # in pieces, because a thread that has pixels of all channels needs all their vectors
        halves = tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2])
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        for i in tl.static_range(2):
            _finish(
                left if i == 0 else right,
                *(bias_ptr, mean_ptr, scale_ptr, beta_ptr, r_ptr),
                *(y_ptr, tile_mean_ptr, tile_m2_ptr, tile_rest_ptr),
                *(i_m, column + i * (BLOCK_N // 2), M, K),
                *(HAS_BIAS, HAS_STATS, HAS_REST, HAS_NORM, HAS_RESIDUAL, RELU, ADD_AFTER_ACT),
                *(BLOCK_M, BLOCK_N // 2, EPILOGUE_N),
            )
        return
    row = i_m * BLOCK_M
    o_m, o_n = tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < M - row, o_n < K
    o, inside = o_m[:, None] * K + o_n[None, :], m_m[:, None] & m_n[None, :]
    if HAS_BIAS:
        acc += vector(bias_ptr, o_n, m_n)[None, :]
    if HAS_NORM:
        mean, scale = vector(mean_ptr, o_n, m_n), vector(scale_ptr, o_n, m_n)
        beta = vector(beta_ptr, o_n, m_n)
        acc = affine(acc, mean[None, :], scale[None, :], beta[None, :])
    if RELU and (ADD_AFTER_ACT or not HAS_RESIDUAL):
        acc = relu(acc)
    if HAS_RESIDUAL:
        acc += block(r_ptr, row, o, inside, K)
        if RELU and not ADD_AFTER_ACT:
            acc = relu(acc)
    b_y = acc.to(y_ptr.dtype.element_ty)
    put(y_ptr, row, o, inside, K, b_y)
    if HAS_STATS:
        b_z = b_y.to(tl.float32)
        n = tl.minimum(M - row, BLOCK_M).to(tl.float32)
        mean, m2 = centred(b_z, m_m[:, None], n)
        o_t = i_m.to(tl.int64) * K + o_n
        tl.store(tile_mean_ptr + o_t, mean, mask=m_n)
        tl.store(tile_m2_ptr + o_t, m2, mask=m_n)
        if HAS_REST:
            rest = tl.sum(tl.where(m_m[:, None], b_z - mean[None, :], 0.0), axis=0) / n
            tl.store(tile_rest_ptr + o_t, rest, mask=m_n)


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q"])
def _conv_fprop_kernel(
    x_ptr,
    x_mean_ptr,
    x_scale_ptr,
    x_beta_ptr,
    w_ptr,
    bias_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    r_ptr,
    y_ptr,
    tile_mean_ptr,
    tile_m2_ptr,
    tile_rest_ptr,
    M,
    C,
    K,
    H,
    W,
    P,
    Q,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    EVEN_C: tl.constexpr,
    HAS_PROLOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_REST: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    ADD_AFTER_ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EPILOGUE_N: tl.constexpr,
):
    # programs that run together share their pixels in L2
    blocks_n = tl.cdiv(K, BLOCK_N)
    i_m, i_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    row = i_m * BLOCK_M
    # past the end the last pixel and channel are read again: the loop then needs no mask for them
    o_m = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1)
    o_n = tl.minimum(i_n * BLOCK_N + tl.arange(0, BLOCK_N), K - 1)
    o_k = tl.arange(0, BLOCK_K)

    POINTWISE: tl.constexpr = (
        R * S == 1 and STRIDE_H == 1 and STRIDE_W == 1 and PAD_H == 0 and PAD_W == 0
    )
    PADDED: tl.constexpr = PAD_H > 0 or PAD_W > 0
    if POINTWISE:
        pixel = o_m.to(tl.int64)
    else:
        h = (o_m // Q) % P * STRIDE_H - PAD_H
        w = o_m % Q * STRIDE_W - PAD_W
        pixel = (o_m // Q // P).to(tl.int64) * H * W + h * W + w
    p_x = x_ptr + pixel[:, None] * C + o_k[None, :]
    p_w = w_ptr + o_n.to(tl.int64)[None, :] * (R * S * C) + o_k[:, None]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(tl.cdiv(C, BLOCK_K) * (R * S)):
        c = step // (R * S) * BLOCK_K
        r, s = step % (R * S) // S, step % S
        m_c = o_k < C - c
        near = (r * DILATION_H * W + s * DILATION_W).to(tl.int64) * C + c
        if PADDED:
            h_in, w_in = h + r * DILATION_H, w + s * DILATION_W
            m_m = (h_in >= 0) & (h_in < H) & (w_in >= 0) & (w_in < W)
            m_x = m_m[:, None] if EVEN_C else m_m[:, None] & m_c[None, :]
            b_x = tl.load(p_x + near, mask=m_x, other=0.0)
        elif EVEN_C:
            b_x = tl.load(p_x + near)
        else:
            b_x = tl.load(p_x + near, mask=m_c[None, :], other=0.0)
        if HAS_PROLOGUE:
            # a channel tail stays 0: its affine is all zeros
            x_mean, x_scale = vector(x_mean_ptr + c, o_k, m_c), vector(x_scale_ptr + c, o_k, m_c)
            x_beta = vector(x_beta_ptr + c, o_k, m_c)
            b_u = affine(b_x.to(tl.float32), x_mean[None, :], x_scale[None, :], x_beta[None, :])
            b_x = relu(b_u).to(x_ptr.dtype.element_ty)
            if PADDED:
                b_x = tl.where(m_m[:, None], b_x, 0.0)
        p_tap = p_w + (r * S + s) * C + c
        b_w = tl.load(p_tap) if EVEN_C else tl.load(p_tap, mask=m_c[:, None], other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)

    _finish(
        acc,
        *(bias_ptr, mean_ptr, scale_ptr, beta_ptr, r_ptr),
        *(y_ptr, tile_mean_ptr, tile_m2_ptr, tile_rest_ptr, i_m, i_n * BLOCK_N, M, K),
        *(HAS_BIAS, HAS_STATS, HAS_REST, HAS_NORM, HAS_RESIDUAL, RELU, ADD_AFTER_ACT),
        *(BLOCK_M, BLOCK_N, EPILOGUE_N),
    )


def conv_fprop(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    *,
    prologue: Affine | None = None,
    stats: bool = False,
    norm: Affine | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    add_after_act: bool = False,
    precision: str = "ieee",
    tile: ConvTile | None = None,
) -> tuple[Tensor, TileStats | None]:
    """z = conv(a, weight) + bias, ``[N, K, P, Q]``; a is x, or relu(affine(x)) with a prologue.

    ``stats``: also the statistics of z, as rounded, per tile of pixels. ``norm``: y instead of z,
    y = act(u + r) or act(u) + r with u = affine(z), z not rounded, and r the residual.
    """
    if g.groups != 1:
        raise ValueError(f"groups must be 1, got {g.groups}")
    if stats and norm is not None:
        raise ValueError("either the statistics of z are taken or a norm is applied to it")
    if norm is None and (relu or residual is not None):
        raise ValueError("a residual or ReLU needs a norm")
    (n, c, height, width), (k, _, r, s) = x.shape, weight.shape
    p, q = conv_output_size((height, width), g, (r, s))
    m = n * p * q
    assert max(m, n * height * width) < 2**31, "pixels are counted in int32"
    if x.dtype != torch.float32:
        precision = "ieee"  # of no effect: one variant for all
    if tile is None:
        tile, *_ = likely("conv_fprop", (m, k, c * r * s), c, x, precision, prologue is not None)
    y = empty_nhwc((n, k, p, q), x)

    count = triton.cdiv(m, tile.block_m)
    absent = (None, None, None)
    tiles, parts = None, absent
    if stats:
        # of 16-bit values, a mean that is large beside their spread has few bits: float32 holds it
        has_rest = x.dtype == torch.float32
        out = torch.empty(2 + has_rest, count, k, dtype=torch.float32, device=x.device)
        mean, m2, rest = (*out.unbind(), None)[:3]
        tiles = TileStats(mean, m2, tile.block_m, m, rest)
        parts = mean, m2, rest
    sampled = (
        _touched(height, p, r, g.stride[0], g.padding[0], g.dilation[0])
        * _touched(width, q, s, g.stride[1], g.padding[1], g.dilation[1])
    )  # fmt: skip
    # elements of a tile that the epilogue takes at a time: 128 registers a thread are enough
    per_thread = 16 if residual is not None or x.dtype == torch.float32 else 32
    launch(
        _conv_fprop_kernel,
        (count * triton.cdiv(k, tile.block_n),),
        *(x, *(prologue or absent), weight, bias, *(norm or absent)),
        *(residual, y, *parts),
        *(m, c, k, height, width, p, q),
        reads=(
            *(n * sampled * c * x.element_size(), *(prologue or ()), weight, bias),
            *(*(norm or ()), residual),
        ),
        writes=(y, *parts),
        R=r,
        S=s,
        STRIDE_H=g.stride[0],
        STRIDE_W=g.stride[1],
        PAD_H=g.padding[0],
        PAD_W=g.padding[1],
        DILATION_H=g.dilation[0],
        DILATION_W=g.dilation[1],
        EVEN_C=c % tile.block_k == 0,
        HAS_PROLOGUE=prologue is not None,
        HAS_BIAS=bias is not None,
        HAS_STATS=stats,
        HAS_REST=tiles is not None and tiles.rest is not None,
        HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None,
        RELU=relu,
        ADD_AFTER_ACT=add_after_act and residual is not None,
        PRECISION=precision,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        EPILOGUE_N=min(tile.block_n, max(16, per_thread * 32 * tile.warps // tile.block_m)),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y, tiles

"""The input's gradient of a convolution: an implicit matrix product over taps × output channels.

Input pixels are sorted into stride_h × stride_w phases. All pixels of a phase are reached by the
same taps, and only those are multiplied; a tile's pixels are of one phase. The backward pass of the
norm above is applied on the way in; on the way out the gradient of another branch joins, the ReLU
below masks it, and each tile's sums for the norm below are taken.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfast.backends.interface import Below, ConvGeometry, NormGradient, empty_nhwc
from resfast.kernels.launch import launch
from resfast.kernels.math import affine, positive, unpack_mask
from resfast.kernels.norm import TileSums, check_mask, vector
from resfast.kernels.tiles import ConvTile, likely


@triton.jit
def _reaching(
    phase,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    DILATION: tl.constexpr,
    STEP: tl.constexpr,
):
    """(first, count): taps first + t·STEP, t < count, reach the pixels ≡ phase (mod STRIDE).

    Those of tap r come from output pixels (pixel + PAD − r·DILATION) / STRIDE.
    """
    first = phase * 0 + SIZE
    for r in tl.static_range(STEP):
        if r < SIZE:
            first = tl.where((phase + PAD - r * DILATION) % STRIDE == 0, r, first)
    return first, (SIZE - first + STEP - 1) // STEP


@triton.jit
def _finish(
    acc,
    residual_ptr,
    z_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    mask_ptr,
    z2_ptr,
    mean2_ptr,
    dx_ptr,
    sums_ptr,
    pixel,
    m_m,
    residual_pixel,
    m_residual,
    i_t,
    column,
    T,
    C,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BELOW: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SECOND: tl.constexpr,
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
                *(residual_ptr, z_ptr, mean_ptr, scale_ptr, beta_ptr, mask_ptr),
                *(z2_ptr, mean2_ptr, dx_ptr, sums_ptr),
                *(pixel, m_m, residual_pixel, m_residual),
                *(i_t, column + i * (BLOCK_N // 2), T, C),
                *(HAS_RESIDUAL, HAS_BELOW, HAS_MASK, HAS_SECOND),
                *(BLOCK_M, BLOCK_N // 2, EPILOGUE_N),
            )
        return
    o_c = column + tl.arange(0, BLOCK_N)
    m_c = o_c < C
    o_x, inside = pixel[:, None] * C + o_c[None, :], m_m[:, None] & m_c[None, :]
    if HAS_RESIDUAL:
        o_r, m_r = residual_pixel[:, None] * C + o_c[None, :], m_residual[:, None] & m_c[None, :]
        acc += tl.load(residual_ptr + o_r, mask=m_r, other=0.0).to(tl.float32)
    b_dx = acc.to(dx_ptr.dtype.element_ty)
    if HAS_BELOW:
        mean = vector(mean_ptr, o_c, m_c)
        b_z = tl.load(z_ptr + o_x, mask=inside, other=0.0).to(tl.float32)
        if HAS_MASK:
            o_bits = column // 8 + tl.arange(0, BLOCK_N // 8)
            p_bits = mask_ptr + pixel[:, None] * (C // 8) + o_bits[None, :]
            m_bits = m_m[:, None] & (o_bits < C // 8)[None, :]
            b_bits = tl.load(p_bits, mask=m_bits, other=0)
            keep = unpack_mask(b_bits, BLOCK_M, BLOCK_N)
        else:
            scale, beta = vector(scale_ptr, o_c, m_c), vector(beta_ptr, o_c, m_c)
            keep = positive(affine(b_z, mean[None, :], scale[None, :], beta[None, :]))
        b_dx = tl.where(keep & inside, b_dx, 0.0)
    tl.store(dx_ptr + o_x, b_dx, mask=inside)
    if HAS_BELOW:
        b_du = b_dx.to(tl.float32)
        p_sums = sums_ptr + i_t.to(tl.int64) * C + o_c
        plane = T.to(tl.int64) * C
        tl.store(p_sums, tl.sum(b_du, axis=0), mask=m_c)
        tl.store(p_sums + plane, tl.sum(b_du * (b_z - mean[None, :]), axis=0), mask=m_c)
        if HAS_SECOND:
            b_z2 = tl.load(z2_ptr + o_x, mask=inside, other=0.0).to(tl.float32)
            b_z2 -= vector(mean2_ptr, o_c, m_c)[None, :]
            tl.store(p_sums + 2 * plane, tl.sum(b_du * b_z2, axis=0), mask=m_c)


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "T"])
def _conv_dgrad_kernel(
    dz_ptr,
    above_z_ptr,
    above_mean_ptr,
    above_scale_ptr,
    coef_z_ptr,
    coef_1_ptr,
    w_ptr,
    residual_ptr,
    z_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    mask_ptr,
    z2_ptr,
    mean2_ptr,
    dx_ptr,
    sums_ptr,
    N,
    H,
    W,
    C,
    P,
    Q,
    K,
    T,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_COEF_Z: tl.constexpr,
    HAS_COEF_1: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RESIDUAL_H: tl.constexpr,
    RESIDUAL_W: tl.constexpr,
    HAS_BELOW: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EPILOGUE_N: tl.constexpr,
):
    PHASES: tl.constexpr = STRIDE_H * STRIDE_W
    # pixel i of a phase, if any tap reaches it, is output pixel i
    DIRECT: tl.constexpr = R * S == 1 and PAD_H == 0 and PAD_W == 0
    # programs that run together share their output pixels in L2
    blocks_n = tl.cdiv(C, BLOCK_N)
    i_t, i_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    phase_h, phase_w = i_t % PHASES // STRIDE_W, i_t % STRIDE_W
    rows_h, rows_w = tl.cdiv(H - phase_h, STRIDE_H), tl.cdiv(W - phase_w, STRIDE_W)
    rows = N * rows_h * rows_w
    row = i_t // PHASES * BLOCK_M
    # past the end the last pixel is read again: the loop then needs no mask for it
    o_row = tl.arange(0, BLOCK_M)
    o_m = tl.maximum(row + tl.minimum(o_row, rows - row - 1), 0)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k, m_n = tl.arange(0, BLOCK_K), o_n < C
    rows_h, rows_w = tl.maximum(rows_h, 1), tl.maximum(rows_w, 1)
    i_image, i_h, i_w = o_m // rows_w // rows_h, o_m // rows_w % rows_h, o_m % rows_w
    h, w = i_h * STRIDE_H + phase_h, i_w * STRIDE_W + phase_w

    first_h, taps_h = _reaching(phase_h, R, STRIDE_H, PAD_H, DILATION_H, STEP_H)
    first_w, taps_w = _reaching(phase_w, S, STRIDE_W, PAD_W, DILATION_W, STEP_W)
    if DIRECT:
        output_pixel = o_m.to(tl.int64)
    else:
        p = i_h + (phase_h + PAD_H - first_h * DILATION_H) // STRIDE_H
        q = i_w + (phase_w + PAD_W - first_w * DILATION_W) // STRIDE_W
        output_pixel = (i_image.to(tl.int64) * P + p) * Q + q
    o_dz = output_pixel[:, None] * K + o_k[None, :]
    p_w = w_ptr + (first_h * S + first_w) * C + o_k[:, None] * (R * S * C) + o_n[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    taps = taps_h * taps_w
    for step in range(tl.where(row < rows, tl.cdiv(K, BLOCK_K) * taps, 0)):
        k = step * BLOCK_K if R * S == 1 else step // taps * BLOCK_K
        m_k = o_k < K - k
        if DIRECT:
            near, tap_w = k, 0
            m_dz = m_k[None, :]
        else:
            t_h, t_w = step % taps // taps_w, step % taps_w
            # the next tap's output pixel is this far before
            up = t_h * (STEP_H * DILATION_H // STRIDE_H)
            left = t_w * (STEP_W * DILATION_W // STRIDE_W)
            near = k - (up * Q + left).to(tl.int64) * K
            tap_w = t_h * STEP_H * S + t_w * STEP_W
            m_pixel = (p >= up) & (p < P + up) & (q >= left) & (q < Q + left)
            m_dz = m_pixel[:, None] if EVEN_K else m_pixel[:, None] & m_k[None, :]
        if DIRECT and EVEN_K:
            b_dz = tl.load(dz_ptr + near + o_dz)
        else:
            b_dz = tl.load(dz_ptr + near + o_dz, mask=m_dz, other=0.0)
        if HAS_NORM:
            # a channel tail stays 0: its vectors are all zeros
            b_du = b_dz.to(tl.float32) * vector(above_scale_ptr + k, o_k, m_k)[None, :]
            if HAS_COEF_Z:
                if DIRECT and EVEN_K:
                    b_above = tl.load(above_z_ptr + near + o_dz)
                else:
                    b_above = tl.load(above_z_ptr + near + o_dz, mask=m_dz, other=0.0)
                b_above = b_above.to(tl.float32) - vector(above_mean_ptr + k, o_k, m_k)[None, :]
                b_du += b_above * vector(coef_z_ptr + k, o_k, m_k)[None, :]
            if HAS_COEF_1:
                b_du += vector(coef_1_ptr + k, o_k, m_k)[None, :]
            b_dz = b_du.to(dz_ptr.dtype.element_ty)
            if not DIRECT:
                b_dz = tl.where(m_pixel[:, None], b_dz, 0.0)
        m_w = m_n[None, :] if EVEN_K else m_k[:, None] & m_n[None, :]
        b_w = tl.load(p_w + (k * (R * S) + tap_w) * C, mask=m_w, other=0.0)
        acc = tl.dot(b_dz, b_w, acc, input_precision=PRECISION)

    if PHASES == 1:
        pixel = o_m.to(tl.int64)
    else:
        pixel = (i_image.to(tl.int64) * H + h) * W + w
    m_m = o_row < rows - row
    residual_pixel, m_residual = pixel, m_m
    if RESIDUAL_H * RESIDUAL_W > 1:
        residual_row = i_image.to(tl.int64) * tl.cdiv(H, RESIDUAL_H) + h // RESIDUAL_H
        residual_pixel = residual_row * tl.cdiv(W, RESIDUAL_W) + w // RESIDUAL_W
        m_residual = m_m & (h % RESIDUAL_H == 0) & (w % RESIDUAL_W == 0)
    _finish(
        acc,
        *(residual_ptr, z_ptr, mean_ptr, scale_ptr, beta_ptr, mask_ptr, z2_ptr, mean2_ptr),
        *(dx_ptr, sums_ptr, pixel, m_m, residual_pixel, m_residual, i_t, i_n * BLOCK_N, T, C),
        *(HAS_RESIDUAL, HAS_BELOW, HAS_MASK, HAS_SECOND, BLOCK_M, BLOCK_N, EPILOGUE_N),
    )


def conv_dgrad(
    dz: Tensor | NormGradient,
    weight: Tensor,
    shape: tuple[int, int, int, int],
    g: ConvGeometry,
    *,
    residual: Tensor | None = None,
    residual_stride: tuple[int, int] = (1, 1),
    below: Below | None = None,
    precision: str = "ieee",
    tile: ConvTile | None = None,
) -> tuple[Tensor, TileSums | None]:
    """(dx + residual, None), ``[N, C, H, W]``; with ``below`` (du, its tiles' sums).

    dx[n, h, w, c] = Σ dz[n, p, q, k]·weight[k, c, r, s] over p·stride + r·dilation = h + padding
    and likewise w. The residual ``[N, C, ⌈H / residual_stride⌉, …]`` belongs to every
    residual_stride-th pixel. du is their sum where below's ReLU let its input through; the sums
    are those of du as rounded.
    """
    if g.groups != 1:
        raise ValueError(f"groups must be 1, got {g.groups}")
    n, c, height, width = shape
    if below is not None:
        check_mask(c, below.mask)
    du, *above = dz if isinstance(dz, NormGradient) else (dz, *[None] * 5)
    assert isinstance(du, Tensor)
    has_norm = isinstance(dz, NormGradient)
    above_z, above_mean, above_scale, coef_z, coef_1 = above
    (_, k, p, q), (r, s) = du.shape, weight.shape[2:]
    assert max(n * height * width, n * p * q, weight.numel()) < 2**31, "counted in int32"
    if du.dtype != torch.float32:
        precision = "ieee"  # of no effect: one variant for all
    phases = g.stride[0] * g.stride[1]
    # of the largest phase; a smaller one may leave its last tile empty
    rows = n * triton.cdiv(height, g.stride[0]) * triton.cdiv(width, g.stride[1])
    step_h, step_w = (a // math.gcd(a, d) for a, d in zip(g.stride, g.dilation, strict=True))
    if tile is None:
        sizes = (rows * phases, c, triton.cdiv(k * r * s, phases))
        tile, *_ = likely("conv_dgrad", sizes, k, du, precision, has_norm)
    count = triton.cdiv(rows, tile.block_m) * phases
    dx = empty_nhwc(shape, du)

    sums, mask, second = None, None, (None, None)
    vectors: tuple[Tensor | None, ...] = (None, None, None)
    if below is not None:
        mask, second = below.mask, (below.z2, below.mean2)
        planes = 2 if below.z2 is None else 3
        sums = torch.empty(planes, count, c, dtype=torch.float32, device=du.device)
        vectors = below.affine if mask is None else (below.affine.mean, None, None)
    z = None if below is None else below.z
    launch(
        _conv_dgrad_kernel,
        (count * triton.cdiv(c, tile.block_n),),
        *(du, above_z, above_mean, above_scale, coef_z, coef_1, weight, residual),
        *(z, *vectors, mask, *second, dx, sums),
        *(n, height, width, c, p, q, k, count),
        reads=(
            *(du, above_scale, coef_1, *(() if coef_z is None else (above_z, above_mean, coef_z))),
            *(weight, residual, z, *vectors, mask, *second),
        ),
        writes=(dx, sums),
        R=r,
        S=s,
        STRIDE_H=g.stride[0],
        STRIDE_W=g.stride[1],
        PAD_H=g.padding[0],
        PAD_W=g.padding[1],
        DILATION_H=g.dilation[0],
        DILATION_W=g.dilation[1],
        STEP_H=step_h,
        STEP_W=step_w,
        EVEN_K=k % tile.block_k == 0,
        HAS_NORM=has_norm,
        HAS_COEF_Z=coef_z is not None,
        HAS_COEF_1=coef_1 is not None,
        HAS_RESIDUAL=residual is not None,
        RESIDUAL_H=residual_stride[0],
        RESIDUAL_W=residual_stride[1],
        HAS_BELOW=below is not None,
        HAS_MASK=mask is not None,
        HAS_SECOND=second[0] is not None,
        PRECISION=precision,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        EPILOGUE_N=32 if below is not None and (not has_norm or tile.block_n < 128) else 64,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dx, None if sums is None else TileSums(sums)

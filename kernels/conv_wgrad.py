"""The weight's gradient of a convolution: an implicit matrix product that reduces over pixels.

Rows are output channels, columns are (r, s, c) flat, as the weight's memory has them. The pixels
are shared out in ranges; each range writes its own partial result, and a second kernel adds the
ranges up in a fixed order: no atomics, the same bits on every run.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfast.backends.interface import Affine, ConvGeometry, NormGradient, empty_nhwc
from resfast.kernels.launch import launch
from resfast.kernels.math import affine, relu
from resfast.kernels.tiles import ConvTile, chip, shipped

# partial results of one weight at most: a quarter of an H100's L2, so that they can stay there
PARTIAL_BYTES = 12 << 20


@triton.jit
def _divided(n, multiplier, shift):
    """n // d for 0 ≤ n < 2³¹; ``_reciprocal`` gives d's multiplier and shift."""
    high = tl.umulhi((n + n).to(tl.uint32), multiplier.to(tl.uint32))
    return (high >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        *("count", "span", "H", "W", "P", "Q"),
        *("p_multiplier", "p_shift", "q_multiplier", "q_shift"),
    ]
)
def _conv_wgrad_kernel(
    dz_ptr,
    z_ptr,
    mean_ptr,
    scale_ptr,
    coef_z_ptr,
    coef_1_ptr,
    x_ptr,
    x_mean_ptr,
    x_scale_ptr,
    x_beta_ptr,
    out_ptr,
    count,
    span,
    K,
    C,
    H,
    W,
    P,
    Q,
    p_multiplier,
    p_shift,
    q_multiplier,
    q_shift,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_COEF_Z: tl.constexpr,
    HAS_COEF_1: tl.constexpr,
    HAS_PROLOGUE: tl.constexpr,
    EVEN_PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[i_split, k, r, s, c] = Σ dz[n, p, q, k]·a[n, h, w, c] over ``span`` pixels (n, p, q).

    h = p·stride + r·dilation − padding, w likewise; a = x or relu(affine(x)), 0 in the padding.
    SWAP: a is the product's first operand, the one that may come from registers. WIDE: x has
    2³¹ elements or more.
    """
    # x's pixels are those of dz
    DIRECT: tl.constexpr = R * S * STRIDE_H * STRIDE_W == 1 and PAD_H == 0 and PAD_W == 0
    PADDED: tl.constexpr = PAD_H > 0 or PAD_W > 0
    # dz's tile is [k, pixel] and x's [pixel, column], or each the other way round
    DZ_PIXELS: tl.constexpr = 0 if SWAP else 1
    X_PIXELS: tl.constexpr = 1 - DZ_PIXELS
    dtype = x_ptr.dtype.element_ty
    columns = R * S * C
    i_tile, i_split = tl.program_id(0), tl.program_id(1)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    o_k = tl.expand_dims(i_tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M), DZ_PIXELS)
    o_n = tl.expand_dims(i_tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N), X_PIXELS)
    o_pixel = tl.arange(0, BLOCK_K)
    m_k, m_n = o_k < K, o_n < columns
    tap = o_n // C
    o_c = o_n - tap * C if R * S == 1 else o_n % C
    # where each column's tap lies from its output pixel's corner
    tap_h, tap_w = tap // S * DILATION_H - PAD_H, tap % S * DILATION_W - PAD_W
    o_tap = tap_h * W + tap_w
    o_column = (o_tap.to(tl.int64) if WIDE else o_tap) * C + o_c
    if HAS_NORM:
        scale = tl.load(scale_ptr + o_k, mask=m_k, other=0.0)
        if HAS_COEF_Z:
            mean = tl.load(mean_ptr + o_k, mask=m_k, other=0.0)
            coef_z = tl.load(coef_z_ptr + o_k, mask=m_k, other=0.0)
        if HAS_COEF_1:
            coef_1 = tl.load(coef_1_ptr + o_k, mask=m_k, other=0.0)
    if HAS_PROLOGUE:
        x_mean = tl.load(x_mean_ptr + o_c, mask=m_n, other=0.0)
        x_scale = tl.load(x_scale_ptr + o_c, mask=m_n, other=0.0)
        x_beta = tl.load(x_beta_ptr + o_c, mask=m_n, other=0.0)

    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], dtype=tl.float32)
    begin = i_split * span
    for step in tl.range(0, tl.minimum(span, count - begin), BLOCK_K):
        i_pixel = begin + step
        m_pixel = i_pixel + o_pixel < count
        m_dz, m_x = m_k, m_n
        if not EVEN_PIXELS:
            m_dz = m_dz & tl.expand_dims(m_pixel, X_PIXELS)
            m_x = m_x & tl.expand_dims(m_pixel, DZ_PIXELS)

        # what a step adds to an address is one 64-bit product, the same for the whole tile
        p_dz = i_pixel.to(tl.int64) * K + (tl.expand_dims(o_pixel * K, X_PIXELS) + o_k)
        b_dz = tl.load(dz_ptr + p_dz, mask=m_dz, other=0.0)
        if HAS_NORM:
            b_du = b_dz.to(tl.float32) * scale
            if HAS_COEF_Z:
                b_z = tl.load(z_ptr + p_dz, mask=m_dz, other=0.0).to(tl.float32)
                b_du += (b_z - mean) * coef_z
            if HAS_COEF_1:
                b_du += coef_1
            b_dz = b_du.to(dtype)
            if not EVEN_PIXELS:
                b_dz = tl.where(m_dz, b_dz, 0.0)

        if DIRECT:
            p_x = i_pixel.to(tl.int64) * C + (tl.expand_dims(o_pixel * C, DZ_PIXELS) + o_c)
        else:
            row = _divided(i_pixel + o_pixel, q_multiplier, q_shift)
            o_image = _divided(row, p_multiplier, p_shift)
            h = (row - o_image * P) * STRIDE_H
            w = (i_pixel + o_pixel - row * Q) * STRIDE_W
            o_x = (o_image * H + h) * W + w
            o_x = (o_x.to(tl.int64) if WIDE else o_x) * C
            p_x = tl.expand_dims(o_x, DZ_PIXELS) + o_column
            if PAD_H > 0:
                at = tl.expand_dims(h, DZ_PIXELS) + tap_h
                m_x = m_x & (at >= 0) & (at < H)
            if PAD_W > 0:
                at = tl.expand_dims(w, DZ_PIXELS) + tap_w
                m_x = m_x & (at >= 0) & (at < W)
        b_x = tl.load(x_ptr + p_x, mask=m_x, other=0.0)
        if HAS_PROLOGUE:
            b_a = relu(affine(b_x.to(tl.float32), x_mean, x_scale, x_beta))
            b_x = b_a.to(dtype)
            if PADDED or not EVEN_PIXELS:
                b_x = tl.where(m_x, b_x, 0.0)
        if SWAP:
            acc = tl.dot(b_x, b_dz, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(b_dz, b_x, acc, input_precision=PRECISION)

    o_out = (i_split.to(tl.int64) * K + o_k) * columns + o_n
    tl.store(out_ptr + o_out, acc.to(out_ptr.dtype.element_ty), mask=m_k & m_n)


@triton.jit(do_not_specialize=["splits"])
def _conv_wgrad_reduce_kernel(
    partial_ptr, dw_ptr, splits, n, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr
):
    """dw = Σ of the ``splits`` rows of partial ``[splits, n]``."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    acc = tl.zeros([BLOCK_N], dtype=tl.float32)
    for i_split in range(0, splits, BLOCK_S):
        o_split = i_split + tl.arange(0, BLOCK_S)
        p_partial = o_split.to(tl.int64)[:, None] * n + o_n[None, :]
        m_partial = (o_split < splits)[:, None] & m_n[None, :]
        acc += tl.sum(tl.load(partial_ptr + p_partial, mask=m_partial, other=0.0), axis=0)
    tl.store(dw_ptr + o_n, acc.to(dw_ptr.dtype.element_ty), mask=m_n)


def conv_wgrad(
    dz: Tensor | NormGradient,
    x: Tensor,
    weight_shape: tuple[int, int, int, int],
    g: ConvGeometry,
    *,
    prologue: Affine | None = None,
    precision: str = "ieee",
    tile: ConvTile | None = None,
    splits: int | None = None,
) -> Tensor:
    """dw ``[K, C, R, S]`` from dz ``[N, K, P, Q]`` and the convolution's input x ``[N, C, H, W]``.

    A ``NormGradient`` is made into dz on the way in, rounded to storage; a prologue makes the input
    relu(affine(x)), likewise rounded. ``splits``: ranges the pixels are cut into.

    Raises:
        ValueError: groups are not 1.
    """
    if g.groups != 1:
        raise ValueError(f"groups must be 1, got {g.groups}")
    norm = None if isinstance(dz, Tensor) else dz
    grad, z, mean, scale, coef_z, coef_1 = (dz, *(None,) * 5) if isinstance(dz, Tensor) else dz
    if coef_z is None:
        z = mean = None
    (n, k, p, q), (_, c, height, width), (r, s) = grad.shape, x.shape, weight_shape[2:]
    count, columns = n * p * q, r * s * c
    assert max(count, n * height * width) < 2**31, "pixels are counted in int32"
    if x.dtype != torch.float32:
        precision = "ieee"
    if tile is None or splits is None:
        normed = norm is not None or prologue is not None
        tiles = tuple(shipped("conv_wgrad", min(c, k), x.dtype, precision, normed))
        likely = plan(
            *(count, k, columns, x.element_size(), precision),
            (grad.numel() + x.numel()) * x.element_size(),
            (tile,) if tile else tiles,
            chip(x.device).processors,
        )
        tile, splits = tile or likely[0], splits or likely[1]
    # ranges are of whole steps, and none is empty
    steps = triton.cdiv(count, tile.block_k)
    steps_each = max(1, triton.cdiv(steps, splits))
    splits = max(1, triton.cdiv(steps, steps_each))

    dw = empty_nhwc(weight_shape, x)
    out = dw if splits == 1 else dw.new_empty(splits, k, columns, dtype=torch.float32)
    programs = triton.cdiv(k, tile.block_m) * triton.cdiv(columns, tile.block_n)
    affine_vectors = prologue or (None, None, None)
    launch(
        _conv_wgrad_kernel,
        (programs, splits),
        *(grad, z, mean, scale, coef_z, coef_1, x, *affine_vectors, out),
        *(count, steps_each * tile.block_k, k, c, height, width, p, q),
        *(*_reciprocal(p), *_reciprocal(q)),
        reads=(
            *(grad, z, mean, scale, coef_z, coef_1),
            *(_bytes_read(x, (p, q), (r, s), g), *affine_vectors),
        ),
        writes=(out,),
        R=r,
        S=s,
        STRIDE_H=g.stride[0],
        STRIDE_W=g.stride[1],
        PAD_H=g.padding[0],
        PAD_W=g.padding[1],
        DILATION_H=g.dilation[0],
        DILATION_W=g.dilation[1],
        HAS_NORM=norm is not None,
        HAS_COEF_Z=coef_z is not None,
        HAS_COEF_1=coef_1 is not None,
        HAS_PROLOGUE=prologue is not None,
        EVEN_PIXELS=count % tile.block_k == 0,
        WIDE=x.numel() >= 2**31,
        SWAP=prologue is not None and norm is None,
        PRECISION=precision,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        # few elements and many splits, or the other way round: 1024 values at a time
        block_s = 8 if splits <= 8 else 32
        block_n = 1024 // block_s
        launch(
            _conv_wgrad_reduce_kernel,
            (triton.cdiv(k * columns, block_n),),
            *(out, dw, splits, k * columns),
            reads=(out,),
            writes=(dw,),
            BLOCK_S=block_s,
            BLOCK_N=block_n,
            num_warps=4,
        )
    return dw


def _reciprocal(divisor: int) -> tuple[int, int]:
    """(multiplier, shift) for ``_divided``; the multiplier's 32 bits as a signed number."""
    divisor = max(1, divisor)
    shift = (divisor - 1).bit_length()
    return -(-(1 << (31 + shift)) // divisor) - (1 << 32), shift


def _bytes_read(
    x: Tensor, out: tuple[int, int], taps: tuple[int, int], g: ConvGeometry
) -> Tensor | int:
    """x, or of a 1×1 convolution with strides the bytes of the pixels it samples."""
    if taps != (1, 1) or g.stride == (1, 1):
        return x
    n, c, *size = x.shape
    for length, number, stride, padding in zip(size, out, g.stride, g.padding, strict=True):
        first, last = triton.cdiv(padding, stride), (length - 1 + padding) // stride
        n *= max(0, min(last, number - 1) - first + 1)
    return n * c * x.element_size()


@functools.cache
def plan(
    count: int,
    k: int,
    columns: int,
    itemsize: int,
    precision: str,
    traffic: int,
    tiles: tuple[ConvTile, ...],
    processors: int,
) -> tuple[ConvTile, int]:
    """The tile of ``tiles`` and the number of ranges for ``count`` pixels likely to be the fastest.

    Waves of programs, bound by products and by loads from L2, take no less time than memory needs
    for ``traffic`` bytes; then come the partial results, written and read again.
    """
    multiply_adds, memory = 2.2e12, 2.5e12  # a second: in 16 bit by one multiprocessor; bytes
    passes = {2: 1, 4: {"tf32": 2, "tf32x3": 6}.get(precision, 10)}[itemsize]
    partial = 4 * k * columns
    best = (float("inf"), tiles[0], 1)
    for tile in tiles:
        programs = triton.cdiv(k, tile.block_m) * triton.cdiv(columns, tile.block_n)
        steps = triton.cdiv(count, tile.block_k)
        # 16 bits take as long to load as some 64 products, and a step as some 100,000 to begin
        products = tile.block_m * tile.block_n * passes
        loads = (tile.block_m + tile.block_n) * itemsize / 2
        step = tile.block_k * (products + 64 * loads) + 1e5
        most = max(1, min(steps // 4, PARTIAL_BYTES // partial))
        full = (turns * processors // programs for turns in range(1, 9))
        for splits in {1, *(min(n, most) for n in full if n)}:
            each = triton.cdiv(steps, splits) + tile.stages + 2  # to fill and drain the pipeline
            work = triton.cdiv(programs * splits, processors) * each * step
            bounds = work / multiply_adds, traffic / memory
            seconds = max(bounds) + min(bounds) / 4  # the two overlap, but not quite
            if splits > 1:
                seconds += 3e-6 + 2 * splits * partial / memory
            best = min(best, (seconds, tile, splits))
    return best[1:]

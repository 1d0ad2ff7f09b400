"""Per-element and per-tile maths of the Triton kernels; docs/numerics.md derives it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def affine(z, mean, scale, beta):
    """u = (z − mean)·scale + beta. One fused multiply-add, so that forward and backward agree."""
    return tl.fma(z - mean, scale, beta)


@triton.jit
def positive(u):
    """The ReLU's mask; NaN counts as positive, as in torch.relu's backward."""
    return (u <= 0) == 0


@triton.jit
def relu(u):
    """max(u, 0); NaN stays NaN."""
    return tl.where(u <= 0, 0.0, u)


@triton.jit
def pack_mask(mask, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``[ROWS, COLS]`` bools as ``[ROWS, COLS / 8]`` bytes, bit i the i-th of 8 columns."""
    bits = tl.reshape(mask.to(tl.int32), [ROWS, COLS // 8, 8])
    weights = (1 << tl.arange(0, 8))[None, None, :]
    return tl.sum(bits * weights, axis=2).to(tl.uint8)


@triton.jit
def centred(z, valid, rows):
    """(mean, M2) over axis 0 of the ``valid`` values, ``rows`` (float32) of them, at least one."""
    mean = tl.sum(tl.where(valid, z, 0.0), axis=0) / rows
    rest = tl.where(valid, z - mean[None, :], 0.0)
    # the mean of what is left corrects the first mean's rounding
    correction = tl.sum(rest, axis=0) / rows
    rest = tl.where(valid, rest - correction[None, :], 0.0)
    return mean + correction, tl.sum(rest * rest, axis=0)


@triton.jit
def chan_merge(mean_a, m2_a, n_a, mean_b, m2_b, n_b):
    """Statistics of two sets joined (Chan, Golub, LeVeque 1983); an empty set changes nothing."""
    n = n_a + n_b
    share = tl.where(n > 0, n_b / tl.where(n > 0, n, 1.0), 0.0)
    delta = mean_b - mean_a
    return mean_a + delta * share, m2_a + m2_b + delta * delta * n_a * share, n


@triton.jit
def unpack_mask(bits, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``[ROWS, COLS / 8]`` bytes of ``pack_mask`` as ``[ROWS, COLS]`` bools."""
    places = tl.arange(0, 8)[None, None, :]
    return tl.reshape((bits.to(tl.int32)[:, :, None] >> places) & 1, [ROWS, COLS]) != 0

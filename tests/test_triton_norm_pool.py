"""kernels/norm_pool.py against EagerBackend in float64, on the inputs as rounded to their dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from resfast.backends.eager import EagerBackend
from resfast.backends.interface import Affine, nhwc
from resfast.backends.library_pool import unpool
from resfast.kernels import norm, norm_pool
from resfast.kernels.tiles import NormTile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # CPU: Triton's interpreter, see conftest
EAGER = EagerBackend()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
U = 2.0**-24
# half the distance of neighbours at 1, and below the least normal number
ROUNDOFF = {torch.float32: (U, 0.0), torch.bfloat16: (2.0**-8, 0.0), torch.float16: (2.0**-11, U)}
SMALL = NormTile(16, 32, 4)
# kernel, stride, padding: the stem's, apart, overlapping fully, with gaps, over several pixels
WINDOWS = [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 1), (5, 2, 2), (1, 1, 0)]
SHAPES = [(1, 1, 3, 5), (2, 3, 8, 7), (1, 64, 4, 4), (1, 65, 5, 5)]


def randn(shape, dtype=torch.float32) -> Tensor:
    t = torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)
    return nhwc(t) if len(shape) == 4 else t


def random_affine(c: int) -> Affine:
    """Channel 0 has gamma 0; about half of the others are negative."""
    scale = randn((c,))
    scale[0] = 0
    return Affine(randn((c,)), scale, randn((c,)))


def double(affine: Affine) -> Affine:
    return Affine(*(v.double() for v in affine))


def channel(v: Tensor) -> Tensor:
    return v.double().view(1, -1, 1, 1)


def clear_of_zero(z: Tensor, affine: Affine) -> Tensor:
    """z with the mean, where u is 0 but for rounding: then u is beta."""
    mean, scale, beta = map(channel, affine)
    u = (z.double() - mean) * scale + beta
    terms = (z.double().abs() + mean.abs()) * scale.abs() + beta.abs()
    return nhwc(torch.where(u.abs() > 16 * U * terms, z, z + 1))


def assert_close(actual: Tensor, reference: Tensor, terms: Tensor, roundings: float = 8):
    """One rounding to storage, and so many of float32 relative to ``terms``."""
    relative, least = ROUNDOFF[actual.dtype]
    error = (actual.double() - reference).abs()
    assert (error <= relative * reference.abs() + least + 2 * roundings * U * terms).all()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(window, dtype):
    for shape in SHAPES:
        z, affine = randn(shape, dtype), random_affine(shape[1])
        expected, _ = EAGER.norm_apply_max_pool(z.double(), double(affine), *window)
        size = (z.double().abs() + channel(affine.mean).abs()) * channel(affine.scale).abs()
        terms = size.amax((0, 2, 3), keepdim=True) + channel(affine.beta).abs()
        for tile in (None, SMALL):
            y, index = norm_pool.norm_apply_max_pool(z, affine, *window, tile=tile)
            assert y.dtype == z.dtype
            assert index.dtype == torch.uint8
            assert y.shape == index.shape == expected.shape
            assert y.stride() == index.stride() == nhwc(expected).stride()
            assert_close(y, expected, terms)
            check_positions(index, z, affine, window, expected, terms)


def check_positions(index, z, affine, window, expected, terms):
    """Each names a pixel of its window that has the maximum, but for rounding."""
    a = EAGER.norm_apply(z.double(), double(affine), None, None, True, False)
    kernel, stride, padding = window
    n, c, p, q = index.shape
    h = torch.arange(p, device=DEVICE).view(-1, 1) * stride - padding + index.long() // kernel
    w = torch.arange(q, device=DEVICE) * stride - padding + index.long() % kernel
    assert ((h >= 0) & (h < z.shape[2]) & (w >= 0) & (w < z.shape[3])).all()
    picked = a.flatten(2).gather(2, (h * z.shape[3] + w).flatten(2)).view(n, c, p, q)
    assert ((picked - expected).abs() <= 8 * U * terms).all()


@pytest.mark.parametrize("window", WINDOWS)
def test_the_first_of_equal_maxima(window):
    """Small integers are exact in every order of rounding, and tie often."""
    for shape in SHAPES:
        c = shape[1]
        z = nhwc(torch.randint(-2, 3, shape, device=DEVICE).float())
        affine = Affine(*(torch.randint(-2, 3, (c,), device=DEVICE).float() for _ in range(3)))
        y, index = norm_pool.norm_apply_max_pool(z, affine, *window, tile=SMALL)
        expected, position = EAGER.norm_apply_max_pool(z, affine, *window)
        assert torch.equal(y, expected)
        assert torch.equal(index, position)


@pytest.mark.parametrize("window", WINDOWS)
def test_nan_wins(window):
    z = nhwc(torch.randint(-2, 3, (2, 8, 6, 7), device=DEVICE).float())
    z[torch.rand(z.shape, device=DEVICE) < 0.15] = float("nan")
    z[0, 0, 0, 0] = float("inf")
    one = torch.ones(8, device=DEVICE)
    affine = Affine(one, one, one)
    y, index = norm_pool.norm_apply_max_pool(z, affine, *window, tile=SMALL)
    expected, position = EAGER.norm_apply_max_pool(z, affine, *window)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(-1), expected.nan_to_num(-1))
    assert torch.equal(index, position)


@pytest.mark.parametrize(
    ("window", "coefficients"),
    [*((w, "both") for w in WINDOWS), *((WINDOWS[0], c) for c in ("coef_z", "coef_1", "neither"))],
)
def test_backward(window, coefficients, monkeypatch):
    monkeypatch.setattr(norm, "programs", lambda device: 6)  # several chunks a program
    for i, shape in enumerate(SHAPES):
        dtype, c = DTYPES[i % 3], shape[1]
        affine = random_affine(c)
        z = clear_of_zero(randn(shape, dtype), affine)
        y, index = norm_pool.norm_apply_max_pool(z, affine, *window)
        dy = randn(y.shape, dtype)
        coef_z = randn((c,)) if coefficients in ("both", "coef_z") else None
        coef_1 = randn((c,)) if coefficients in ("both", "coef_1") else None

        one = torch.ones(c, dtype=torch.float64, device=DEVICE)
        # |du| with every window's share taken in absolute value: what roundings are relative to
        absolute = unpool(dy.double().abs(), z, index, *window)
        centred = z.double() - channel(affine.mean)
        for tile in (SMALL, None) if c == 65 else (SMALL,):
            tiles = norm_pool.norm_max_pool_backward_reduce(
                dy, z, affine, index, *window, tile=tile
            )
            sums = norm.merge_sums(tiles)
            expected = EAGER.norm_max_pool_backward_reduce(
                dy.double(), z.double(), double(affine), one, index, *window
            )
            assert_close(sums[0], expected[0], absolute.sum((0, 2, 3)))
            terms = (absolute * centred.abs()).sum((0, 2, 3))
            assert_close(sums[1], expected[1], terms, roundings=16)

            dz = norm_pool.norm_max_pool_backward_apply(
                dy, z, affine, index, *window, coef_z, coef_1, tile=tile
            )
            expected = EAGER.norm_max_pool_backward_apply(
                *(dy.double(), z.double(), double(affine), index, *window),
                *(v if v is None else v.double() for v in (coef_z, coef_1)),
            )
            terms = absolute * channel(affine.scale).abs()
            if coef_z is not None:
                terms = terms + (centred * channel(coef_z)).abs()
            if coef_1 is not None:
                terms = terms + channel(coef_1).abs()
            assert_close(dz, expected, terms)
            assert dz.dtype == z.dtype
            assert dz.stride() == z.stride()


def test_no_images():
    z, affine = randn((0, 8, 6, 6)), random_affine(8)
    y, index = norm_pool.norm_apply_max_pool(z, affine, 3, 2, 1)
    assert y.shape == index.shape == (0, 8, 3, 3)
    sums = norm.merge_sums(norm_pool.norm_max_pool_backward_reduce(y, z, affine, index, 3, 2, 1))
    assert torch.equal(sums, torch.zeros(2, 8, device=DEVICE))
    dz = norm_pool.norm_max_pool_backward_apply(y, z, affine, index, 3, 2, 1, None, None)
    assert dz.shape == z.shape

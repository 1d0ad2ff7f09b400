"""The raw CPU norm ops against float64 formulas.

Bounds. u is the unit roundoff of the accumulation type (2^-24; 2^-53 for float64), v that of the
activation's dtype. An elementwise result takes at most six roundings of partial results no larger
than the sum A of its terms' magnitudes, then one to the dtype: 6·u·A + v·|y|. A tile's sum over at
most 1024 rows is a tree over 8 rows and a chain over the 128 blocks of them, merged in double: 140
roundings, relative to the sum of magnitudes. 140·2^-24 < 1e-5, which is what is promised of the
variance at mean/std = 1e4.
"""

from __future__ import annotations

import pytest
import torch

from resfast import native

if not native.is_available():
    pytest.skip(f"native library: {native.load_error()}", allow_module_level=True)

import resfast._C as _C

pytestmark = pytest.mark.usefixtures("one_thread")

ops = torch.ops.resfast

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [
    (2, 1, 5, 7),
    (3, 3, 9, 11),
    (1, 3, 1, 1),
    (2, 17, 6, 5),
    (3, 8, 1, 1),
    (1, 64, 1, 1),
    (4, 64, 14, 14),
    (5, 130, 3, 3),
    (2, 24, 33, 20),
    (1, 2049, 2, 3),
    (2, 40, 70, 70),
    (0, 5, 3, 3),
    (2, 5, 0, 3),
]
SUM_ROUNDINGS = 140


def available_isas() -> list[str]:
    isas = []
    for isa in native.build_info()["isas"]:
        try:
            _C.set_cpu_isa(isa)
        except RuntimeError:
            continue
        isas.append(isa)
    _C.set_cpu_isa(None)
    return isas


@pytest.fixture(params=available_isas())
def isa(request):
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(None)


def acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def nhwc(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last)


class Inputs:
    """Random activations and vectors of one shape and dtype; outputs come filled with NaN."""

    def __init__(self, shape, dtype, seed=0):
        self.shape, self.dtype = shape, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def activation(self) -> torch.Tensor:
        return nhwc(torch.randn(self.shape, generator=self.generator).to(self.dtype))

    def vector(self, low=-1.5, high=1.5) -> torch.Tensor:
        t = torch.rand(self.shape[1], generator=self.generator, dtype=torch.float64)
        return (t * (high - low) + low).to(acc(self.dtype))

    def out(self) -> torch.Tensor:
        return nhwc(torch.full(self.shape, float("nan"), dtype=self.dtype))

    def out_vector(self) -> torch.Tensor:
        return torch.full((self.shape[1],), float("nan"), dtype=acc(self.dtype))


def wide(v: torch.Tensor) -> torch.Tensor:
    """A channel vector in float64, to be broadcast over NCHW."""
    return v.double().view(1, -1, 1, 1)


def sum_channels(t: torch.Tensor) -> torch.Tensor:
    return t.sum(dim=(0, 2, 3))


def assert_within(actual: torch.Tensor, reference: torch.Tensor, bound: torch.Tensor) -> None:
    assert not actual.isnan().any(), "an output was not written, or is NaN"
    excess = (actual.double() - reference).abs() - bound
    assert (excess <= 0).all(), f"error exceeds the bound by {excess.max().item():.3e}"


def assert_elementwise(actual, reference, magnitude) -> None:
    dtype = actual.dtype
    rounding = unit(dtype) * reference.abs() + torch.finfo(dtype).smallest_normal * unit(dtype)
    assert_within(actual, reference, 6 * unit(acc(dtype)) * magnitude * 1.01 + rounding * 1.01)


# ---- norm_stats


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stats(isa, shape, dtype):
    x = Inputs(shape, dtype)
    z = nhwc((x.activation().double() * 2 + 3).to(dtype))
    mean, m2 = x.out_vector(), x.out_vector()
    ops.norm_stats(z, mean, m2)
    rows = shape[0] * shape[2] * shape[3]
    if rows == 0:
        assert (mean == 0).all()
        assert (m2 == 0).all()
        return
    reference = z.double().mean(dim=(0, 2, 3))
    deviation = z.double() - wide(reference)
    reference_m2 = sum_channels(deviation**2)
    u = unit(acc(dtype))
    spread = deviation.abs().amax(dim=(0, 2, 3))
    assert_within(mean, reference, u * reference.abs() * 1.01 + SUM_ROUNDINGS * u * spread)
    assert_within(m2, reference_m2, SUM_ROUNDINGS * u * reference_m2)


@pytest.mark.parametrize("channels", [1, 3, 64, 130])
def test_stats_of_a_large_mean(isa, channels):
    generator = torch.Generator().manual_seed(1)
    z = nhwc(torch.randn(4, channels, 37, 41, generator=generator) + 1e4)
    mean, m2 = torch.empty(channels), torch.empty(channels)
    ops.norm_stats(z, mean, m2)
    reference = z.double().var(dim=(0, 2, 3), unbiased=False)
    error = m2.double() / (4 * 37 * 41) / reference - 1
    assert error.abs().max() < 1e-5
    assert (mean == z.double().mean(dim=(0, 2, 3)).float()).all()


def test_stats_in_double_are_not_rounded(isa):
    generator = torch.Generator().manual_seed(1)
    z = nhwc(torch.randn(4, 24, 9, 7, generator=generator) + 1e4)
    mean, m2 = (torch.empty(24, dtype=torch.float64) for _ in range(2))
    ops.norm_stats(z, mean, m2)
    reference = z.double()
    torch.testing.assert_close(mean, reference.mean((0, 2, 3)), rtol=1e-10, atol=0)
    variance = reference.var((0, 2, 3), unbiased=False)
    assert (m2 / (4 * 9 * 7) / variance - 1).abs().max() < 1e-5


@pytest.mark.parametrize("outliers", [1, 8, 64, 300])
def test_stats_where_the_first_rows_lie_far_off(isa, outliers):
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(2048, 64, generator=generator) + 1e4
    rows[:outliers] = 0
    z = rows.t().reshape(1, 64, 2048, 1)
    mean, m2 = torch.empty(64), torch.empty(64)
    ops.norm_stats(z, mean, m2)
    reference = z.double().var(dim=(0, 2, 3), unbiased=False)
    assert (m2.double() / 2048 / reference - 1).abs().max() < 1e-5


@pytest.mark.parametrize("value", [0.0, -1.25, 1e4, 12345678.0, 1e8, -3e30])
@pytest.mark.parametrize("channels", [1, 24, 64])
def test_constant_channel_is_exact(isa, value, channels):
    z = nhwc(torch.full((3, channels, 31, 17), value))
    mean, m2 = torch.empty(channels), torch.empty(channels)
    ops.norm_stats(z, mean, m2)
    assert (mean == z[0, 0, 0, 0]).all()
    assert (m2 == 0).all()
    beta = torch.linspace(-1, 1, channels)
    out = torch.full_like(z, float("nan"))
    rstd = torch.full((channels,), 1e-5).rsqrt()
    ops.norm_apply(z, mean, rstd, beta, None, None, None, None, False, False, out)
    assert (out == beta.view(1, -1, 1, 1)).all()


def test_stats_of_nan_stays_in_its_channel(isa):
    z = nhwc(torch.ones(2, 20, 5, 5))
    z[1, 7, 3, 2] = float("nan")
    mean, m2 = torch.empty(20), torch.empty(20)
    ops.norm_stats(z, mean, m2)
    expected = torch.arange(20) == 7
    assert (mean.isnan() == expected).all()
    assert (m2.isnan() == expected).all()


# ---- norm_apply


def apply_reference(z, mean, scale, beta, residual, affine, relu, add_after_act):
    """The result, and the sum of its terms' magnitudes."""
    z = z.double()
    u = (z - wide(mean)) * wide(scale) + wide(beta)
    magnitude = ((z - wide(mean)) * wide(scale)).abs() + wide(beta).abs()
    r = torch.zeros_like(u)
    if residual is not None:
        r = residual.double()
        magnitude = magnitude + r.abs()
        if affine is not None:
            r_mean, r_scale, r_beta = map(wide, affine)
            r = (residual.double() - r_mean) * r_scale + r_beta
            magnitude = magnitude + ((residual.double() - r_mean) * r_scale).abs() + r_beta.abs()
    if add_after_act:
        return (u.relu() if relu else u) + r, magnitude
    return (u + r).relu() if relu else u + r, magnitude


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_apply(isa, shape, dtype):
    x = Inputs(shape, dtype)
    z, residual = x.activation(), x.activation()
    mean, scale, beta = x.vector(), x.vector(), x.vector()
    affine = (x.vector(), x.vector(), x.vector())
    for r, r_affine in ((None, None), (residual, None), (residual, affine)):
        for relu in (False, True):
            for add_after_act in (False, True):
                out = x.out()
                ops.norm_apply(
                    z, mean, scale, beta, r, *(r_affine or (None,) * 3), relu, add_after_act, out
                )
                reference, magnitude = apply_reference(
                    z, mean, scale, beta, r, r_affine, relu, add_after_act
                )
                assert_elementwise(out, reference, magnitude)


@pytest.mark.parametrize("add_after_act", [False, True])
@pytest.mark.parametrize("where", ["z", "residual"])
def test_apply_in_place(isa, where, add_after_act):
    x = Inputs((3, 20, 9, 7), torch.bfloat16)
    z, residual = x.activation(), x.activation()
    args = (x.vector(), x.vector(), x.vector())
    out = x.out()
    ops.norm_apply(z, *args, residual, None, None, None, True, add_after_act, out)
    target = {"z": z, "residual": residual}[where]
    ops.norm_apply(z, *args, residual, None, None, None, True, add_after_act, target)
    assert torch.equal(target, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_propagates_nan_and_infinity(isa, dtype):
    z = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0, 2.0]).to(dtype)
    z = z.repeat(40).view(1, 1, 200, 1)
    one, zero = torch.ones(1, dtype=acc(dtype)), torch.zeros(1, dtype=acc(dtype))
    out = torch.zeros_like(z)
    ops.norm_apply(z, zero, one, zero, None, None, None, None, True, False, out)
    torch.testing.assert_close(out, torch.relu(z), rtol=0, atol=0, equal_nan=True)
    residual = torch.full_like(z, float("nan"))
    for add_after_act in (False, True):
        ops.norm_apply(z, zero, one, zero, residual, None, None, None, True, add_after_act, out)
        assert out.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_match_torch_on_every_bit_pattern(isa, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    z = every.view(1, 1, 256, 256).repeat(1, 24, 1, 1)
    z = nhwc(z)
    scale = torch.tensor([1.0, 1 / 3, 0.99609375, 1.00390625, 1.0009765625, 3e-5, 1e5, 1e-38])
    scale = scale.repeat(3) * torch.tensor([1.0, 0.7, 1.37]).repeat_interleave(8)
    zero = torch.zeros(24)
    out = torch.zeros_like(z)
    ops.norm_apply(z, zero, scale, zero, None, None, None, None, False, False, out)
    reference = (z.float() * scale.view(1, -1, 1, 1)).to(dtype)
    torch.testing.assert_close(out, reference, rtol=0, atol=0, equal_nan=True)


def test_narrowing_keeps_nan_with_any_payload(isa):
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7FC00000], dtype=torch.int64)
    beta = bits.to(torch.int32).view(torch.float32).repeat(8)
    one, zero = torch.ones(32), torch.zeros(32)
    for dtype in (torch.bfloat16, torch.float16):
        z = torch.zeros(1, 32, 1, 1, dtype=dtype)
        out = torch.zeros_like(z)
        ops.norm_apply(z, zero, one, beta, None, None, None, None, True, False, out)
        assert out.isnan().all()


# ---- backward


def backward_reference(dy, z, mean, scale, beta, y, relu):
    """du, and where the sign of the recomputed pre-activation is a matter of rounding."""
    du = dy.double()
    unsure = torch.zeros_like(du, dtype=torch.bool)
    if relu and y is not None:
        du = torch.where(y.double() <= 0, 0.0, du)
    elif relu:
        terms = (z.double() - wide(mean)) * wide(scale)
        u = terms + wide(beta)
        du = torch.where(u <= 0, 0.0, du)
        unsure = u.abs() <= 6 * unit(acc(z.dtype)) * (terms.abs() + wide(beta).abs())
    return du, unsure


MASKS = ["none", "from_y", "recompute"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_reduce(isa, shape, dtype):
    x = Inputs(shape, dtype)
    dy, z, y = x.activation(), x.activation(), x.activation().relu()
    mean, rstd, scale, beta = x.vector(), x.vector(0.5, 2), x.vector(), x.vector()
    u = unit(acc(dtype))
    for mask in MASKS:
        for with_activation in (False, True):
            relu = mask != "none"
            given_y = y if mask == "from_y" else None
            affine = (scale, beta) if with_activation or mask == "recompute" else (None, None)
            sum_du, sum_du_xhat = x.out_vector(), x.out_vector()
            activation = x.out() if with_activation else None
            ops.norm_backward_reduce(
                dy, z, mean, rstd, given_y, *affine, relu, sum_du, sum_du_xhat, activation
            )
            du, unsure = backward_reference(dy, z, mean, scale, beta, given_y, relu)
            xhat = (z.double() - wide(mean)) * wide(rstd)
            slack = torch.where(unsure, dy.double().abs(), 0.0)
            assert_within(
                sum_du,
                sum_channels(du),
                SUM_ROUNDINGS * u * sum_channels(du.abs()) + sum_channels(slack),
            )
            assert_within(
                sum_du_xhat,
                sum_channels(du * xhat),
                SUM_ROUNDINGS * u * sum_channels((du * xhat).abs())
                + sum_channels(slack * xhat.abs()),
            )
            if with_activation:
                reference, magnitude = apply_reference(
                    z, mean, scale, beta, None, None, relu, False
                )
                assert_elementwise(activation, reference, magnitude)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_apply(isa, shape, dtype):
    x = Inputs(shape, dtype)
    dy, z, y = x.activation(), x.activation(), x.activation().relu()
    mean, scale, beta = x.vector(), x.vector(), x.vector()
    coef_z, coef_1 = x.vector(), x.vector()
    for mask in MASKS:
        for coefs in ((None, None), (coef_z, None), (None, coef_1), (coef_z, coef_1)):
            for with_du in (False, True):
                relu = mask != "none"
                given_y = y if mask == "from_y" else None
                given_beta = beta if mask == "recompute" else None
                dz, out_du = x.out(), x.out() if with_du else None
                ops.norm_backward_apply(
                    dy, z, mean, scale, given_beta, given_y, relu, *coefs, dz, out_du
                )
                du, unsure = backward_reference(dy, z, mean, scale, beta, given_y, relu)
                reference = wide(scale) * du
                magnitude = reference.abs()
                if coefs[0] is not None:
                    term = wide(coef_z) * (z.double() - wide(mean))
                    reference, magnitude = reference + term, magnitude + term.abs()
                if coefs[1] is not None:
                    reference = reference + wide(coef_1)
                    magnitude = magnitude + wide(coef_1).abs()
                slack = torch.where(unsure, (wide(scale) * dy.double()).abs(), 0.0)
                rounding = 1.01 * unit(dtype) * (reference.abs() + slack)
                rounding += torch.finfo(dtype).smallest_normal * unit(dtype)
                bound = 6.1 * unit(acc(dtype)) * magnitude + rounding + slack
                assert_within(dz, reference, bound)
                if with_du:
                    assert torch.equal(torch.where(unsure, du, out_du.double()), du)


@pytest.mark.parametrize(("dz_is", "du_is"), [("dy", None), ("z", None), ("z", "dy"), ("y", None)])
def test_backward_apply_in_place(isa, dz_is, du_is):
    x = Inputs((2, 20, 9, 7), torch.float32)
    tensors = {"dy": x.activation(), "z": x.activation(), "y": x.activation().relu()}
    vectors = (x.vector(), x.vector())
    coefs = (x.vector(), x.vector())

    def run(dz, du):
        t = tensors
        ops.norm_backward_apply(t["dy"], t["z"], *vectors, None, t["y"], True, *coefs, dz, du)

    dz, du = x.out(), x.out() if du_is else None
    run(dz, du)
    run(tensors[dz_is], tensors[du_is] if du_is else None)
    assert torch.equal(tensors[dz_is], dz)
    if du_is:
        assert torch.equal(tensors[du_is], du)


def test_recomputed_mask_is_the_forward_pass_mask(isa):
    """Forward and backward must agree on the sign of u, whatever rounding does to it."""
    x = Inputs((4, 20, 33, 31), torch.float32)
    z, dy = x.activation(), torch.ones(x.shape).contiguous(memory_format=torch.channels_last)
    mean, scale = x.vector(), x.vector()
    # u is exactly zero but for rounding
    beta = -((z[0, :, 0, 0] - mean) * scale)
    z = nhwc(z[:1, :, :1, :1].expand(x.shape))
    out, dz, du = x.out(), x.out(), x.out()
    ops.norm_apply(z, mean, scale, beta, None, None, None, None, True, False, out)
    ops.norm_backward_apply(dy, z, mean, scale, beta, None, True, None, None, dz, du)
    assert torch.equal(du != 0, out > 0)


# ---- max-pool

POOLS = [  # shape, kernel, stride, padding
    ((2, 64, 12, 15), 3, 2, 1),
    ((1, 3, 7, 5), 3, 2, 1),
    ((2, 17, 6, 6), 2, 2, 0),
    ((1, 5, 1, 1), 3, 2, 1),
    ((1, 20, 9, 9), 3, 1, 1),
    ((2, 9, 4, 4), 1, 1, 0),
    ((1, 33, 17, 13), 5, 3, 2),
    ((1, 6, 11, 12), 2, 5, 1),
    ((0, 6, 11, 12), 3, 2, 1),
]


def pool_outputs(x: Inputs, pool) -> tuple[torch.Tensor, torch.Tensor]:
    (n, c, h, w), kernel, stride, padding = x.shape, *pool
    p, q = ((size + 2 * padding - kernel) // stride + 1 for size in (h, w))
    out = nhwc(torch.full((n, c, p, q), float("nan"), dtype=x.dtype))
    return out, torch.full_like(out, 255, dtype=torch.uint8)


def flat_index(index: torch.Tensor, shape, pool) -> torch.Tensor:
    """The window's own index as torch's: a position in the input plane."""
    kernel, stride, padding = pool
    p, q = (torch.arange(n) * stride - padding for n in index.shape[2:])
    rows = index.long() // kernel + p.view(-1, 1)
    columns = index.long() % kernel + q
    assert ((rows >= 0) & (rows < shape[2]) & (columns >= 0) & (columns < shape[3])).all()
    return rows * shape[3] + columns


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), POOLS, ids=str)
def test_apply_max_pool(isa, shape, kernel, stride, padding, dtype):
    x, pool = Inputs(shape, dtype), (kernel, stride, padding)
    z, mean, scale, beta = x.activation(), x.vector(), x.vector(), x.vector(0, 1)
    out, index = pool_outputs(x, pool)
    ops.norm_apply_max_pool(z, mean, scale, beta, *pool, out, index)
    without_index, _ = pool_outputs(x, pool)
    ops.norm_apply_max_pool(z, mean, scale, beta, *pool, without_index, None)
    assert torch.equal(out, without_index)
    if shape[0] == 0:
        return
    y, magnitude = apply_reference(z, mean, scale, beta, None, None, True, False)
    reference = torch.nn.functional.max_pool2d(y, *pool)
    largest = torch.nn.functional.max_pool2d(magnitude, *pool)
    assert_elementwise(out, reference, largest)
    picked = y.flatten(2).gather(2, flat_index(index, shape, pool).flatten(2)).view_as(reference)
    assert_within(picked, reference, 6 * unit(acc(dtype)) * largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), POOLS[:-1], ids=str)
def test_max_pool_index_follows_the_rule_of_torch(isa, shape, kernel, stride, padding, dtype):
    """Small integers: many ties, no rounding. The first maximum wins, NaN over all."""
    x, pool = Inputs(shape, dtype), (kernel, stride, padding)
    z = nhwc((x.activation().double() * 2).round().to(dtype))
    for nan_share in (0.0, 0.05):
        z[torch.rand(shape, generator=x.generator) < nan_share] = float("nan")
        mean = torch.ones(shape[1], dtype=acc(dtype))
        scale = torch.full_like(mean, -0.5)
        scale[::2] = 2
        out, index = pool_outputs(x, pool)
        ops.norm_apply_max_pool(z, mean, scale, mean, *pool, out, index)
        y = ((z.double() - 1) * wide(scale) + 1).relu()
        reference, position = torch.nn.functional.max_pool2d(y, *pool, return_indices=True)
        torch.testing.assert_close(out.double(), reference, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(flat_index(index, shape, pool), position)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), POOLS, ids=str)
def test_max_pool_alone(isa, shape, kernel, stride, padding, dtype):
    """Values of every sign; NaN over all, wherever it stands in a window."""
    x, pool = Inputs(shape, dtype), (kernel, stride, padding)
    z = x.activation()
    for special in (None, float("nan"), -float("inf")):
        if special is not None:
            z[torch.rand(shape, generator=x.generator) < 0.1] = special
        out, _ = pool_outputs(x, pool)
        ops.max_pool(z, *pool, out)
        if shape[0] > 0:
            reference = torch.nn.functional.max_pool2d(z.double(), *pool)
            torch.testing.assert_close(out.double(), reference, rtol=0, atol=0, equal_nan=True)


def pooled_du(dy, z, mean, scale, beta, index, shape, pool):
    """du of the pool's input, the sum of its terms' magnitudes, and where its sign is unsure."""
    at = flat_index(index, shape, pool).flatten(2)
    du, magnitude = torch.zeros(2, *shape, dtype=torch.float64)
    du.flatten(2).scatter_add_(2, at, dy.double().flatten(2))
    magnitude.flatten(2).scatter_add_(2, at, dy.double().abs().flatten(2))
    masked, unsure = backward_reference(du, z, mean, scale, beta, None, True)
    return masked, torch.where((masked == 0) & ~unsure, 0.0, magnitude), unsure


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), POOLS, ids=str)
def test_max_pool_backward(isa, shape, kernel, stride, padding, dtype):
    x, pool = Inputs(shape, dtype), (kernel, stride, padding)
    z, mean, scale, beta = x.activation(), x.vector(), x.vector(), x.vector(0, 1)
    rstd, coef_z, coef_1 = x.vector(0.5, 2), x.vector(), x.vector()
    out, index = pool_outputs(x, pool)
    ops.norm_apply_max_pool(z, mean, scale, beta, *pool, out, index)
    dy = nhwc(torch.randn(out.shape, generator=x.generator).to(dtype))
    du, terms, unsure = pooled_du(dy, z, mean, scale, beta, index, shape, pool)
    u = unit(acc(dtype))
    slack = torch.where(unsure, terms, 0.0)

    sum_du, sum_du_xhat = x.out_vector(), x.out_vector()
    vectors = (mean, rstd, scale, beta)
    ops.norm_max_pool_backward_reduce(dy, z, *vectors, index, *pool, sum_du, sum_du_xhat)
    xhat = (z.double() - wide(mean)) * wide(rstd)
    # One rounding a window of a tile, which holds fewer than 140 of them here.
    bound = SUM_ROUNDINGS * u * sum_channels(terms) + sum_channels(slack)
    assert_within(sum_du, sum_channels(du), bound)
    bound = SUM_ROUNDINGS * u * sum_channels(terms * xhat.abs()) + sum_channels(slack * xhat.abs())
    assert_within(sum_du_xhat, sum_channels(du * xhat), bound)

    for coefs in ((None, None), (coef_z, None), (None, coef_1), (coef_z, coef_1)):
        dz = x.out()
        ops.norm_max_pool_backward_apply(dy, z, mean, scale, beta, index, *pool, *coefs, dz)
        reference = wide(scale) * du
        magnitude = (wide(scale) * terms).abs()
        if coefs[0] is not None:
            term = wide(coef_z) * (z.double() - wide(mean))
            reference, magnitude = reference + term, magnitude + term.abs()
        if coefs[1] is not None:
            reference, magnitude = reference + wide(coef_1), magnitude + wide(coef_1).abs()
        unsure_by = (wide(scale) * slack).abs()
        rounding = 1.01 * unit(dtype) * (reference.abs() + unsure_by)
        rounding += torch.finfo(dtype).smallest_normal * unit(dtype)
        # A pixel's du is a sum over at most kernel² windows.
        bound = (6 + kernel**2) * u * magnitude + rounding + unsure_by
        assert_within(dz, reference, bound)
    in_place = z.clone(memory_format=torch.preserve_format)
    ops.norm_max_pool_backward_apply(
        dy, in_place, mean, scale, beta, index, *pool, coef_z, coef_1, in_place
    )
    assert torch.equal(in_place, dz)


# ---- all ops


def all_results(shape, dtype, seed=0):
    """Every op once, on fresh inputs: name, outputs."""
    x = Inputs(shape, dtype, seed)
    z, dy, y, residual = x.activation(), x.activation(), x.activation().relu(), x.activation()
    mean, scale, beta = x.vector(), x.vector(), x.vector()
    out = {name: x.out() for name in ("apply", "activation", "dz", "du")}
    out |= {name: x.out_vector() for name in ("mean", "m2", "sum_du", "sum_du_xhat")}
    ops.norm_stats(z, out["mean"], out["m2"])
    affine = (x.vector(), x.vector(), x.vector())
    ops.norm_apply(z, mean, scale, beta, residual, *affine, True, False, out["apply"])
    ops.norm_backward_reduce(
        *(dy, z, mean, scale.abs() + 0.5, y, scale, beta, True),
        *(out["sum_du"], out["sum_du_xhat"], out["activation"]),
    )
    ops.norm_backward_apply(
        *(dy, z, mean, scale, beta, None, True, x.vector(), x.vector(), out["dz"], out["du"])
    )
    pool = (3, 2, 1)
    out["pooled"], out["index"] = pool_outputs(x, pool)
    ops.norm_apply_max_pool(z, mean, scale, beta, *pool, out["pooled"], out["index"])
    out |= {"pool_sum": x.out_vector(), "pool_sum_xhat": x.out_vector(), "pool_dz": x.out()}
    ops.norm_max_pool_backward_reduce(
        *(out["pooled"], z, mean, scale.abs() + 0.5, scale, beta, out["index"], *pool),
        *(out["pool_sum"], out["pool_sum_xhat"]),
    )
    ops.norm_max_pool_backward_apply(
        *(out["pooled"], z, mean, scale, beta, out["index"], *pool),
        *(x.vector(), x.vector(), out["pool_dz"]),
    )
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 64, 56, 56), (3, 3, 100, 101), (8, 2048, 7, 7)], ids=str)
def test_results_do_not_depend_on_the_thread_count(isa, shape, dtype):
    one = all_results(shape, dtype)
    torch.set_num_threads(2)
    two = all_results(shape, dtype)
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_strides_of_size_one_dimensions_are_ignored(isa):
    for shape, strides in [
        ((2, 6, 1, 1), (6, 1, 1, 1)),
        ((1, 6, 4, 5), (7, 1, 30, 6)),
        ((2, 1, 4, 5), (20, 999, 5, 1)),
        ((3, 6, 1, 5), (30, 1, 12345, 6)),
    ]:
        z = torch.randn(shape)
        strided = torch.empty(int(z.numel())).as_strided(shape, strides).copy_(z)
        v = torch.rand(3, shape[1])
        out = torch.full_like(nhwc(z), float("nan"))
        ops.norm_apply(strided, *v, None, None, None, None, True, False, out)
        expected = torch.full_like(nhwc(z), float("nan"))
        ops.norm_apply(nhwc(z), *v, None, None, None, None, True, False, expected)
        assert torch.equal(out, expected)


# ---- bad arguments

SHAPE = (2, 6, 4, 5)


def good_arguments(op: str) -> dict[str, object]:
    x = Inputs(SHAPE, torch.float32)
    a, v = x.activation, x.vector
    pool = {"kernel": 3, "stride": 2, "padding": 1}
    pooled, index = pool_outputs(x, pool.values())
    return {
        "norm_stats": lambda: {"z": a(), "mean": x.out_vector(), "m2": x.out_vector()},
        "norm_apply": lambda: {
            **{"z": a(), "mean": v(), "scale": v(), "beta": v(), "residual": a()},
            **{"residual_mean": v(), "residual_scale": v(), "residual_beta": v()},
            **{"relu": True, "add_after_act": False, "out": x.out()},
        },
        "norm_backward_reduce": lambda: {
            **{"dy": a(), "z": a(), "mean": v(), "rstd": v(), "y": a(), "scale": v()},
            **{"beta": v(), "relu": True, "sum_du": x.out_vector()},
            **{"sum_du_xhat": x.out_vector(), "activation": x.out()},
        },
        "norm_backward_apply": lambda: {
            **{"dy": a(), "z": a(), "mean": v(), "scale": v(), "beta": v(), "y": a()},
            **{"relu": True, "coef_z": v(), "coef_1": v(), "dz": x.out(), "du": x.out()},
        },
        "norm_apply_max_pool": lambda: {
            **{"z": a(), "mean": v(), "scale": v(), "beta": v(), **pool},
            **{"out": pooled, "index": index},
        },
        "max_pool": lambda: {"z": a(), **pool, "out": pooled},
        "norm_max_pool_backward_reduce": lambda: {
            **{"dy": torch.rand_like(pooled), "z": a(), "mean": v(), "rstd": v(), "scale": v()},
            **{"beta": v(), "index": index.zero_(), **pool},
            **{"sum_du": x.out_vector(), "sum_du_xhat": x.out_vector()},
        },
        "norm_max_pool_backward_apply": lambda: {
            **{"dy": torch.rand_like(pooled), "z": a(), "mean": v(), "scale": v(), "beta": v()},
            **{"index": index.zero_(), **pool, "coef_z": v(), "coef_1": v(), "dz": x.out()},
        },
    }[op]()


OUTPUTS = {
    "norm_stats": ("mean", "m2"),
    "norm_apply": ("out",),
    "norm_backward_reduce": ("sum_du", "sum_du_xhat", "activation"),
    "norm_backward_apply": ("dz", "du"),
    "norm_apply_max_pool": ("out", "index"),
    "max_pool": ("out",),
    "norm_max_pool_backward_reduce": ("sum_du", "sum_du_xhat"),
    "norm_max_pool_backward_apply": ("dz",),
}


def assert_rejected(op: str, arguments: dict[str, object], match: str) -> None:
    outputs = {name: arguments[name] for name in OUTPUTS[op] if arguments[name] is not None}
    before = {name: t.clone() for name, t in outputs.items()}
    with pytest.raises(RuntimeError, match=match):
        getattr(ops, op)(**arguments)
    for name, t in outputs.items():
        same = (t == before[name]) | (t.isnan() & before[name].isnan())
        assert same.all(), f"{name} was written"


TENSORS = [
    (op, name)
    for op in OUTPUTS
    for name, value in good_arguments(op).items()
    if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_bad_tensor_is_rejected_before_any_write(op, name):
    good = good_arguments(op)[name]
    if good.dim() == 4:
        bad = {
            "rank": good[0],
            "channels": nhwc(good[:, :5]),
            "height": nhwc(good[:, :, :1]),
            "layout": good.clone(memory_format=torch.contiguous_format),
            "sliced": nhwc(torch.cat([good, good], 3))[..., : good.shape[3]],
            "dtype": good.to(torch.bfloat16),
            "integer": good.nan_to_num().to(torch.int32),
        }
    else:
        bad = {
            "length": good[:5],
            "rank": good.view(1, -1),
            "dtype": good.double(),
            "half": good.to(torch.bfloat16),
            "strided": torch.randn(12)[::2],
        }
    if (op, name) == ("norm_stats", "z"):  # the only activation there
        del bad["height"], bad["dtype"]
    elif op == "norm_stats":  # its outputs may be double for any activation
        del bad["dtype"]
    for value in bad.values():
        arguments = good_arguments(op) | {name: value}
        # z sets what the others must be like, and they are named as not like z.
        match = (
            r"\bz must | of z |\b(mean|out|dy|index) must " if name == "z" else rf"\b{name} must "
        )
        assert_rejected(op, arguments, match)


def test_message_names_argument_shape_and_dtype():
    arguments = good_arguments("norm_apply")
    with pytest.raises(RuntimeError, match=r"scale must have shape \[6\].* got \[4\]"):
        ops.norm_apply(**arguments | {"scale": torch.ones(4)})
    with pytest.raises(RuntimeError, match=r"out must have the dtype of z \(Float\), got Half"):
        ops.norm_apply(**arguments | {"out": arguments["out"].half()})


@pytest.mark.parametrize(
    ("op", "changes", "match"),
    [
        ("norm_apply", {"residual": None}, "residual_mean is given without residual"),
        ("norm_apply", {"residual_scale": None}, "must be given together, got 2 of 3"),
        ("norm_apply", {"residual_mean": None}, "must be given together, got 2 of 3"),
        ("norm_backward_reduce", {"y": None, "beta": None}, "relu needs y"),
        ("norm_backward_reduce", {"scale": None}, "activation needs scale and beta"),
        ("norm_backward_apply", {"y": None, "beta": None}, "relu needs y"),
        ("norm_apply_max_pool", {"kernel": 0}, "kernel must be 1 to 16, got 0"),
        ("norm_apply_max_pool", {"kernel": 17, "padding": 8}, "kernel must be 1 to 16, got 17"),
        ("norm_apply_max_pool", {"stride": 0}, "stride must be at least 1, got 0"),
        ("norm_apply_max_pool", {"padding": -1}, "padding must be 0 to half the kernel size"),
        ("norm_apply_max_pool", {"padding": 2}, "padding must be 0 to half the kernel size"),
        ("norm_apply_max_pool", {"kernel": 7, "padding": 0}, "kernel 7 .* is larger than z"),
        ("max_pool", {"kernel": 0}, "kernel must be 1 to 16, got 0"),
        ("max_pool", {"stride": 0}, "stride must be at least 1, got 0"),
        ("max_pool", {"padding": 2}, "padding must be 0 to half the kernel size"),
        ("norm_max_pool_backward_reduce", {"stride": 1}, "dy must have the pooled shape"),
        ("norm_max_pool_backward_apply", {"stride": 3}, "dy must have the pooled shape"),
    ],
)
def test_bad_combination_is_rejected(op, changes, match):
    assert_rejected(op, good_arguments(op) | changes, match)


@pytest.mark.parametrize(
    ("op", "output", "other"),
    [
        ("norm_stats", "mean", "m2"),
        ("norm_apply", "out", "z"),
        ("norm_apply", "out", "residual"),
        ("norm_backward_reduce", "sum_du", "sum_du_xhat"),
        ("norm_backward_reduce", "sum_du", "mean"),
        ("norm_backward_apply", "dz", "du"),
        ("norm_backward_apply", "dz", "dy"),
        ("max_pool", "out", "z"),
        ("norm_max_pool_backward_reduce", "sum_du_xhat", "rstd"),
        ("norm_max_pool_backward_apply", "dz", "z"),
    ],
)
def test_overlapping_memory_is_rejected(op, output, other):
    arguments = good_arguments(op)
    if arguments[output].dim() == 1:  # the very same vector
        arguments[output] = arguments[other]
    else:  # shifted by one element
        storage = torch.randn(max(arguments[n].numel() for n in (output, other)) + 1)
        for shift, name in enumerate((output, other)):
            like = arguments[name]
            arguments[name] = storage.as_strided(like.shape, like.stride(), shift)
    assert_rejected(op, arguments, f"{output} overlaps the memory of {other}")


def test_unknown_instruction_set_is_an_error():
    with pytest.raises(RuntimeError, match="'sse' is no instruction set"):
        _C.set_cpu_isa("sse")
    assert native.cpu_isa() in native.build_info()["isas"]


@pytest.mark.parametrize("op", list(OUTPUTS))
def test_opcheck(op):
    arguments = good_arguments(op)
    for name in OUTPUTS[op]:  # opcheck compares outputs, and NaN equals nothing
        arguments[name].zero_()
    overload = getattr(ops, op).default
    args = tuple(arguments[a.name] for a in overload._schema.arguments)
    torch.library.opcheck(overload, args, test_utils=("test_schema", "test_faketensor"))

"""The kernels of csrc/cuda and the backend they make up, against float64.

On a CUDA device the library's ops run; without one, the same source compiled for the CPU, whose
address sanitizer stands for guard regions around every buffer (tests/cuda_on_cpu).
"""

from __future__ import annotations

import needs
import pytest
import torch
from cuda_on_cpu.emulator import Emulator, compile_program, missing_compiler
from torch import Tensor

import resfast
from resfast import native
from resfast.backends import cuda as cuda_backend
from resfast.backends import norm_race, select
from resfast.backends.eager import EagerBackend
from resfast.backends.interface import Affine, mask_shape, nhwc, pack_mask
from resfast.testing import (
    HALF_DTYPES,
    block_case,
    bn_case,
    bottleneck_weights,
    chain_case,
    judge_seeds,
    max_pool_case,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# without a device only the ops' schemas are needed, which the native library has
pytestmark = [
    pytest.mark.cuda,
    needs.cuda_library if DEVICE == "cuda" else needs.native_library,
]
EAGER = EagerBackend()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
U = 2.0**-24
# half the distance of neighbours at 1, and below the least normal number
ROUNDOFF = {torch.float32: (U, 0.0), torch.bfloat16: (2.0**-8, 0.0), torch.float16: (2.0**-11, U)}
# N, C, H, W: one value; odd channels; a byte of a mask; several tiles with a part of one left;
# several blocks of channels with a part of one left, read whole and one by one
SHAPES = [
    *((1, 1, 1, 1), (2, 1, 3, 5), (1, 3, 3, 5), (2, 7, 5, 3), (2, 8, 2, 4), (3, 64, 9, 11)),
    *((1, 2049, 1, 3), (2, 264, 7, 9)),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    if DEVICE == "cuda":
        library = native.cuda_library()
        assert library["built"], library["reason"]
        yield torch.ops.resfast
        return
    missing = missing_compiler()
    if missing:
        pytest.skip(missing)
    emulator = Emulator(compile_program(tmp_path_factory.mktemp("cuda_on_cpu")))
    yield emulator
    emulator.close()


def randn(shape, dtype=torch.float32, mean=0.0, std=1.0) -> Tensor:
    t = torch.randn(shape, dtype=torch.float64) * std + mean
    t = t.to(dtype).to(DEVICE)
    return nhwc(t) if len(shape) == 4 else t


def empty(like: Tensor) -> Tensor:
    """An output to be filled: any value left over is NaN."""
    return torch.full_like(like, float("nan"))


def vectors(c: int, n: int) -> list[Tensor]:
    return [torch.full((c,), float("nan"), device=DEVICE) for _ in range(n)]


def random_affine(c: int) -> Affine:
    """Channel 0 has gamma 0; about half of the others are negative."""
    scale = randn((c,))
    scale[0] = 0
    return Affine(randn((c,)), scale, randn((c,)))


def channel(v: Tensor) -> Tensor:
    return v.double().view(1, -1, 1, 1)


def normalised(z: Tensor, affine: Affine) -> Tensor:
    return (z.double() - channel(affine.mean)) * channel(affine.scale) + channel(affine.beta)


def size(z: Tensor, affine: Affine) -> Tensor:
    """The terms of the affine added up in absolute value: what its roundings are relative to."""
    mean, scale, beta = (channel(v).abs() for v in affine)
    return (z.double().abs() + mean) * scale + beta


def assert_close(actual: Tensor, reference: Tensor, terms: Tensor | float, roundings: float = 8):
    """One rounding to storage, and so many of float32 relative to ``terms``."""
    relative, least = ROUNDOFF[actual.dtype]
    bound = relative * reference.abs() + least + (roundings * U * (1 + relative)) * terms
    error = (actual.double() - reference).abs()
    # not `error > bound`: NaN must fail
    assert (error <= bound).all(), f"{(error / bound).max():.3g} times the bound"


def assert_sum_close(actual: Tensor, term: Tensor):
    """A chain within a thread, a tree over the block, then float64."""
    assert_close(actual, term.sum((0, 2, 3)), term.abs().sum((0, 2, 3)), roundings=24)


def misaligned(t: Tensor) -> Tensor:
    """The same values one element further on in memory."""
    memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return memory[1:].as_strided(t.shape, t.stride(), 1).copy_(t)


# ---- statistics and per-channel vectors


def stats(kernels, z):
    mean, m2 = vectors(z.shape[1], 2)
    kernels.cuda_norm_stats(z, mean, m2)
    return mean, m2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics(kernels, shape, dtype):
    z = randn(shape, dtype, mean=3, std=2)
    mean, m2 = stats(kernels, z)
    expected_mean, expected_m2 = EAGER.norm_stats(z.double())
    assert_close(mean, expected_mean, expected_m2.sqrt())
    assert_close(m2, expected_m2, expected_m2, roundings=24)


@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_in_double_are_not_rounded(kernels, shape, kinds):
    z = randn(shape, mean=1e4)
    c, n = shape[1], shape[0] * shape[2] * shape[3]
    rounded = vectors(c, 2)
    exact = [torch.full((c,), float("nan"), dtype=torch.float64, device=DEVICE) for _ in range(2)]
    mean, m2 = (e if double else r for e, r, double in zip(exact, rounded, kinds, strict=True))
    kernels.cuda_norm_stats(z, mean, m2)
    expected_mean, expected_m2 = EAGER.norm_stats(z.double())
    std = (expected_m2 / n).sqrt()
    if kinds[0]:  # relative to the spread, not to the mean
        assert ((mean - expected_mean).abs() <= 24 * U * std).all()
    else:
        assert_close(mean, expected_mean, expected_m2.sqrt())
    assert_close(m2.float(), expected_m2, expected_m2, roundings=24)


@pytest.mark.parametrize("outlier", [0.0, 1e6])
def test_variance_of_a_large_mean(kernels, outlier):
    """Also where the pixel that others are subtracted from is far from them."""
    z = randn((4, 16, 9, 11), mean=1e4)
    z[0, :, 0, 0] += outlier
    mean, m2 = stats(kernels, z)
    expected_mean, expected_m2 = EAGER.norm_stats(z.double())
    assert ((m2.double() - expected_m2).abs() / expected_m2).max() < 1e-5
    assert_close(mean, expected_mean, (expected_m2 / (4 * 9 * 11)).sqrt())


@pytest.mark.parametrize("magnitude", [0.1, 1e4, 1e8])
def test_statistics_of_a_constant_channel_are_exact(kernels, magnitude):
    z = nhwc(torch.full((3, 24, 9, 11), magnitude, device=DEVICE))
    mean, m2 = stats(kernels, z)
    assert torch.equal(mean, z[0, :, 0, 0])
    assert (m2 == 0).all()


@pytest.mark.skipif(DEVICE == "cpu", reason="launches nothing: the op fills zeros, on a GPU only")
def test_statistics_of_nothing(kernels):
    mean, m2 = stats(kernels, randn((0, 3, 4, 4)))
    assert (mean == 0).all()
    assert (m2 == 0).all()


@pytest.mark.parametrize("given", [True, False])
def test_prepare(kernels, given):
    var = randn((300,)).abs()
    weight, bias = (randn((300,)), randn((300,))) if given else (None, None)
    scale, beta, rstd = vectors(300, 3)
    kernels.cuda_norm_prepare(var, weight, bias, 1e-5, scale, beta, rstd)
    expected = 1 / (var.double() + torch.tensor(1e-5)).sqrt()
    assert_close(rstd, expected, expected, roundings=2)
    gamma = torch.ones_like(expected) if weight is None else weight.double()
    assert_close(scale, gamma * expected, (gamma * expected).abs(), roundings=3)
    assert torch.equal(beta, torch.zeros_like(beta) if bias is None else bias)


def test_coefficients(kernels):
    scale, rstd, sum_du, centred = (randn((300,)) for _ in range(4))
    outputs = vectors(300, 3)
    kernels.cuda_norm_coefficients(scale, rstd, sum_du, centred, 77, *outputs)
    s, r, a, b = (t.double() for t in (scale, rstd, sum_du, centred))
    expected = (r * b, -s / 77 * r * (r * b), -s / 77 * a)
    for actual, reference in zip(outputs, expected, strict=True):
        assert_close(actual, reference, reference.abs())


# ---- forward


def forward_reference(z, affine, residual, residual_affine, relu, after):
    u, r = normalised(z, affine), 0.0
    terms = size(z, affine)
    if residual is not None:
        r = normalised(residual, residual_affine) if residual_affine else residual.double()
        terms = terms + (size(residual, residual_affine) if residual_affine else r.abs())
    y = (u.relu() if relu else u) + r if after else u + r
    return (y if after or not relu else y.relu()), terms


def check_mask_of(mask, y):
    if mask is not None:
        assert torch.equal(mask, pack_mask(y))


def new_mask(z):
    if z.shape[1] % 8:
        return None
    return torch.full(mask_shape(z.shape), 0xAA, dtype=torch.uint8, device=DEVICE)


@pytest.mark.parametrize(
    ("joined", "relu"),
    [
        *(("none", True), ("none", False), ("raw", True), ("raw after", True)),
        *(("affine", True), ("affine after", True), ("affine", False)),
    ],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_apply(kernels, shape, joined, relu):
    for dtype in DTYPES:
        z, affine = randn(shape, dtype), random_affine(shape[1])
        residual = None if joined == "none" else randn(shape, dtype)
        other = random_affine(shape[1]) if "affine" in joined else None
        out, mask = empty(z), new_mask(z)
        kernels.cuda_norm_apply(
            *(z, *affine, residual, *(other or (None,) * 3), relu, "after" in joined, out, mask)
        )
        assert_close(out, *forward_reference(z, affine, residual, other, relu, "after" in joined))
        check_mask_of(mask, out)


def test_apply_writes_over_what_it_reads(kernels):
    z, affine, residual = randn((3, 64, 9, 11)), random_affine(64), randn((3, 64, 9, 11))
    expected = empty(z)
    rest = (None, None, None, True, False)
    kernels.cuda_norm_apply(z, *affine, residual, *rest, expected, None)
    for out in (0, 1):
        given = [z.clone(), residual.clone()]
        kernels.cuda_norm_apply(given[0], *affine, given[1], *rest, given[out], None)
        assert torch.equal(given[out], expected)
        assert torch.equal(given[1 - out], (z, residual)[1 - out])


def test_nan_passes(kernels):
    z, affine = randn((2, 8, 5, 3)), random_affine(8)
    z[1, 3, 2, 1] = float("nan")
    out, mask = empty(z).zero_(), new_mask(z)
    kernels.cuda_norm_apply(z, *affine, *[None] * 4, True, False, out, mask)
    assert out.isnan().nonzero().tolist() == [[1, 3, 2, 1]]
    check_mask_of(mask, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_starts_anywhere(kernels, dtype):
    """Views may start between two multiples of 16 bytes."""
    z, affine = randn((2, 16, 5, 3), dtype), random_affine(16)
    dy, dz, du = randn(z.shape, dtype), empty(z), empty(z)
    out = empty(z)
    mean, m2 = stats(kernels, misaligned(z))
    expected = stats(kernels, z)
    assert_close(mean, expected[0].double(), expected[1].double().sqrt())
    assert_close(m2, expected[1].double(), expected[1].double(), roundings=24)
    kernels.cuda_norm_apply(misaligned(z), *affine, *[None] * 4, True, False, out, None)
    assert_close(out, *forward_reference(z, affine, None, None, True, False))
    kernels.cuda_norm_backward_apply(
        *(dy, misaligned(z), *affine, None, True, *[None] * 7, dz, du, None)
    )
    again = empty(z)
    kernels.cuda_norm_backward_apply(*(dy, z, *affine, None, True, *[None] * 7, again, None, None))
    assert torch.equal(dz, again)
    seen = randn(z.shape)
    expected = du_reference(dy, None, z, affine, "bits", seen, dtype)
    sums = torch.full((2, 16), float("nan"), device=DEVICE)
    kernels.cuda_norm_backward_reduce(
        *(misaligned(dy), None, z, *affine, None, pack_mask(seen), True),
        *(None, None, sums, None, None),
    )
    assert_sum_close(sums[0], expected)


HELD_SHAPES = [s for s in SHAPES if s[1] < 100] + [(1, 24, 32, 32), (1, 9, 31, 33)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HELD_SHAPES, ids=str)
def test_forward_in_one_read(kernels, shape, dtype):
    z = randn(shape, dtype, mean=3, std=2)
    m = z.numel() // z.shape[1]
    for joined in ("none", "raw", "after"):
        residual = None if joined == "none" else randn(shape, dtype)
        weight, bias = (randn(shape[1:2]), randn(shape[1:2])) if joined != "raw" else (None, None)
        out, mask, (mean, var) = empty(z), new_mask(z), vectors(shape[1], 2)
        kernels.cuda_norm_forward(
            *(z, weight, bias, 1e-5, residual, True, joined == "after", out, mask, mean, var)
        )
        expected_mean, expected_m2 = EAGER.norm_stats(z.double())
        assert_close(mean, expected_mean, expected_m2.sqrt())
        assert_close(var, expected_m2 / m, expected_m2 / m, roundings=24)
        rstd = 1 / (var.double() + torch.tensor(1e-5)).sqrt()
        gamma = 1.0 if weight is None else weight.double()
        affine = Affine(mean, gamma * rstd, torch.zeros_like(mean) if bias is None else bias)
        assert_close(out, *forward_reference(z, affine, residual, None, True, joined == "after"))
        check_mask_of(mask, out)


def test_one_read_of_a_large_mean_and_of_a_constant_channel(kernels):
    z = randn((1, 16, 30, 30), mean=1e4)
    z[:, 3] = 12345.5
    out, (mean, var) = empty(z), vectors(16, 2)
    bias = randn((16,))
    kernels.cuda_norm_forward(z, None, bias, 1e-5, None, False, False, out, None, mean, var)
    exact = EAGER.norm_stats(z.double())[1] / 900
    error = (var.double() - exact).abs() / exact.clamp(min=1e-30)
    assert error.max() < 1e-5
    assert var[3] == 0
    assert (out[:, 3] == bias[3]).all()


# ---- backward


def du_reference(dy, dy2, z, affine, source, y, dtype):
    """du in float64, and masks read as the kernel reads them."""
    du = dy.double() if dy2 is None else dy.double() + dy2.double()
    if source == "none":
        return du
    if source == "recompute":  # rounds as the kernel does, so that no sign differs
        u = torch.addcmul(
            affine.beta.view(1, -1, 1, 1).double(),
            (z.float() - affine.mean.view(1, -1, 1, 1)).double(),
            affine.scale.view(1, -1, 1, 1).double(),
        ).float()
        return torch.where(u <= 0, 0.0, du)
    return torch.where(y <= 0, 0.0, du)


def backward_inputs(shape, dtype, source, forked):
    z, affine = randn(shape, dtype), random_affine(shape[1])
    dy, dy2 = randn(shape, dtype), randn(shape, dtype) if forked else None
    seen = randn(shape, dtype)
    y = seen if source == "y" else None
    mask = pack_mask(seen) if source == "bits" else None
    return dy, dy2, z, affine, seen, y, mask


SOURCES = ["none", "recompute", "y", "bits"]


def with_sources(shapes):
    """A bit mask has whole bytes."""
    return [(s, source) for s in shapes for source in SOURCES if source != "bits" or s[1] % 8 == 0]


@pytest.mark.parametrize(("shape", "source"), with_sources(SHAPES), ids=str)
def test_backward_reduce(kernels, shape, source):
    for dtype, forked in zip(DTYPES, (False, True, True), strict=True):
        dy, dy2, z, affine, seen, y, mask = backward_inputs(shape, dtype, source, forked)
        z2, mean2 = (randn(shape, dtype), randn(shape[1:2])) if forked else (None, None)
        du = empty(z) if forked else None
        activation = empty(z) if source == "recompute" else None
        sums = torch.full((3 if forked else 2, shape[1]), float("nan"), device=DEVICE)
        kernels.cuda_norm_backward_reduce(
            *(dy, dy2, z, *affine, y, mask, source != "none", z2, mean2, sums, du, activation)
        )
        expected = du_reference(dy, dy2, z, affine, source, seen, dtype)
        if du is not None:
            assert_close(du, expected, 0.0)
            expected = du.double()  # the sums are of what was stored
        assert_sum_close(sums[0], expected)
        assert_sum_close(sums[1], expected * (z.double() - channel(affine.mean)))
        if z2 is not None:
            assert_sum_close(sums[2], expected * (z2.double() - channel(mean2)))
        if activation is not None:
            assert_close(activation, normalised(z, affine).relu(), size(z, affine))


@pytest.mark.parametrize("source", SOURCES[:3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_apply(kernels, shape, source):
    for dtype, training in zip(DTYPES, (True, False, True), strict=True):
        dy, _, z, affine, seen, y, _ = backward_inputs(shape, dtype, source, False)
        c = shape[1:2]
        coef_z, coef_1 = (randn(c), randn(c)) if training else (None, None)
        second = (randn(shape, dtype), randn(c), randn(c), randn(c), randn(c), empty(z))
        for z2, mean2, scale2, coef_z2, coef_12, dz2 in ((None,) * 6, second):
            dz, du = empty(z), empty(z)
            kernels.cuda_norm_backward_apply(
                *(dy, z, *affine, y, source != "none", coef_z, coef_1),
                *(z2, mean2, scale2, coef_z2, coef_12, dz, du, dz2),
            )
            expected = du_reference(dy, None, z, affine, source, seen, dtype)
            assert_close(du, expected, 0.0)
            assert_gradient(dz, expected, z, affine.mean, affine.scale, coef_z, coef_1)
            if dz2 is not None:
                assert_gradient(dz2, expected, z2, mean2, scale2, coef_z2, coef_12)


def assert_gradient(dz, du, z, mean, scale, coef_z, coef_1):
    terms = [du * channel(scale)]
    if coef_z is not None:
        terms.append((z.double() - channel(mean)) * channel(coef_z))
    if coef_1 is not None:
        terms.append(channel(coef_1).expand(z.shape))
    assert_close(dz, sum(terms), sum(t.abs() for t in terms))


def test_a_coefficient_of_zero_ignores_infinite_values(kernels):
    """With fixed statistics dz does not depend on z: an infinity there must not make NaN."""
    dy, z, affine = randn((2, 8, 5, 3)), randn((2, 8, 5, 3)), random_affine(8)
    affine.scale[1] = 0.5
    z[0, 1] = float("inf")
    dz = empty(z)
    kernels.cuda_norm_backward_apply(*(dy, z, *affine, None, True), *[None] * 7, dz, None, None)
    expected = du_reference(dy, None, z, affine, "recompute", None, z.dtype)
    assert_close(dz, expected * channel(affine.scale), 0.0)


@pytest.mark.parametrize(("shape", "source"), with_sources(HELD_SHAPES), ids=str)
def test_backward_in_one_read(kernels, shape, source):
    for dtype, forked in zip(DTYPES, (False, True, True), strict=True):
        dy, dy2, z, affine, seen, y, mask = backward_inputs(shape, dtype, source, forked)
        rstd = randn(shape[1:2]).abs()
        du = empty(z) if forked else None
        activation = empty(z) if source == "recompute" else None
        dz, (sum_du, sum_du_xhat) = empty(z), vectors(shape[1], 2)
        kernels.cuda_norm_backward(
            *(dy, dy2, z, *affine, rstd, y, mask, source != "none"),
            *(dz, du, activation, sum_du, sum_du_xhat),
        )
        expected = du_reference(dy, dy2, z, affine, source, seen, dtype)
        if du is not None:
            assert_close(du, expected, 0.0)
            expected = du.double()
        centred = z.double() - channel(affine.mean)
        assert_sum_close(sum_du, expected)
        assert_sum_close(sum_du_xhat, expected * centred * channel(rstd))
        share = affine.scale.double() / (z.numel() // shape[1])
        coef_z = -(share * rstd.double() * sum_du_xhat.double())
        assert_gradient(
            *(dz, expected, z, affine.mean, affine.scale, coef_z, -(share * sum_du.double()))
        )
        if activation is not None:
            assert_close(activation, normalised(z, affine).relu(), size(z, affine))


# ---- how the work is shared out


@pytest.mark.skipif(DEVICE == "cuda", reason="only the emulator shows its tilings")
@pytest.mark.parametrize("c", [1, 3, 8, 64, 2048, 2049])
@pytest.mark.parametrize("m", [1, 300, 802816, 2**33 + 1])
def test_tilings_cover_the_activation_within_the_chips_limits(kernels, m, c):
    for dtype in DTYPES:
        for aligned in (True, False):
            rows = kernels.tilings(m, c, dtype, aligned).tolist()
            for kind, (lanes, threads_c, threads_m, blocks_c, tiles, per_tile) in enumerate(rows):
                assert lanes == (8 if aligned and c % 8 == 0 else 1)
                assert (blocks_c - 1) * threads_c * lanes < c <= blocks_c * threads_c * lanes
                assert (tiles - 1) * per_tile < m <= tiles * per_tile
                assert threads_c * threads_m <= (512 if kind == 2 else 256)
                assert tiles <= (512, 65535, 1)[kind]
                if kind == 2 and m <= 1024:
                    held = 1024 * 32 // dtype.itemsize // lanes // 512
                    assert threads_m * held >= m


# ---- the backend


@pytest.fixture
def forced(kernels, monkeypatch):
    """The backend forced, on what runs its kernels here."""
    if DEVICE == "cpu":
        monkeypatch.setattr(cuda_backend, "_native", kernels)
        monkeypatch.setattr(cuda_backend.CudaBackend, "unavailable_reason", lambda self: None)
        monkeypatch.setattr(cuda_backend.CudaBackend, "declines", lambda self, f, z: None)
    with resfast.backend("cuda"):
        yield


# small: what the kernels do not take runs beside them
SMALL = (2, 16, 6, 5)
NORMS = [
    bn_case("bn", SMALL, True, relu=False),
    bn_case("bn_add_relu", SMALL, True, residual=True),
    bn_case("bn_relu_add", SMALL, True, residual=True, add_after_act=True),
    bn_case("bn_add_relu", SMALL, False, residual=True),
    max_pool_case("bn_relu_max_pool", SMALL, True),
]
NARROW, WIDE = bottleneck_weights(16, 8, 16), bottleneck_weights(16, 8, 24)
RECOMPUTING = block_case(
    *("memory_efficient", SMALL, WIDE, True), stride=2, projection=True, memory_efficient=True
)
CHAIN = chain_case("chain", SMALL, [NARROW, WIDE], True)


def assert_ok(verdicts):
    bad = [v for v in verdicts if not v.ok]
    assert not bad, "\n".join(map(str, bad))


@pytest.mark.parametrize(
    ("case", "reads_once"),
    [*((c, once) for c in (*NORMS, CHAIN) for once in (True, False)), (RECOMPUTING, False)],
    ids=str,
)
def test_backend(forced, monkeypatch, case, reads_once):
    if not reads_once:
        monkeypatch.setattr(cuda_backend, "HELD_PIXELS", 0)
    # so few channels: the largest error of 8 inputs says little
    assert_ok(judge_seeds(case, torch.float32, 64, DEVICE, ("nhwc",)))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_backend_in_half_precision(forced, dtype):
    assert_ok(judge_seeds(NORMS[1], dtype, 32, DEVICE, ("nhwc",)))


@pytest.mark.parametrize("race", norm_race._SETUPS, ids=str)
@pytest.mark.parametrize("reads_once", [True, False])
def test_what_races_is_this_backends_own_pass(forced, monkeypatch, race, reads_once):
    if not reads_once:
        monkeypatch.setattr(cuda_backend, "HELD_PIXELS", 0)
    backend = select._BACKENDS["cuda"]
    window = (3, 2, 1) if race[1] == norm_race.MAX_POOL else ()
    norm_race._SETUPS[race](randn(SMALL), race[1], window, backend)(backend)


def test_ranks_statistics_merge_exactly(forced):
    """Each rank's mean is a standard deviation from the next's, and large beside it."""
    ranks = [randn((2, 16, 9, 8), mean=1e4 + i) for i in range(5)]
    moments = [select._BACKENDS["cuda"].norm_stats_exact(z) for z in ranks]
    assert all(v.dtype == torch.float64 for pair in moments for v in pair)
    means, m2s = (torch.stack(vs) for vs in zip(*moments, strict=True))
    n = 2 * 9 * 8
    m2 = m2s.sum(0) + n * (means - means.mean(0)).square().sum(0)
    _, expected = EAGER.norm_stats(torch.cat(ranks).double())
    assert ((m2 - expected).abs() / expected).max() < 1e-6


def test_blocks_in_a_row_are_one_op(forced):
    assert select.chains(torch.zeros(1, 1, 1, 1, device=DEVICE))


def test_explain_says_that_the_max_pool_is_the_librarys(forced):
    model = resfast.ResNet(resfast.BasicBlock, [1, 1, 1, 1], num_classes=2).to(DEVICE)
    explanation = resfast.explain(model, randn((2, 3, 32, 32)))
    assert "PyTorch's max-pool" in explanation.declined["cuda max-pool"]
    assert "cuda max-pool" in str(explanation)

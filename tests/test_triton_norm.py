"""kernels/norm.py against EagerBackend in float64, on the inputs as rounded to their dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from resfast.backends.eager import EagerBackend
from resfast.backends.interface import Affine, nhwc, pack_mask
from resfast.kernels import norm
from resfast.kernels.launch import count_traffic
from resfast.kernels.norm import TileStats, TileSums
from resfast.kernels.tiles import NormTile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # CPU: Triton's interpreter, see conftest
EAGER = EagerBackend()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
U = 2.0**-24
# half the distance of neighbours at 1, and below the least normal number
ROUNDOFF = {torch.float32: (U, 0.0), torch.bfloat16: (2.0**-8, 0.0), torch.float16: (2.0**-11, U)}
SMALL = NormTile(16, 16, 4)
# N, C, H, W: pixels one less than a block of 16, one block, one more, several; channels likewise
SHAPES = [(1, 1, 1, 1), (1, 3, 3, 5), (2, 8, 2, 4), (1, 64, 1, 17), (2, 65, 3, 7)]


def randn(shape, dtype=torch.float32, mean=0.0, std=1.0) -> Tensor:
    t = torch.randn(shape, dtype=torch.float64) * std + mean
    t = t.to(dtype).to(DEVICE)
    return nhwc(t) if len(shape) == 4 else t


def empty(like: Tensor) -> Tensor:
    """An output to be filled: any value left over is NaN."""
    return torch.full_like(like, float("nan"))


def random_affine(c: int) -> Affine:
    """Channel 0 has gamma 0; about half of the others are negative."""
    scale = randn((c,))
    scale[0] = 0
    return Affine(randn((c,)), scale, randn((c,)))


def double(*tensors):
    """Each in float64; an affine's members, None as it is."""
    wide = [
        Affine(*double(*t)) if isinstance(t, Affine) else None if t is None else t.double()
        for t in tensors
    ]
    return wide[0] if len(wide) == 1 else wide


def channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def normalised(z: Tensor, affine: Affine) -> Tensor:
    z, affine = double(z, affine)
    return (z - channel(affine.mean)) * channel(affine.scale) + channel(affine.beta)


def size(z: Tensor, affine: Affine) -> Tensor:
    """The terms of the affine added up in absolute value: what its roundings are relative to."""
    z, (mean, scale, beta) = double(z, affine)
    return (z.abs() + channel(mean.abs())) * channel(scale.abs()) + channel(beta.abs())


def assert_close(actual: Tensor, reference: Tensor, terms: Tensor | float, roundings: float = 8):
    """One rounding to storage, and so many of float32 relative to ``terms``."""
    relative, least = ROUNDOFF[actual.dtype]
    bound = relative * reference.abs() + least + (roundings * U * (1 + relative)) * terms
    error = (actual.double() - reference).abs()
    # not `error > bound`: NaN must fail
    assert (error <= bound).all(), f"{(error / bound).max():.3g} times the bound"


def assert_sums_close(sums: Tensor, terms: list[Tensor]):
    """Sums in blocks of float32: a chain of chunks, a tree over the block, then float64."""
    assert sums.shape == (len(terms), terms[0].shape[1])
    assert sums.dtype == torch.float32
    for actual, term in zip(sums, terms, strict=True):
        assert_close(actual, term.sum((0, 2, 3)), term.abs().sum((0, 2, 3)), roundings=24)


@pytest.fixture
def few_programs(monkeypatch):
    """Reductions as if of large tensors: several chunks a program."""
    monkeypatch.setattr(norm, "programs", lambda device: 6)


# ---- statistics


@pytest.mark.parametrize("tile", [None, SMALL, NormTile(4, 32, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(shape, tile, few_programs):
    for dtype in DTYPES:
        z = randn(shape, dtype, mean=3, std=2)
        tiles = norm.norm_stats(z, tile)
        assert tiles.count == shape[0] * shape[2] * shape[3]
        assert tiles.mean.shape == (-(-tiles.count // tiles.rows), shape[1])
        mean, m2 = norm.merge_stats(tiles)
        expected_mean, expected_m2 = EAGER.norm_stats(z.double())
        assert_close(mean, expected_mean, expected_m2.sqrt())
        assert_close(m2, expected_m2, expected_m2, roundings=24)


def test_each_tile_has_its_own_statistics(few_programs):
    z = randn((3, 20, 5, 7), mean=100)
    tiles = norm.norm_stats(z, NormTile(8, 16, 4))
    assert (tiles.rows, tiles.count, len(tiles.mean)) == (40, 105, 3)
    pixels = z.permute(0, 2, 3, 1).reshape(-1, 20).double()
    for t, part in enumerate(pixels.split(40)):
        mean = part.mean(0)
        assert_close(tiles.mean[t], mean, 0.0, roundings=0)
        # the rest holds what rounding the mean to float32 lost
        assert ((tiles.mean[t].double() + tiles.rest[t] - mean).abs() <= 4 * U).all()
        m2 = (part - mean).square().sum(0)
        assert_close(tiles.m2[t], m2, m2)


@pytest.mark.parametrize("programs", [1, 4, 528])
@pytest.mark.parametrize("outliers", [0, 1, 16])
def test_variance_at_a_large_mean(programs, outliers, monkeypatch):
    """Relative error below 1e-5 at mean/std = 1e4, whatever the first rows are."""
    monkeypatch.setattr(norm, "programs", lambda device: programs)
    z = randn((4, 24, 9, 9), mean=1e4)
    z.permute(0, 2, 3, 1).view(-1, 24)[:outliers] = -1e4
    _, expected = EAGER.norm_stats(z.double())
    for tile in (SMALL, NormTile(4, 32, 1)):
        mean, m2 = norm.merge_stats(norm.norm_stats(z, tile))
        assert ((m2 - expected).abs() < 1e-5 * expected).all()
        # summed as differences to a tile's first value
        expected_mean = z.double().mean((0, 2, 3))
        assert_close(mean, expected_mean, (z[0, :, 0, 0] - expected_mean).abs() + 1, roundings=8)


@pytest.mark.parametrize("value", [1e8, -1e8, 1 / 3, 0.0])
def test_a_constant_channel_is_exact(value, few_programs):
    for pixels in (1, 7, 37, 1000):
        z = nhwc(torch.full((1, 3, 1, pixels), value, device=DEVICE))
        mean, m2 = norm.merge_stats(norm.norm_stats(z, NormTile(8, 8, 1)))
        assert torch.equal(mean, z[0, :, 0, 0])
        assert (m2 == 0).all()


def test_no_pixels():
    z = randn((0, 5, 3, 3))
    mean, m2 = norm.merge_stats(norm.norm_stats(z))
    assert torch.equal(mean, torch.zeros(5, device=DEVICE))
    assert torch.equal(m2, torch.zeros(5, device=DEVICE))
    sums = norm.merge_sums(norm.norm_backward_reduce(z, z, random_affine(5)))
    assert torch.equal(sums, torch.zeros(2, 5, device=DEVICE))
    assert norm.norm_apply(z, random_affine(5)).shape == z.shape


@pytest.mark.parametrize("t", [1, 31, 32, 33, 256, 257, 512, 513, 5000])
@pytest.mark.parametrize("short", [0, 1, 127])
def test_merging_tiles(t, short):
    """``short``: pixels that the last tile lacks."""
    c = 11
    mean, m2 = randn((t, c), mean=1e4), randn((t, c)).abs() * 100
    tiles = TileStats(mean, m2, 128, 128 * t - short)
    n = torch.full((t, 1), 128.0, dtype=torch.float64, device=DEVICE)
    n[-1] -= short
    mean, m2 = double(mean, m2)
    expected_mean = (n * mean).sum(0) / n.sum()
    expected_m2 = (m2 + n * (mean - expected_mean).square()).sum(0)
    actual_mean, actual_m2 = norm.merge_stats(tiles)
    # float64 throughout: nothing but the last rounding, and float64's share of the large mean
    assert_close(actual_mean, expected_mean, 1.0, roundings=1e-3)
    assert_close(actual_m2, expected_m2, expected_m2, roundings=1e-2)
    assert actual_mean.dtype == actual_m2.dtype == torch.float32


@pytest.mark.parametrize("t", [3, 300, 5000])
def test_merging_constant_tiles_is_exact(t):
    mean = torch.full((t, 9), 1e8, device=DEVICE)
    tiles = TileStats(mean, torch.zeros_like(mean), 128, 128 * t - 5)
    merged, m2 = norm.merge_stats(tiles)
    assert torch.equal(merged, mean[0])
    assert (m2 == 0).all()


@pytest.mark.parametrize("t", [1, 32, 33, 512, 513, 5000])
@pytest.mark.parametrize("s", [2, 3])
def test_merging_sums(t, s):
    sums = randn((s, t, 13))
    if t > 2:
        sums[:, 0], sums[:, -1] = 1e8, -1e8  # float32 would lose the rest
    expected = sums.double().sum(1)
    actual = norm.merge_sums(TileSums(sums))
    assert actual.shape == (s, 13)
    # some 30 roundings of float64 to the outliers' size
    assert_close(actual, expected, 1e8, roundings=30 * 2.0**-29)
    assert actual[0].is_contiguous()


# ---- per-channel vectors


@pytest.mark.parametrize("c", [1, 3, 128, 129])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["both", "weight", "bias", "neither"])
def test_prepare(c, dtype, given):
    mean, var = randn((c,)), randn((c,)).square()
    weight = randn((c,), dtype) if given in ("both", "weight") else None
    bias = randn((c,), dtype) if given in ("both", "bias") else None
    affine, rstd = norm.norm_prepare(mean, var, weight, bias, 1e-5)
    expected = 1 / (var.double() + 1e-5).sqrt()
    assert_close(rstd, expected, expected, roundings=2)
    scale = expected if weight is None else expected * weight.double()
    assert_close(affine.scale, scale, scale.abs(), roundings=3)
    assert torch.equal(affine.mean, mean)
    assert torch.equal(affine.beta, torch.zeros_like(mean) if bias is None else bias.float())
    assert all(v.dtype == torch.float32 for v in (*affine, rstd))


def test_prepare_extremes():
    var = torch.tensor([0.0, float("nan"), -1.0, float("inf")], device=DEVICE)
    _, rstd = norm.norm_prepare(var, var, None, None, 0.0)
    assert rstd[0] == float("inf")
    assert rstd[1:3].isnan().all()
    assert rstd[3] == 0


@pytest.mark.parametrize("n", [0, 1, 105])
def test_coefficients(n):
    scale, rstd, sums = randn((70,)), randn((70,)).abs(), randn((2, 70), std=100)
    actual = norm.norm_coefficients(scale, rstd, sums[0], sums[1], n)
    expected = EAGER.norm_coefficients(*double(scale, rstd, sums[0], sums[1]), n)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, e.abs())
        assert a.dtype == torch.float32


# ---- forward


@pytest.mark.parametrize("residual", ["none", "raw", "affine"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("add_after_act", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply(residual, relu, add_after_act, dtype):
    for shape in SHAPES[1:]:
        z, affine = randn(shape, dtype), random_affine(shape[1])
        r = None if residual == "none" else randn(shape, dtype)
        r_affine = random_affine(shape[1]) if residual == "affine" else None
        expected = EAGER.norm_apply(*double(z, affine, r, r_affine), relu, add_after_act)
        terms = size(z, affine)
        if r is not None:
            terms = terms + (r.double().abs() if r_affine is None else size(r, r_affine))
        operands = (z, affine, r, r_affine, relu, add_after_act)
        y = norm.norm_apply(*operands, out=empty(z), tile=SMALL)
        assert_close(y, expected, terms)
        fresh = norm.norm_apply(*operands)
        assert torch.equal(fresh, y)
        assert fresh.stride() == z.stride()


@pytest.mark.parametrize("shape", [(1, 8, 3, 5), (2, 64, 4, 5), (1, 72, 1, 17)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_bits(shape, dtype):
    z, affine, r = randn(shape, dtype), random_affine(shape[1]), randn(shape, dtype)
    z[0, 1, 0, 0] = float("nan")
    expected = norm.norm_apply(z, affine, r)
    for tile in (None, SMALL):
        mask = torch.full((z.numel() // shape[1], shape[1] // 8), 0xAA, device=DEVICE).byte()
        y = norm.norm_apply(z, affine, r, mask=mask, tile=tile)
        assert torch.equal(y.nan_to_num(-1), expected.nan_to_num(-1))
        assert torch.equal(mask, pack_mask(y))
    assert y[0, 1, 0, 0].isnan()
    assert mask[0, 0] & 2


def test_mask_bits_are_of_the_stored_output():
    """A positive value that float16 rounds to 0 is 0."""
    z = nhwc(torch.ones(1, 8, 1, 2, dtype=torch.float16, device=DEVICE))
    one = torch.ones(8, device=DEVICE)
    scale = one.clone()
    scale[3] = 2.0**-26
    mask = torch.zeros(2, 1, dtype=torch.uint8, device=DEVICE)
    y = norm.norm_apply(z, Affine(one * 0, scale, one * 0), mask=mask)
    assert (y[0, 3] == 0).all()
    assert (mask == 0xFF - 8).all()


def test_mask_bits_need_whole_bytes():
    z, affine = randn((1, 12, 2, 2)), random_affine(12)
    mask = torch.zeros(4, 2, dtype=torch.uint8, device=DEVICE)
    coef = affine.mean
    for call in (
        lambda: norm.norm_apply(z, affine, mask=mask),
        lambda: norm.norm_backward_reduce(z, z, affine, mask=mask),
        lambda: norm.norm_forward_persistent(z, None, None, 1e-5, mask=mask),
        lambda: norm.norm_backward_persistent(z, z, affine, coef, mask=mask),
    ):
        with pytest.raises(ValueError, match="multiples of 8, got 12"):
            call()


def test_apply_in_place():
    z, affine, r = randn((2, 20, 3, 3)), random_affine(20), randn((2, 20, 3, 3))
    expected = norm.norm_apply(z, affine, r)
    for out in ("z", "r"):
        both = {"z": nhwc(z.clone()), "r": nhwc(r.clone())}
        y = norm.norm_apply(both["z"], affine, both["r"], out=both[out], tile=SMALL)
        assert y is both[out]
        assert torch.equal(y, expected)


def test_nan_passes_the_relu():
    z, affine = randn((1, 8, 2, 3)), random_affine(8)
    z[0, 5, 1, 1] = float("nan")
    y = norm.norm_apply(z, affine)
    assert torch.equal(y.isnan(), z.isnan())
    mask = pack_mask(y)
    dy = randn(z.shape)
    for source in ({}, {"y": y}, {"mask": mask}):
        du = empty(z)
        norm.norm_backward_reduce(dy, z, affine, du=du, **source)
        assert torch.equal(du, torch.where(y <= 0, 0, dy))  # as torch.relu's backward


# ---- backward


class Case:
    """Random operands of a backward pass; the gradient is 0 where rounding decides the mask."""

    def __init__(self, shape, dtype, source: str, second: bool = False, dy2: bool = False):
        c = shape[1]
        self.z, self.affine = randn(shape, dtype), random_affine(c)
        u = normalised(self.z, self.affine)
        clear = u.abs() > 16 * U * size(self.z, self.affine) + U
        self.dy = nhwc(torch.where(clear, randn(shape, dtype), 0))
        self.dy2 = nhwc(torch.where(clear, randn(shape, dtype), 0)) if dy2 else None
        self.y = self.mask = None
        self.relu = source != "none"
        keep = torch.ones_like(u, dtype=torch.bool)
        if source == "affine":
            keep = u > 0
        elif source != "none":  # another mask than z's
            y = randn(shape, dtype)
            keep = y > 0
            if source == "output":
                self.y = y
            else:
                self.mask = pack_mask(y)
        self.keep = keep
        self.z2 = randn(shape, dtype) if second else None
        self.mean2 = randn((c,)) if second else None

    def sources(self):
        return {"y": self.y, "mask": self.mask, "relu": self.relu}

    def du(self) -> Tensor:
        g = self.dy.double() if self.dy2 is None else self.dy.double() + self.dy2.double()
        return torch.where(self.keep, g, 0)

    def centred(self) -> Tensor:
        return self.z.double() - channel(self.affine.mean.double())

    def terms(self, du: Tensor) -> list[Tensor]:
        """What the sums add up."""
        found = [du, du * self.centred()]
        if self.z2 is not None:
            found.append(du * (self.z2.double() - channel(self.mean2.double())))
        return found


SOURCES = ("none", "affine", "output", "bits")


def shapes_for(source: str):
    return [s for s in SHAPES if source != "bits" or s[1] % 8 == 0]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dy2", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_backward_reduce(source, dy2, second, few_programs):
    for shape in shapes_for(source):
        for dtype, tile in zip(DTYPES, (SMALL, NormTile(4, 32, 1), None), strict=True):
            case = Case(shape, dtype, source, second, dy2)
            operands = {"dy2": case.dy2, "z2": case.z2, "mean2": case.mean2, **case.sources()}
            tiles = norm.norm_backward_reduce(case.dy, case.z, case.affine, **operands, tile=tile)
            assert_sums_close(norm.merge_sums(tiles), case.terms(case.du()))

            # stored: the sums are of what was rounded
            du = empty(case.z)
            tiles = norm.norm_backward_reduce(
                case.dy, case.z, case.affine, **operands, du=du, tile=tile
            )
            # one float32 addition may round before storage does
            assert_close(du, case.du(), case.du().abs(), roundings=1)
            assert_sums_close(norm.merge_sums(tiles), case.terms(du.double()))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_reduce_writes_the_activation(relu, dtype, few_programs):
    for shape in SHAPES[1:]:
        case = Case(shape, dtype, "affine" if relu else "none")
        activation = empty(case.z)
        tiles = norm.norm_backward_reduce(
            case.dy, case.z, case.affine, relu=relu, activation=activation, tile=SMALL
        )
        assert torch.equal(activation, norm.norm_apply(case.z, case.affine, relu=relu))
        assert_sums_close(norm.merge_sums(tiles), case.terms(case.du()))


@pytest.mark.parametrize("target", ["dy", "dy2"])
def test_backward_reduce_in_place(target, few_programs):
    case = Case((3, 24, 5, 7), torch.bfloat16, "bits", dy2=True)
    operands = {"mask": case.mask, "tile": SMALL}
    du = empty(case.z)
    expected = norm.norm_backward_reduce(
        case.dy, case.z, case.affine, dy2=case.dy2, du=du, **operands
    )
    out = getattr(case, target)
    tiles = norm.norm_backward_reduce(
        case.dy, case.z, case.affine, dy2=case.dy2, du=out, **operands
    )
    assert torch.equal(tiles.sums, expected.sums)
    assert torch.equal(out, du)


def test_recomputed_mask_is_that_of_forward():
    """Where u is 0 but for rounding, too."""
    c, m = 8, 512
    affine = random_affine(c)
    mean, scale, beta = affine
    # the roots of u, and their neighbours
    z = (mean - beta / torch.where(scale == 0, 1, scale)).repeat(m, 1)
    z = z * (1 + (torch.arange(m, device=DEVICE).view(-1, 1) - m // 2) * 2.0**-23)
    z = nhwc(z.t().reshape(1, c, 1, m))
    y = norm.norm_apply(z, affine)
    assert 0 < (y == 0).sum() < y.numel()
    du = empty(z)
    dy = torch.ones_like(z)
    tiles = norm.norm_backward_reduce(dy, z, affine, du=du)
    assert torch.equal(du, (y > 0).float())
    assert torch.equal(norm.merge_sums(tiles)[0], (y > 0).float().sum((0, 2, 3)))
    again, dz = empty(z), empty(z)
    norm.norm_backward_apply(dy, z, affine, dz=dz, du=again)
    assert torch.equal(again, du)
    assert torch.equal(dz, du * channel(scale))


@pytest.mark.parametrize("source", [s for s in SOURCES if s != "bits"])
@pytest.mark.parametrize("coefficients", ["both", "coef_z", "coef_1", "neither"])
@pytest.mark.parametrize("second", [False, True])
def test_backward_apply(source, coefficients, second):
    for shape in shapes_for(source):
        for dtype, tile in zip(DTYPES, (SMALL, NormTile(4, 32, 1), None), strict=True):
            c = shape[1]
            case = Case(shape, dtype, source, second)
            z, affine = case.z, case.affine
            coef_z = randn((c,)) if coefficients in ("both", "coef_z") else None
            coef_1 = randn((c,)) if coefficients in ("both", "coef_1") else None
            dz, dz2, du = empty(z), empty(z), empty(z)
            scale2, coef_z2 = randn((c,)), None if coef_z is None else randn((c,))
            coef_12 = None if coef_1 is None else randn((c,))
            norm.norm_backward_apply(
                *(case.dy, z, affine),
                relu=source != "none",
                y=case.sources()["y"],
                coef_z=coef_z,
                coef_1=coef_1,
                dz=dz,
                du=du,
                second=(case.z2, case.mean2, scale2, coef_z2, coef_12, dz2) if second else None,
                tile=tile,
            )
            assert torch.equal(du.double(), case.du())
            check_gradient(dz, case.du(), z, affine.mean, affine.scale, coef_z, coef_1)
            if second:
                check_gradient(dz2, case.du(), case.z2, case.mean2, scale2, coef_z2, coef_12)
            else:
                assert dz2.isnan().all()


def check_gradient(dz, du, z, mean, scale, coef_z, coef_1):
    zero = torch.zeros_like(scale)
    coef_z, coef_1 = (zero if v is None else v for v in (coef_z, coef_1))
    z, mean, scale, coef_z, coef_1 = double(z, mean, scale, coef_z, coef_1)
    parts = (
        du * channel(scale),
        (z - channel(mean)) * channel(coef_z),
        channel(coef_1).expand_as(z),
    )
    assert_close(dz, sum(parts), sum(part.abs() for part in parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_apply_in_place(dtype):
    case = Case((3, 24, 5, 7), dtype, "affine", second=True)
    v = [randn((24,)) for _ in range(5)]
    second = (case.z2, case.mean2, *v[2:])

    def run(dy, dz, dz2, du):
        norm.norm_backward_apply(
            *(dy, case.z, case.affine),
            coef_z=v[0],
            coef_1=v[1],
            dz=dz,
            du=du,
            second=(*second, dz2),
            tile=SMALL,
        )
        return dz, dz2, du

    apart = run(case.dy, empty(case.z), empty(case.z), empty(case.z))
    dy = nhwc(case.dy.clone())
    for a, b in zip(run(dy, dy, empty(case.z), empty(case.z)), apart, strict=True):
        assert torch.equal(a, b)
    dy = nhwc(case.dy.clone())
    for a, b in zip(run(dy, empty(case.z), dy, empty(case.z)), apart, strict=True):
        assert torch.equal(a, b)
    dy = nhwc(case.dy.clone())
    for a, b in zip(run(dy, empty(case.z), empty(case.z), dy), apart, strict=True):
        assert torch.equal(a, b)


def test_gradients_are_those_of_autograd():
    """All passes in a row against batch_norm + relu."""
    z, dy = randn((4, 10, 5, 5), mean=2), randn((4, 10, 5, 5))
    weight, bias = randn((10,)), randn((10,))
    m = 100
    mean, m2 = norm.merge_stats(norm.norm_stats(z))
    affine, rstd = norm.norm_prepare(mean, m2 / m, weight, bias, 1e-5)
    y = norm.norm_apply(z, affine)
    sums = norm.merge_sums(norm.norm_backward_reduce(dy, z, affine))
    dweight, coef_z, coef_1 = norm.norm_coefficients(affine.scale, rstd, sums[0], sums[1], m)
    dz = empty(z)
    norm.norm_backward_apply(dy, z, affine, coef_z=coef_z, coef_1=coef_1, dz=dz)

    leaves = [t.double().requires_grad_() for t in (z, weight, bias)]
    reference = torch.nn.functional.batch_norm(leaves[0], None, None, *leaves[1:], True, 0.1, 1e-5)
    reference = reference.relu()
    grads = torch.autograd.grad(reference, leaves, dy.double())
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-5)
    for actual, expected in zip((dz, dweight, sums[0]), grads, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


# ---- one-read forms

PERSISTENT = [(1, 1, 1, 1), (1, 3, 3, 5), (2, 8, 4, 4), (1, 24, 3, 11), (2, 35, 5, 7)]


def test_persistent_fits():
    assert norm.persistent_fits(randn((1, 3, 32, 32)))
    assert not norm.persistent_fits(randn((1, 3, 25, 41)))
    assert not norm.persistent_fits(randn((0, 3, 25, 41)))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("add_after_act", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_persistent_forward_is_the_two_passes(residual, relu, add_after_act, dtype):
    for shape in PERSISTENT:
        n, c, h, w = shape
        m = n * h * w
        z = randn(shape, dtype, mean=1)
        weight, bias = (randn((c,)), randn((c,))) if c % 3 else (None, None)
        r = randn(shape, dtype) if residual else None
        mask = torch.full((m, c // 8), 0xAA, device=DEVICE).byte() if c % 8 == 0 else None
        y, mean, var = norm.norm_forward_persistent(
            z, weight, bias, 1e-5, r, relu, add_after_act, mask=mask
        )
        expected_mean, expected_m2 = EAGER.norm_stats(z.double())
        assert_close(mean, expected_mean, (expected_m2 / m).sqrt())
        assert_close(var, expected_m2 / m, expected_m2 / m, roundings=16)
        # from these statistics on, the same bits
        affine, _ = norm.norm_prepare(mean, var, weight, bias, 1e-5)
        expected = norm.norm_apply(z, affine, r, None, relu, add_after_act)
        if DEVICE == "cpu":
            assert torch.equal(y, expected)
        else:  # the addition of the residual may or may not fuse
            torch.testing.assert_close(y, expected)
        assert y.stride() == z.stride()
        if mask is not None:
            assert torch.equal(mask, pack_mask(y))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dy2", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_persistent_backward_is_the_two_passes(source, dy2, dtype):
    for shape in PERSISTENT:
        if source == "bits" and shape[1] % 8:
            continue
        n, c, h, w = shape
        m = n * h * w
        case = Case(shape, dtype, source, dy2=dy2)
        rstd = randn((c,)).abs()
        for stored in (False, True):
            du = empty(case.z) if stored else None
            activation = empty(case.z) if stored else None
            dz, sum_du, sum_du_xhat = norm.norm_backward_persistent(
                *(case.dy, case.z, case.affine, rstd),
                dy2=case.dy2,
                **case.sources(),
                du=du,
                activation=activation,
            )
            g = case.du()
            if du is not None:
                assert_close(du, g, g.abs(), roundings=1)
                g = du.double()
                expected = norm.norm_apply(case.z, case.affine, relu=case.relu)
                assert torch.equal(activation, expected)
            terms = case.terms(g)
            assert_sums_close(torch.stack([sum_du, sum_du_xhat / rstd]), terms)
            _, coef_z, coef_1 = EAGER.norm_coefficients(
                *double(case.affine.scale, rstd), *(t.sum((0, 2, 3)) for t in terms), m
            )
            check_persistent(dz, g, case, rstd, coef_z, coef_1, m)


def check_persistent(dz, du, case, rstd, coef_z, coef_1, m):
    scale, rstd = double(case.affine.scale, rstd)
    centred = case.centred()
    reference = du * channel(scale) + centred * channel(coef_z) + channel(coef_1)
    # the coefficients carry their sums' roundings, relative to the sums of absolute values
    sums = [t.abs().sum((0, 2, 3)) for t in case.terms(du)]
    terms = (du * channel(scale)).abs() + channel(scale.abs() / m * sums[0])
    terms = terms + centred.abs() * channel(scale.abs() / m * rstd.square() * sums[1])
    assert_close(dz, reference, terms, roundings=32)


def test_persistent_at_its_largest():
    z, dy = randn((1, 16, 32, 32), torch.bfloat16), randn((1, 16, 32, 32), torch.bfloat16)
    y, mean, var = norm.norm_forward_persistent(z, None, None, 1e-5)
    affine, rstd = norm.norm_prepare(mean, var, None, None, 1e-5)
    assert torch.equal(y, norm.norm_apply(z, affine))
    dz, sum_du, sum_du_xhat = norm.norm_backward_persistent(dy, z, affine, rstd)
    sums = norm.merge_sums(norm.norm_backward_reduce(dy, z, affine))
    torch.testing.assert_close(sum_du, sums[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sum_du_xhat, sums[1] * rstd, rtol=1e-5, atol=1e-4)
    _, coef_z, coef_1 = norm.norm_coefficients(affine.scale, rstd, sums[0], sums[1], 1024)
    expected = empty(z)
    norm.norm_backward_apply(dy, z, affine, coef_z=coef_z, coef_1=coef_1, dz=expected)
    torch.testing.assert_close(dz, expected, rtol=2**-7, atol=1e-5)


def test_persistent_constant_channel_and_large_mean():
    z = randn((1, 16, 9, 9), mean=1e4)
    z[:, 3] = 1e8
    bias = randn((16,))
    y, mean, var = norm.norm_forward_persistent(z, None, bias, 1e-5, relu=False)
    assert torch.equal(y[0, 3], bias[3].expand(9, 9))
    assert mean[3] == 1e8
    assert var[3] == 0
    expected = z.double().var((0, 2, 3), correction=0)
    assert ((var - expected).abs() <= 1e-5 * expected).all()


# ---- int64, bytes, determinism


def test_same_bits_again(few_programs):
    case = Case((3, 40, 5, 7), torch.bfloat16, "affine")
    first = norm.merge_sums(norm.norm_backward_reduce(case.dy, case.z, case.affine, tile=SMALL))
    again = norm.merge_sums(norm.norm_backward_reduce(case.dy, case.z, case.affine, tile=SMALL))
    assert torch.equal(first, again)


def test_traffic_counts_each_operand_once():
    shape, c, m = (256, 64, 56, 56), 64, 256 * 56 * 56
    z = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    v = torch.empty(c, device="meta")
    affine = Affine(v, v, v)
    mask = torch.empty(m, c // 8, dtype=torch.uint8, device="meta")
    with count_traffic() as traffic:
        norm.norm_stats(z)
        norm.norm_apply(z, affine, z, affine, mask=mask)
        norm.norm_backward_reduce(z, z, affine, dy2=z, mask=mask, du=z, z2=z, mean2=v)
        norm.norm_backward_apply(z, z, affine, relu=False, coef_z=v, coef_1=v, dz=z)
        norm.norm_backward_apply(z, z, affine, relu=False, dz=z)
    size = 2 * m * c
    per_channel = 3 * 512 * 4 * c
    moved = [(t.reads, t.writes) for t in traffic]
    expected = [
        (size, 0),
        (2 * size, size + m * 8),
        (4 * size + m * 8, size),
        (2 * size, size),
        (size, size),
    ]
    for got, want in zip(moved, expected, strict=True):
        assert all(0 <= g - w <= per_channel for g, w in zip(got, want, strict=True))

"""Convolution forward with the norms before and after it fused, against fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from guarded import check_bounds, guarded

from resfast.backends.interface import Affine, ConvGeometry, empty_nhwc, nhwc
from resfast.kernels import norm as norm_kernels
from resfast.kernels.conv_fprop import (
    conv_fprop,
    conv_output_size,
)
from resfast.kernels.launch import capture, count_traffic
from resfast.kernels.tiles import CONV_TILES, ConvTile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # CPU: Triton's interpreter, see conftest

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
# of each storage dtype: the relative error of rounding to it
ROUNDOFF = {FLOAT: 2.0**-24, BFLOAT: 2.0**-8, HALF: 2.0**-11}
DTYPES = list(ROUNDOFF)
# of one factor in a product of float32
PRECISIONS = {"ieee": 0.0, "tf32x3": 2.0**-20, "tf32": 2.0**-10}
SMALL = ConvTile(16, 16, 16, 4, 2)
IN_PIECES = ConvTile(128, 64, 16, 4, 2)  # the epilogue takes 16 or 32 of the 64 channels at a time
EPS32 = 2.0**-24


def _geometry(stride=(1, 1), padding=(0, 0), dilation=(1, 1)):
    return ConvGeometry(stride, padding, dilation, 1)


# name: (input shape, K, window, geometry)
CASES = {
    "1x1": ((2, 24, 5, 3), 40, (1, 1), _geometry()),
    "1x1, one tile": ((1, 16, 4, 4), 16, (1, 1), _geometry()),
    "1x1, one more": ((1, 17, 1, 17), 17, (1, 1), _geometry()),
    "1x1, one less": ((1, 15, 3, 5), 15, (1, 1), _geometry()),
    "1x1, one pixel": ((1, 8, 1, 1), 3, (1, 1), _geometry()),
    "1x1, stride 2": ((2, 8, 6, 6), 16, (1, 1), _geometry((2, 2))),
    "1x1, stride 2, odd": ((1, 65, 7, 5), 3, (1, 1), _geometry((2, 2))),
    "1x1, stride (1, 2)": ((1, 8, 3, 6), 8, (1, 1), _geometry((1, 2))),
    "1x1, padding": ((1, 8, 4, 3), 8, (1, 1), _geometry(padding=(1, 2))),
    "3x3": ((2, 16, 4, 5), 32, (3, 3), _geometry(padding=(1, 1))),
    "3x3, no padding": ((1, 3, 5, 6), 65, (3, 3), _geometry()),
    "3x3, stride 2": ((2, 64, 6, 6), 16, (3, 3), _geometry((2, 2), (1, 1))),
    "3x3, stride 2, odd": ((1, 8, 7, 5), 24, (3, 3), _geometry((2, 2), (1, 1))),
    "3x3, dilation 2": ((1, 8, 6, 5), 8, (3, 3), _geometry((1, 1), (2, 2), (2, 2))),
    "3x3, all different": ((2, 5, 9, 8), 9, (3, 2), _geometry((2, 3), (3, 1), (2, 1))),
    "3x1": ((1, 16, 7, 4), 1, (3, 1), _geometry((2, 1), (1, 0))),
    "1x3": ((1, 1, 3, 8), 8, (1, 3), _geometry((1, 2), (0, 1))),
    "7x7, stride 2": ((1, 3, 9, 10), 64, (7, 7), _geometry((2, 2), (3, 3))),
    "padding beyond the window": ((1, 8, 3, 3), 8, (2, 2), _geometry((2, 2), (3, 3))),
}


def _random(*shape, dtype=FLOAT):
    t = torch.randn(shape)
    return (nhwc(t) if len(shape) == 4 else t).to(DEVICE, dtype)


def _affine(c):
    """Of values around 3: padding that is not left at 0, or tails that are not, show."""
    return Affine(3 + 0.5 * _random(c), _random(c), 0.5 + _random(c))


def _channel(v):
    return v.double().view(1, -1, 1, 1)


def _conv(a, w, g):
    return F.conv2d(a, w, None, g.stride, g.padding, g.dilation)


class Problem:
    """Inputs of one call, and what it should give."""

    def __init__(self, case, dtype=FLOAT, prologue=False, bias=None, stats=False, norm=None):
        """``norm``: None or (residual: "none" or "raw", relu, add_after_act)."""
        shape, k, window, self.g = CASES[case] if isinstance(case, str) else case
        (n, c, h, w), self.k = shape, k
        p, q = (
            (i + 2 * pad - d * (r - 1) - 1) // s + 1
            for i, r, s, pad, d in zip((h, w), window, *self.g[:3], strict=True)
        )
        self.dtype, self.stats = dtype, stats
        self.x = nhwc((_random(*shape) + (3 if prologue else 0)).to(dtype))
        self.weight = _random(k, c, *window, dtype=dtype)
        self.prologue = _affine(c) if prologue else None
        self.bias = None if bias is None else _random(k, dtype=bias)
        residual, self.relu, self.add_after_act = norm or ("none", False, False)
        self.norm = None if norm is None else Affine(_random(k), _random(k), _random(k))
        self.residual = None if residual == "none" else _random(n, k, p, q, dtype=dtype)

    def call(self, tile=SMALL, precision="ieee"):
        return conv_fprop(
            self.x,
            self.weight,
            self.bias,
            self.g,
            prologue=self.prologue,
            stats=self.stats,
            norm=self.norm,
            residual=self.residual,
            relu=self.relu,
            add_after_act=self.add_after_act,
            precision=precision,
            tile=tile,
        )

    def _rounded(self, v):
        return v.float().to(self.dtype).double()

    def _input(self):
        """(what is multiplied, as float64, and by how much another rounding of it may differ)."""
        if self.prologue is None:
            return self.x.double(), torch.zeros_like(self.x, dtype=torch.float64)
        mean, scale, beta = map(_channel, self.prologue)
        u = (self.x.double() - mean) * scale + beta
        # the difference is rounded to float32, the multiply-add once more, or twice interpreted
        off = 3 * EPS32 * (2 * ((self.x.double() - mean) * scale).abs() + beta.abs())
        low, middle, high = (self._rounded(F.relu(v)) for v in (u - off, u, u + off))
        return middle, high - low

    def expected(self, precision="ieee"):
        """(y as float64, the largest error it may have)."""
        a, off = self._input()
        w = self.weight.double()
        z = _conv(a, w, self.g)
        sizes = _conv(a.abs(), w.abs(), self.g)
        # a sum of k products rounds k times; the last factor: rounding of the factors
        products = self.weight[0].numel() + 1
        factors = 0.0 if self.dtype != FLOAT else 2 * PRECISIONS[precision]
        error = (products * EPS32 + factors) * sizes + _conv(off, w.abs(), self.g)
        if self.bias is not None:
            z = z + _channel(self.bias)
            error = error + EPS32 * z.abs()
        if self.norm is not None:
            mean, scale, beta = map(_channel, self.norm)
            u = (z - mean) * scale + beta
            error = scale.abs() * (error + EPS32 * (z - mean).abs())
            error = error + 2 * EPS32 * (((z - mean) * scale).abs() + beta.abs())
            r = 0.0
            if self.residual is not None:
                r = self.residual.double()
                error = error + EPS32 * (u.abs() + r.abs())
            act = F.relu if self.relu else lambda v: v
            z = act(u) + r if self.add_after_act else act(u + r)
        # a subnormal of fp16 is rounded to a multiple of 2⁻²⁴
        return z, error + ROUNDOFF[self.dtype] * (z.abs() + error) + 2.0**-25

    def check(self, tile=SMALL, precision="ieee"):
        with guarded(guard=1 << 13):  # more than a few rows of each tensor here
            y, tiles = self.call(tile, precision)
        expected, bound = self.expected(precision)
        assert y.shape == expected.shape
        assert y.dtype == self.dtype
        assert y.stride() == empty_nhwc(y.shape, y).stride()
        assert not y.isnan().any()
        excess = (y.double() - expected).abs() - bound
        assert excess.max() <= 0, f"{excess.max():.3g} at {_where(excess)}"
        assert (tiles is not None) == self.stats
        if tiles is not None:
            _check_statistics(tiles, y, tile)


def _where(excess):
    return tuple(int(i) for i in torch.nonzero(excess == excess.max())[0])


def _check_statistics(tiles, z, tile):
    """Each tile's mean and M2 are those of z as it was stored."""
    rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).double()
    assert tiles.count == len(rows)
    assert tile is None or tiles.rows == tile.block_m
    parts = rows.split(tiles.rows)
    assert tiles.mean.shape == tiles.m2.shape == (len(parts), z.shape[1])
    assert tiles.mean.dtype == tiles.m2.dtype == FLOAT
    assert (tiles.rest is not None) == (z.dtype == FLOAT)
    for i, part in enumerate(parts):
        mean = part.mean(0)
        spread = (part - mean).abs()
        m2 = spread.square().sum(0)
        # sums of that many roundings of what is left after the mean was taken off
        rounding = len(part) * EPS32
        got = tiles.mean[i].double() + (0 if tiles.rest is None else tiles.rest[i].double())
        held = EPS32 * mean.abs() * (tiles.rest is None)
        # the mean's first rounding is corrected, up to its square
        off = rounding * (spread.mean(0) + rounding * mean.abs()) + held
        assert ((got - mean).abs() <= off).all()
        assert ((tiles.m2[i].double() - m2).abs() <= 2 * rounding * m2 + len(part) * off**2).all()


# ---- every geometry


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_any_geometry(case, dtype):
    Problem(case, dtype, stats=True).check()


@pytest.mark.parametrize("case", CASES)
def test_any_geometry_behind_a_prologue(case):
    Problem(case, BFLOAT, prologue=True).check()


@pytest.mark.parametrize("k", [1, 3, 8, 64, 65])
@pytest.mark.parametrize("c", [1, 3, 8, 64, 65])
def test_channels(c, k):
    Problem(((1, c, 3, 4), k, (3, 3), _geometry(padding=(1, 1))), HALF, True, FLOAT, True).check()
    Problem(((1, c, 4, 4), k, (1, 1), _geometry()), BFLOAT, True, BFLOAT, True).check()


@pytest.mark.parametrize("size", [1, 15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("what", ["pixels", "c", "k"])
def test_around_the_tile(what, size):
    sizes = {"pixels": 16, "c": 16, "k": 16} | {what: size}
    shape = (1, sizes["c"], 1, sizes["pixels"])
    Problem((shape, sizes["k"], (1, 1), _geometry()), BFLOAT, True, None, True).check()


# ---- what is fused


PROLOGUES = {"x": False, "relu(norm(x))": True}
NORMS = {
    f"norm {residual}{' relu' if relu else ''}{' before' if after else ''}": (residual, relu, after)
    for residual, relu, after in itertools.product(("none", "raw"), (False, True), (False, True))
}
EPILOGUES = {"z": {}, "stats": {"stats": True}} | {k: {"norm": v} for k, v in NORMS.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_every_combination(prologue, epilogue, bias, dtype):
    case = "3x3, all different" if bias else "1x1, one more"
    bias_dtype = dtype if bias else None
    Problem(case, dtype, PROLOGUES[prologue], bias_dtype, **EPILOGUES[epilogue]).check()


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues_in_pieces(epilogue):
    case = ((1, 8, 10, 13), 130, (1, 1), _geometry())
    Problem(case, BFLOAT, bias=FLOAT, **EPILOGUES[epilogue]).check(IN_PIECES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", ["stats", "norm raw relu"])
@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("case", ["1x1", "3x3", "1x1, stride 2, odd", "7x7, stride 2"])
def test_the_default_tile(case, prologue, epilogue, dtype):
    Problem(case, dtype, PROLOGUES[prologue], **EPILOGUES[epilogue]).check(None)


@pytest.mark.parametrize("tile", CONV_TILES["conv_fprop"]["half normed"], ids=str)
def test_every_tile_that_ships(tile):
    case = ((1, 40, 9, 15), 140, (1, 1), _geometry())
    Problem(case, BFLOAT, True, None, True).check(tile)


@pytest.mark.parametrize("tile", [SMALL, None], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision, tile):
    Problem("3x3", FLOAT, True, stats=True).check(tile, precision)


def test_what_meets_the_residual_is_not_rounded():
    problem = Problem("1x1", BFLOAT, norm=("raw", False, False))
    # u + r cancels, but for 2⁻¹⁰, which a stored z or u of 8 bits would lose
    problem.weight.zero_()
    vectors = (0.0, 1.0, 1 + 2.0**-10)
    problem.norm = Affine(*(torch.full((problem.k,), v, device=DEVICE) for v in vectors))
    problem.residual.fill_(-1.0)
    y, _ = problem.call()
    assert (y == 2.0**-10).all()


# ---- numbers


@pytest.mark.parametrize("tile", [SMALL, ConvTile(64, 32, 16, 4, 2)], ids=str)
def test_variance_where_the_mean_is_ten_thousand_times_the_spread(tile):
    problem = Problem(((3, 16, 9, 8), 17, (1, 1), _geometry()), FLOAT, bias=FLOAT, stats=True)
    problem.bias.mul_(100).add_(4e4)  # z spreads by 4
    z, tiles = problem.call(tile)
    mean, m2 = norm_kernels.merge_stats(tiles)
    rows = z.permute(0, 2, 3, 1).reshape(-1, problem.k).double()
    assert (rows.mean(0) / rows.std(0)).min() > 5e3
    exact = (rows - rows.mean(0)).square().sum(0)
    assert ((m2.double() - exact).abs() < 1e-5 * exact).all()
    assert ((mean.double() - rows.mean(0)).abs() <= 2 * EPS32 * rows.mean(0).abs()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [1.0, 1234.5678, 5e4, 1e8])
def test_a_constant_channel_has_no_variance(value, dtype):
    if dtype == HALF and value > 6e4:
        pytest.skip("fp16 holds no such value")
    problem = Problem("1x1, one more", dtype, bias=FLOAT, stats=True)
    problem.weight.zero_()
    problem.bias.fill_(value)
    z, tiles = problem.call()
    mean, m2 = norm_kernels.merge_stats(tiles)
    assert (mean == z[0, :, 0, 0].float()).all()
    # what is left is rounding of the rounding: nothing beside eps = 1e-5
    assert (m2 / tiles.count < 1e-9).all()


@pytest.mark.parametrize("prologue", PROLOGUES)
def test_nan_and_infinity_stay_where_they_are(prologue):
    problem = Problem("3x3", BFLOAT, PROLOGUES[prologue], norm=("raw", True, False))
    clean, _ = problem.call()
    problem.x[0, 3, 0, 0] = torch.nan
    problem.x[1, 0, 3, 4] = torch.inf
    problem.residual[0, 1, 3, 4] = torch.nan
    y, _ = problem.call()
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[0, :, :2, :2] = True
    touched[1, :, 2:, 3:] = True
    touched[0, 1, 3, 4] = True
    assert torch.equal(y[~touched], clean[~touched])
    assert y[0, :, :2, :2].isnan().all()
    assert y[0, 1, 3, 4].isnan()


def test_the_same_bits_every_time():
    problem = Problem("3x3", BFLOAT, True, FLOAT, stats=True)
    (z, tiles), (again, others) = problem.call(), problem.call()
    assert torch.equal(z, again)
    assert torch.equal(tiles.mean, others.mean)
    assert torch.equal(tiles.m2, others.m2)


# ---- memory


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("epilogue", ["stats", "norm raw relu"])
@pytest.mark.parametrize("case", ["1x1, stride 2, odd", "3x3, all different", "1x1, one less"])
def test_stays_in_bounds(case, epilogue, dtype):
    problem = Problem(case, dtype, True, FLOAT, **EPILOGUES[epilogue])
    check_bounds(lambda: problem.call())
    check_bounds(lambda: problem.call(None))


@pytest.mark.parametrize("far", ["pixels", "taps"])
@pytest.mark.parametrize("c", [8, 7])
def test_offsets_beyond_32_bits(c, far):
    """Only corners of 2 × 2 pixels of x are read; memory that nothing touches costs nothing."""
    gap = 17600
    assert c * gap * gap > 2**31
    x = torch.empty((1, c, gap + 2, gap + 2), dtype=BFLOAT, device=DEVICE)
    x = x.as_strided(x.shape, (x.numel(), 1, c * (gap + 2), c))
    ends = torch.tensor([0, 1, gap, gap + 1], device=DEVICE)
    corners = _random(1, c, 4, 4, dtype=BFLOAT)
    x[:, :, ends[:, None], ends] = corners
    apart = (gap, gap) if far == "pixels" else (1, 1), (gap, gap) if far == "taps" else (1, 1)
    weight = _random(8, c, 2, 2, dtype=BFLOAT)
    z, _ = conv_fprop(x, weight, None, _geometry(apart[0], (0, 0), apart[1]), tile=SMALL)
    near = ((2, 2), (1, 1)) if far == "pixels" else ((1, 1), (2, 2))
    expected = _conv(corners.double(), weight.double(), _geometry(near[0], (0, 0), near[1]))
    # rounded to 8 bits after a sum of 32 products
    assert ((z.double() - expected).abs() < 2.0**-8 * expected.abs() + 1e-5).all()


def test_traffic_is_each_operand_once():
    problem = Problem("1x1, stride 2", BFLOAT, True, FLOAT, True)
    n, c, k, pixels = 2, 8, 16, 9
    with count_traffic() as ledger:
        _, tiles = problem.call()
    (traffic,) = ledger
    # of x only every fourth pixel
    reads = 2 * n * pixels * c + 3 * 4 * c + 2 * k * c + 4 * k
    assert traffic.reads == reads
    assert traffic.writes == 2 * n * pixels * k + 2 * 4 * tiles.mean.numel()
    problem = Problem("3x3, no padding", FLOAT, norm=("raw", True, False))
    with count_traffic() as ledger:
        y, _ = problem.call()
    (traffic,) = ledger
    vectors = 3 * 65
    assert traffic.reads == 4 * (90 + 65 * 27 + vectors + y.numel())
    assert traffic.writes == 4 * y.numel()


def test_meta_tensors_are_only_counted():
    x = torch.empty(256, 64, 56, 56, device="meta", dtype=BFLOAT).to(
        memory_format=torch.channels_last
    )
    weight = torch.empty(256, 64, 1, 1, device="meta", dtype=BFLOAT)
    with capture() as launches:
        z, tiles = conv_fprop(x, weight, None, _geometry(), stats=True)
    (launch,) = launches
    assert z.shape == (256, 256, 56, 56)
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert tiles.mean.shape == (256 * 56 * 56 // tiles.rows, 256)
    assert launch.grid == (len(tiles.mean) * 256 // launch.constexprs["BLOCK_N"],)


@pytest.mark.parametrize("stats", [False, True])
def test_no_pixels(stats):
    problem = Problem(((0, 8, 4, 4), 8, (3, 3), _geometry(padding=(1, 1))), BFLOAT, stats=stats)
    z, tiles = problem.call()
    assert z.shape == (0, 8, 4, 4)
    assert tiles is None or tiles.mean.shape == tiles.m2.shape == (0, 8)


# ---- arguments


def test_what_it_does_not_compute_is_refused():
    problem = Problem("1x1", norm=("raw", False, False))
    x, weight, g = problem.x, problem.weight, problem.g
    with pytest.raises(ValueError, match="groups must be 1, got 2"):
        conv_fprop(x, weight, None, g._replace(groups=2))
    with pytest.raises(ValueError, match="either the statistics"):
        conv_fprop(x, weight, None, g, stats=True, norm=problem.norm)
    for extra in ({"relu": True}, {"residual": problem.residual}):
        with pytest.raises(ValueError, match="needs a norm"):
            conv_fprop(x, weight, None, g, **extra)


@pytest.mark.parametrize("case", CASES)
def test_output_size(case):
    shape, k, window, g = CASES[case]
    like = torch.empty(shape, device="meta")
    weight = torch.empty(k, shape[1], *window, device="meta")
    assert conv_output_size(shape[2:], g, window) == _conv(like, weight, g).shape[2:]

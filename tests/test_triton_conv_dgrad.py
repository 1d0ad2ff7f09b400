"""The input's gradient of a convolution, with the norms above and below it fused, against fp64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from guarded import guarded

from resfast.backends.interface import (
    Affine,
    Below,
    ConvGeometry,
    NormGradient,
    empty_nhwc,
    nhwc,
    pack_mask,
)
from resfast.kernels.conv_dgrad import conv_dgrad
from resfast.kernels.launch import count_traffic
from resfast.kernels.tiles import ConvTile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # CPU: Triton's interpreter, see conftest

# of each storage dtype: the relative error of rounding to it
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = list(ROUNDOFF)
# of a product's factors beyond float32's: TF32 drops 13 bits, three passes of it keep 21
PRECISION = {"ieee": 0.0, "tf32": 2.0**-9, "tf32x3": 2.0**-20}
SMALL = ConvTile(16, 16, 16, 4, 2)
NORMS = "none", "running", "coef_1", "batch"
RESIDUALS = None, (1, 1), (2, 2)
BELOWS = "none", "affine", "bits", "affine of 2", "bits of 2"


def _geometry(stride=(1, 1), padding=(0, 0), dilation=(1, 1)):
    return ConvGeometry(stride, padding, dilation, 1)


# name: (input shape, K, window, geometry)
CASES = {
    "1x1": ((2, 24, 5, 3), 40, (1, 1), _geometry()),
    "1x1, one tile": ((1, 16, 4, 4), 16, (1, 1), _geometry()),
    "1x1, one pixel more": ((1, 17, 1, 17), 17, (1, 1), _geometry()),
    "1x1, one pixel less": ((1, 15, 3, 5), 15, (1, 1), _geometry()),
    "1x1, stride 2": ((2, 8, 6, 6), 16, (1, 1), _geometry((2, 2))),
    "1x1, stride 2, odd": ((1, 65, 7, 5), 3, (1, 1), _geometry((2, 2))),
    "1x1, padding": ((1, 8, 4, 3), 8, (1, 1), _geometry(padding=(1, 2))),
    "1x1, stride 2, padding": ((1, 8, 4, 5), 8, (1, 1), _geometry((2, 2), (1, 1))),
    "3x3": ((2, 16, 4, 5), 32, (3, 3), _geometry(padding=(1, 1))),
    "3x3, no padding": ((1, 3, 5, 6), 65, (3, 3), _geometry()),
    "3x3, stride 2": ((2, 64, 6, 6), 16, (3, 3), _geometry((2, 2), (1, 1))),
    "3x3, stride 2, odd": ((1, 8, 7, 5), 24, (3, 3), _geometry((2, 2), (1, 1))),
    "3x3, dilation 2": ((1, 8, 6, 5), 8, (3, 3), _geometry((1, 1), (2, 2), (2, 2))),
    "3x3, stride 2, dilation 2": ((1, 8, 7, 6), 8, (3, 3), _geometry((2, 2), (2, 2), (2, 2))),
    "3x3, stride 4, dilation 6": ((1, 8, 15, 9), 8, (3, 3), _geometry((4, 2), (6, 1), (6, 3))),
    "3x3, stride 3, dilation 2": ((1, 1, 8, 9), 4, (3, 3), _geometry((3, 3), (1, 2), (2, 2))),
    "2x2, stride 3": ((2, 8, 8, 7), 8, (2, 2), _geometry((3, 3))),  # pixels no window covers
    "3x1, stride (2, 1)": ((1, 16, 7, 4), 1, (3, 1), _geometry((2, 1), (1, 0))),
    "1x3, stride (1, 2)": ((1, 1, 3, 8), 8, (1, 3), _geometry((1, 2), (0, 1))),
    "7x7, stride 2": ((1, 3, 6, 7), 17, (7, 7), _geometry((2, 2), (3, 3))),
    "stride beyond the input": ((2, 8, 1, 2), 8, (1, 2), _geometry((3, 4))),
    "padding beyond the window": ((1, 8, 3, 3), 8, (2, 2), _geometry((2, 2), (3, 3))),
}


def _random(*shape, dtype=torch.float32):
    """Normal values, channels_last where there are channels."""
    t = nhwc(torch.randn(shape)) if len(shape) == 4 else torch.randn(shape)
    return t.to(DEVICE, dtype)


def _channel(v):
    return v.double().view(1, -1, 1, 1)


def _rows(t):
    """[N·H·W, C]"""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


class Problem:
    """Inputs of one call, and what it should give."""

    def __init__(self, case, dtype, norm="none", residual=None, below="none"):
        self.shape, k, window, self.g = CASES[case] if isinstance(case, str) else case
        n, c, h, w = self.shape
        like = torch.empty(self.shape, dtype=torch.float64)
        weight = torch.empty(k, c, *window, dtype=torch.float64)
        p, q = torch.conv2d(like, weight, None, *self.g[:3]).shape[2:]
        self.dtype = dtype
        self.weight = _random(k, c, *window, dtype=dtype)
        self.dz = _random(n, k, p, q, dtype=dtype)
        if norm != "none":
            # the mean is large beside the spread: padding that is not left at 0 shows
            mean = 3 + _random(k)
            z = (_random(n, k, p, q) + mean.view(1, -1, 1, 1)).to(dtype)
            coef_z, coef_1 = _random(k), _random(k)
            self.dz = NormGradient(
                self.dz,
                nhwc(z),
                mean,
                _random(k),
                coef_z if norm == "batch" else None,
                None if norm == "running" else coef_1,
            )
        self.stride = residual or (1, 1)
        self.residual = None
        if residual is not None:
            self.residual = _random(n, c, -(-h // residual[0]), -(-w // residual[1]), dtype=dtype)
        self.below = None
        if below != "none":
            affine = Affine(_random(c) + 2, _random(c), _random(c))
            z = nhwc((_random(*self.shape) + 2).to(dtype))
            mask, second = None, (None, None)
            if below.startswith("bits"):
                mask = pack_mask(_random(*self.shape))
            if below.endswith("of 2"):
                second = nhwc((_random(*self.shape) - 1).to(dtype)), _random(c) - 1
            self.below = Below(z, affine, mask, *second)

    def run(self, tile=SMALL, precision="ieee"):
        with guarded(guard=1 << 13):  # more than a few rows of each tensor here
            return conv_dgrad(
                self.dz,
                self.weight,
                self.shape,
                self.g,
                residual=self.residual,
                residual_stride=self.stride,
                below=self.below,
                precision=precision,
                tile=tile,
            )

    def _materialised(self):
        """(dz rounded to storage, the bound on what another rounding of it changes in dx)."""
        if not isinstance(self.dz, NormGradient):
            return self.dz.double(), 0.0
        du, z, mean, scale, coef_z, coef_1 = self.dz
        dz = du.float() * scale.view(1, -1, 1, 1)
        if coef_z is not None:
            dz = dz + (z.float() - mean.view(1, -1, 1, 1)) * coef_z.view(1, -1, 1, 1)
        if coef_1 is not None:
            dz = dz + coef_1.view(1, -1, 1, 1)
        dz = dz.to(self.dtype).double()
        # a compiler may fuse multiplications and additions: then a value near the middle between
        # two storable ones, and in fp32 any, may be rounded to the other
        flips = self.weight[0, 0].numel() * self.weight.shape[0] if dz.dtype == torch.float32 else 2
        other = 2 * ROUNDOFF[self.dtype] * dz.abs().amax() if dz.numel() else 0.0
        return dz, flips * other * self.weight.double().abs().amax()

    def _product(self, dz, weight):
        like = torch.empty(self.shape, dtype=torch.float64, device=DEVICE)
        return torch.ops.aten.convolution_backward(
            dz, like, weight, None, *self.g[:3], False, (0, 0), 1, (True, False, False)
        )[0]

    def expected(self, precision="ieee"):
        """(dx or du in fp64, the bound on each element's error)."""
        dz, bound = self._materialised()
        weight = self.weight.double()
        dx, size = self._product(dz, weight), self._product(dz.abs(), weight.abs())
        if self.residual is not None:
            into = dx[:, :, :: self.stride[0], :: self.stride[1]]
            into += self.residual.double()
            size[:, :, :: self.stride[0], :: self.stride[1]] += self.residual.double().abs()
        terms = 1 + weight[:, 0].numel()
        # fp32 sums of so many terms; then the rounding to storage, absolute below fp16's normals
        bound = bound + (terms * 2.0**-24 + PRECISION[precision]) * size
        bound = bound + ROUNDOFF[self.dtype] * (dx.abs() + bound) + 2.0**-25 * (size > 0)
        if self.below is not None:
            z, affine, mask, *_ = self.below
            if mask is None:
                u = (z.double() - _channel(affine.mean)) * _channel(affine.scale)
                u += _channel(affine.beta)
                assert u.numel() == 0 or u.abs().min() > 1e-6, "a mask that rounding decides"
                keep = u > 0
            else:
                bits = (mask[:, :, None].int() >> torch.arange(8, device=DEVICE)) & 1
                n, c, h, w = self.shape
                keep = bits.reshape(n, h, w, c).permute(0, 3, 1, 2).bool()
            dx, bound = dx * keep, bound * keep
        return dx, bound

    def check(self, tile=SMALL, precision="ieee"):
        actual, sums = self.run(tile, precision)
        expected, bound = self.expected(precision)
        assert actual.dtype == self.dtype
        assert actual.shape == self.shape
        assert actual.stride() == empty_nhwc(self.shape, actual).stride()
        error = (actual.double() - expected).abs()
        assert (error <= bound).all(), f"{(error - bound).max():.3g} beyond the bound"  # NaN fails
        if self.below is None:
            assert sums is None
            return
        z, affine, _, z2, mean2 = self.below
        du = _rows(actual.double())
        centred = [_rows(z.double() - _channel(affine.mean))]
        if z2 is not None:
            centred.append(_rows(z2.double() - _channel(mean2)))
        factors = [torch.ones_like(du), *centred]
        assert sums.sums.dtype == torch.float32
        assert sums.sums.shape[::2] == (len(factors), self.shape[1])
        for got, factor in zip(sums.sums.double(), factors, strict=True):
            # fp32 sums over a tile of pixels, of terms rounded twice
            limit = (len(du) + 2) * 2.0**-24 * (du * factor).abs()
            limit += 2.0**-24 * du.abs() * (factor.abs() + 8)  # z − mean itself is rounded
            assert ((got.sum(0) - (du * factor).sum(0)).abs() <= limit.sum(0)).all()
            if len(du) and tile is not None and self.g.stride == (1, 1):
                pieces = (du * factor).split(tile.block_m), limit.split(tile.block_m)
                parts = zip(*pieces, strict=True)
                for row, (part, most) in zip(got, parts, strict=True):
                    assert ((row - part.sum(0)).abs() <= most.sum(0)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_input_gradient(case, dtype):
    Problem(case, dtype).check()


@pytest.mark.parametrize("case", CASES)
def test_with_everything_fused(case):
    c = CASES[case][0][1]
    below = "affine of 2" if c % 8 else "bits of 2"
    Problem(case, torch.bfloat16, "batch", (2, 2), below).check()
    Problem(case, torch.float32, "batch", (1, 1), "affine").check()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("below", BELOWS)
def test_every_prologue_with_every_epilogue(norm, below):
    cases = "1x1", "3x3, stride 2, odd", "1x1, stride 2"
    first = NORMS.index(norm) + BELOWS.index(below)
    for i, residual in enumerate(RESIDUALS, first):
        Problem(cases[i % 3], DTYPES[i // 3 % 3], norm, residual, below).check()


# one pixel or channel less, as many, and one more than a tile of 32
@pytest.mark.parametrize("edge", [31, 32, 33])
@pytest.mark.parametrize("side", ["pixels", "input channels", "output channels"])
def test_tile_edges(side, edge):
    sides = "pixels", "input channels", "output channels"
    n, c, k = (edge if side == each else 8 for each in sides)
    below = "affine" if c % 8 else "bits of 2"
    problem = Problem(
        ((n, c, 1, 1), k, (1, 1), _geometry()), torch.bfloat16, "batch", (1, 1), below
    )
    problem.check(ConvTile(32, 32, 32, 4, 2))
    case = (1, c, 1, n), k, (3, 3), _geometry((1, 1), (1, 1))
    Problem(case, torch.float32, "batch", (1, 1), below).check(ConvTile(32, 32, 32, 4, 2))


TILES = [ConvTile(32, 16, 64, 4, 3), ConvTile(16, 64, 16, 4, 2), ConvTile(16, 128, 32, 8, 3), None]


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tiles(tile, norm):
    """Wide ones leave in pieces; None is the default."""
    for c, below in ((136, "bits of 2"), (129, "affine")):
        case = (1, c, 3, 5), 35, (3, 3), _geometry((2, 1), (1, 1))
        Problem(case, torch.bfloat16, norm, (1, 1), below).check(tile)
        Problem(case, torch.float32, norm).check(tile)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (1, 2056, 1, 2), (2, 1, 1, 1), (1, 8, 1, 300)])
def test_sizes(shape):
    below = "affine" if shape[1] % 8 else "bits"
    for k in (1, 260) if shape[0] else (8,):
        problem = Problem((shape, k, (1, 1), _geometry()), torch.float16, "none", None, below)
        problem.check(ConvTile(16, 64, 64, 4, 2))


@pytest.mark.parametrize("precision", PRECISION)
def test_precisions(precision):
    Problem("3x3, stride 2", torch.float32, "batch", (1, 1), "affine").check(None, precision)


def test_every_pixel_is_in_one_tile():
    """Of all phases; tiles without pixels have sums of 0."""
    problem = Problem("3x3, stride 2, odd", torch.float32, below="affine")
    _, sums = problem.run(SMALL)
    n, _, h, w = problem.shape
    most = n * -(-h // 2) * -(-w // 2)
    assert sums.sums.shape[1] == 4 * -(-most // SMALL.block_m)
    problem.check()
    thin = Problem(
        ((1, 8, 1, 1), 8, (3, 3), _geometry((2, 2), (1, 1))), torch.float32, below="affine"
    )
    _, sums = thin.run(SMALL)
    assert sums.sums.shape[1] == 4
    assert (sums.sums[:, 1:] == 0).all()


def test_a_nan_passes_the_mask():
    """As in torch.relu's backward, and it goes nowhere else."""
    problem = Problem("1x1", torch.float32, below="affine")
    expected, _ = problem.run()
    problem.below.z[1, 3, 2, 1] = float("nan")
    actual, sums = problem.run()
    same = torch.ones_like(expected, dtype=torch.bool)
    same[1, 3, 2, 1] = False
    assert torch.equal(actual[same], expected[same])
    alone = problem._product(problem.dz.double(), problem.weight.double())[1, 3, 2, 1]
    assert torch.isclose(actual[1, 3, 2, 1].double(), alone, rtol=1e-5, atol=1e-5)
    assert sums.sums.sum(1).isnan().sum() == 1


def test_twice_the_same_bits():
    problem = Problem("3x3, stride 2", torch.bfloat16, "batch", (2, 2), "bits of 2")
    (first, first_sums), (second, second_sums) = problem.run(), problem.run()
    assert torch.equal(first, second)
    assert torch.equal(first_sums.sums, second_sums.sums)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("below", BELOWS)
def test_the_ledger_counts_each_operand_once(norm, below):
    problem = Problem("3x3, stride 2, odd", torch.bfloat16, norm, (2, 2), below)
    n, c, h, w = problem.shape
    k = problem.weight.shape[0]
    pixels, outputs = n * h * w, n * 4 * 3
    dz = {"none": 2 * outputs * k, "batch": 2 * 2 * outputs * k + 4 * 4 * k}
    dz |= {"running": 2 * outputs * k + 4 * k, "coef_1": 2 * outputs * k + 2 * 4 * k}
    reads = dz[norm] + 2 * problem.weight.numel() + 2 * problem.residual.numel()
    z, second = 2 * pixels * c, 2 * pixels * c + 4 * c
    reads += {
        "none": 0,
        "affine": z + 3 * 4 * c,
        "bits": z + 4 * c + pixels * c // 8,
        "affine of 2": z + 3 * 4 * c + second,
        "bits of 2": z + 4 * c + pixels * c // 8 + second,
    }[below]

    def meta(value):
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        return type(value)(*map(meta, value)) if isinstance(value, tuple) else value

    with count_traffic() as ledger:
        dx, sums = conv_dgrad(
            meta(problem.dz),
            meta(problem.weight),
            problem.shape,
            problem.g,
            residual=meta(problem.residual),
            residual_stride=(2, 2),
            below=meta(problem.below),
            tile=SMALL,
        )
    assert dx.device.type == "meta"
    (launch,) = ledger
    assert launch.kernel == "_conv_dgrad_kernel"
    assert launch.reads == reads
    assert launch.writes == 2 * pixels * c + (0 if sums is None else 4 * sums.sums.numel())


def test_what_is_refused():
    problem = Problem("1x1, one pixel less", torch.float32, below="affine")
    z, affine, *_ = problem.below
    bits = torch.zeros(15, 1, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="multiples of 8, got 15"):
        conv_dgrad(
            problem.dz, problem.weight, problem.shape, problem.g, below=Below(z, affine, bits)
        )
    with pytest.raises(ValueError, match="groups must be 1, got 3"):
        conv_dgrad(problem.dz, problem.weight, problem.shape, problem.g._replace(groups=3))

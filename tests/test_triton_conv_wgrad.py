"""The weight's gradient by Triton against float64, along the kernel's own rounding to storage."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.grad import conv2d_weight

pytest.importorskip("triton")

from guarded import check_bounds

from resfast.backends.interface import Affine, ConvGeometry, NormGradient, empty_nhwc
from resfast.kernels import conv_wgrad as module
from resfast.kernels.conv_wgrad import conv_wgrad
from resfast.kernels.launch import capture, count_traffic
from resfast.kernels.tiles import ConvTile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # CPU: Triton's interpreter, see conftest

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
ROUNDOFF = {HALF: 2.0**-11, BFLOAT: 2.0**-8, FLOAT: 2.0**-24}
# of a product's factors beyond float32's: TF32 drops 13 bits, three passes of it keep 21
PRECISION = {"ieee": 0.0, "tf32": 2.0**-9, "tf32x3": 2.0**-20}
PROLOGUES = [("", False), ("", True), ("z 1", False), ("z 1", True)]
SMALL = ConvTile(16, 16, 16, 4, 2)

# (N, C, H, W), (K, R, S), stride, padding, dilation
CASES = {
    "3x3": ((2, 8, 6, 5), (16, 3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 stride 2": ((2, 5, 9, 8), (3, 3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3 dilation 2": ((1, 8, 9, 7), (8, 3, 3), (1, 1), (2, 2), (2, 2)),
    "3x3 no padding": ((2, 17, 5, 6), (8, 3, 3), (1, 1), (0, 0), (1, 1)),
    "1x1": ((2, 17, 5, 7), (33, 1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1 stride 2": ((2, 16, 7, 6), (8, 1, 1), (2, 2), (0, 0), (1, 1)),
    "1x1 padding": ((1, 3, 4, 4), (5, 1, 1), (1, 1), (1, 2), (1, 1)),
    "7x7 stem": ((1, 3, 13, 12), (16, 7, 7), (2, 2), (3, 3), (1, 1)),
    "uneven": ((1, 4, 11, 9), (5, 2, 3), (3, 1), (1, 2), (2, 1)),
    "window as large as the input": ((3, 2, 4, 3), (2, 4, 3), (1, 1), (0, 0), (1, 1)),
    "padding beyond the input": ((1, 2, 2, 2), (2, 3, 3), (1, 1), (4, 3), (1, 1)),
}


def channels(v):
    return v.double().view(1, -1, 1, 1)


def randn(shape, dtype):
    values = torch.randn(shape, device=DEVICE).to(dtype)
    return values.contiguous(memory_format=torch.channels_last)


def vector(n, offset=0.0):
    return torch.randn(n, device=DEVICE) + offset


class Call:
    """Inputs of one gradient, made for a case."""

    def __init__(self, case, dtype=FLOAT, norm="", prologue=False):
        shape, (k, r, s), *geometry = case
        n, c, *size = shape
        self.g = ConvGeometry(*geometry, 1)
        self.shape = (k, c, r, s)
        p, q = (
            (i + 2 * pad - d * (w - 1) - 1) // stride + 1
            for i, w, stride, pad, d in zip(size, (r, s), *geometry, strict=True)
        )
        self.x = randn(shape, dtype)
        self.dz = randn((n, k, p, q), dtype)
        if norm:
            self.dz = NormGradient(
                self.dz,
                randn((n, k, p, q), dtype),
                vector(k),
                vector(k),
                vector(k) if "z" in norm else None,
                vector(k, 1.0) if "1" in norm else None,
            )
        # beta > 0: padding that was put through the affine would be seen
        self.prologue = Affine(vector(c), vector(c), vector(c, 1.0)) if prologue else None

    def __call__(self, **options):
        return conv_wgrad(
            self.dz, self.x, self.shape, self.g, **{"prologue": self.prologue, **options}
        )

    def factors(self):
        """dz and the convolution's input, in float64, and how far off float32 may put each.

        A value that float32's error moves across a rounding boundary is off by a unit of storage;
        all others are exact.
        """

        def interval(value, magnitude):
            reach = 4 * 2.0**-24 * magnitude
            ends = ((value + sign * reach).to(self.x.dtype).double() for sign in (-1, 1))
            low, high = ends
            return value.to(self.x.dtype).double(), (high - low).abs()

        dz, x = self.dz, self.x.double()
        if isinstance(dz, NormGradient):
            terms = [dz.du.double() * channels(dz.scale)]
            if dz.coef_z is not None:
                centred = dz.z.double() - channels(dz.mean)
                terms.append(centred * channels(dz.coef_z))
            if dz.coef_1 is not None:
                terms.append(channels(dz.coef_1).expand_as(terms[0]))
            dz, dz_off = interval(sum(terms), sum(t.abs() for t in terms))
        else:
            dz, dz_off = dz.double(), torch.zeros_like(dz, dtype=torch.float64)
        x_off = torch.zeros_like(x)
        if self.prologue:
            mean, scale, beta = map(channels, self.prologue)
            product = (x - mean) * scale
            x, x_off = interval((product + beta).relu(), product.abs() + beta.abs())
        return dz, dz_off, x, x_off

    def check(self, dw, precision="ieee"):
        """dw within what its roundings allow: each product and sum in float32, once to storage."""
        dz, dz_off, x, x_off = self.factors()

        def gradient(dz, x):
            return conv2d_weight(x, self.shape, dz, *self.g)

        expected = gradient(dz, x)
        sums = gradient(dz.abs(), x.abs())
        count = dz.numel() // dz.shape[1]
        bound = (count * 2.0**-24 + PRECISION[precision]) * sums
        bound += gradient(dz_off, x.abs() + x_off) + gradient(dz.abs(), x_off)
        bound += ROUNDOFF[dw.dtype] * (expected.abs() + bound) + 2.0**-25
        assert dw.shape == self.shape
        assert dw.dtype == self.x.dtype
        assert dw.stride() == empty_nhwc(self.shape, dw).stride()
        excess = (dw.double() - expected).abs() / bound
        assert (excess <= 1).all(), f"error up to {excess.max():.3g} of the bound"


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_any_geometry(case, dtype):
    call = Call(case, dtype)
    call.check(call(tile=SMALL))


@pytest.mark.parametrize("prologue", [False, True], ids=["x", "affine"])
@pytest.mark.parametrize("norm", ["", "scale", "scale z", "scale 1", "scale z 1"])
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("case", ["3x3", "1x1", "1x1 stride 2", "uneven"])
def test_prologues(case, dtype, norm, prologue):
    call = Call(CASES[case], dtype, norm, prologue)
    call.check(call(tile=SMALL, splits=2))


@pytest.mark.parametrize("prologue", [False, True], ids=["x", "affine"])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize(("k", "c"), [(1, 1), (3, 8), (8, 3), (64, 65), (65, 64), (16, 17)])
def test_channels_around_tiles(k, c, window, prologue):
    pad = window // 2
    case = ((2, c, 3, 3), (k, window, window), (1, 1), (pad, pad), (1, 1))
    call = Call(case, BFLOAT, "z 1" if prologue else "", prologue)
    call.check(call(tile=ConvTile(64, 64, 16, 4, 2)))


@pytest.mark.parametrize("pixels", [1, 2, 15, 16, 17, 31, 32, 33, 48])
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_pixels_around_steps_and_ranges(pixels, splits):
    # coef_1 shows rows that should not have been there
    case = ((1, 8, 1, pixels), (8, 1, 3), (1, 1), (0, 1), (1, 1))
    call = Call(case, FLOAT, "z 1", True)
    call.check(call(tile=SMALL, splits=splits))


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF], ids=str)
@pytest.mark.parametrize(("norm", "prologue"), PROLOGUES)
@pytest.mark.parametrize("case", ["3x3", "1x1", "7x7 stem"])
def test_tiles_by_default(case, norm, prologue, dtype):
    call = Call(CASES[case], dtype, norm, prologue)
    call.check(call())


@pytest.mark.parametrize("precision", PRECISION)
def test_precisions(precision):
    call = Call(CASES["3x3"], FLOAT, "z 1", True)
    call.check(call(precision=precision), precision)


@pytest.mark.parametrize("splits", [2, 7, 9, 33, 1000])
def test_ranges_are_added_up_in_a_fixed_order(splits):
    case = ((1, 3, 16, 33), (2, 1, 1), (1, 1), (0, 0), (1, 1))  # 33 steps
    call = Call(case)
    first = call(tile=SMALL, splits=splits)
    call.check(first)
    assert torch.equal(first, call(tile=SMALL, splits=splits))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(("norm", "prologue"), [("", False), ("", True), ("z 1", True)])
@pytest.mark.parametrize("case", ["1x1", "1x1 stride 2", "uneven"])
def test_stays_in_bounds(case, norm, prologue, splits):
    call = Call(CASES[case], HALF, norm, prologue)
    check_bounds(lambda: call(tile=ConvTile(32, 64, 32, 4, 2), splits=splits))


@pytest.mark.parametrize(("norm", "prologue"), PROLOGUES)
def test_a_nan_stays_in_its_channel(norm, prologue):
    call = Call(((1, 20, 4, 4), (20, 3, 3), (1, 1), (1, 1), (1, 1)), FLOAT, norm, prologue)
    (call.dz.du if norm else call.dz)[0, 3, 1, 1] = float("nan")
    call.x[0, 5, 1, 1] = float("nan")
    bad = call(tile=SMALL).isnan()
    assert bad[3].all()
    assert bad[:, 5].all()
    bad[3] = bad[:, 5] = False
    assert not bad.any()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("window", [1, 3])
def test_steps_beyond_the_last_pixel_do_not_overflow(window):
    pad = window // 2
    call = Call(((1, 8, 3, 3), (8, window, window), (1, 1), (pad, pad), (1, 1)), HALF, "z", True)
    for t in (call.x, call.dz.z):
        t += 30000
    # far from 0 lies only what is not there: in half precision it would be infinite
    far, ones = torch.full((8,), 30000.0, device=DEVICE), torch.ones(8, device=DEVICE)
    call.dz = call.dz._replace(mean=far, scale=ones, coef_z=4 * ones)
    call.prologue = Affine(far, -4 * ones, 0 * ones)
    call.check(call(tile=SMALL))


@pytest.mark.parametrize(("norm", "prologue"), PROLOGUES)
def test_no_pixels(norm, prologue):
    call = Call(((0, 8, 6, 6), (4, 3, 3), (1, 1), (1, 1), (1, 1)), FLOAT, norm, prologue)
    assert torch.equal(call(), torch.zeros(call.shape, device=DEVICE))


def test_groups_are_refused():
    call = Call(CASES["3x3"])
    call.g = call.g._replace(groups=2)
    with pytest.raises(ValueError, match="groups must be 1, got 2"):
        call()


def meta(shape, dtype=BFLOAT):
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


@pytest.mark.parametrize("case", ["3x3", "1x1", "1x1 stride 2", "7x7 stem"])
def test_offsets_in_64_bits_are_the_same(case, monkeypatch):
    call = Call(CASES[case], FLOAT, "", True)
    expected = call(tile=SMALL)
    launch = module.launch
    monkeypatch.setattr(
        module,
        "launch",
        lambda kernel, *args, **options: launch(
            kernel, *args, **(options | ({"WIDE": True} if "WIDE" in options else {}))
        ),
    )
    assert torch.equal(call(tile=SMALL), expected)


@pytest.mark.parametrize(("n", "wide"), [(255, False), (256, True)])
def test_offsets_have_64_bits_where_they_must(n, wide):
    x, dz = meta((n, 128, 256, 256)), meta((n, 64, 256, 256))
    with capture() as launches:
        conv_wgrad(dz, x, (64, 128, 3, 3), ConvGeometry((1, 1), (1, 1), (1, 1), 1))
    assert launches[0].constexprs["WIDE"] is wide


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 49, 56, 112, 113, 12544, 2**16 + 1, 2**31 - 1])
def test_reciprocals_divide(divisor):
    multiplier, shift = module._reciprocal(divisor)
    assert -(2**31) <= multiplier < 2**31
    numerators = [0, 1, divisor - 1, divisor, 2**31 - 1, 2**31 - divisor]
    numerators += [k * divisor + d for k in (1, 5, (2**31 - 2) // divisor) for d in (-1, 0, 1)]
    numerators += [random.Random(divisor).randrange(2**31) for _ in range(1000)]
    for n in numerators:
        if 0 <= n < 2**31:
            high = 2 * n * (multiplier % 2**32) >> 32
            assert high >> shift == n // divisor


def traffic(dz, x, shape, g, **options):
    with count_traffic() as ledger:
        conv_wgrad(dz, x, shape, g, **options)
    return [(t.kernel, t.reads, t.writes) for t in ledger]


def test_traffic_counts_the_partial_results():
    x, dz = meta((4, 32, 10, 10)), meta((4, 16, 10, 10))
    g = ConvGeometry((1, 1), (1, 1), (1, 1), 1)
    operands, dw = 2 * (x.numel() + dz.numel()), 2 * 16 * 32 * 9
    one = traffic(dz, x, (16, 32, 3, 3), g, splits=1)
    assert one == [("_conv_wgrad_kernel", operands, dw)]
    partial = 5 * 4 * 16 * 32 * 9
    assert traffic(dz, x, (16, 32, 3, 3), g, tile=SMALL, splits=5) == [
        ("_conv_wgrad_kernel", operands, partial),
        ("_conv_wgrad_reduce_kernel", partial, dw),
    ]


@pytest.mark.parametrize(
    ("size", "out", "padding", "sampled"), [(9, 5, 0, 25), (8, 4, 0, 16), (8, 5, 1, 16)]
)
def test_traffic_of_a_strided_1x1_is_the_pixels_it_samples(size, out, padding, sampled):
    x, dz = meta((3, 32, size, size)), meta((3, 16, out, out))
    g = ConvGeometry((2, 2), (padding, padding), (1, 1), 1)
    (main,) = traffic(dz, x, (16, 32, 1, 1), g, splits=1)
    assert main[1] == 2 * (3 * 32 * sampled + dz.numel())


@pytest.mark.parametrize(("coefs", "activations", "vectors"), [(2, 2, 4), (0, 1, 1)])
def test_traffic_of_the_prologues(coefs, activations, vectors):
    x, du = meta((3, 32, 8, 8)), meta((3, 16, 8, 8))
    per_k, per_c = (torch.empty(n, device="meta") for n in (16, 32))
    dz = NormGradient(du, du, per_k, per_k, *([per_k] * coefs or [None, None]))
    g = ConvGeometry((1, 1), (0, 0), (1, 1), 1)
    prologue = Affine(per_c, per_c, per_c)
    (main,) = traffic(dz, x, (16, 32, 1, 1), g, prologue=prologue, splits=1)
    assert main[1] == 2 * (x.numel() + activations * du.numel()) + 4 * (vectors * 16 + 3 * 32)

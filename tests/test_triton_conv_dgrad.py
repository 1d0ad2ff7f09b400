"""The input's gradient of a convolution, with the norms above and below it fused, against fp64."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # CPU: Triton's interpreter, see conftest

from guarded import guarded  # noqa: E402

from resfast.backends.interface import (  # noqa: E402
    Affine,
    Below,
    ConvGeometry,
    NormGradient,
    empty_nhwc,
    nhwc,
    pack_mask,
)
from resfast.kernels.conv_dgrad import conv_dgrad  # noqa: E402
from resfast.kernels.launch import count_traffic  # noqa: E402
from resfast.kernels.tiles import ConvTile  # noqa: E402

# of each storage dtype: the relative error of rounding to it
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = list(ROUNDOFF)
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
    "7x7, stride 2": ((1, 3, 9, 10), 64, (7, 7), _geometry((2, 2), (3, 3))),
    "stride beyond the input": ((2, 8, 1, 2), 8, (1, 2), _geometry((3, 4))),
    "padding beyond the window": ((1, 8, 3, 3), 8, (2, 2), _geometry((2, 2), (3, 3))),
}


def _random(*shape, dtype=torch.float32):
    """Half the values of [N, C, H, W] are as memory for [N, H, W, C] holds them."""
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

    def expected(self):
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
        bound = bound + terms * 2.0**-24 * size
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
        expected, bound = self.expected()
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
        for got, factor in zip(sums.sums.double().sum(1), factors, strict=True):
            # fp32 sums over a tile of pixels, of terms rounded twice
            limit = (len(du) + 2) * 2.0**-24 * (du * factor).abs().sum(0)
            limit += 2.0**-23 * (du.abs() * 4).sum(0)  # z − mean itself is rounded
            assert ((got - (du * factor).sum(0)).abs() <= limit).all()


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


COMBINATIONS = list(itertools.product(NORMS, RESIDUALS, BELOWS))


@pytest.mark.parametrize("case", ["1x1", "1x1, stride 2", "3x3, stride 2, odd"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_prologue_with_every_epilogue(case, norm):
    for i, (residual, below) in enumerate(itertools.product(RESIDUALS, BELOWS)):
        Problem(case, DTYPES[i % 3], norm, residual, below).check()

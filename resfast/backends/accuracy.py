"""Whether a float32 convolution keeps to the error criterion on a layer's own activations.

The criterion is docs/numerics.md's: against float64, an RMSE of at most 1.5 times the worst of
stock PyTorch's paths, or 8·2⁻²⁴ of the reference's RMS; likewise the largest error. Direct
convolution keeps to it by what it is. Winograd's errors grow with the activations and filters that
it adds up before it multiplies, and where those nearly cancel afterwards, nothing else does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from resfast.backends.interface import ConvGeometry, NormVectors, nhwc
from resfast.backends.packed import PackedConvolution

# on stock's error; and the floor below which an error is rounding
SINGLE_FACTOR = 1.5
FLOOR_ULPS = 8
# the largest of thousands of rounding errors varies from run to run far more than their RMS
CHANNEL_FACTOR = 2.0
# An RMSE over n independent errors is itself uncertain by 1/√(2n): 1.6 % at 2048, well inside the
# factors.
POOL_VALUES = 2048

_SIDE = 16  # of a window of pixels, enough for that
_aten = torch.ops.aten


def window(x: Tensor, channels: int) -> Tensor:
    """A copy of what decides the error of a convolution of x to so many channels, in NHWC.

    A window around the largest activation: in few images, those with the largest ones.
    """
    h, w = x.shape[2:]
    size = x.detach().abs().amax(1)
    images = size.flatten(1).amax(1).argsort(descending=True)
    row, column = divmod(int(size[images[0]].argmax()), w)
    top, left = (
        min(max(at - _SIDE // 2, 0), max(length - _SIDE, 0))
        for at, length in ((row, h), (column, w))
    )
    count = math.ceil(POOL_VALUES / (min(h, _SIDE) * min(w, _SIDE) * channels))
    cut = x.detach()[images[:count], :, top : top + _SIDE, left : left + _SIDE]
    return cut.clone(memory_format=torch.channels_last)


class Judge:
    """Judges implementations of one convolution and its norm on one sample of activations.

    ReLU and residual left out, which take away errors and references alike, or add to the latter.
    """

    def __init__(
        self,
        sample: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        g: ConvGeometry,
        norm: NormVectors,
    ) -> None:
        self.sample = sample
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        z = _aten._slow_conv2d_forward(
            sample.double(), weight.double(), weight.shape[2:], _double(bias), g.stride, g.padding
        )
        gamma, beta = _double(norm.weight), _double(norm.bias)
        exact = NormVectors(gamma, beta, norm.mean.double(), norm.var.double(), norm.eps)
        self.exact = _norm(z, exact)
        errors = [_size(y - self.exact) for y in _stock(sample, weight, bias, g, norm)]
        scale, largest = _size(self.exact)
        floor = FLOOR_ULPS * 2.0**-24
        self.limit = max(SINGLE_FACTOR * max(e for e, _ in errors), floor * scale)
        self.largest_limit = max(CHANNEL_FACTOR * max(m for _, m in errors), floor * largest)

    def excess(self, run: PackedConvolution) -> float:
        """The error of ``run`` over the allowed error, the larger of the two ratios; ≤ 1 passes.

        0 where the sample is not finite, which tells nothing.
        """
        if not self.exact.isfinite().all():
            return 0.0
        error, largest = _size(run(self.sample, None, False) - self.exact)
        return max(_ratio(error, self.limit), _ratio(largest, self.largest_limit))


def _stock(
    x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry, norm: NormVectors
) -> Iterator[Tensor]:
    """Stock's own paths: NHWC and NCHW, with oneDNN and without; its switches stay as they are."""
    for a, w in ((x, nhwc(weight)), (x.contiguous(), weight.contiguous())):
        yield _norm(_aten.mkldnn_convolution(a, w, bias, g.padding, g.stride, *g[2:]), norm)
        yield _norm(_aten._slow_conv2d_forward(a, w, w.shape[2:], bias, g.stride, g.padding), norm)


def _norm(z: Tensor, norm: NormVectors) -> Tensor:
    weight, bias = (None if v is None else v.detach() for v in norm[:2])
    return torch.batch_norm(z, weight, bias, norm.mean, norm.var, False, 0.0, norm.eps, False)


def _double(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.double()


def _size(error: Tensor) -> tuple[float, float]:
    error = error.double()
    return float(error.square().mean().sqrt()), float(error.abs().max())


def _ratio(error: float, limit: float) -> float:
    if not math.isfinite(error):
        return math.inf
    return error / limit if limit else math.inf if error else 0.0

"""How exact a convolution is, beside stock's own paths on the same tensors."""

from __future__ import annotations

import torch

from resfast.testing import FLOOR_ULPS, SINGLE_FACTOR


def rms(t):
    return t.double().square().mean().sqrt().item()


def stock(compute, *tensors):
    """Stock's own paths: NHWC and NCHW, with oneDNN and without."""
    for on in (True, False):
        with torch.backends.mkldnn.flags(enabled=on):
            yield compute(*tensors)
            yield compute(*(t.contiguous() for t in tensors))


def assert_criterion(result, compute, *tensors):
    """The design's float32 criterion; ``result``: an activation, or a weight's gradient."""
    exact = compute(*(t.double() for t in tensors))
    worst = max(rms(y - exact) for y in stock(compute, *tensors))
    limit = max(SINGLE_FACTOR * worst, FLOOR_ULPS * 2**-24 * rms(exact))
    assert rms(result - exact) <= limit
    if result.shape[2:].numel() <= 9:
        return
    # and channel by channel, where a few thousand values stand for each
    per_channel = (result - exact).square().mean((0, 2, 3)).sqrt() / exact.square().mean(
        (0, 2, 3)
    ).sqrt()
    assert per_channel.max() <= 2 * limit / rms(exact)


def assert_close(result, exact):
    assert result.shape == exact.shape
    assert rms(result - exact) <= 2e-6 * rms(exact)
    assert (result - exact).abs().max() <= 2e-5 * rms(exact)

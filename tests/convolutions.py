"""How exact a convolution is, beside stock's own paths on the same tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from resfast import native
from resfast.backends import cpu
from resfast.backends.interface import NormVectors, nhwc
from resfast.backends.packed import packed_convolution
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


def assert_same_on_any_threads(compute):
    """``compute()``: a list of tensors, bit by bit the same on one thread and on several."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(compute())
    finally:
        torch.set_num_threads(threads)
    for several in results[1:]:
        assert all(map(torch.equal, results[0], several))


def assert_prepared_once_and_anew(x, weight, g):
    """One prepared convolution serves all sizes; a change of any of its inputs makes it anew."""
    vectors = [torch.rand(weight.shape[0]) + 0.5 for _ in range(4)]
    gamma, beta, mean, var = vectors
    norm = NormVectors(*vectors, 1e-5)

    def check(images):
        y = packed_convolution(images, weight, None, g, norm)(images, None, False)
        z = F.conv2d(images, weight, None, *g)
        exact = F.batch_norm(z, mean, var, gamma, beta, False)
        torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)

    check(x)
    check(nhwc(torch.randn(1, x.shape[1], 20, 24)))
    first = packed_convolution(x, weight, None, g, norm)
    assert packed_convolution(x, weight, None, g, norm) is first
    weight.data.mul_(2)
    check(x)
    var.mul_(3)
    check(x)
    native._C.set_cpu_isa("scalar")
    check(x)


def calls_of(names, monkeypatch):
    """Which of these functions the CPU backend calls from now on, in order."""
    called = []

    def watch(name):
        original = getattr(cpu, name)

        def watched(*arguments):
            called.append(name)
            return original(*arguments)

        monkeypatch.setattr(cpu, name, watched)

    for name in names:
        watch(name)
    return called

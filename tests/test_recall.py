"""A prepared convolution is recalled only for arguments that its checks cover."""

from __future__ import annotations

import math

import needs
import pytest
import torch

from resfast import clear_caches
from resfast.backends import packed
from resfast.ops import ConvParams, NormParams, conv_bn_act

pytestmark = needs.native_library
ops = torch.ops.resfast


def _tensors(k=16, c=8, side=3):
    weight = torch.randn(k, c, side, side).contiguous(memory_format=torch.channels_last)
    bias, gamma, beta, mean = (torch.randn(k) for _ in range(4))
    return [weight, bias, gamma, beta, mean, torch.rand(k) + 0.5]


@pytest.fixture
def recalled(monkeypatch):
    """How often a call was answered by recall."""
    clear_caches()
    hits = []
    original = packed.recall_convolution

    def watch(*args):
        answer = original(*args)
        hits.append(answer is not None)
        return answer

    monkeypatch.setattr("resfast.backends.cpu.recall_convolution", watch)
    return hits


@torch.no_grad()
def _call(x, tensors, residual=None, stride=1, eps=1e-5):
    weight, bias, gamma, beta, mean, var = tensors
    side = weight.shape[2] // 2
    conv = ConvParams(weight, bias, (stride, stride), (side, side))
    return conv_bn_act(x, conv, NormParams(gamma, beta, mean, var, None, False, 0.1, eps), residual)


@pytest.mark.parametrize("channels", [8, 16])  # oneDNN, Winograd
def test_the_second_call_recalls_and_computes_the_same(recalled, channels):
    tensors, x = _tensors(16, channels), torch.randn(2, channels, 12, 12)
    first = _call(x, tensors)
    assert torch.equal(_call(x, tensors), first)
    assert recalled == [False, True]


@pytest.mark.parametrize("which", range(6))
def test_a_change_of_any_tensor_is_seen(recalled, which):
    tensors, x = _tensors(), torch.randn(2, 8, 12, 12)
    before = _call(x, tensors)
    tensors[which].data.mul_(1.5)
    after = _call(x, tensors)
    clear_caches()
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, _call(x, tensors))
    assert recalled[:2] == [False, False]


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.randn(3, 8, 12, 12)},
        {"x": torch.randn(2, 8, 10, 12)},
        {"stride": 2},
        {"eps": 1e-3},
    ],
    ids=["batch", "size", "stride", "eps"],
)
def test_other_arguments_are_checked_anew(recalled, change):
    tensors, x = _tensors(), torch.randn(2, 8, 12, 12)
    _call(x, tensors)
    given = {"x": x, "tensors": tensors} | change
    y = _call(**given)
    clear_caches()
    torch.testing.assert_close(y, _call(**given))
    assert recalled == [False, False, False]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"residual": torch.randn(2, 16, 12, 11)}, "residual"),
        ({"residual": torch.randn(2, 16, 12, 12).double()}, "residual"),
        ({"x": torch.randn(2, 9, 12, 12)}, "channels"),
        ({"x": torch.randn(2, 8, 12, 12).bfloat16()}, "type"),
    ],
    ids=["residual's shape", "residual's dtype", "channels", "dtype"],
)
def test_bad_arguments_after_a_good_call_raise(recalled, change, words):
    tensors, x = _tensors(), torch.randn(2, 8, 12, 12)
    _call(x, tensors, torch.randn(2, 16, 12, 12))
    with pytest.raises(RuntimeError, match=words):
        _call(**({"x": x, "tensors": tensors} | change))
    assert recalled == [False, False]


def test_switching_onednn_off_is_obeyed(recalled):
    tensors, x = _tensors(), torch.randn(2, 8, 12, 12)
    _call(x, tensors)
    with torch.backends.mkldnn.flags(enabled=False):
        _call(x, tensors)
    assert recalled == [False, False]


def test_a_sample_is_compared_bit_by_bit():
    tensors = _tensors(64, 32)
    sample = torch.empty(2 * 64 + 5 * 64)
    assert ops.take_sample(*tensors, sample)
    assert ops.same_sample(*tensors, sample)
    tensors[1][3] = math.nan
    assert not ops.same_sample(*tensors, sample)
    assert ops.take_sample(*tensors, sample)
    assert ops.same_sample(*tensors, sample)
    for tensor in tensors:
        kept = tensor.clone(memory_format=torch.preserve_format)
        if tensor.dim() == 1:
            tensor[0] += 1
        else:
            tensor.mul_(2)
        assert not ops.same_sample(*tensors, sample)
        tensor.copy_(kept)
    assert ops.same_sample(*tensors[:1], None, *tensors[2:], sample) is False


def test_what_cannot_be_sampled_is_declined():
    tensors, sample = _tensors(), torch.empty(1000)
    for i, other in (
        (0, tensors[0].double()),
        (0, torch.randn(16, 8, 3, 6)[..., ::2]),
        (2, torch.randn(15)),
        (2, torch.randn(32)[::2]),
    ):
        changed = [*tensors[:i], other, *tensors[i + 1 :]]
        assert not ops.take_sample(*changed, sample)
        assert not ops.same_sample(*changed, sample)
    with pytest.raises(RuntimeError, match="sample must be"):
        ops.take_sample(*tensors, torch.empty(10))

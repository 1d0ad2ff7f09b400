"""bfloat16 convolution for inference: the native ops, and the choice to use them."""

from __future__ import annotations

import copy
import math

import needs
import pytest
import torch
import torch.nn.functional as F
from convolutions import assert_same_on_any_threads

import resfast
from resfast import native
from resfast.backends.bf16 import bf16_declines, bf16_weight
from resfast.backends.interface import ConvGeometry, nhwc
from resfast.ops import ConvParams, NormParams, conv_bn_act

pytestmark = [
    needs.native_library,
    pytest.mark.skipif(
        not native.bf16_products(), reason="no products of bfloat16 pairs on this processor"
    ),
]
ops = torch.ops.resfast
PLAIN = ConvGeometry((1, 1), (0, 0), (1, 1), 1)


def _problem(n, c, h, w, k, kernel=(1, 1), g=PLAIN, seed=0):
    """(x, weight, scale, shift, residual): activations as after a ReLU, He-scaled weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return nhwc(torch.randn(shape, generator=generator)).bfloat16()

    x, weight = normal(n, c, h, w).relu(), normal(k, c, *kernel)
    weight = weight * math.sqrt(2 / weight[0].numel())
    scale, shift = (torch.randn(k, generator=generator) for _ in range(2))
    return x, weight, scale + 3, shift, normal(*F.conv2d(x, weight, None, *g).shape)


def _convolve(x, weight, g, scale, shift, residual=None, relu=False):
    out = nhwc(F.conv2d(x, weight, None, *g))
    kernel = weight.shape[2:]
    tail = (scale, shift, residual, relu, out)
    ops.bf16_conv(x, bf16_weight(weight), *kernel, *g.stride, *g.padding, *tail)
    return out


def _exact(x, weight, g, scale, shift, residual=None, relu=False):
    z = F.conv2d(x.double(), weight.double(), None, *g)
    u = z * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
    u = u if residual is None else u + residual
    return u.relu() if relu else u


def _assert_rounded_once(y, exact):
    """Each value within half a unit of bfloat16's last place, but for float32's own errors."""
    float32 = 1e-5 * exact.square().mean().sqrt()
    assert ((y - exact).abs() <= 2**-8 * exact.abs() + float32).all()


@pytest.mark.parametrize(
    ("c", "k", "kernel", "stride"),
    [
        (64, 256, 1, 1),
        (2048, 512, 1, 1),
        (256, 512, 1, 2),
        (3, 64, 7, 2),
        (64, 64, 3, 1),
        (512, 512, 3, 1),
        (128, 128, 3, 2),
    ],
)
def test_a_resnets_convolutions_round_once(c, k, kernel, stride):
    g = ConvGeometry((stride, stride), (kernel // 2, kernel // 2), (1, 1), 1)
    x, weight, scale, shift, residual = _problem(2, c, 14, 14, k, (kernel, kernel), g)
    for relu, r in ((True, None), (False, residual), (True, residual)):
        y = _convolve(x, weight, g, scale, shift, r, relu)
        _assert_rounded_once(y, _exact(x, weight, g, scale, shift, r, relu))


@pytest.mark.parametrize("stride", [(1, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("padding", [(0, 0), (2, 1), (0, 2)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)], ids=str)
@pytest.mark.parametrize("c", [1, 6, 7])
def test_every_window(c, kernel, padding, stride):
    """Odd numbers of values too, whose last pair is half empty."""
    g = ConvGeometry(stride, padding, (1, 1), 1)
    x, weight, scale, shift, _ = _problem(2, c, 9, 8, 48, kernel, g)
    y = _convolve(x, weight, g, scale, shift)
    _assert_rounded_once(y, _exact(x, weight, g, scale, shift))


def test_half_an_empty_pair_is_zero_whatever_was_in_memory():
    g = PLAIN._replace(padding=(1, 1))
    x, weight, scale, shift, _ = _problem(1, 8, 6, 6, 16, (3, 3), g)
    assert _convolve(x * math.nan, weight, g, scale, shift).isnan().all()
    x, weight, scale, shift, _ = _problem(1, 7, 6, 6, 16, (3, 3), g)
    y = _convolve(x, weight, g, scale, shift)
    _assert_rounded_once(y, _exact(x, weight, g, scale, shift))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 1, 1, 16),
        (1, 32, 4, 4, 80),  # a panel that is not full
        (1, 1040, 3, 3, 16),  # two parts of a row
        (2, 16, 29, 23, 16),  # blocks of pixels
        (1, 2, 3, 3, 512),  # more channels than pixels: threads share panels
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", [1, 3])
def test_every_shape_on_any_number_of_threads(kernel, shape):
    g = PLAIN._replace(padding=(kernel // 2,) * 2)
    x, weight, scale, shift, residual = _problem(*shape, (kernel, kernel), g)
    y = _convolve(x, weight, g, scale, shift, residual, True)
    _assert_rounded_once(y, _exact(x, weight, g, scale, shift, residual, True))
    assert_same_on_any_threads(lambda: [_convolve(x, weight, g, scale, shift, residual, True)])


def test_weights_in_any_layout_and_a_residual_in_place():
    x, weight, scale, shift, residual = _problem(2, 16, 6, 6, 32)
    y = _convolve(x, weight, PLAIN, scale, shift, residual)
    packed = bf16_weight(weight.contiguous())
    ops.bf16_conv(x, packed, 1, 1, 1, 1, 0, 0, scale, shift, residual, False, residual)
    assert torch.equal(residual, y)


def test_nan_and_infinity_stay_and_nothing_outside_is_read():
    g = PLAIN._replace(padding=(1, 1))
    x, weight, scale, shift, _ = _problem(3, 7, 5, 5, 16, (3, 3), g)
    around = nhwc(torch.full((5, 7, 5, 5), math.nan)).bfloat16()
    around[1:4] = x
    y = _convolve(around[1:4], weight, g, scale, shift, None, True)
    assert torch.equal(y, _convolve(x, weight, g, scale, shift, None, True))
    x[0, 3, 2, 2] = math.nan
    x[1, 3, 2, 2] = math.inf
    y = _convolve(x, weight.abs(), g, scale.abs(), shift, None, True)
    assert y[0, :, 2, 2].isnan().all()
    assert y[1, :, 2, 2].isposinf().all()
    assert y[2].isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(1, 16, 8, 8)}, "bfloat16"),
        ({"x": torch.zeros(1, 16, 8).bfloat16()}, "4-D"),
        ({"x": torch.zeros(1, 32, 8, 8).bfloat16()}, "bf16_weight made for"),
        ({"packed": torch.zeros(1, 8, 64, 3).bfloat16()}, "bf16_weight made for"),
        ({"scale": torch.zeros(8)}, "one value per channel"),
        ({"shift": torch.zeros(16).double()}, "shift must be"),
        ({"residual": torch.zeros(1, 16, 8, 9).bfloat16()}, "residual must have the shape"),
        ({"out": torch.full((1, 16, 9, 8), 7.0).bfloat16()}, "out must be"),
        (
            {
                "out": torch.full((1, 20, 8, 8), 7.0).bfloat16(),
                "scale": torch.ones(20),
                "shift": torch.ones(20),
            },
            "multiple of",
        ),
        ({"window": (1, 1, 2, 2, 0, 0)}, "out must be"),
        ({"window": (1, 1, 0, 1, 0, 0)}, "at least 1"),
        ({"window": (1, 1, 1, 1, -1, 0)}, "at least 1"),
        ({"window": (9, 1, 1, 1, 0, 0)}, "must fit"),
    ],
    ids=str,
)
def test_bad_arguments_raise_before_anything_is_written(change, words):
    given = {
        "x": torch.zeros(1, 16, 8, 8).bfloat16(),
        "packed": bf16_weight(torch.zeros(16, 16, 1, 1).bfloat16()),
        "window": (1, 1, 1, 1, 0, 0),
        "scale": torch.ones(16),
        "shift": torch.zeros(16),
        "residual": None,
        "out": torch.full((1, 16, 8, 8), 7.0).bfloat16(),
    } | change
    for name in ("x", "residual", "out"):
        if given[name] is not None and given[name].dim() == 4:
            given[name] = nhwc(given[name])
    vectors = (given["scale"], given["shift"], given["residual"])
    with pytest.raises(RuntimeError, match=words):
        ops.bf16_conv(given["x"], given["packed"], *given["window"], *vectors, False, given["out"])
    assert (given["out"] == 7).all()


def test_bad_weights_raise():
    packed = torch.zeros(1, 8, 64, 2).bfloat16()
    for weight, words in (
        (torch.zeros(16, 16, 1, 1), "bfloat16"),
        (torch.zeros(16, 16).bfloat16(), "weight must be"),
        (torch.zeros(16, 18, 1, 1).bfloat16(), "packed must be"),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.bf16_weight(weight, packed)
    x = nhwc(torch.zeros(1, 16, 8, 8)).bfloat16()
    with pytest.raises(RuntimeError, match="out overlaps the memory of x"):
        ops.bf16_conv(x, packed, 1, 1, 1, 1, 0, 0, torch.ones(16), torch.ones(16), None, False, x)


def test_it_runs_on_avx512_alone(isa):
    x, weight, scale, shift, _ = _problem(1, 16, 4, 4, 16)
    if isa == "avx512":
        assert bf16_declines(weight, PLAIN) is None
        return
    assert "no products" in bf16_declines(weight, PLAIN)
    with pytest.raises(RuntimeError, match="need avx512 kernels"):
        _convolve(x, weight, PLAIN, scale, shift)


@pytest.mark.parametrize(
    ("weight", "geometry", "words"),
    [
        ((64, 3, 7, 7), PLAIN, None),
        ((24, 16, 1, 1), PLAIN, "multiples of 16"),
        ((64, 32, 1, 1), PLAIN._replace(groups=2), "groups"),
        ((64, 64, 3, 3), PLAIN._replace(dilation=(2, 2)), "dilation"),
    ],
    ids=str,
)
def test_what_it_declines(weight, geometry, words):
    reason = bf16_declines(torch.empty(weight).bfloat16(), geometry)
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize("optimized", [False, True])
def test_a_network_in_bfloat16_runs_its_convolutions_and_norms_in_one_step(optimized):
    """With half the roundings of stock's."""
    model = resfast.resnet18().eval().bfloat16()
    stock = copy.deepcopy(resfast.unfused(model))
    x = nhwc(torch.randn(2, 3, 64, 64)).bfloat16()
    with torch.no_grad():
        report = resfast.explain(model, x)
        assert {name for row in report.rows for name in row.backends} == {"conv_fprop"}
        y = resfast.optimize_for_inference(model)(x) if optimized else model(x)
        expected = stock(x)
        exact = stock.double()(x.double())
    assert (y - exact).square().sum() < (expected - exact).square().sum()


def test_a_convolution_and_its_norm_round_once():
    """Scale and shift of the norm's own float32 parameters are not rounded."""
    x, weight, gamma, beta, residual = _problem(2, 48, 9, 9, 32)
    mean, var = torch.randn(32), torch.rand(32) + 0.5
    norm = NormParams(gamma, beta, mean, var, None, False)
    with torch.no_grad():
        y = conv_bn_act(x, ConvParams(weight, None), norm, residual)
    z = F.conv2d(x.double(), weight.double())
    vectors = [v.double() for v in (mean, var, gamma, beta)]
    _assert_rounded_once(y, (F.batch_norm(z, *vectors) + residual).relu())


def test_a_change_of_any_sampled_value_is_seen():
    """Values are two bytes apart: of the 64 sampled ones, the second lies behind 36 values."""
    conv = resfast.BasicBlock(16, 16).eval().bfloat16()
    x = nhwc(torch.randn(1, 16, 4, 4)).bfloat16()
    weight = conv.conv1.weight
    with torch.no_grad():
        y = conv(x)
        weight.data.as_strided((weight.numel(),), (1,))[36] += 50
        assert not torch.equal(conv(x), y)


def test_prepared_weights_follow_weights_and_norm():
    block = resfast.BasicBlock(16, 16).eval().bfloat16()
    x = nhwc(torch.randn(2, 16, 6, 6)).bfloat16()
    for change in (
        lambda: None,
        lambda: block.conv1.weight.data.mul_(-1),
        lambda: block.bn2.running_mean.add_(1),
    ):
        with torch.no_grad():
            change()
            y = block(x)
            assert torch.equal(block(x), y)
            exact = copy.deepcopy(resfast.unfused(block)).double()(x.double())
        torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02)


def test_plans_under_autocast_keep_memory_of_the_dtype_they_compute_in():
    model = resfast.resnet18(num_classes=10).eval()
    x = nhwc(torch.randn(2, 3, 64, 64))
    optimized = resfast.optimize_for_inference(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = optimized(x)
        expected = model(x)
    (plan,) = optimized.plans.values()
    assert set(plan.memory.dtypes) == {torch.bfloat16}
    torch.testing.assert_close(y, expected)

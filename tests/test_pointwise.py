"""1×1 convolution: the native ops on each instruction set, and the choice to use them."""

from __future__ import annotations

import math

import needs
import pytest
import torch
import torch.nn.functional as F
from convolutions import (
    assert_close,
    assert_criterion,
    assert_prepared_once_and_anew,
    assert_same_on_any_threads,
    calls_of,
)

from resfast.backends import backend
from resfast.backends.interface import ConvGeometry, nhwc
from resfast.backends.pointwise import (
    is_pointwise,
    pointwise_dgrad,
    pointwise_fprop,
    pointwise_output,
    pointwise_weight,
    prepare_linear,
)

pytestmark = needs.native_library
ops = torch.ops.resfast
PLAIN = ConvGeometry((1, 1), (0, 0), (1, 1), 1)


def _strided(s):
    return PLAIN._replace(stride=(s, s))


def _problem(n, c, h, w, k, stride=1, seed=0):
    """Activations as after a ReLU, He-scaled weights, a gradient; float32, channels_last."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return nhwc(torch.randn(shape, generator=generator))

    p, q = math.ceil(h / stride), math.ceil(w / stride)
    return normal(n, c, h, w).relu(), normal(k, c, 1, 1) * math.sqrt(2 / c), normal(n, k, p, q)


def _backward_x(dz, weight):
    return torch.nn.grad.conv2d_input((dz.shape[0], weight.shape[1], *dz.shape[2:]), weight, dz)


@pytest.mark.parametrize(
    ("c", "k"), [(64, 256), (256, 64), (512, 128), (1024, 256), (2048, 512), (16, 16)]
)
def test_error_against_float64_is_that_of_stock(c, k):
    """The design's float32 criterion, at the channel counts of a ResNet."""
    x, weight, dz = _problem(4, c, 14, 14, k)
    assert_criterion(pointwise_fprop(x, weight, PLAIN), F.conv2d, x, weight)
    assert_criterion(pointwise_dgrad(dz, weight), _backward_x, dz, weight)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 1, 1, 16),
        (2, 16, 3, 5, 48),
        (1, 32, 4, 4, 80),  # a panel that is not full
        (3, 64, 7, 7, 16),
        (1, 48, 9, 14, 64),
        (2, 80, 6, 1, 32),
        (1, 1040, 3, 3, 16),  # three chains
        (2, 16, 29, 23, 16),  # blocks of pixels
        (2, 544, 5, 5, 528),  # large weights, a panel at a time
    ],
    ids=str,
)
def test_every_shape_and_instruction_set(stride, shape, isa):
    x, weight, dz = _problem(*shape, stride=stride)
    g = _strided(stride)
    exact = F.conv2d(x.double(), weight.double(), stride=stride)
    assert_close(pointwise_fprop(x, weight, g), exact)
    assert torch.equal(pointwise_fprop(x, weight.contiguous(), g), pointwise_fprop(x, weight, g))
    if stride == 1:
        assert_close(pointwise_dgrad(dz, weight), _backward_x(dz.double(), weight.double()))


@pytest.mark.parametrize("shape", [(2, 32, 20, 20, 32), (1, 64, 5, 5, 256), (1, 528, 5, 5, 560)])
@pytest.mark.parametrize("stride", [1, 2])
def test_results_do_not_depend_on_the_number_of_threads(shape, stride):
    """Many pixels and many panels of either side: each way of sharing the work out."""
    x, weight, _ = _problem(*shape, stride=stride)
    assert_same_on_any_threads(lambda: [pointwise_fprop(x, weight, _strided(stride))])


@pytest.mark.parametrize("c", [32, 1040])
@pytest.mark.parametrize("relu", [False, True])
def test_epilogue(relu, c, isa):
    x, weight, residual = _problem(2, c, 9, 9, 32)
    scale, shift = torch.rand(32) + 0.5, torch.randn(32)
    packed = pointwise_weight(weight, scale)
    out = pointwise_output(x, 32, PLAIN)
    ops.pointwise_conv(x, packed, shift, residual, relu, 1, 1, out)
    u = F.conv2d(x.double(), weight.double()) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    u = u + residual
    torch.testing.assert_close(out, (u.relu() if relu else u).float(), rtol=1e-5, atol=1e-5)
    in_place = residual.clone(memory_format=torch.preserve_format)
    ops.pointwise_conv(x, packed, shift, in_place, relu, 1, 1, in_place)
    assert torch.equal(in_place, out)


@pytest.mark.parametrize(("c", "k"), [(48, 32), (528, 544)])
def test_the_inputs_gradient_is_added_to_the_residual(c, k, isa):
    """With weights packed first, and by panels."""
    _, weight, dz = _problem(2, c, 9, 9, k)
    residual = torch.randn(2, c, 9, 9)
    alone = pointwise_dgrad(dz, weight)
    torch.testing.assert_close(pointwise_dgrad(dz, weight, residual), alone + residual)


def test_each_instruction_set_runs_kernels_of_its_own(isa):
    """Told by the columns that fit its registers."""
    assert ops.panel_columns() == {"avx512": 64, "avx2": 16, "scalar": 8}[isa]


def test_nan_and_infinity_stay(isa):
    x, weight, _ = _problem(1, 16, 8, 8, 16)
    x[0, 3, 2, 2] = math.nan
    x[0, 3, 4, 4] = math.inf
    out = pointwise_output(x, 16, PLAIN)
    ops.pointwise_conv(x, pointwise_weight(weight.abs()), None, None, True, 1, 1, out)
    assert out[0, :, 2, 2].isnan().all()
    assert out[0, :, 4, 4].isposinf().all()
    assert out[0, :, 7, 7].isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(1, 16, 8, 8, dtype=torch.float64)}, "float32"),
        ({"x": torch.zeros(1, 16, 8)}, "4-D"),
        ({"x": torch.zeros(1, 32, 8, 8)}, "pointwise_weight made for"),
        ({"packed": torch.zeros(1, 16, 7)}, "pointwise_weight made for"),
        ({"shift": torch.zeros(8)}, "one value per channel"),
        ({"residual": torch.zeros(1, 16, 8, 9)}, "residual must have the shape"),
        ({"out": torch.zeros(1, 16, 9, 8)}, "out must be"),
        ({"out": torch.zeros(1, 18, 8, 8)}, "multiple of"),
        ({"stride": 2}, "out must be"),
        ({"stride": 0}, "strides must be"),
    ],
    ids=str,
)
def test_bad_arguments_raise_before_anything_is_written(change, words):
    _, weight, _ = _problem(1, 16, 8, 8, 16)
    given = {
        "x": torch.zeros(1, 16, 8, 8),
        "packed": pointwise_weight(weight),
        "shift": None,
        "residual": None,
        "out": torch.full((1, 16, 8, 8), 7.0),
        "stride": 1,
    } | change
    for name in ("x", "residual", "out"):
        if given[name] is not None and given[name].dim() == 4:
            given[name] = nhwc(given[name])
    before = given["out"].clone()
    call = [given[k] for k in ("x", "packed", "shift", "residual")]
    with pytest.raises(RuntimeError, match=words):
        ops.pointwise_conv(*call, False, given["stride"], given["stride"], given["out"])
    assert torch.equal(given["out"], before)


def test_output_must_not_be_the_input():
    x, weight, _ = _problem(1, 16, 4, 4, 16)
    packed = pointwise_weight(weight)
    with pytest.raises(RuntimeError, match="overlaps the memory of x"):
        ops.pointwise_conv(x, packed, None, None, False, 1, 1, x)
    inside = packed.view(-1)[:256].as_strided((1, 16, 4, 4), (256, 1, 64, 16))
    with pytest.raises(RuntimeError, match="overlaps the memory of packed"):
        ops.pointwise_conv(x, packed, None, None, False, 1, 1, inside)


@pytest.mark.parametrize(
    ("weight", "scale", "words"),
    [
        (torch.zeros(16, 16, 3, 3), None, "weight must be"),
        (torch.zeros(16, 16, 1, 1).double(), None, "float32"),
        (torch.zeros(16, 32, 1, 1), None, "packed must be"),
        (torch.zeros(16, 16, 1, 1), torch.ones(8), "scale must be"),
    ],
)
def test_bad_weights_raise(weight, scale, words):
    packed = torch.zeros(1, 16, ops.panel_columns())
    with pytest.raises(RuntimeError, match=words):
        ops.pointwise_weight(weight, scale, packed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(1, 16, 8, 8).double()}, "float32"),
        ({"x": torch.zeros(1, 32, 8, 8)}, "weight must be"),
        ({"weight": torch.zeros(32, 16, 1, 1)}, "weight must be"),
        ({"weight": torch.zeros(16, 16, 3, 3)}, "weight must be"),
        ({"weight": torch.zeros(16, 16, 1, 1).double()}, "float32"),
        ({"residual": nhwc(torch.zeros(1, 16, 8, 9))}, "residual must have the shape"),
        ({"stride": 2}, "out must be"),
        ({"stride": 0}, "strides must be"),
        ({"out": torch.full((1, 16, 8, 9), 7.0)}, "out must be"),
    ],
    ids=str,
)
@pytest.mark.parametrize("transposed", [False, True])
def test_bad_arguments_of_a_convolution_run_once_raise(change, words, transposed):
    given = {
        "x": torch.zeros(1, 16, 8, 8),
        "weight": torch.zeros(16, 16, 1, 1),
        "residual": None,
        "stride": 1,
        "out": torch.full((1, 16, 8, 8), 7.0),
    } | change
    out, stride = nhwc(given["out"]), (given["stride"],) * 2
    call = (nhwc(given["x"]), given["weight"], transposed, given["residual"], *stride)
    with pytest.raises(RuntimeError, match=words):
        ops.pointwise_conv_once(*call, out)
    assert (out == 7).all()
    x = nhwc(torch.zeros(1, 16, 8, 8))
    with pytest.raises(RuntimeError, match="out overlaps the memory of x"):
        ops.pointwise_conv_once(x, torch.zeros(16, 16, 1, 1), transposed, None, 1, 1, x)


@pytest.mark.parametrize(
    ("x", "weight", "geometry", "runs"),
    [
        ((1, 64, 56, 56), (256, 64, 1, 1), PLAIN, True),
        ((1, 64, 56, 56), (256, 64, 1, 1), _strided(2), True),
        ((1, 64, 56, 56), (256, 64, 1, 1), PLAIN._replace(dilation=(2, 2)), True),
        ((1, 64, 56, 56), (256, 64, 1, 1), PLAIN._replace(padding=(1, 1)), False),
        ((1, 64, 56, 56), (64, 32, 1, 1), PLAIN._replace(groups=2), False),
        ((1, 64, 56, 56), (64, 64, 3, 3), PLAIN, False),
        ((1, 24, 56, 56), (64, 24, 1, 1), PLAIN, False),
        ((1, 64, 56, 56), (24, 64, 1, 1), PLAIN, False),
        ((0, 64, 56, 56), (64, 64, 1, 1), PLAIN, False),
    ],
    ids=str,
)
def test_what_is_run_as_a_product(x, weight, geometry, runs):
    assert is_pointwise(torch.empty(x), torch.empty(weight), geometry) == runs
    assert not is_pointwise(torch.empty(x).bfloat16(), torch.empty(weight).bfloat16(), geometry)


def test_prepared_weights_follow_weights_norm_and_instruction_set(isa):
    x, weight, _ = _problem(2, 16, 6, 6, 32)
    assert_prepared_once_and_anew(x, weight, PLAIN)


@pytest.mark.parametrize(("n", "c", "k"), [(1, 512, 1000), (3, 64, 10), (20, 2048, 64)])
def test_linear_layers(n, c, k, isa):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((n, c), (k, c), (k,)))
    y = prepare_linear(x, weight, bias)(x)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert_close(y, exact)
    assert y.is_contiguous()
    assert torch.equal(prepare_linear(x, weight, bias)(x.t().contiguous().t()), y)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.empty(2, 24), torch.empty(10, 24)),
        (torch.empty(2, 32).bfloat16(), torch.empty(10, 32).bfloat16()),
        (torch.empty(0, 32), torch.empty(10, 32)),
    ],
    ids=["channels", "bfloat16", "empty"],
)
def test_linear_layers_left_to_pytorch(x, weight):
    assert prepare_linear(x, weight, weight.new_empty(10)) is None


@pytest.mark.parametrize("stride", [1, 2])
def test_training_runs_the_products_forward_and_backward(stride, monkeypatch):
    """Through the public op; the weight's gradient, and the input's at stride 2, by im2col."""
    from resfast.ops import ConvParams, NormParams, conv_bn_act

    names = ["pointwise_fprop", "pointwise_dgrad", "im2col_dgrad", "im2col_wgrad"]
    called = calls_of(names, monkeypatch)
    x, weight, _ = _problem(4, 32, 6, 6, 32)
    x.requires_grad_()
    weight.requires_grad_()
    norm = NormParams(torch.ones(32), torch.zeros(32), None, None, None, True)
    conv = ConvParams(weight, None, (stride, stride), (0, 0))
    conv_bn_act(x, conv, norm).sum().backward()
    assert called == [n for n in names if n != ("im2col_dgrad", "pointwise_dgrad")[stride - 1]]
    called.clear()
    with backend("eager"):
        conv_bn_act(x, conv, norm)
    assert called == []

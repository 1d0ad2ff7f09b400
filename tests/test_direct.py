"""Direct convolution: the native ops on each instruction set, and the choice to use them."""

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

from resfast import clear_caches
from resfast.backends.direct import direct_fprop, direct_weight, is_direct
from resfast.backends.interface import ConvGeometry, conv_output_shape, empty_nhwc, nhwc
from resfast.ops import ConvParams, NormParams, conv_bn_act

pytestmark = needs.native_library
ops = torch.ops.resfast


def _geometry(stride, padding):
    return ConvGeometry((stride, stride), (padding, padding), (1, 1), 1)


STRIDED = _geometry(2, 1)


def _problem(n, c, h, w, k, kernel=(3, 3), seed=0):
    """Activations as after a ReLU, He-scaled weights; float32, channels_last."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return nhwc(torch.randn(shape, generator=generator))

    return normal(n, c, h, w).relu(), normal(k, c, *kernel) * math.sqrt(2 / (c * math.prod(kernel)))


def _exact(x, weight, g):
    return F.conv2d(x.double(), weight.double(), None, *g)


def _output(x, weight):
    return empty_nhwc(conv_output_shape(x, weight, STRIDED), x)


@pytest.mark.parametrize(
    ("c", "k", "size", "kernel"),
    [(3, 64, 56, 7), (64, 128, 28, 3), (128, 128, 28, 3), (512, 512, 14, 3)],
)
def test_error_against_float64_is_that_of_stock(c, k, size, kernel):
    """The design's float32 criterion, at the convolutions of a ResNet."""
    g = _geometry(2, kernel // 2)
    x, weight = _problem(4, c, size, size, k, (kernel, kernel))
    assert_criterion(
        direct_fprop(x, weight, g), lambda x, weight: F.conv2d(x, weight, None, *g), x, weight
    )


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 0), (1, 3), (4, 4)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)], ids=str)
def test_every_window(kernel, padding, stride, isa):
    """Windows beyond each side, wholly outside, and rows and columns left over."""
    g = ConvGeometry(stride, padding, (1, 1), 1)
    x, weight = _problem(2, 16, 9, 8, 32, kernel)
    assert_close(direct_fprop(x, weight, g), _exact(x, weight, g))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 3, 3, 16),  # one pixel's worth
        (3, 5, 7, 9, 80),  # any number of input channels; a panel that is not full
        (1, 700, 5, 5, 16),  # more than one chain within a row of the window
        (2, 80, 5, 5, 16),  # a window's rows in chains of two
        (1, 16, 2, 2, 336),  # threads share out the panels
        (2, 16, 57, 43, 16),  # blocks of rows
        (1, 16, 3, 220, 16),  # rows longer than a block
    ],
    ids=str,
)
def test_every_shape(shape, isa):
    x, weight = _problem(*shape)
    assert_close(direct_fprop(x, weight, STRIDED), _exact(x, weight, STRIDED))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("k", [24, 80])
def test_packed_weights(k, layout, isa):
    """Panels of columns, rows in the order of a window's values, zero beyond the last column."""
    weight, scale = torch.randn(k, 20, 3, 2).contiguous(memory_format=layout), torch.rand(k)
    packed = direct_weight(weight, scale)
    panels, width, columns = packed.shape
    scaled = (weight * scale.view(-1, 1, 1, 1)).permute(0, 2, 3, 1).reshape(k, width)
    padded = F.pad(scaled, (0, 0, 0, panels * columns - k))
    assert torch.equal(packed, padded.view(panels, columns, width).transpose(1, 2))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_in_any_layout(layout):
    x, weight = _problem(2, 24, 9, 9, 48)
    other = weight.contiguous(memory_format=layout)
    assert torch.equal(direct_fprop(x, other, STRIDED), direct_fprop(x, weight, STRIDED))


@pytest.mark.parametrize("shape", [(2, 16, 40, 40, 32), (1, 64, 5, 5, 256)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(shape):
    x, weight = _problem(*shape)
    residual = nhwc(torch.randn_like(_output(x, weight)))
    shift, packed = torch.randn(shape[-1]), direct_weight(weight, torch.ones(shape[-1]))

    def compute():
        out = torch.empty_like(residual)
        ops.direct_conv(x, packed, 3, 3, 2, 2, 1, 1, shift, residual, False, out)
        return [out, direct_fprop(x, weight, STRIDED)]

    assert_same_on_any_threads(compute)
    out, z = compute()
    torch.testing.assert_close(out, z + shift.view(-1, 1, 1) + residual, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("c", [16, 700])
def test_epilogue(relu, c, isa):
    """In one chain and in several; a residual's memory may take the result."""
    x, weight = _problem(2, c, 9, 9, 32)
    scale, shift = torch.rand(32) + 0.5, torch.randn(32)
    packed = direct_weight(weight, scale)
    z = _exact(x, weight, STRIDED)
    residual = nhwc(torch.randn(z.shape))
    u = z * scale.view(-1, 1, 1) + shift.view(-1, 1, 1) + residual
    out = _output(x, weight)
    arguments = (x, packed, 3, 3, 2, 2, 1, 1, shift, residual, relu)
    ops.direct_conv(*arguments, out)
    torch.testing.assert_close(out.double(), u.relu() if relu else u, rtol=1e-5, atol=1e-5)
    ops.direct_conv(*arguments, residual)
    assert torch.equal(residual, out)


def test_nan_stays(isa):
    x, weight = _problem(1, 16, 9, 9, 16)
    x[0, 3, 4, 4] = math.nan
    out = _output(x, weight)
    packed = direct_weight(weight, torch.ones(16))
    ops.direct_conv(x, packed, 3, 3, 2, 2, 1, 1, None, None, True, out)
    assert out[0, :, 2, 2].isnan().all()
    assert out[0, :, 0, 0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(1, 16, 9, 9).double()}, "float32"),
        ({"x": torch.zeros(1, 16, 9)}, "4-D"),
        ({"x": torch.zeros(1, 24, 9, 9)}, "direct_weight made for"),
        ({"packed": torch.zeros(1, 144, 7)}, "direct_weight made for"),
        ({"shift": torch.zeros(8)}, "one value per channel"),
        ({"residual": torch.zeros(1, 16, 5, 4)}, "residual must have the shape"),
        ({"out": torch.zeros(1, 16, 4, 5)}, "out must be"),
        ({"out": torch.zeros(1, 17, 5, 5)}, "multiple of"),
        ({"kernel": (12, 3)}, "must fit"),
        ({"kernel": (0, 3)}, "at least 1"),
        ({"stride": (2, 0)}, "at least 1"),
        ({"padding": (-1, 1)}, "at least 0"),
    ],
    ids=str,
)
def test_bad_arguments_raise_before_anything_is_written(change, words):
    _, weight = _problem(1, 16, 9, 9, 16)
    given = {
        "x": torch.zeros(1, 16, 9, 9),
        "packed": direct_weight(weight, torch.ones(16)),
        "kernel": (3, 3),
        "stride": (2, 2),
        "padding": (1, 1),
        "shift": None,
        "residual": None,
        "out": torch.full((1, 16, 5, 5), 7.0),
    } | change
    for name in ("x", "residual", "out"):
        if given[name] is not None and given[name].dim() == 4:
            given[name] = given[name].contiguous(memory_format=torch.channels_last)
    before = given["out"].clone()
    with pytest.raises(RuntimeError, match=words):
        ops.direct_conv(
            given["x"],
            given["packed"],
            *given["kernel"],
            *given["stride"],
            *given["padding"],
            given["shift"],
            given["residual"],
            False,
            given["out"],
        )
    assert torch.equal(given["out"], before)


def test_output_must_not_be_the_input():
    x, weight = _problem(1, 16, 9, 9, 16)
    packed = direct_weight(weight, torch.ones(16))
    with pytest.raises(RuntimeError, match="overlaps"):
        ops.direct_conv(x, packed, 3, 3, 1, 1, 1, 1, None, None, False, x)


@pytest.mark.parametrize(
    ("weight", "scale", "words"),
    [
        (torch.zeros(16, 16, 3), None, "weight must be"),
        (torch.zeros(16, 16, 3, 3).double(), None, "float32"),
        (torch.zeros(16, 16, 3, 3), torch.zeros(8), "scale must be"),
        (torch.zeros(16, 24, 3, 3), None, "packed must be"),
    ],
    ids=["dimensions", "dtype", "scale", "packed"],
)
def test_bad_weights_raise(weight, scale, words):
    packed = torch.zeros(1, 144, ops.panel_columns())
    with pytest.raises(RuntimeError, match=words):
        ops.direct_weight(weight, scale, packed)


@pytest.mark.parametrize(
    ("x", "weight", "g", "runs"),
    [
        ((1, 3, 32, 32), (64, 3, 7, 7), _geometry(2, 3), True),
        ((1, 64, 8, 8), (128, 64, 3, 3), STRIDED, True),
        ((1, 64, 8, 8), (128, 64, 3, 3), _geometry(1, 1), False),
        ((1, 64, 8, 8), (128, 64, 1, 1), _geometry(2, 0), False),
        ((1, 64, 8, 8), (24, 64, 3, 3), STRIDED, False),
        ((1, 64, 8, 8), (128, 32, 3, 3), STRIDED._replace(groups=2), False),
        ((1, 64, 8, 8), (128, 64, 3, 3), STRIDED._replace(dilation=(2, 2)), False),
        ((0, 64, 8, 8), (128, 64, 3, 3), STRIDED, False),
    ],
    ids=str,
)
def test_what_is_run_directly(x, weight, g, runs):
    assert is_direct(torch.empty(x), torch.empty(weight), g) == runs
    assert not is_direct(torch.empty(x).bfloat16(), torch.empty(weight), g)


def test_prepared_weights_follow_weights_norm_and_instruction_set(isa):
    x, weight = _problem(2, 16, 16, 16, 16)
    assert_prepared_once_and_anew(x, weight, STRIDED)


def test_training_runs_strided_convolutions_directly(monkeypatch):
    called = calls_of(["direct_fprop"], monkeypatch)
    x, weight = _problem(2, 16, 8, 8, 16)
    norm = NormParams(torch.ones(16), torch.zeros(16), None, None, None, True)
    y = conv_bn_act(x, ConvParams(weight, None, (2, 2), (1, 1)), norm)
    assert called == ["direct_fprop"]
    z = _exact(x, weight, STRIDED)
    exact = F.batch_norm(z, None, None, training=True).relu()
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("shape", [(4, 16, 32, 32), (4, 32, 2, 2)], ids=["channels", "size"])
def test_a_wrong_input_raises_stocks_own_error_in_training(shape, kernel, stride):
    """Whichever kernel would run it."""
    x, weight = torch.randn(shape), torch.randn(32, 32, kernel, kernel + 3 * (shape[2] < 3))
    with pytest.raises(RuntimeError) as stock:
        F.conv2d(x, weight, stride=stride)
    norm = NormParams(torch.ones(32), torch.zeros(32), None, None, None, True)
    with pytest.raises(RuntimeError) as own:
        conv_bn_act(x, ConvParams(weight, None, (stride, stride)), norm)
    assert str(own.value) == str(stock.value)


@pytest.mark.parametrize(("stride", "padding"), [(0, 1), (2, -1)])
def test_a_wrong_geometry_raises_stocks_own_error_in_training(stride, padding):
    x, weight = _problem(2, 16, 8, 8, 16)
    with pytest.raises(RuntimeError) as stock:
        F.conv2d(x, weight, stride=stride, padding=padding)
    norm = NormParams(torch.ones(16), torch.zeros(16), None, None, None, True)
    with pytest.raises(RuntimeError) as own:
        conv_bn_act(x, ConvParams(weight, None, (stride,) * 2, (padding,) * 2), norm)
    assert str(own.value) == str(stock.value)


def test_large_outputs_live_in_kept_memory():
    """Fresh memory of this size would cost more than the kernel."""
    clear_caches()  # of such memory that other tests left, any would do
    x, weight = _problem(1, 3, 512, 512, 64, (7, 7))
    address = direct_fprop(x, weight, _geometry(2, 3)).data_ptr()
    assert direct_fprop(x, weight, _geometry(2, 3)).data_ptr() == address
    assert empty_nhwc((1, 64, 256, 256), x).data_ptr() == address

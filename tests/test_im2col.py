"""Gradients by im2col: the native ops on each instruction set, and the choice to use them."""

from __future__ import annotations

import math

import needs
import pytest
import torch
import torch.nn.functional as F
from convolutions import assert_close, assert_criterion, assert_same_on_any_threads, calls_of

from resfast.backends.im2col import im2col_dgrad, im2col_wgrad, is_gathered
from resfast.backends.interface import ConvGeometry, nhwc

pytestmark = needs.native_library
ops = torch.ops.resfast


def _geometry(stride, padding):
    return ConvGeometry((stride, stride), (padding, padding), (1, 1), 1)


def _problem(n, c, h, w, k, kernel, g, seed=0):
    """Activations as after a ReLU, He-scaled weights, a gradient; float32, channels_last."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return nhwc(torch.randn(shape, generator=generator))

    x, weight = normal(n, c, h, w).relu(), normal(k, c, *kernel)
    weight *= math.sqrt(2 / weight[0].numel())
    return x, weight, normal(*F.conv2d(x, weight, None, *g).shape)


def _exact_x(dz, weight, x, g):
    return torch.nn.grad.conv2d_input(x.shape, weight, dz, g.stride, g.padding)


def _exact_weight(dz, x, weight, g):
    return torch.nn.grad.conv2d_weight(x, weight.shape, dz, g.stride, g.padding)


@pytest.mark.parametrize(
    ("c", "k", "size", "kernel", "stride"),
    [
        (64, 128, 28, 3, 2),
        (256, 256, 14, 3, 2),
        (512, 512, 14, 3, 2),
        (64, 256, 14, 1, 1),
        (1024, 256, 14, 1, 1),
        (256, 512, 28, 1, 2),
        (64, 32, 112, 1, 1),  # a sum over many pixels
    ],
)
def test_error_against_float64_is_that_of_stock(c, k, size, kernel, stride):
    """The design's float32 criterion, at the convolutions of a ResNet."""
    g = _geometry(stride, kernel // 2)
    x, weight, dz = _problem(4, c, size, size, k, (kernel, kernel), g)
    dx = im2col_dgrad(dz, x, weight, g)
    assert_criterion(dx, lambda dz, weight: _exact_x(dz, weight, x, g), dz, weight)
    dweight = im2col_wgrad(dz, x, weight, g)
    assert_criterion(dweight, lambda dz, x: _exact_weight(dz, x, weight, g), dz, x)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 0), (1, 3)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)], ids=str)
def test_every_window(kernel, padding, stride, isa):
    """Taps that meet no pixel, pixels that no tap meets, rows and columns left over."""
    g = ConvGeometry(stride, padding, (1, 1), 1)
    x, weight, dz = _problem(2, 16, 9, 8, 24, kernel, g)
    exact = [t.double() for t in (dz, x, weight)]
    assert_close(im2col_dgrad(dz, x, weight, g), _exact_x(exact[0], exact[2], x, g))
    assert_close(im2col_wgrad(dz, x, weight, g), _exact_weight(*exact, g))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 3, 3, 16),  # one pixel
        (1, 32, 4, 6, 5),  # channels of dz are any number
        (3, 80, 7, 7, 16),  # a panel that is not full
        (1, 16, 5, 5, 300),  # more than one chain of channels
        (2, 16, 57, 43, 16),  # blocks of pixels, and more than one chain of them
    ],
    ids=str,
)
def test_every_shape(shape, isa):
    g = _geometry(2, 1)
    x, weight, dz = _problem(*shape, (3, 3), g)
    exact = [t.double() for t in (dz, x, weight)]
    assert_close(im2col_dgrad(dz, x, weight, g), _exact_x(exact[0], exact[2], x, g))
    assert_close(im2col_wgrad(dz, x, weight, g), _exact_weight(*exact, g))


@pytest.mark.parametrize("c", [3, 7])
def test_the_weights_gradient_takes_windows_that_end_within_a_vector(c, isa):
    g = _geometry(2, 3)
    x, weight, dz = _problem(2, c, 20, 24, 10, (7, 7), g)
    exact = [t.double() for t in (dz, x, weight)]
    assert_close(im2col_wgrad(dz, x, weight, g), _exact_weight(*exact, g))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_and_their_gradient_in_any_layout(layout, kernel):
    g = _geometry(2, kernel // 2)
    x, weight, dz = _problem(2, 16, 6, 6, 32, (kernel, kernel), g)
    other = weight.contiguous(memory_format=layout)
    dweight = im2col_wgrad(dz, x, other, g)
    assert dweight.stride() == torch.empty_like(other).stride()
    assert torch.equal(dweight, im2col_wgrad(dz, x, weight, g))
    assert torch.equal(im2col_dgrad(dz, x, other, g), im2col_dgrad(dz, x, weight, g))


@pytest.mark.parametrize("shape", [(2, 32, 40, 40, 32), (1, 64, 5, 5, 256), (1, 256, 5, 5, 64)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_results_do_not_depend_on_the_number_of_threads(shape, kernel):
    """Many pixels and many panels of either side: each way of sharing the work out."""
    g = _geometry(2, kernel // 2)
    x, weight, dz = _problem(*shape, (kernel, kernel), g)
    assert_same_on_any_threads(
        lambda: [im2col_dgrad(dz, x, weight, g), im2col_wgrad(dz, x, weight, g)]
    )


def test_what_is_outside_of_the_image_is_not_read(isa):
    """Neighbours in memory of every image's border are not a number."""
    g = _geometry(2, 1)
    x, weight, dz = _problem(3, 16, 6, 6, 16, (3, 3), g)
    padded = nhwc(torch.full((5, 16, 6, 6), math.nan))
    padded[1:4] = x
    assert torch.equal(im2col_wgrad(dz, padded[1:4], weight, g), im2col_wgrad(dz, x, weight, g))
    around = nhwc(torch.full((5, *dz.shape[1:]), math.nan))
    around[1:4] = dz
    assert torch.equal(im2col_dgrad(around[1:4], x, weight, g), im2col_dgrad(dz, x, weight, g))


_GIVEN = {
    "dz": torch.zeros(1, 32, 4, 4),
    "x": torch.zeros(1, 16, 8, 8),
    "weight": torch.zeros(32, 16, 3, 3),
    "stride": (2, 2),
    "padding": (1, 1),
}
_BAD = [
    ({"dz": torch.zeros(1, 32, 4, 5)}, "dz must be"),
    ({"dz": torch.zeros(2, 32, 4, 4)}, "dz must be"),
    ({"dz": torch.zeros(1, 24, 4, 4)}, "must be \\[24, 16, R, S\\]"),
    ({"dz": torch.zeros(1, 32, 4, 4).double()}, "float32"),
    ({"dz": torch.zeros(1, 32, 4)}, "4-D"),
    ({"weight": torch.zeros(32, 8, 3, 3)}, "must be \\[32, 16, R, S\\]"),
    ({"weight": torch.zeros(32, 16, 3)}, "must be \\[32, 16, R, S\\]"),
    ({"weight": torch.zeros(32, 16, 3, 3).double()}, "float32"),
    ({"weight": torch.zeros(32, 16, 11, 3)}, "must fit into the padded"),
    ({"stride": (0, 2)}, "strides must be"),
    ({"stride": (2, 1)}, "dz must be"),
    ({"padding": (1, -1)}, "paddings must be"),
    ({"padding": (2, 1)}, "dz must be"),
]


def _memory(weight):
    columns = ops.panel_columns()
    k, c = weight.shape[:2]
    return torch.empty(k * weight.shape[2:].numel() * math.ceil(c / columns) * columns)


def _nhwc_where_4d(t):
    return nhwc(t) if t.dim() == 4 else t


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *_BAD,
        (
            {"x": torch.zeros(1, 5, 8, 8), "weight": torch.zeros(32, 5, 3, 3)},
            "multiple of",
        ),
        ({"packed": torch.zeros(7)}, "packed must be"),
    ],
    ids=str,
)
def test_bad_arguments_of_dgrad_raise_before_anything_is_written(change, words):
    given = _GIVEN | change
    dx = torch.full_like(nhwc(given["x"]), 7.0)
    packed = given.get("packed", _memory(given["weight"]))
    call = (_nhwc_where_4d(given["dz"]), given["weight"], *given["stride"], *given["padding"])
    with pytest.raises(RuntimeError, match=words):
        ops.im2col_dgrad(*call, packed, dx)
    assert (dx == 7).all()


@pytest.mark.parametrize(("change", "words"), _BAD, ids=str)
def test_bad_arguments_of_wgrad_raise_before_anything_is_written(change, words):
    given = _GIVEN | change
    dweight = torch.full_like(_nhwc_where_4d(given["weight"]), 7.0)
    call = (nhwc(given["x"]), _nhwc_where_4d(given["dz"]), *given["stride"], *given["padding"])
    with pytest.raises(RuntimeError, match=words):
        ops.im2col_wgrad(*call, dweight)
    assert (dweight == 7).all()


def test_the_weights_gradient_is_written_to_channels_last_memory():
    x, dz = nhwc(_GIVEN["x"]), nhwc(_GIVEN["dz"])
    with pytest.raises(RuntimeError, match="dweight must be dense channels_last"):
        ops.im2col_wgrad(x, dz, 2, 2, 1, 1, _GIVEN["weight"])


def test_outputs_share_no_memory_with_inputs():
    x, dz, weight = (nhwc(_GIVEN[name]) for name in ("x", "dz", "weight"))
    square = nhwc(torch.zeros(1, 16, 8, 8))
    filters = torch.zeros(16, 16, 1, 1)
    with pytest.raises(RuntimeError, match="dx overlaps the memory of dz"):
        ops.im2col_dgrad(square, filters, 1, 1, 0, 0, _memory(filters), square)
    packed = _memory(weight)
    inside = packed[: weight.numel()].view(32, 3, 3, 16).permute(0, 3, 1, 2)
    with pytest.raises(RuntimeError, match="packed overlaps the memory of weight"):
        ops.im2col_dgrad(dz, inside, 2, 2, 1, 1, packed, x)
    many = nhwc(torch.zeros(9, 32, 8, 8))
    inside = many.permute(0, 2, 3, 1).flatten()[: weight.numel()].view(32, 3, 3, 16)
    with pytest.raises(RuntimeError, match="dweight overlaps the memory of dz"):
        ops.im2col_wgrad(
            nhwc(torch.zeros(9, 16, 8, 8)), many, 1, 1, 1, 1, inside.permute(0, 3, 1, 2)
        )


def test_no_pixels_give_a_gradient_of_zero():
    dweight = torch.full((16, 16, 1, 1), 7.0)
    x = torch.zeros(0, 16, 4, 4)
    ops.im2col_wgrad(x, x, 1, 1, 0, 0, dweight)
    assert not dweight.any()


@pytest.mark.parametrize(
    ("weight", "geometry", "runs"),
    [
        ((64, 64, 3, 3), _geometry(2, 1), True),
        ((24, 64, 3, 3), _geometry(2, 1), True),
        ((64, 64, 1, 1), _geometry(1, 0), True),
        ((64, 64, 1, 1), _geometry(2, 0), True),
        ((64, 64, 3, 3), _geometry(1, 1), False),
        ((64, 64, 3, 3), _geometry(2, 1)._replace(dilation=(2, 2)), False),
        ((64, 32, 3, 3), _geometry(2, 1)._replace(groups=2), False),
        ((64, 3, 7, 7), _geometry(2, 3), False),
    ],
    ids=str,
)
def test_what_is_gathered(weight, geometry, runs):
    x = torch.empty(1, weight[1] * geometry.groups, 14, 14)
    assert is_gathered(x, torch.empty(weight), geometry) == runs
    assert not is_gathered(x.bfloat16(), torch.empty(weight).bfloat16(), geometry)
    assert not is_gathered(x[:0], torch.empty(weight), geometry)


def test_training_gathers_the_gradients_of_strided_convolutions(monkeypatch):
    """Through the public op."""
    from resfast.ops import ConvParams, NormParams, conv_bn_act

    called = calls_of(["im2col_dgrad", "im2col_wgrad"], monkeypatch)
    x, weight, _ = _problem(4, 32, 6, 6, 32, (3, 3), _geometry(2, 1))
    x.requires_grad_()
    weight.requires_grad_()
    norm = NormParams(torch.ones(32), torch.zeros(32), None, None, None, True)
    conv_bn_act(x, ConvParams(weight, None, (2, 2), (1, 1)), norm).sum().backward()
    assert called == ["im2col_dgrad", "im2col_wgrad"]

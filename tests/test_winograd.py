"""Winograd convolution: the native ops on each instruction set, and the choice to use them."""

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

from resfast.backends import backend, cpu
from resfast.backends.interface import ConvGeometry, empty_nhwc, nhwc
from resfast.backends.winograd import (
    winograd_dgrad,
    winograd_fprop,
    winograd_tile,
    winograd_weight,
    winograd_wgrad,
)
from resfast.ops import ConvParams, NormParams, conv_bn_act, residual_block

pytestmark = needs.native_library
ops = torch.ops.resfast
FORMS = [(2, 1), (4, 1), (2, 2)]  # of tiles: outputs a side, stride
PLAIN = ConvGeometry((1, 1), (1, 1), (1, 1), 1)


def _problem(n, c, h, w, k, seed=0):
    """Activations as after a ReLU, He-scaled filters, a gradient; float32, channels_last."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)

    return (
        normal(n, c, h, w).relu(),
        normal(k, c, 3, 3) * math.sqrt(2 / (9 * c)),
        normal(n, k, h, w),
    )


def _backward_x(dz, weight):
    shape = (dz.shape[0], weight.shape[1], *dz.shape[2:])
    return torch.nn.grad.conv2d_input(shape, weight, dz, padding=1)


def _backward_weight(dz, x):
    shape = (dz.shape[1], x.shape[1], 3, 3)
    return torch.nn.grad.conv2d_weight(x, shape, dz, padding=1)


@pytest.mark.parametrize(("tile", "stride"), FORMS)
@pytest.mark.parametrize("c", [16, 64, 128, 256, 512])
def test_error_against_float64_is_that_of_stock(tile, stride, c):
    """The design's float32 criterion, at every channel count of a ResNet, forward and backward."""
    x, weight, dz = _problem(8, c, 14 * stride, 14 * stride, 64)
    forward = winograd_fprop(x, weight, tile, stride)
    assert_criterion(forward, lambda a, w: F.conv2d(a, w, None, stride, 1), x, weight)
    if stride > 1:
        return
    x, weight, dz = _problem(8, 64, 14, 14, c)
    assert_criterion(winograd_dgrad(dz, weight, tile), _backward_x, dz, weight)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize(
    ("n", "c", "side"), [(16, 64, 28), (8, 128, 28), (8, 256, 14), (8, 512, 7), (16, 512, 7)]
)
def test_error_of_the_weights_gradient_is_that_of_stock(tile, n, c, side):
    """Over a ResNet's stages, from thousands of tiles of few channels to the reverse."""
    x, weight, dz = _problem(n, c, side, side, 64)
    assert_criterion(winograd_wgrad(dz, x, weight, tile), _backward_weight, dz, x)


@pytest.mark.parametrize(("tile", "stride"), FORMS)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 1, 1, 16),
        (2, 16, 3, 5, 48),
        (1, 32, 4, 4, 80),  # a panel that is not full
        (3, 64, 7, 7, 16),
        (1, 48, 9, 14, 64),
        (2, 80, 6, 1, 32),
    ],
    ids=str,
)
def test_every_shape_and_instruction_set(tile, stride, shape, isa):
    x, weight, dz = _problem(*shape)
    z, nchw = winograd_fprop(x, weight, tile, stride), weight.contiguous()
    assert_close(z, F.conv2d(x.double(), weight.double(), None, stride, 1))
    assert torch.equal(winograd_fprop(x, nchw, tile, stride), z)
    if stride > 1:
        return
    assert_close(winograd_dgrad(dz, weight, tile), _backward_x(dz.double(), weight.double()))
    dweight = winograd_wgrad(dz, x, weight, tile)
    assert_close(dweight, _backward_weight(dz.double(), x.double()))
    assert torch.equal(winograd_wgrad(dz, x, nchw, tile), dweight)


@pytest.mark.parametrize(("tile", "stride"), FORMS)
def test_blocks_of_tiles_join_seamlessly(tile, stride):
    """More tiles than one block of one thread; both ways to share out the work."""
    for c, side, n in ((16, 40, 6 * stride**2), (512, 10, 3)):
        x, weight, _ = _problem(n, c, side, side, c)
        exact = F.conv2d(x.double(), weight.double(), None, stride, 1)
        assert_close(winograd_fprop(x, weight, tile, stride), exact)
    if stride > 1:
        return
    x, weight, dz = _problem(8, 256, 24, 24, 16)  # several blocks of the weight's gradient
    exact = _backward_weight(dz.double(), x.double())
    assert_close(winograd_wgrad(dz, x, weight, tile), exact)


@pytest.mark.parametrize(
    ("n", "c", "side", "k"),
    [
        (6, 16, 40, 16),  # filters fit a cache: each thread takes tiles
        (3, 272, 7, 304),  # threads take panels, and make their filters a part at a time
        (9, 336, 14, 336),  # in two blocks of tiles
        (9, 336, 20, 336),  # many tiles: filters are made once
    ],
)
@pytest.mark.parametrize(("tile", "stride"), [(4, 1), (2, 2)])
def test_each_way_to_share_out_the_work(n, c, side, k, tile, stride, isa):
    """The same sums in the same order, whoever takes them, with filters kept or used once."""
    if isa == "scalar" and n == 9:
        n = 6  # slow, and as many blocks
    # filters of a stride are fewer: more channels for as many bytes
    x, weight, dz = _problem(n, c * stride, side, side, k)
    z = winograd_fprop(x, weight, tile, stride)
    assert_close(z, F.conv2d(x.double(), weight.double(), None, stride, 1))
    kept, filters = empty_nhwc(z.shape, z), winograd_weight(weight, tile, stride)
    ops.winograd_conv(x, filters, None, None, None, False, False, stride, kept)
    assert torch.equal(z, kept)
    if stride > 1:
        return
    exact = _backward_weight(dz.double(), x.double())
    assert_close(winograd_wgrad(dz, x, weight, 4), exact)


@pytest.mark.parametrize(("c", "k"), [(32, 16), (272, 304)])
def test_the_inputs_gradient_is_added_to_the_residual(c, k, isa):
    """In a thread's blocks of tiles, and in panels."""
    _, weight, dz = _problem(2, c, 9, 9, k)
    residual = torch.randn(2, c, 9, 9)
    alone = winograd_dgrad(dz, weight, 4)
    torch.testing.assert_close(winograd_dgrad(dz, weight, 4, residual), alone + residual)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_block_adds_the_shortcuts_gradient_in_the_last_convolution(kernel, monkeypatch):
    added = []
    original = cpu.CpuBackend.conv_dgrad_add

    def watched(self, dz, x, weight, g, residual):
        result = original(self, dz, x, weight, g, residual)
        added.append(result is not None)
        return result

    monkeypatch.setattr(cpu.CpuBackend, "conv_dgrad_add", watched)
    x, weight, _ = _problem(2, 32, 20, 20, 32)
    weight = weight[:, :, :kernel, :kernel].clone()
    x.requires_grad_()
    convs = [ConvParams(weight, None, (1, 1), (kernel // 2,) * 2)] * 2
    norms = [NormParams(*(torch.rand(32) + 0.5 for _ in range(4)), None, True) for _ in range(2)]
    residual_block(x, convs, norms).sum().backward()
    assert added == [True]


def test_no_kernel_adds_to_the_gradient_of_a_strided_convolution():
    x, weight, _ = _problem(2, 32, 56, 56, 32)
    g, dz = PLAIN._replace(stride=(2, 2)), nhwc(torch.randn(2, 32, 28, 28))
    assert cpu.CpuBackend().conv_dgrad_add(dz, x, weight, g, torch.zeros_like(x)) is None


@pytest.mark.parametrize(("c", "side"), [(32, 20), (256, 20), (288, 9)])
def test_results_do_not_depend_on_the_number_of_threads(c, side):
    x, weight, dz = _problem(4, c, side, side, c)
    assert_same_on_any_threads(
        lambda: [
            winograd_fprop(x, weight, 4),
            winograd_fprop(x, weight, 2, 2),
            winograd_wgrad(dz, x, weight, 4),
        ]
    )


@pytest.mark.parametrize("add_after_act", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("tile", "stride"), FORMS)
def test_epilogue(tile, stride, relu, add_after_act, isa):
    x, weight, residual = _problem(2, 16, 9, 9, 32)
    residual = nhwc(residual[:, :, ::stride, ::stride])
    scale, shift = torch.randn(32), torch.randn(32)
    z = winograd_fprop(x, weight, tile, stride)
    out = torch.empty_like(z)
    packed = winograd_weight(weight, tile, stride)
    ops.winograd_conv(x, packed, scale, shift, residual, relu, add_after_act, stride, out)
    u = z * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    u = u if add_after_act else u + residual
    u = u.relu() if relu else u
    u = u + residual if add_after_act else u
    torch.testing.assert_close(out, u, rtol=1e-5, atol=1e-5)
    in_place = residual.clone(memory_format=torch.preserve_format)
    ops.winograd_conv(x, packed, scale, shift, in_place, relu, add_after_act, stride, in_place)
    assert torch.equal(in_place, out)


def test_nan_and_infinity_stay(isa):
    x, weight, _ = _problem(1, 16, 8, 8, 16)
    x[0, 3, 2, 2] = math.nan
    out = torch.empty(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    ops.winograd_conv(x, winograd_weight(weight, 2), None, None, None, True, False, 1, out)
    assert out[0, :, 2, 2].isnan().all()
    assert out[0, :, 7, 7].isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(1, 16, 8, 8, dtype=torch.float64)}, "float32"),
        ({"x": torch.zeros(1, 16, 8)}, "4-D"),
        ({"x": torch.zeros(1, 32, 8, 8)}, "winograd_weight made for"),
        ({"x": torch.zeros(1, 18, 8, 8)}, "multiples of"),
        ({"packed": torch.zeros(36, 1, 16, 7)}, "winograd_weight made for"),
        ({"scale": torch.zeros(16)}, "come together"),
        ({"scale": torch.zeros(8), "shift": torch.zeros(8)}, "one value per channel"),
        ({"residual": torch.zeros(1, 16, 8, 9)}, "residual must have the shape"),
        ({"out": torch.zeros(1, 16, 9, 8)}, "out must be"),
        ({"stride": 3}, "stride must be 1 or 2"),
        ({"stride": 2}, "out must be"),
        ({"stride": 2, "out": torch.full((1, 16, 4, 4), 7.0)}, "winograd_weight made for"),
    ],
    ids=str,
)
def test_bad_arguments_raise_before_anything_is_written(change, words):
    _, weight, _ = _problem(1, 16, 8, 8, 16)
    last = {"memory_format": torch.channels_last}
    given = {
        "x": torch.zeros(1, 16, 8, 8),
        "packed": winograd_weight(weight, 4),
        "scale": None,
        "shift": None,
        "residual": None,
        "stride": 1,
        "out": torch.full((1, 16, 8, 8), 7.0),
    } | change
    given = {
        k: v.contiguous(**last)
        if k in ("x", "residual", "out") and isinstance(v, torch.Tensor) and v.dim() == 4
        else v
        for k, v in given.items()
    }
    before = given["out"].clone()
    call = [given[k] for k in ("x", "packed", "scale", "shift", "residual")]
    with pytest.raises(RuntimeError, match=words):
        ops.winograd_conv(*call, False, False, given["stride"], given["out"])
    assert torch.equal(given["out"], before)


def test_output_must_not_be_the_input():
    x, weight, _ = _problem(1, 16, 8, 8, 16)
    with pytest.raises(RuntimeError, match="overlaps"):
        ops.winograd_conv(x, winograd_weight(weight, 4), None, None, None, False, False, 1, x)


@pytest.mark.parametrize(
    ("weight", "tile", "stride", "words"),
    [
        (torch.zeros(16, 16, 3, 3), 3, 1, "tile must be 2 or 4"),
        (torch.zeros(16, 16, 3, 3), 4, 2, "tile must be 2 at stride 2"),
        (torch.zeros(16, 16, 3, 3), 2, 3, "stride must be 1 or 2"),
        (torch.zeros(16, 16, 5, 5), 4, 1, "weight must be"),
        (torch.zeros(16, 16, 3, 3).double(), 4, 1, "float32"),
        (torch.zeros(16, 32, 3, 3), 4, 1, "packed must be"),
        (torch.zeros(16, 16, 3, 3), 2, 2, "packed must be"),
    ],
)
def test_bad_weights_raise(weight, tile, stride, words):
    packed = torch.zeros(36, 1, 16, ops.panel_columns())
    with pytest.raises(RuntimeError, match=words):
        ops.winograd_weight(weight, tile, stride, packed)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_filters_of_any_number_of_channels(layout, isa):
    weight = torch.randn(32, 20, 3, 3).contiguous(memory_format=layout)
    more = F.pad(weight, (0, 0, 0, 0, 0, 12)).contiguous(memory_format=layout)
    assert torch.equal(winograd_weight(weight, 4), winograd_weight(more, 4)[:, :, :20])


@pytest.mark.parametrize(
    "strides", [(1, 16, 1, 1), (32, 32, 2, 2)], ids=["points overlap", "columns apart"]
)
def test_filters_lie_together_but_for_their_points(strides):
    columns = ops.panel_columns()
    shape, memory = (36, 1, 16, columns), torch.zeros(64 * 32 * columns)
    scaled = [*(s * columns for s in strides[:3]), strides[3]]
    with pytest.raises(RuntimeError, match="contiguous but for its points"):
        ops.winograd_weight(torch.zeros(16, 16, 3, 3), 4, 1, memory.as_strided(shape, scaled))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(1, 16, 8, 8).double()}, "float32"),
        ({"x": torch.zeros(1, 32, 8, 8)}, "weight must be"),
        ({"weight": torch.zeros(32, 16, 3, 3)}, "weight must be"),
        ({"weight": torch.zeros(16, 16, 1, 1)}, "weight must be"),
        ({"weight": torch.zeros(16, 16, 3, 3).double()}, "float32"),
        ({"tile": 3}, "tile must be"),
        ({"stride": 2}, "tile must be 2 at stride 2"),
        ({"stride": 2, "tile": 2}, "out must be"),
        ({"residual": nhwc(torch.zeros(1, 16, 8, 9))}, "residual must have the shape"),
        ({"out": torch.full((1, 16, 8, 9), 7.0)}, "out must be"),
    ],
    ids=str,
)
@pytest.mark.parametrize("transposed", [False, True])
def test_bad_arguments_of_a_convolution_run_once_raise(change, words, transposed):
    given = {
        "x": torch.zeros(1, 16, 8, 8),
        "weight": torch.zeros(16, 16, 3, 3),
        "residual": None,
        "tile": 4,
        "stride": 1,
        "out": torch.full((1, 16, 8, 8), 7.0),
    } | change
    out, rest = nhwc(given["out"]), [given[k] for k in ("residual", "tile", "stride")]
    with pytest.raises(RuntimeError, match=words):
        ops.winograd_conv_once(nhwc(given["x"]), given["weight"], transposed, *rest, out)
    assert (out == 7).all()
    x = nhwc(torch.zeros(1, 16, 8, 8))
    with pytest.raises(RuntimeError, match="out overlaps the memory of x"):
        ops.winograd_conv_once(x, torch.zeros(16, 16, 3, 3), transposed, None, 4, 1, x)


def test_bad_gradients_raise():
    x, _, dz = _problem(1, 16, 8, 8, 16)
    for given, words in (
        ((x, dz[:, :, :4], torch.zeros(16, 16, 3, 3)), "dz must be"),
        ((x, dz, torch.zeros(16, 16, 1, 1)), "dweight must be"),
        ((x, dz.double(), torch.zeros(16, 16, 3, 3)), "float32"),
        ((x[:, :5], dz, torch.zeros(16, 5, 3, 3)), "multiples of"),
    ):
        images, gradient, dweight = given
        with pytest.raises(RuntimeError, match=words):
            ops.winograd_wgrad(nhwc(images), nhwc(gradient), 4, dweight)


@pytest.mark.parametrize(
    ("x", "weight", "geometry", "tile"),
    [
        ((1, 64, 56, 56), (64, 64, 3, 3), PLAIN, 4),
        ((16, 512, 7, 7), (512, 512, 3, 3), PLAIN, 4),
        ((1, 512, 7, 7), (512, 512, 3, 3), PLAIN, 2),  # in 4 tiles: 38 MB of filters
        ((1, 512, 5, 5), (512, 512, 3, 3), PLAIN, None),  # in 9: 17 MB
        ((8, 64, 2, 2), (64, 64, 3, 3), PLAIN, None),
        ((1, 64, 56, 56), (64, 64, 3, 3), PLAIN._replace(stride=(2, 2)), 2),
        ((1, 64, 14, 14), (64, 64, 3, 3), PLAIN._replace(stride=(2, 2)), None),  # 16 tiles of 7×7
        ((1, 64, 56, 56), (64, 64, 3, 3), PLAIN._replace(stride=(2, 1)), None),
        ((1, 64, 56, 56), (64, 64, 3, 3), PLAIN._replace(stride=(3, 3)), None),
        ((1, 64, 56, 56), (64, 64, 3, 3), PLAIN._replace(padding=(0, 0)), None),
        ((1, 64, 56, 56), (64, 64, 3, 3), PLAIN._replace(dilation=(2, 2)), None),
        ((1, 64, 56, 56), (64, 32, 3, 3), PLAIN._replace(groups=2), None),
        ((1, 64, 56, 56), (64, 64, 1, 1), PLAIN, None),
        ((1, 24, 56, 56), (64, 24, 3, 3), PLAIN, None),
        ((1, 64, 56, 56), (24, 64, 3, 3), PLAIN, None),
        ((0, 64, 56, 56), (64, 64, 3, 3), PLAIN, None),
    ],
    ids=str,
)
def test_what_is_run_by_winograd(x, weight, geometry, tile):
    assert winograd_tile(torch.empty(x), torch.empty(weight), geometry) == tile
    assert winograd_tile(torch.empty(x).bfloat16(), torch.empty(weight), geometry) is None


@pytest.mark.parametrize("stride", [1, 2])
def test_prepared_filters_follow_weights_norm_and_instruction_set(stride, isa):
    x, weight, _ = _problem(2, 16, 16, 16, 16)
    assert_prepared_once_and_anew(x, weight, PLAIN._replace(stride=(stride, stride)))


@pytest.mark.parametrize(
    ("stride", "names"),
    [
        (1, ["winograd_fprop", "winograd_dgrad", "winograd_wgrad"]),
        (2, ["winograd_fprop", "im2col_dgrad", "im2col_wgrad"]),
    ],
)
def test_training_runs_winograd_forward_and_backward(stride, names, monkeypatch):
    """A convolution large enough for it, through the public op."""
    called = calls_of(names, monkeypatch)
    x, weight, _ = _problem(4, 32, 16, 16, 32)
    x.requires_grad_()
    weight.requires_grad_()
    norm = NormParams(torch.ones(32), torch.zeros(32), None, None, None, True)
    conv = ConvParams(weight, None, (stride, stride), (1, 1))
    conv_bn_act(x, conv, norm).sum().backward()
    assert called == names
    called.clear()
    with backend("eager"):
        conv_bn_act(x, conv, norm)
    assert called == []

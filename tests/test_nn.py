"""Layers and blocks against their own stock children, and what makes a layer run unfused.

Comparisons are in float64: there a ReLU never falls on the other side by rounding, so forward,
gradients and statistics agree to a few ulps times the length of the sums (1e-10 is generous).
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations

from resfast.nn import (
    BasicBlock,
    BlurPool2d,
    Bottleneck,
    ConvBNAct,
    DropPath,
    PreActBlock,
    PreActBottleneck,
    SqueezeExcite,
    conv_params,
    norm_params,
    run_bn_act,
    set_fused,
    unfused,
    unfused_reason,
)
from resfast.nn.blocks import projection

pytestmark = pytest.mark.usefixtures("one_thread")

RTOL = 1e-10


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norms with gammas of both signs and running statistics that are not 0 and 1."""
    torch.manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            if m.weight is not None:
                nn.init.normal_(m.weight, 1.0, 0.5)
                nn.init.normal_(m.bias)
            if m.running_mean is not None:
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2.0)
    return model


def step(model: nn.Module, *inputs: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Output, gradients and buffers after one forward and backward."""
    model.zero_grad()
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    torch.manual_seed(seed)
    y = model(*leaves)
    torch.manual_seed(seed + 1)
    y.backward(torch.randn(y.shape, dtype=y.dtype))
    result = {"y": y.detach()}
    result |= {f"dx{i}": t.grad for i, t in enumerate(leaves)}
    result |= {f"d {k}": p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return result | {k: b.clone() for k, b in model.named_buffers()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = RTOL) -> None:
    assert got.keys() == want.keys()
    for k in want:
        if want[k].is_floating_point():
            scale = max(float(want[k].abs().max()), 1.0)
            assert float((got[k] - want[k]).abs().max()) <= rtol * scale, k
        else:
            assert torch.equal(got[k], want[k]), k


def check_against_stock(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """One step of model and of its unfused twin, from the same state, agree."""
    stock = unfused(model)
    got = step(model, *inputs)
    assert_same(got, step(stock, *inputs))
    return got


def image(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ops_of(module) -> list[str]:
    return [row.op for row in module.plan()]


# ---- one layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("add_after_act", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_layer_equals_its_children(relu, residual, add_after_act, training):
    layer = ConvBNAct.make(5, 6, stride=2, bias=True, relu=relu, add_after_act=add_after_act)
    layer = randomise(layer).double().train(training)
    stock = unfused(layer)
    inputs = [image(3, 5, 9, 8)] + [image(3, 6, 5, 4, seed=8)] * residual
    assert ops_of(layer) == ["conv_bn_act"]
    assert ops_of(stock) == ["unfused"]
    got, want = step(layer, *inputs), step(stock, *inputs)
    assert_same(got, want)
    if training:
        assert int(got["bn.num_batches_tracked"]) == 1
        assert not torch.equal(got["bn.running_mean"], randomise(layer).bn.running_mean)


def test_layer_formula_in_both_orders():
    layer = randomise(ConvBNAct.make(2, 3)).double().eval()
    x, r = image(2, 2, 4, 4), image(2, 3, 4, 4)
    u = layer.bn(layer.conv(x))
    torch.testing.assert_close(layer(x, r), (u + r).relu())
    layer.add_after_act = True
    torch.testing.assert_close(layer(x, r), u.relu() + r)


@pytest.mark.parametrize("training", [True, False])
def test_bn_act_function(training):
    bn = randomise(nn.BatchNorm2d(4)).double().train(training)
    twin = copy.deepcopy(bn)
    x, r = image(3, 4, 5, 5), image(3, 4, 5, 5, seed=8)
    torch.testing.assert_close(run_bn_act(bn, x, r), (twin(x) + r).relu())
    torch.testing.assert_close(bn.running_var, twin.running_var)
    gelu = nn.GELU()
    torch.testing.assert_close(run_bn_act(bn, x, r, gelu), gelu(twin(x) + r))
    got = run_bn_act(bn, x, r, gelu, add_after_act=True)
    torch.testing.assert_close(got, gelu(twin(x)) + r)


@pytest.mark.parametrize("add_after_act", [False, True])
def test_another_activation_follows_a_fused_layer(add_after_act):
    layer = randomise(ConvBNAct.make(2, 3, add_after_act=add_after_act)).double()
    layer.relu = nn.SiLU()
    x, r = image(2, 2, 4, 4), image(2, 3, 4, 4)
    check_against_stock(layer, x, r)
    u = layer.bn(layer.conv(x))
    want = nn.functional.silu(u) + r if add_after_act else nn.functional.silu(u + r)
    torch.testing.assert_close(layer(x, r), want)


def test_output_is_channels_last():
    x = torch.randn(2, 8, 6, 6)
    for layer in (ConvBNAct.make(8, 8), BasicBlock(8, 8)):
        assert layer(x).is_contiguous(memory_format=torch.channels_last)


# ---- blocks

BLOCK_OPTIONS = {
    "plain": {},
    "memory_efficient": {"memory_efficient": True},
    "checkpoint": {"checkpoint": True},
    "groups": {"groups": 2, "base_width": 32},
    "dilation": {"dilation": 2, "first_dilation": 1},
    "v1": {"stride_position": "1x1"},
    "se": {"se": 4},
    "antialias": {"antialias": True},
    "drop_path": {"drop_path": 0.5},
}
WHOLE = {"plain", "memory_efficient", "checkpoint", "groups", "dilation", "v1"}


def make_block(kind: type, stride: int, shortcut: str = "conv", **options) -> nn.Module:
    planes = 8
    out = planes * kind.expansion
    c_in = out if stride == 1 else 6
    downsample = None
    if stride > 1:
        antialias = options.get("antialias", False)
        downsample = projection(c_in, out, stride, nn.BatchNorm2d, shortcut, antialias)
    return randomise(kind(c_in, planes, stride, downsample, **options)).double()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("option", BLOCK_OPTIONS)
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_block_equals_its_children(kind, option, stride):
    block = make_block(kind, stride, **BLOCK_OPTIONS[option])
    stock = unfused(block)
    x = image(4, block.conv1.in_channels, 9, 8)
    whole = option in WHOLE or (option == "antialias" and stride == 1)
    assert ops_of(block) == ["residual_block"] if whole else "residual_block" not in ops_of(block)
    assert set(ops_of(stock)) == {"unfused"}
    got = step(block, x)
    assert_same(got, step(stock, x))
    assert got["y"].shape[2:] == ((9, 8) if stride == 1 else (5, 4))
    assert int(block.bn1.num_batches_tracked) == 1
    block.eval(), stock.eval()
    if option == "drop_path":
        assert ops_of(block) == ["residual_block"]
    assert_same(step(block, x), step(stock, x))
    with torch.no_grad():
        torch.testing.assert_close(block(x), stock(x))


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_resnet_d_shortcut_feeds_the_block_op(kind):
    block = make_block(kind, 2, "d")
    assert ops_of(block) == ["residual_block"]
    assert "downsample.1" in block.plan()[0].children
    x = image(4, 6, 9, 7)
    check_against_stock(block, x)
    pooled = nn.functional.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(block.downsample[0](x), pooled)


def test_block_formula():
    block = make_block(Bottleneck, 2).eval()
    x = image(2, 6, 8, 8)
    y = block.bn1(block.conv1(x)).relu()
    y = block.bn2(block.conv2(y)).relu()
    y = block.bn3(block.conv3(y)) + block.downsample[1](block.downsample[0](x))
    torch.testing.assert_close(block(x), y.relu())


def test_stride_positions():
    assert make_block(Bottleneck, 2).conv2.stride == (2, 2)
    v1 = make_block(Bottleneck, 2, stride_position="1x1")
    assert (v1.conv1.stride, v1.conv2.stride) == ((2, 2), (1, 1))


@pytest.mark.parametrize("stride_position", ["3x3", "1x1"])
def test_blur_replaces_the_stride_where_it_was(stride_position):
    block = make_block(Bottleneck, 2, antialias=True, stride_position=stride_position).eval()
    x = image(2, 6, 8, 9)
    y = block.bn1(block.conv1(x)).relu()
    y = block.blur(y) if stride_position == "1x1" else y
    y = block.bn2(block.conv2(y)).relu()
    y = block.blur(y) if stride_position == "3x3" else y
    y = block.bn3(block.conv3(y)) + block.downsample(x)
    torch.testing.assert_close(block(x), y.relu())
    assert type(block.downsample[0]) is BlurPool2d


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("preact", [True, False])
@pytest.mark.parametrize("kind", [PreActBlock, PreActBottleneck])
def test_preact_block_equals_its_children(kind, preact, training):
    out = 4 * kind.expansion
    block = kind(6, 4, 2, nn.Conv2d(6, out, 1, 2, bias=False), preact=preact)
    block = randomise(block).double().train(training)
    x = image(3, 6, 8, 7)
    assert ops_of(block) == ["bn_act"] * preact + ["conv_bn_act"] * (1 + (kind is not PreActBlock))
    check_against_stock(block, x)
    # full pre-activation: the projection sees the activated input, the sum is not activated
    a = block.bn1(x).relu() if preact else x
    y = block.bn2(block.conv1(a)).relu()
    y = block.conv2(y)
    if kind is PreActBottleneck:
        y = block.conv3(block.bn3(y).relu())
    torch.testing.assert_close(block(x), y + block.downsample(a))
    assert float(block(x).detach().min()) < 0


def test_preact_identity_shortcut_is_the_raw_input():
    block = randomise(PreActBlock(4, 4)).double().eval()
    x = image(2, 4, 5, 5)
    nn.init.zeros_(block.conv2.weight)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "make", [lambda **k: BasicBlock(4, 4, **k), lambda **k: PreActBlock(4, 4, **k)]
)
def test_checkpoint_changes_nothing_and_counts_once(make, fused):
    plain = set_fused(randomise(make()).double(), fused)
    checkpointed = make(checkpoint=True).double()
    checkpointed.load_state_dict(plain.state_dict())
    set_fused(checkpointed, fused)
    x = image(2, 4, 6, 6)
    got, want = step(checkpointed, x), step(plain, x)
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert int(got["bn2.num_batches_tracked"]) == 1


# ---- what unfuses


def with_padding(padding, kernel_size=3, **kw):
    return nn.Conv2d(4, 4, kernel_size, padding=padding, **kw)


UNFUSED = {
    "GroupNorm": lambda: (nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)),
    "Identity": lambda: (nn.Identity(), nn.BatchNorm2d(4)),
    "ConvTranspose2d": lambda: (nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)),
    "Parametrized": lambda: (
        parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
        nn.BatchNorm2d(4),
    ),
    "padding_mode": lambda: (with_padding(1, padding_mode="circular"), nn.BatchNorm2d(4)),
    "one-sided": lambda: (with_padding("same", 2), nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("word", UNFUSED)
def test_unfused_children_still_work(word):
    conv, bn = UNFUSED[word]()
    assert word in unfused_reason(conv, bn)
    layer = randomise(ConvBNAct(conv, bn)).double()
    assert layer.plan()[0].op == "unfused"
    assert word in layer.plan()[0].reason
    x = image(2, 4, 6, 6)
    torch.testing.assert_close(layer(x), copy.deepcopy(bn)(conv(x)).relu())


def test_a_replaced_forward_unfuses():
    layer = ConvBNAct.make(4, 4)
    layer.bn.forward = lambda x: x
    assert "forward" in layer.plan()[0].reason
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(layer(x), layer.conv(x).relu())


@pytest.mark.parametrize(
    ("padding", "kernel_size", "want"),
    [("valid", 3, (0, 0)), ("same", (3, 5), (1, 2)), (2, 3, (2, 2)), ("same", 1, (0, 0))],
)
def test_padding_names_are_resolved(padding, kernel_size, want):
    conv, bn = with_padding(padding, kernel_size), nn.BatchNorm2d(4)
    assert unfused_reason(conv, bn) is None
    assert conv_params(conv).padding == want
    layer = ConvBNAct(conv, bn).double()
    x = image(2, 4, 9, 9)
    check_against_stock(layer, x)


def register(kind: str, module: nn.Module, calls: list) -> None:
    def note(*args):
        calls.append(kind)

    getattr(module, f"register_{kind}")(note)


HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize("child", ["conv1", "bn1", "conv2", "bn2", "relu", "downsample"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hook_on_a_child_fires_and_unfuses(kind, child):
    block = make_block(BasicBlock, 2)
    want = step(unfused(block), x := image(2, 6, 6, 6))
    calls: list = []
    register(kind, block.get_submodule(child), calls)
    rows = block.plan()
    assert all(row.op != "residual_block" for row in rows)
    assert any("hook" in row.reason for row in rows)
    others = [row for row in rows if not any(c.startswith(child) for c in row.children)]
    assert all(row.op == "conv_bn_act" for row in others), rows
    assert_same(step(block, x), want)
    assert calls == [kind] * (2 if child == "relu" else 1)


def test_hook_on_a_shortcut_child_fires():
    for index in range(3):
        block = make_block(BasicBlock, 2, "d")
        want = step(unfused(block), x := image(2, 6, 6, 6))
        calls: list = []
        register("forward_hook", block.downsample[index], calls)
        # the pool is called as a module in any case
        assert (ops_of(block) == ["residual_block"]) == (index == 0)
        assert_same(step(block, x), want)
        assert len(calls) == 1


def test_global_hook_sees_every_child():
    block, seen = make_block(BasicBlock, 2), []
    handle = global_hooks.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        assert {row.op for row in block.plan()} == {"unfused"}
        block(image(2, 6, 6, 6))
    finally:
        handle.remove()
    assert {block.conv1, block.bn1, block.conv2, block.bn2, *block.downsample} <= set(seen)
    assert ops_of(block) == ["residual_block"]


def test_hook_removed_fuses_again():
    block = make_block(BasicBlock, 1)
    handle = block.bn1.register_forward_hook(lambda *a: None)
    assert ops_of(block) == ["conv_bn_act", "unfused"][::-1]
    handle.remove()
    assert ops_of(block) == ["residual_block"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda b: setattr(b, "conv1", nn.Conv2d(8, 8, 3, padding=1)), "bias"),
        (lambda b: setattr(b, "bn1", nn.BatchNorm2d(8, affine=False)), "affine"),
        (lambda b: setattr(b, "bn2", nn.BatchNorm2d(8, track_running_stats=False)), "running"),
        (lambda b: setattr(b, "relu", nn.GELU()), "GELU"),
        (lambda b: setattr(b, "downsample", nn.Identity()), "Identity"),
        (lambda b: setattr(b, "downsample", nn.Sequential(nn.Conv2d(8, 8, 1))), "1 layers"),
        (lambda b: set_fused(b, False), "switched off"),
    ],
)
def test_block_falls_to_layers_with_a_reason(change, word):
    block = make_block(BasicBlock, 1)
    change(block)
    block = block.double()
    rows = block.plan()
    assert all(row.op != "residual_block" for row in rows)
    assert any(word in row.reason for row in rows), rows
    x = image(2, 8, 6, 6)
    check_against_stock(block, x)


def test_an_uneven_convolution_in_a_block():
    block = make_block(BasicBlock, 1)
    block.conv1 = nn.Conv2d(8, 8, (1, 5), padding=(0, 2), bias=False).double()
    assert ops_of(block) == ["residual_block"]
    x = image(2, 8, 6, 7)
    check_against_stock(block, x)


def test_sync_batch_norm_conversion_keeps_the_activation():
    block = make_block(BasicBlock, 2)
    x = image(4, 6, 6, 6)
    want = step(copy.deepcopy(block), x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(block)
    assert type(converted.bn1) is nn.SyncBatchNorm
    assert ops_of(converted) == ["residual_block"]  # without a process group: as BatchNorm2d
    got = step(converted, x)
    assert_same(got, want)
    assert float(got["y"].min()) == 0


# ---- norms in every mode


def test_frozen_norm_inside_a_training_block():
    block = make_block(Bottleneck, 2)
    block.bn2.eval()
    block.bn2.weight.requires_grad_(False)
    before = block.bn2.running_mean.clone()
    x = image(4, 6, 8, 8)
    assert ops_of(block) == ["residual_block"]
    got = check_against_stock(block, x)
    assert torch.equal(block.bn2.running_mean, before)
    assert int(block.bn2.num_batches_tracked) == 0
    assert int(block.bn1.num_batches_tracked) == 1
    assert "d bn2.weight" not in got
    assert "d bn2.bias" in got


def test_track_running_stats_switched_off_later():
    layer = randomise(ConvBNAct.make(4, 4)).double()
    layer.bn.track_running_stats = False
    assert norm_params(layer.bn).running_mean is None
    x = image(2, 4, 5, 5)
    got = check_against_stock(layer, x)
    assert int(got["bn.num_batches_tracked"]) == 0
    layer.eval()  # buffers are there: they are used
    assert norm_params(layer.bn).training is False
    check_against_stock(layer, x)


def test_cumulative_average_over_steps():
    block = make_block(BasicBlock, 1)
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    stock = unfused(block)
    for seed in range(3):
        x = image(2, 8, 5, 5, seed=seed)
        assert_same(step(block, x), step(stock, x))


# ---- living with the rest of PyTorch


def test_autocast_like_stock():
    block = make_block(Bottleneck, 2).float()
    x = image(4, 6, 8, 8).float()
    exact = step(unfused(block).double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = step(unfused(block), x)
        got = step(block, x)
    assert got["y"].dtype == stock["y"].dtype == torch.bfloat16
    assert got["d conv1.weight"].dtype == torch.float32
    for k in ("y", "dx0", "d conv2.weight", "d bn2.weight", "bn3.running_var"):
        error, limit = ((t[k].double() - exact[k]).norm() for t in (got, stock))
        # one draw of a few hundred roundings each: not the 1.1 of a measured ratio
        assert error <= 1.5 * limit, k


def test_copies_and_pickles():
    block = make_block(Bottleneck, 2)
    x = image(2, 6, 8, 8)
    copies = copy.deepcopy(block), pickle.loads(pickle.dumps(block))
    want = step(block, x)
    for other in copies:
        assert_same(step(other, x), want, rtol=0)


def test_unfused_leaves_the_original_alone():
    block = make_block(BasicBlock, 1)
    twin = unfused(block)
    assert ops_of(block) == ["residual_block"]
    assert twin.conv1.weight is not block.conv1.weight
    assert set_fused(twin, True) is twin
    assert ops_of(twin) == ["residual_block"]


def test_fx_traces_the_stock_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = make_block(Bottleneck, 2, "d", se=4, antialias=True).eval()

        def forward(self, x):
            return self.block(x)

    net = Net()
    # resfast's modules are not leaves: their stock children are
    graph = torch.fx.symbolic_trace(net)
    called = {n.target for n in graph.graph.nodes if n.op == "call_module"}
    assert {"block.conv1", "block.bn3", "block.downsample.0"} <= called
    x = image(2, 6, 8, 8)
    torch.testing.assert_close(graph(x), net(x))


def test_plain_attribute_parameters():
    """nn.DataParallel's replicas hold parameters as plain attributes."""
    block = make_block(BasicBlock, 1)
    want = block(x := image(2, 8, 5, 5)).detach()
    for m in block.modules():
        for table in (m._parameters, m._buffers):
            for name in list(table):
                object.__setattr__(m, name, table.pop(name))
    assert ops_of(block) == ["residual_block"]
    torch.testing.assert_close(block(x), want)


# ---- the small layers


def test_squeeze_excite_formula():
    se = SqueezeExcite(32, 2).double()
    x = image(2, 32, 3, 4)
    s = x.mean((2, 3))
    s = (s @ se.fc1.weight.flatten(1).T + se.fc1.bias).relu()
    s = (s @ se.fc2.weight.flatten(1).T + se.fc2.bias).sigmoid()
    torch.testing.assert_close(se(x), x * s[:, :, None, None])
    assert SqueezeExcite(32, 16).fc1.out_channels == 8


@pytest.mark.parametrize("size", [(7, 8), (1, 1), (1, 5), (2, 2)])
def test_blur_pool(size):
    blur = BlurPool2d(3).double()
    out = blur(torch.full((2, 3, *size), 5.0, dtype=torch.float64))
    assert out.shape == (2, 3, (size[0] + 1) // 2, (size[1] + 1) // 2)
    torch.testing.assert_close(out, torch.full_like(out, 5.0))
    assert not blur.state_dict()
    checkerboard = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).double()
    inner = blur(checkerboard.expand(1, 3, 8, 8))
    torch.testing.assert_close(inner, torch.full_like(inner, 0.5))


def test_drop_path_drops_samples_and_keeps_the_mean():
    drop = DropPath(0.25)
    torch.manual_seed(0)
    y = drop(torch.ones(4000, 2, 1, 1)).flatten(1)
    assert torch.equal(y[:, 0], y[:, 1])
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    # 4 standard deviations of a mean of 4000 draws
    assert abs(float(y.mean()) - 1) < 4 * (0.25 / 0.75 / 4000) ** 0.5
    x = torch.randn(2, 2, 1, 1)
    assert drop.eval()(x) is x


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: DropPath(1.0), "drop"),
        (lambda: DropPath(-0.1), "drop"),
        (lambda: SqueezeExcite(8, 0), "reduction"),
        (lambda: Bottleneck(8, 2, stride_position="5x5"), "stride_position"),
        (lambda: BasicBlock(8, 8, stride_position="conv"), "stride_position"),
    ],
)
def test_bad_arguments(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_errors_are_stock_errors():
    block = BasicBlock(8, 8)
    with pytest.raises(RuntimeError, match="channels"):
        block(torch.randn(2, 6, 5, 5))
    with pytest.raises(ValueError, match="4D"):
        block(torch.randn(8, 5, 5))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 8, 1, 1))
    with pytest.raises(RuntimeError, match="size"):
        Bottleneck(8, 4)(torch.randn(2, 8, 5, 5))
    assert int(block.bn1.num_batches_tracked) == 0

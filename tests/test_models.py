"""The model families: torchvision's state dicts, weights and numbers, every option, every tool."""

from __future__ import annotations

import copy
import io
import math
import pickle
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_step import (
    SINGLE_FACTOR,
    SINGLE_FLOOR,
    assert_same,
    assert_training_error,
    images,
    randomise,
    relative,
    step,
    stock_runs,
)
from torch import Tensor, nn

import resfast.models as models
from resfast.models import PreActResNet, ResNet, SimpleResNet, create_model, list_models
from resfast.nn import BasicBlock, Bottleneck, PreActBlock, PreActBottleneck, unfused

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


@pytest.fixture(scope="module")
def tv():
    return pytest.importorskip("torchvision.models", reason="torchvision is the reference")


# ---- torchvision's twin


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_is_torchvisions(tv, name):
    with torch.device("meta"):
        ours, theirs = create_model(name), getattr(tv, name)()
    shapes = [(k, v.shape, v.dtype) for k, v in ours.state_dict().items()]
    assert shapes == [(k, v.shape, v.dtype) for k, v in theirs.state_dict().items()]
    strides = [m.stride for m in ours.modules() if isinstance(m, nn.Conv2d)]
    assert strides == [m.stride for m in theirs.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_same_seed_same_weights_and_strict_loads(tv, name):
    torch.manual_seed(0)
    ours = create_model(name, num_classes=10, zero_init_residual=name == "resnet50")
    after = torch.rand(1)
    torch.manual_seed(0)
    theirs = getattr(tv, name)(num_classes=10, zero_init_residual=name == "resnet50")
    assert torch.equal(after, torch.rand(1))
    for k, v in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[k], v), k
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_dilated_state_and_geometry_are_torchvisions(tv):
    options = {"replace_stride_with_dilation": [False, True, True], "num_classes": 2}
    with torch.device("meta"):
        ours, theirs = create_model("resnet50", **options), tv.resnet50(**options)
    convs = [
        [(m.stride, m.padding, m.dilation) for m in net.modules() if isinstance(m, nn.Conv2d)]
        for net in (ours, theirs)
    ]
    assert convs[0] == convs[1]


def pair(tv, name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    theirs = randomise(getattr(tv, name)(num_classes=10))
    ours = create_model(name, num_classes=10)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_float64_step_is_torchvisions(tv, name):
    ours, theirs = (m.double() for m in pair(tv, name))
    x = images(2, 3, 40, 40, dtype=torch.float64)
    assert_same(step(ours, x), step(theirs, x))
    assert int(ours.layer4[0].downsample[1].num_batches_tracked) == 1
    ours.eval(), theirs.eval()
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-10
    assert relative(ours(x), theirs(x)) < 1e-10


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_float32_eval_error(tv, name):
    """On the last feature map: ten logits are too few to compare errors by."""
    ours, theirs = (m.eval() for m in pair(tv, name))
    features = nn.Sequential(*list(theirs.children())[:-2])
    exact = copy.deepcopy(features).double()
    with torch.no_grad():
        for seed in range(5):
            x = images(2, 3, 40, 40, seed=seed)
            want = exact(x.double())
            stock = stock_runs(features, x, lambda m, x: m(x))
            worst = max(relative(y, want) for y in stock)
            limit = max(SINGLE_FACTOR * worst, SINGLE_FLOOR)
            assert relative(ours.forward_features(x), want) <= limit


def test_float32_training_error(tv):
    ours, theirs = pair(tv, "resnet18")
    assert_training_error(ours, theirs, [images(2, 3, 40, 40, seed=i) for i in range(5)], depth=18)


def test_timm_resnet_d_and_its_numbers():
    timm = pytest.importorskip("timm", reason="timm is the reference for ResNet-D")
    theirs = randomise(timm.create_model("resnet50d", num_classes=10)).double().eval()
    ours = models.resnet50(num_classes=10, stem="deep", shortcut="d").double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(1, 3, 65, 63, dtype=torch.float64)
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-10


# ---- options


def small(block: type = BasicBlock, **options) -> ResNet:
    torch.manual_seed(0)
    return ResNet(block, [1, 1, 1, 1], 5, **options)


OPTIONS = {
    "default": {},
    "bottleneck": {"block": Bottleneck},
    "zero_init": {"zero_init_residual": True},
    "groups": {"block": Bottleneck, "groups": 4, "width_per_group": 8},
    "wide_basic": {"width_per_group": 96},
    "dilated": {"replace_stride_with_dilation": [False, True, True]},
    "in_channels": {"in_channels": 1},
    "cifar": {"stem": "cifar", "output_stride": 16},
    "deep": {"stem": "deep"},
    "v1": {"block": Bottleneck, "stride_position": "1x1"},
    "d": {"block": Bottleneck, "shortcut": "d"},
    "se": {"se": 8},
    "antialias": {"antialias": True},
    "everything": {
        "block": Bottleneck,
        "se": True,
        "antialias": True,
        "shortcut": "d",
        "stem": "deep",
        "drop_path": 0.3,
        "output_stride": 16,
        "checkpoint": True,
        "memory_efficient": True,
    },
    "drop_path": {"drop_path": 0.5},
    "output_stride": {"output_stride": 8},
    "memory_efficient": {"block": Bottleneck, "memory_efficient": True},
    "checkpoint": {"checkpoint": True},
    "features_only": {"features_only": True},
    "group_norm": {"norm_layer": lambda c: nn.GroupNorm(8, c)},
    "no_affine": {"norm_layer": lambda c: nn.BatchNorm2d(c, affine=False)},
    "no_buffers": {"norm_layer": lambda c: nn.BatchNorm2d(c, track_running_stats=False)},
}


def check_against_stock(model: nn.Module, x: Tensor) -> None:
    """A step in training, then eval, equal the unfused twin's."""
    model = model.double()
    stock = unfused(model)
    assert_same(step(model, x), step(stock, x))
    with torch.no_grad():
        for p, q in zip(model.parameters(), stock.parameters(), strict=True):
            if p.grad is not None:
                p -= 0.1 * p.grad
                q.copy_(p)
    model.eval(), stock.eval()
    with torch.no_grad():
        got, want = model(x), stock(x)
    for a, b in zip(*((t if isinstance(t, list) else [t]) for t in (got, want)), strict=True):
        assert relative(a, b) < 1e-9


@pytest.mark.parametrize("option", OPTIONS)
def test_option_equals_its_unfused_twin(option):
    model = small(**OPTIONS[option])
    size = (12, 10) if option == "cifar" else (40, 36)
    check_against_stock(model, images(2, model_channels(model), *size, dtype=torch.float64))


def model_channels(model: nn.Module) -> int:
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels


@pytest.mark.parametrize("block", [PreActBlock, PreActBottleneck])
@pytest.mark.parametrize("options", [{}, {"stem": "cifar"}, {"drop_path": 0.4, "checkpoint": True}])
def test_preact_equals_its_unfused_twin(block, options):
    model = PreActResNet(block, [1, 2, 1, 1], 5, **options)
    size = (12, 10) if "stem" in options else (36, 40)
    check_against_stock(model, images(2, 3, *size, dtype=torch.float64))


def test_preact_formula():
    model = randomise(PreActResNet(PreActBlock, [1, 1, 1, 1], 3)).double().eval()
    x = images(2, 3, 48, 48, dtype=torch.float64)
    a = model.maxpool(model.bn1(model.conv1(x)).relu())
    for i, stage in enumerate((model.layer1, model.layer2, model.layer3, model.layer4)):
        (block,) = stage
        assert (block.bn1 is None) == (i == 0)
        pre = a if block.bn1 is None else block.bn1(a).relu()
        shortcut = a if block.downsample is None else block.downsample(pre)
        a = block.conv2(block.bn2(block.conv1(pre)).relu()) + shortcut
    a = model.bn2(a).relu()
    torch.testing.assert_close(model(x), model.fc(a.mean((2, 3))))


@pytest.mark.parametrize("channels", [1, 3])
def test_simple_resnet_equals_its_unfused_twin(channels):
    check_against_stock(
        SimpleResNet(channels, 4, 8), images(3, channels, 9, 8, dtype=torch.float64)
    )


def test_simple_resnet_formula():
    model = randomise(SimpleResNet(channels=8)).double().eval()
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))
    assert all(row.op == "conv_bn_act" for row in model.plan())
    x = images(2, 3, 8, 8, dtype=torch.float64)
    y = model.bn1(model.conv1(x)).relu()
    y = model.bn2(model.conv2(y)).relu() + model.shortcut(x)
    torch.testing.assert_close(model(x), model.fc(y.mean((2, 3))))
    assert model.conv1.out_channels == 8
    assert SimpleResNet().conv1.out_channels == 64


def test_zero_init_makes_blocks_shortcuts():
    model = small(Bottleneck, zero_init_residual=True)
    assert float(model.layer2[0].bn3.weight.detach().abs().max()) == 0
    assert float(model.layer2[0].bn2.weight.detach().min()) == 1


def test_drop_path_grows_linearly():
    model = ResNet(BasicBlock, [2, 1, 1, 1], 2, drop_path=0.4)
    blocks = [m for m in model.modules() if isinstance(m, BasicBlock)]
    assert [b.drop_path.p if b.drop_path else 0 for b in blocks] == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4]
    )


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize(
    ("block", "options"),
    [(BasicBlock, {}), (Bottleneck, {}), (Bottleneck, {"stride_position": "1x1"})],
)
def test_dilation_refines_the_strided_features(block, options, output_stride):
    """Every (32/output_stride)-th value of the dilated map is the strided network's."""
    torch.manual_seed(0)
    coarse = randomise(ResNet(block, [1, 1, 1, 2], 2, **options)).double().eval()
    fine = ResNet(block, [1, 1, 1, 2], 2, output_stride=output_stride, **options).double().eval()
    fine.load_state_dict(coarse.state_dict())
    x = images(1, 3, 64, 32, dtype=torch.float64)
    every = 32 // output_stride
    with torch.no_grad():
        a, b = coarse.forward_features(x), fine.forward_features(x)
    assert b.shape[2:] == (64 // output_stride, 32 // output_stride)
    assert relative(b[:, :, ::every, ::every], a) < 1e-10


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block": Bottleneck},
        {"stem": "cifar"},
        {"stem": "deep", "antialias": True},
        {"output_stride": 8},
        {"shortcut": "d", "antialias": True},
    ],
)
def test_feature_extraction(options):
    model = small(**options, features_only=True)
    assert not hasattr(model.fc, "weight")
    x = images(1, 3, 70, 59) if model.stem_reduction == 4 else images(1, 3, 35, 30)
    maps = model(x)
    assert [i.name for i in model.feature_info] == ["layer1", "layer2", "layer3", "layer4"]
    for t, info in zip(maps, model.feature_info, strict=True):
        # every stage rounds up
        size = tuple(math.ceil(n / info.reduction) for n in x.shape[2:])
        assert t.shape == (1, info.channels, *size)
        assert t.is_contiguous(memory_format=torch.channels_last)
    assert model.forward_features(x).shape == maps[-1].shape


def test_head_and_classifier():
    model = small()
    x = images(2, 3, 40, 40)
    model.eval()
    features = model.forward_features(x)
    torch.testing.assert_close(model(x), model.forward_head(features))
    assert model.num_features == 512
    model.double().reset_classifier(7)
    assert model.fc.weight.dtype == torch.float64
    assert model(x.double()).shape == (2, 7)
    model.reset_classifier(0)
    torch.testing.assert_close(
        model(x.double()), features.double().mean((2, 3)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("build", [small, lambda: PreActResNet(PreActBlock, [1, 1, 1, 1], 5)])
def test_any_memory_format_gives_the_same(build):
    model = build().eval()
    x = images(2, 3, 40, 40)
    want = model(x)
    for other in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().mT):
        assert torch.equal(model(other), want)


@pytest.mark.parametrize("build", [small, SimpleResNet])
def test_layers_are_given_channels_last(build):
    model = build()
    seen = []
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(images(2, 3, 40, 40))
    assert seen
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen)


@pytest.mark.parametrize("fused", [True, False])
def test_checkpoint_is_bitwise_and_counts_once(fused):
    plain, checkpointed = small(Bottleneck), small(Bottleneck, checkpoint=True)
    if not fused:
        plain, checkpointed = unfused(plain), unfused(checkpointed)
    x = images(2, 3, 40, 40)
    got, want = step(checkpointed, x), step(plain, x)
    for k in want:
        assert torch.equal(got[k], want[k]), k
    counts = {int(v) for k, v in got.items() if k.endswith("num_batches_tracked")}
    assert counts == {1}


def test_checkpoint_saves_less():
    def saved(model: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(images(2, 3, 64, 64))
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        del y
        return sum(n for k, n in sizes.items() if k not in parameters)

    def build(**options) -> nn.Module:
        return ResNet(Bottleneck, [2, 2, 2, 2], 5, **options)

    full, stock = saved(build()), saved(unfused(build()))
    assert full < 0.9 * stock
    assert saved(build(memory_efficient=True)) < 0.75 * full
    assert saved(build(checkpoint=True)) < 0.5 * full


# ---- plans


def test_plans():
    model = small(Bottleneck)
    for m in model.modules():
        if isinstance(m, Bottleneck):
            assert [row.op for row in m.plan()] == ["residual_block"]
    assert [row.op for row in model.plan()] == ["conv_bn_act_max_pool"]
    assert model.plan()[0].children == ("conv1", "bn1", "relu", "maxpool")
    model.eval()
    with torch.no_grad():
        assert [row.op for row in model.plan()] == ["conv_bn_act", "unfused"]
    assert {row.op for row in unfused(model).plan()} == {"unfused"}
    deep = small(stem="deep")
    assert [row.op for row in deep.plan()] == ["conv_bn_act", "conv_bn_act", "conv_bn_act_max_pool"]
    assert [row.op for row in small(stem="cifar").plan()] == ["conv_bn_act"]
    preact = PreActResNet(PreActBlock, [1, 1, 1, 1], 5)
    assert [row.op for row in preact.plan()] == ["conv_bn_act_max_pool", "bn_act"]


@pytest.mark.parametrize("child", ["conv1", "bn1", "relu", "maxpool", "avgpool", "fc", "layer1"])
def test_hooks_on_the_stem_and_head_fire(child):
    model = small().double()
    x = images(2, 3, 40, 40, dtype=torch.float64)
    want = step(unfused(model), x)
    calls = []
    model.get_submodule(child).register_forward_hook(lambda *a: calls.append(1))
    assert_same(step(model, x), want)
    assert calls == [1]
    if child in ("bn1", "relu", "maxpool"):
        assert not any("max_pool" in row.op for row in model.plan())


def test_children_run_in_order_are_the_backbone():
    """What torchvision's IntermediateLayerGetter relies on."""
    model = small(Bottleneck).eval()
    x = y = images(2, 3, 40, 40)
    for name, child in model.named_children():
        y = torch.flatten(y, 1) if name == "fc" else y
        y = child(y)
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)


# ---- tools of PyTorch


@pytest.mark.parametrize("training", [True, False])
def test_compile_without_graph_breaks(training):
    torch._dynamo.reset()
    model = models.resnet18(num_classes=5).train(training)
    twin = copy.deepcopy(model)
    x = images(2, 3, 40, 40)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if training:
        y = compiled(x)
        y.square().sum().backward()
        twin(x).square().sum().backward()
        grads = zip(model.parameters(), twin.parameters(), strict=True)
        assert max(relative(p.grad, q.grad) for p, q in grads) < 1e-3
        assert int(model.layer1[0].bn1.num_batches_tracked) == 1
    else:
        with torch.no_grad():
            assert relative(compiled(x), twin(x)) < 1e-5
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "build",
    [
        lambda: small(Bottleneck, checkpoint=True, se=8, drop_path=0.2),
        lambda: unfused(small(checkpoint=True)),
        lambda: PreActResNet(PreActBlock, [1, 1, 1, 1], 5),
        SimpleResNet,
    ],
)
def test_compile_the_other_models(build):
    torch._dynamo.reset()
    model = build()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(2, 3, 32, 32)
    torch.manual_seed(0)
    got = compiled(x)
    got.sum().backward()
    torch.manual_seed(0)
    assert relative(got, twin(x)) < 1e-4
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_export_holds_fused_ops():
    model = small(Bottleneck).eval()
    x = images(2, 3, 40, 40)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
        ops = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        assert any(op.startswith("resfast.") for op in ops), ops
        assert not any("batch_norm" in op for op in ops), ops
        other = images(5, 3, 40, 40)
        torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.parametrize(
    "build", [small, SimpleResNet, lambda: PreActResNet(PreActBottleneck, [1, 1, 1, 1], 5)]
)
def test_fx_sees_stock_layers(build):
    model = build().eval()
    graph = torch.fx.symbolic_trace(model)
    called = [n.target for n in graph.graph.nodes if n.op == "call_module"]
    assert {"conv1", "bn1"} <= set(called)
    x = images(2, 3, 40, 40)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        script = torch.jit.trace(model, x)
        torch.testing.assert_close(script(x), model(x), rtol=1e-4, atol=1e-5)
    assert not any("resfast::" in n.kind() for n in script.inlined_graph.nodes())


def test_functional_call():
    model = small(Bottleneck)
    scaled = {k: 1.1 * p for k, p in model.named_parameters()}
    x = images(2, 3, 40, 40)
    got = torch.func.functional_call(model, scaled, (x,))
    want = torch.func.functional_call(unfused(model), scaled, (x,))
    assert relative(got, want) < 1e-5
    assert relative(got, model(x)) > 1e-3


def test_func_transforms_run_stock_layers():
    model = small(Bottleneck).double().eval()
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    x = images(3, 3, 40, 40, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    model(x).square().sum().backward()
    assert relative(each["conv1.weight"].sum(0), model.conv1.weight.grad) < 1e-9


def test_copies_pickles_and_saved_modules():
    model = small(Bottleneck, se=8, stem="deep")
    x = images(2, 3, 40, 40)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    want = model(x)
    for other in copies:
        assert torch.equal(other(x), want)


def test_frozen_norms_in_a_training_model():
    model = small(Bottleneck).double()
    stock = unfused(model)
    for net in (model, stock):
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        for p in net.layer1.parameters():
            p.requires_grad_(False)
    x = images(2, 3, 40, 40, dtype=torch.float64)
    got = step(model, x)
    assert_same(got, step(stock, x))
    assert not any(k.startswith("d layer1") for k in got)
    assert {int(v) for k, v in got.items() if k.endswith("num_batches_tracked")} == {0}


def test_sync_batch_norm_conversion():
    model = small(Bottleneck).double()
    x = images(2, 3, 40, 40, dtype=torch.float64)
    want = step(unfused(model), x)
    assert_same(step(nn.SyncBatchNorm.convert_sync_batchnorm(model), x), want)


def test_default_device_and_dtype_are_followed():
    with torch.device("meta"):
        assert small(antialias=True).conv1.weight.is_meta
    torch.set_default_dtype(torch.float64)
    try:
        assert small(antialias=True)(images(2, 3, 40, 40, dtype=torch.float64)).shape == (2, 5)
    finally:
        torch.set_default_dtype(torch.float32)


def test_learns():
    torch.manual_seed(0)
    x, target = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
    model = SimpleResNet(num_classes=4, channels=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1


# ---- names, weights, errors


def test_registry():
    assert set(NAMES) <= set(list_models())
    assert len(list_models("preact_*")) == 5
    assert list_models() == sorted(list_models())
    assert isinstance(create_model("simple_resnet", channels=4), SimpleResNet)
    with pytest.raises(ValueError, match=r"resnet19.*resnet18"):
        create_model("resnet19")
    with torch.device("meta"):
        for name in list_models():
            assert sum(p.numel() for p in create_model(name).parameters()) > 1000


def test_hub_entry_points_are_the_registry():
    root = Path(__file__).resolve().parent.parent
    names = runpy.run_path(str(root / "hubconf.py"))
    assert sorted(k for k, v in names.items() if callable(v)) == list_models()
    model = torch.hub.load(str(root), "simple_resnet", source="local", channels=4)
    assert model.conv1.out_channels == 4
    model = torch.hub.load(str(root), "resnet18", source="local", num_classes=3)
    assert model.fc.out_features == 3


def test_weights_from_a_file(tmp_path):
    source = models.resnet18(num_classes=3)
    path = tmp_path / "weights.pt"
    torch.save(source.state_dict(), path)
    for form in (path, str(path)):
        loaded = models.resnet18(weights=form, num_classes=3)
        assert torch.equal(loaded.fc.weight, source.fc.weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        models.resnet18(weights=path)


def test_weights_from_an_enumeration():
    class Weights:
        # torchvision's members carry a plain dict, and the code under test asks for one
        meta = {"categories": ["a", "b", "c"]}  # noqa: RUF012

        def get_state_dict(self, progress):
            self.progress = progress
            return state

    state = models.resnet18(num_classes=3).state_dict()
    weights = Weights()
    model = models.resnet18(weights=weights, progress=False)
    assert torch.equal(model.fc.weight, state["fc.weight"])
    assert weights.progress is False


def test_weights_that_are_neither():
    with pytest.raises(FileNotFoundError, match=r"DEFAULT.*no weights"):
        models.resnet18(weights="DEFAULT")
    with pytest.raises(TypeError, match="bool"):
        models.resnet18(weights=True)
    with pytest.raises(TypeError):
        models.resnet18(True)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"layers": [1, 1, 1]}, "layers"),
        ({"layers": [1, 1, 0, 1]}, "layers"),
        ({"stem": "vgg"}, "stem"),
        ({"in_channels": 0}, "in_channels"),
        ({"num_classes": -1}, "num_classes"),
        ({"output_stride": 4}, "output_stride"),
        ({"output_stride": 16, "replace_stride_with_dilation": [0, 0, 1]}, "not both"),
        ({"replace_stride_with_dilation": [True]}, "3-element"),
        ({"stride_position": "2x2"}, "stride_position"),
        ({"shortcut": "e"}, "shortcut"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
)
def test_bad_options(options, word):
    with pytest.raises(ValueError, match=word):
        ResNet(BasicBlock, options.pop("layers", [1, 1, 1, 1]), **options)


def test_bad_calls():
    with pytest.raises(TypeError, match="block"):
        ResNet(PreActBlock, [1, 1, 1, 1])
    with pytest.raises(TypeError, match="block"):
        PreActResNet(BasicBlock, [1, 1, 1, 1])
    with pytest.raises(ValueError, match="channels"):
        SimpleResNet(channels=0)
    model = small()
    with pytest.raises(ValueError, match="4D"):
        model(torch.randn(3, 32, 32))
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.randn(2, 4, 32, 32))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 3, 32, 32))


# ---- blocks in a row as one op


def _hooked(model, calls):
    model.layer2[0].register_forward_hook(lambda *_: calls.append("block"))


def _hooked_child(model, calls):
    model.layer2[0].bn2.register_forward_hook(lambda *_: calls.append("child"))


def _hooked_stage(model, calls):
    model.layer2.register_forward_hook(lambda *_: calls.append("stage"))


def _checkpointed(model, calls):
    model.layer2[0].checkpoint = True


def _replaced(model, calls):
    model.layer2[0].bn1 = nn.GroupNorm(2, 128)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (None, [5]),
        (_hooked, [2, 2]),  # layer1 and what comes after the hooked block
        (_hooked_child, [2, 2]),
        (_hooked_stage, [2, 2]),
        (_checkpointed, [2, 2]),
        (_replaced, [2, 2]),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_rows_of_blocks_are_one_op_and_leave_out_what_is_not_plain(monkeypatch, change, rows):
    """Outputs and gradients are the same as block by block; hooks and checkpoints keep working."""
    import resfast.nn.blocks as module

    model = ResNet(BasicBlock, [2, 1, 1, 1], stem="cifar", num_classes=3)
    calls: list[str] = []
    if change is not None:
        change(model, calls)
    alone = copy.deepcopy(model)
    seen: list[int] = []
    original = module.residual_blocks

    def counted(x, blocks, **options):
        seen.append(len(blocks))
        return original(x, blocks, **options)

    monkeypatch.setattr(module, "residual_blocks", counted)
    x = torch.randn(2, 3, 16, 16)
    alone(x).square().sum().backward()
    assert seen == []
    once = list(calls)
    monkeypatch.setattr(module, "chains", lambda x: True)
    model(x).square().sum().backward()
    assert seen == rows
    assert calls == 2 * once
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(model.buffers(), alone.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    seen.clear()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model(x)
    if change is None:
        assert seen == [2, 1, 1, 1], "a row ends with its stage, where gradients are exchanged"

"""accelerate on the models of torchvision and timm: outputs, gradients, running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from converted import check, outputs
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
from torch import nn

import resfast
from resfast import accelerate

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- named models: the block classes of torchvision and timm, a block a stage


def _torchvision(block: str = "BasicBlock", **options) -> nn.Module:
    resnet = pytest.importorskip("torchvision.models.resnet")
    return resnet.ResNet(getattr(resnet, block), [2, 1, 1, 1], num_classes=5, **options)


def _timm(name: str, **options) -> nn.Module:
    timm = pytest.importorskip("timm")
    small = {"layers": [1, 1, 1, 1], "channels": (16, 24, 32, 40), "num_classes": 5}
    return timm.create_model(name, **{**small, **options})


def _backbone() -> nn.Module:
    _utils = pytest.importorskip("torchvision.models._utils")
    dilated = _torchvision("Bottleneck", replace_stride_with_dilation=[False, True, True])
    layers = {"layer3": "out", "layer2": "aux"}  # one stage less than usual, for speed
    return _utils.IntermediateLayerGetter(dilated, return_layers=layers)


def _deeplab() -> nn.Module:
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    head = segmentation.deeplabv3.DeepLabHead(1024, 3)
    return segmentation.DeepLabV3(_backbone(), head, segmentation.fcn.FCNHead(512, 3))


def _fcn() -> nn.Module:
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    return segmentation.FCN(_backbone(), segmentation.fcn.FCNHead(1024, 3))


def _fpn() -> nn.Module:
    detection = pytest.importorskip("torchvision.models.detection.backbone_utils")
    return detection.resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)


TORCHVISION = {
    "basic": lambda: _torchvision(),
    "bottleneck": lambda: _torchvision("Bottleneck"),
    "resnext": lambda: _torchvision("Bottleneck", groups=4, width_per_group=8),
    "wide": lambda: _torchvision("Bottleneck", width_per_group=96),
    "dilated": lambda: _torchvision("Bottleneck", replace_stride_with_dilation=[False, True, True]),
    "deeplabv3": _deeplab,
    "fcn": _fcn,
    "fpn-frozen": _fpn,
}
TIMM = {
    "resnet18": lambda: _timm("resnet18"),
    "resnet50": lambda: _timm("resnet50"),
    "resnet50d": lambda: _timm("resnet50d"),
    "resnet50t": lambda: _timm("resnet50t"),
    "resnext50_32x4d": lambda: _timm("resnext50_32x4d", cardinality=4),
    "seresnet50": lambda: _timm("seresnet50"),
    "ecaresnet50d": lambda: _timm("ecaresnet50d"),
    "resnetblur50": lambda: _timm("resnetblur50"),
    "resnet18-drop": lambda: _timm("resnet18", drop_path_rate=0.3, drop_block_rate=0.1),
}
NAMED = {f"torchvision-{k}": v for k, v in TORCHVISION.items()}
NAMED |= {f"timm-{k}": v for k, v in TIMM.items()}
# layers that become one op, per model: blocks, then single layers
EXPECTED = {
    "torchvision-basic": (5, 1),
    "torchvision-bottleneck": (5, 1),
    "torchvision-resnext": (5, 1),
    "torchvision-wide": (5, 1),
    "torchvision-dilated": (5, 1),
    "torchvision-deeplabv3": (4, 9),
    "torchvision-fcn": (4, 2),
    "torchvision-fpn-frozen": (8, 1),
    "timm-resnet18": (4, 1),
    "timm-resnet50": (4, 1),
    "timm-resnet50d": (4, 3),
    "timm-resnet50t": (4, 3),
    "timm-resnext50_32x4d": (4, 1),
    "timm-seresnet50": (0, 16),
    "timm-ecaresnet50d": (0, 18),
    "timm-resnetblur50": (1, 13),
    "timm-resnet18-drop": (1, 10),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = randomise(NAMED[name]())
    for m in model.modules():
        if type(m).__name__ == "FrozenBatchNorm2d":
            m.weight.normal_(1, 0.2), m.bias.normal_(0, 0.2)
            m.running_mean.normal_(0, 0.2), m.running_var.uniform_(0.5, 2)
            m.eps = 0.1  # large enough to be missed
        if isinstance(m, nn.Dropout):
            m.p = 0.0  # which elements it drops depends on the memory layout
    return model


@pytest.mark.parametrize("name", NAMED)
def test_named_model_is_the_same_in_float64(name):
    report = check(build(name), images(2, 3, 40, 36))
    blocks = sum(row.op == "residual_block" for row in report.fused)
    assert (blocks, len(report.fused) - blocks) == EXPECTED[name], str(report)


@pytest.mark.parametrize("name", NAMED)
def test_named_model_with_norms_in_eval_and_frozen_parameters(name):
    """Every other norm in eval, every third parameter without gradient, training otherwise."""
    model = build(name).double()
    x = images(2, 3, 40, 36, dtype=torch.float64)
    stock = copy.deepcopy(model)
    accelerate(model)
    for net in (model, stock):
        for i, m in enumerate(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            m.train(i % 2 == 0)
        for i, p in enumerate(net.parameters()):
            p.requires_grad_(p.requires_grad and i % 3 != 0)
    got, want = step(model, x), step(stock, x)
    assert_same(got, want)
    trainable = {f"d {k}" for k, p in stock.named_parameters() if p.requires_grad}
    assert {k for k in got if k.startswith("d ")} == trainable | {"d input"}


@pytest.mark.parametrize("name", ["timm-resnet50", "torchvision-fpn-frozen"])
def test_named_model_error_in_float32(name):
    """Error against float64 beside stock's own, in training and in evaluation."""
    theirs = build(name)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    batches = [images(2, 3, 40, 40, seed=seed) for seed in range(3)]
    assert_training_error(ours, theirs, batches, depth=18)
    ours.eval(), theirs.eval()
    exact = copy.deepcopy(theirs).double()
    for x in batches:
        want = outputs(exact, x.double())
        worst = max(relative(y, want) for y in stock_runs(theirs, x, outputs))
        assert relative(outputs(ours, x), want) <= max(SINGLE_FACTOR * worst, SINGLE_FLOOR)


def test_frozen_norms_under_autocast_return_what_stock_returns():
    """Their float32 buffers promote: fused, the features would be 16-bit."""
    stock = build("torchvision-fpn-frozen").body
    ours = copy.deepcopy(stock)
    accelerate(ours)
    x = images(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got, want = ours(x), stock(x)
    assert [t.dtype for t in got.values()] == [t.dtype for t in want.values()]
    for a, b in zip(got.values(), want.values(), strict=True):
        torch.testing.assert_close(a, b)
    assert all("autocast" in row.reason for row in _rows_under_autocast(ours, x))


def _rows_under_autocast(model: nn.Module, x: torch.Tensor) -> list:
    with torch.autocast("cpu", torch.bfloat16):
        return resfast.explain(model, x).rows

"""ONNX: exported models in ONNX Runtime, by both exporters, and without leaving a trace behind."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resfast.models import PreActResNet, ResNet, SimpleResNet
from resfast.nn import BasicBlock, Bottleneck, PreActBlock, unfused
from resfast.ops import conv_bn_act
from resfast.testing import FLOOR_ULPS, SINGLE_FACTOR

onnx = pytest.importorskip("onnx", reason="onnx is in the dev extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is in the dev extra")

pytestmark = pytest.mark.usefixtures("one_thread")
BUILDS = {
    "basic": lambda: ResNet(BasicBlock, [1, 1, 1, 1], 5, antialias=True),
    "bottleneck": lambda: ResNet(Bottleneck, [1, 1, 1, 1], 5, stem="deep", shortcut="d", se=8),
    "preact": lambda: PreActResNet(PreActBlock, [1, 1, 1, 1], 5),
    "simple": lambda: SimpleResNet(num_classes=5),
    "features": lambda: ResNet(BasicBlock, [1, 1, 1, 1], features_only=True),
}


def build(name: str) -> nn.Module:
    model = BUILDS[name]()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0, 0.2)
            nn.init.normal_(m.bias, 0.0, 0.2)
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2.0)
    return model.eval()


def export(model: nn.Module, path: Path, dynamo: bool) -> None:
    """What a user writes, with a dynamic batch."""
    x = torch.randn(2, 3, 40, 40)
    if dynamo:
        pytest.importorskip("onnxscript", reason="the new exporter needs onnxscript")
        batch = torch.export.Dim("batch", min=1)
        torch.onnx.export(model, (x,), path, dynamic_shapes={"x": {0: batch}}, verbose=False)
    else:
        torch.onnx.export(
            model, (x,), path, input_names=["x"], dynamic_axes={"x": {0: "batch"}}, dynamo=False
        )


def run(path: Path, x: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    return [torch.from_numpy(y) for y in session.run(None, {name: x.numpy()})]


def listed(y: Tensor | list[Tensor]) -> list[Tensor]:
    return y if isinstance(y, list) else [y]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("name", "dynamo"),
    [
        ("basic", True),
        ("bottleneck", True),
        ("bottleneck", False),
        ("preact", False),
        ("simple", True),
        ("features", False),
    ],
)
def test_onnx_runtime_agrees(tmp_path: Path, name, dynamo):
    """Against float64, beside the errors of PyTorch's own two ways through the same model."""
    model = build(name)
    export(model, tmp_path / "model.onnx", dynamo)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    exact, stock = copy.deepcopy(model).double(), unfused(model)
    for n in (2, 5):
        x = torch.randn(n, 3, 40, 40)
        with torch.no_grad():
            runs = zip(
                run(tmp_path / "model.onnx", x),
                *(listed(m(x)) for m in (model, stock)),
                listed(exact(x.double())),
                strict=True,
            )
        for got, ours, theirs, want in runs:
            errors = [float((y.double() - want).norm() / want.norm()) for y in (ours, theirs)]
            limit = max(*errors, FLOOR_ULPS * 2.0**-24)
            # logits are few: a factor 4 on one draw, as a transposed or lost layer is 10⁵ away
            assert float((got.double() - want).norm() / want.norm()) <= 4 * SINGLE_FACTOR * limit


def test_exporting_leaves_the_model_fused(tmp_path: Path, monkeypatch):
    model = build("simple")
    export(model, tmp_path / "model.onnx", dynamo=True)
    calls = []
    monkeypatch.setattr(
        "resfast.nn.fuse.conv_bn_act",
        lambda *args, **options: calls.append(1) or conv_bn_act(*args, **options),
    )
    with torch.no_grad():
        model(torch.randn(1, 3, 40, 40))
    assert calls

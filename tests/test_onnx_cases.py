"""ONNX's own cases of Conv and BatchNormalization, where one 2-d node, on resfast's ops.

Cases come from onnx's node tests and the models it ships that PyTorch once exported. Of another
rank they must raise ValueError. ONNX means one thing otherwise: the running variance takes the
biased variance of the batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resfast.ops import ConvParams, NormParams, bn_act, conv_bn_act

onnx = pytest.importorskip("onnx", reason="onnx is in the dev extra")
pytestmark = pytest.mark.usefixtures("one_thread")
NODES = ("Conv", "BatchNormalization")
NO_EPS = 2.0**-100  # an identity norm's: stock refuses 0


def node_cases() -> Iterator[tuple[str, Any, list, list]]:
    """(name, node, inputs, outputs) of onnx's generated node tests."""
    package = importlib.import_module("onnx.backend.test.case.node")
    for module in ("conv", "batch_normalization"):  # importing one makes its cases
        importlib.import_module(f"onnx.backend.test.case.node.{module}")
    for case in package._NodeTestCases:
        for i, (inputs, outputs) in enumerate(case.data_sets):
            (node,) = case.model.graph.node
            yield f"{case.name}-{i}", node, inputs, outputs


def shipped_cases() -> Iterator[tuple[str, Any, list, list]]:
    """The same of models on disk, whose parameters may be initializers."""

    def read(path: Path) -> Any:
        return onnx.numpy_helper.to_array(onnx.load_tensor(path))

    data = Path(onnx.__file__).parent / "backend/test/data"
    for path in sorted(data.glob("pytorch-*/*/model.onnx")):
        graph = onnx.load(path).graph
        if [n.op_type for n in graph.node] not in ([name] for name in NODES):
            continue
        (node,) = graph.node
        stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        fed = [i.name for i in graph.input if i.name not in stored]
        for folder in sorted(path.parent.glob("test_data_set_*")):
            values = [read(folder / f"input_{i}.pb") for i in range(len(list(folder.glob("in*"))))]
            named = {**stored, **dict(zip(fed, values, strict=False))}
            outputs = [read(folder / "output_0.pb")]
            yield f"{path.parent.name}-{folder.name}", node, [named[n] for n in node.input], outputs


CASES = {
    name: case for name, *case in [*node_cases(), *shipped_cases()] if case[0].op_type in NODES
}


def pads(x: Tensor, weight: Tensor, a: dict[str, Any]) -> list[int]:
    """[top, left, bottom, right]."""
    if a.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID"):
        return a.get("pads", [0, 0, 0, 0])
    begin, end = [], []
    for size, k, s, d in zip(
        x.shape[2:], weight.shape[2:], a["strides"], a["dilations"], strict=True
    ):
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        small, large = total // 2, total - total // 2
        begin.append(small if a["auto_pad"] == b"SAME_UPPER" else large)
        end.append(total - begin[-1])
    return begin + end


def conv(inputs: list[Tensor], a: dict[str, Any]) -> list[Tensor]:
    x, weight, *bias = inputs
    a = {"strides": [1, 1], "dilations": [1, 1], "group": 1, **a}
    padding = (0, 0)
    if x.dim() == 4:
        top, left, *rest = pads(x, weight, a)
        assert [top, left] == rest, "resfast pads both sides alike, and so do all cases"
        padding = (top, left)
    k = weight.shape[0]
    geometry = (tuple(a["strides"]), padding, tuple(a["dilations"]), a["group"])
    norm = NormParams(None, None, torch.zeros(k), torch.ones(k), eps=NO_EPS)
    return [conv_bn_act(x, ConvParams(weight, *(bias or [None]), *geometry), norm, relu=False)]


def batch_norm(inputs: list[Tensor], a: dict[str, Any]) -> list[Tensor]:
    x, weight, bias, mean, var = inputs
    training = bool(a.get("training_mode", 0))
    keep = a.get("momentum", 0.9)
    old = var.clone()
    norm = NormParams(weight, bias, mean, var, None, training, 1 - keep, a.get("epsilon", 1e-5))
    y = bn_act(x, norm, relu=False)
    if not training:
        return [y]
    n = x.numel() // x.shape[1]
    return [y, mean, keep * old + (var - keep * old) * (n - 1) / n]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", CASES)
def test_case(name, grad):
    node, inputs, outputs = CASES[name]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    tensors = [torch.tensor(v) for v in inputs]
    tensors[0].requires_grad_(grad)
    run = conv if node.op_type == "Conv" else batch_norm
    with torch.set_grad_enabled(grad):
        if tensors[0].dim() != 4:
            with pytest.raises(ValueError, match="expected 4D"):
                run(tensors, attributes)
            return
        got = run(tensors, attributes)
    for y, want in zip(got, outputs, strict=True):
        torch.testing.assert_close(y, torch.tensor(want), rtol=1e-3, atol=1e-7)  # onnx's own


def test_there_are_cases_of_every_kind():
    kinds = {(c[0].op_type, c[1][0].ndim) for c in CASES.values()}
    assert kinds >= {("Conv", 3), ("Conv", 4), ("Conv", 5), ("BatchNormalization", 4)}
    assert sum(c[1][0].ndim == 4 for c in CASES.values()) >= 20

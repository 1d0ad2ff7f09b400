"""`resfast gradflow`: gradient norms of plain and residual networks, table, numbers and picture."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

import resfast
from resfast.cli import main
from resfast.training.config import OptionError
from resfast.training.gradflow import _Plain, gradient_norms, measure
from resfast.training.model import SmallResNet

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def test_norms_are_those_of_the_3x3_convolutions_in_order():
    torch.manual_seed(0)
    model, x, labels = SmallResNet(1, 8, 1, 10), torch.randn(6, 1, 8, 8), torch.arange(6)
    norms = gradient_norms(model, x, labels)
    stock = resfast.unfused(model).train()
    F.cross_entropy(stock(x), labels).backward()
    blocks = list(stock.stages)
    weights = [stock.stem.conv.weight]
    weights += [w for b in blocks for w in (b.conv1.weight, b.conv2.weight)]
    assert norms == pytest.approx([float(w.grad.norm()) for w in weights], rel=1e-4)


def test_the_plain_twin_lacks_only_the_shortcuts():
    torch.manual_seed(0)
    residual = SmallResNet(1, 8, 1, 10).eval()
    plain, x = _Plain(residual).eval(), torch.randn(2, 1, 8, 8)
    y = residual.stem(x)
    for block in residual.stages:
        y = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(y))))))
    torch.testing.assert_close(plain(x), residual.fc(y.mean((2, 3))))
    assert {id(p) for p in plain.parameters()} <= {id(p) for p in residual.parameters()}


def test_deep_plain_networks_lose_balance_and_residual_ones_keep_it():
    rows = {(r["depth"], r["kind"]): r for r in measure([8, 56], "digits", 0, repeats=1)}
    assert len(rows[56, "plain"]["norms"]) == 55
    plain, residual = (rows[56, kind]["first_over_last"] for kind in ("plain", "residual"))
    assert plain > 10 * residual or plain < residual / 10
    assert rows[56, "plain"]["first_over_last"] != rows[8, "plain"]["first_over_last"]


def test_table_numbers_and_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "flow.png"
    assert main(["gradflow", "--depths", "8,14", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    record = json.loads(out.with_suffix(".json").read_text())
    assert [(r["depth"], r["kind"]) for r in record["rows"]] == [
        (8, "plain"),
        (8, "residual"),
        (14, "plain"),
        (14, "residual"),
    ]
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [["8", "plain"], ["14", "plain"]]


def test_what_cannot_be_drawn_is_named(tmp_path, capsys):
    with pytest.raises(OptionError, match="9 is not 6"):
        measure([9], "digits", 0)
    assert main(["gradflow", "--out", str(tmp_path / "flow.gif")]) == 2
    assert main(["gradflow", "--out", str(tmp_path / "no" / "flow.png")]) == 2
    assert "no such folder" in capsys.readouterr().err

"""bench/train_race.py: an epoch of each by turns, from the same weights, on the same batches."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from resfast.nn.fuse import Fusible
from resfast.training.loop import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "train_race.py"
OPTIONS = ["--data", "synthetic", "--image-size", "8", "--batch-size", "100", "--seed", "5"]


@pytest.fixture(scope="module")
def train_race():
    spec = importlib.util.spec_from_file_location("train_race", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_record_of_two_epochs(train_race, tmp_path, monkeypatch, capsys):
    fits, starts, seconds, batches = [], [], {}, {True: [], False: []}
    fit, batch = Trainer.fit, Trainer.batch

    def recorded_fit(trainer, until):
        fits.append((trainer.config.fused, until))
        fused = {module.fused for module in trainer.model.modules() if isinstance(module, Fusible)}
        assert fused == {trainer.config.fused}
        weights = (p for p in trainer.model.parameters() if p.dim() == 4)
        assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
        if until == 1:
            starts.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
        fit(trainer, until)
        seconds[trainer.config.fused] = trainer.seconds

    def recorded_batch(trainer, indices):
        inputs, labels = batch(trainer, indices)
        batches[trainer.config.fused].append((inputs.sum(), labels))
        return inputs, labels

    monkeypatch.setattr(Trainer, "fit", recorded_fit)
    monkeypatch.setattr(Trainer, "batch", recorded_batch)
    out = tmp_path / "new" / "race.json"
    options = [*OPTIONS, "--epochs", "2"]
    assert train_race.main([*options, "--save", str(out)]) == 0
    assert fits == [(True, 1), (False, 1), (False, 2), (True, 2)]
    assert starts[0]["stem.bn.num_batches_tracked"] == 0, "the warm-up trained it"
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert len(batches[True]) == 1 + 2 * 14  # one to warm up
    for (left, left_labels), (right, right_labels) in zip(*batches.values(), strict=True):
        assert torch.equal(left, right)
        assert torch.equal(left_labels, right_labels)

    record = json.loads(out.read_text())
    assert record["command"].startswith("python bench/train_race.py --data synthetic")
    assert record["order"] == [["resfast", "eager"], ["eager", "resfast"]]
    assert {"date", "versions", "device", "isa", "options"} <= record.keys()
    ours, stock = (record["contenders"][name] for name in ("resfast", "eager"))
    ratios = sorted(
        b["seconds"] / a["seconds"] for a, b in zip(ours["epochs"], stock["epochs"], strict=True)
    )
    assert record["ratio"]["rounds"] == 2
    assert record["ratio"]["ratio"] == pytest.approx(sum(ratios) / 2)
    assert ratios[0] <= record["ratio"]["low"] <= record["ratio"]["high"] <= ratios[1]
    assert record["total_ratio"] == pytest.approx(stock["seconds"] / ours["seconds"])
    assert [side["seconds"] for side in (ours, stock)] == pytest.approx([*seconds.values()])
    for side in (ours, stock):
        assert [row["epoch"] for row in side["epochs"]] == [1, 2]
        assert side["seconds"] == pytest.approx(sum(row["seconds"] for row in side["epochs"]))
        assert side["images_per_second"] == pytest.approx(2 * 14 * 100 / side["seconds"])
        assert side["test"]["images"] == 400
        assert side["epochs"][1]["validation_accuracy"] > 0.3
    # one network, the same batches: rounding apart, the same losses at first
    first = [side["epochs"][0]["train_loss"] for side in (ours, stock)]
    assert first[0] == pytest.approx(first[1], rel=0.01)
    assert "eager / resfast" in capsys.readouterr().err


def test_one_epoch_makes_no_interval(train_race, tmp_path):
    out = tmp_path / "race.json"
    assert train_race.main([*OPTIONS, "--epochs", "1", "--save", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["ratio"] is None
    assert record["total_ratio"] > 0


def test_bad_options_are_one_line(train_race, tmp_path, capsys):
    out = tmp_path / "race.json"
    assert train_race.main([*OPTIONS, "--lr", "-1", "--save", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train_race.py: error: --lr must be")
    assert error.count("\n") == 1
    for extra in (["--no-fused"], ["--sav", "x"]):
        with pytest.raises(SystemExit, match="2"):
            train_race.main([*OPTIONS, *extra, "--save", str(out)])
    assert not out.exists()

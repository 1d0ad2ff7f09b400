"""`resfast train --tensorboard`: the event files say what metrics.jsonl says, each step once."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from resfast import cli
from resfast.training import run as run_module
from resfast.training.report import Recorder
from resfast.training.scalars import FOLDER, Scalars

pytestmark = pytest.mark.usefixtures("one_thread", "warnings_format")
OPTIONS = ("--data", "synthetic", "--image-size", "8", "--no-compare", "--quiet")


def scalars_in(run: Path) -> dict[str, list[tuple[int, float]]]:
    """tag → (step, value), as TensorBoard reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / FOLDER))
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def expected(run: Path) -> dict[str, list[tuple[int, float]]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    fields = {
        "loss/one_batch": ("step", "loss"),
        "learning_rate": ("step", "lr"),
        "loss/train": ("epoch", "train_loss"),
        "loss/validation": ("epoch", "validation_loss"),
        "accuracy/train": ("epoch", "train_accuracy"),
        "accuracy/validation": ("epoch", "validation_accuracy"),
        "images_per_second": ("epoch", "images_per_second"),
        "skipped_steps": ("epoch", "skipped"),
    }
    return {
        tag: [(r["step"], pytest.approx(r[field], rel=1e-6)) for r in rows if r["kind"] == kind]
        for tag, (kind, field) in fields.items()
    }


def test_a_run_and_its_continuation_are_there_once(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="writes event files")
    pytest.importorskip("matplotlib", reason="`resfast train` draws curves")
    closed = []
    close = Scalars.close
    monkeypatch.setattr(Scalars, "close", lambda self: closed.append(close(self)))
    run = tmp_path / "run"
    assert cli.main(["train", *OPTIONS, "--epochs", "2", "--tensorboard", "--out", str(run)]) == 0
    assert len(closed) == 1
    first = scalars_in(run)
    assert first == expected(run)
    assert [step for step, _ in first["loss/validation"]] == [21, 42]
    assert [step for step, _ in first["loss/one_batch"]] == [10, 20, 30, 40]
    # as after a kill in the second epoch, whose rows were written already
    (run / "checkpoint-00000042.pt").unlink()
    resumed = ["train", *OPTIONS, "--resume", str(run), "--epochs", "3", "--tensorboard"]
    assert cli.main(resumed) == 0
    assert scalars_in(run) == expected(run)
    assert [step for step, _ in scalars_in(run)["accuracy/train"]] == [21, 42, 63]


def row(step: int, loss: float) -> dict:
    return {"kind": "step", "step": step, "loss": loss, "lr": 0.5}


def test_a_run_resumed_with_the_option_has_what_came_before(tmp_path):
    pytest.importorskip("tensorboard", reason="writes event files")
    recorder = Recorder(tmp_path / "metrics.jsonl")
    for each in ({"kind": "start"}, row(10, 3.0), {"kind": "skip", "step": 12}, row(20, 2.0)):
        recorder(each)
    scalars = Scalars(tmp_path, 20)
    scalars(row(30, 1.0))
    scalars.close()
    assert scalars_in(tmp_path) == {
        "loss/one_batch": [(10, 3.0), (20, 2.0), (30, 1.0)],
        "learning_rate": [(10, 0.5), (20, 0.5), (30, 0.5)],
    }
    # rewound to step 20, whose row is kept: later ones are hidden, that one is not lost or doubled
    again = Scalars(tmp_path, 20)
    again(row(30, 0.25))
    again.close()
    assert scalars_in(tmp_path)["loss/one_batch"] == [(10, 3.0), (20, 2.0), (30, 0.25)]


def test_without_the_package_nothing_is_begun(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="`resfast train` draws curves")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        run_module.importlib.util, "find_spec", lambda n: None if n == "tensorboard" else find(n)
    )
    status = cli.main(["train", *OPTIONS, "--tensorboard", "--out", str(tmp_path / "run")])
    assert status == 1
    assert capsys.readouterr().err == (
        "resfast train: error: --tensorboard needs tensorboard: pip install tensorboard\n"
    )
    assert not (tmp_path / "run").exists()

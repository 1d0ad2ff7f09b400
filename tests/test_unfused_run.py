"""`resfast train --no-fused`: the same run on stock layers only."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resfast import cli
from resfast.testing import FLOOR_ULPS, SINGLE_FACTOR
from resfast.training.checkpoint import BEST, load
from resfast.training.config import TrainConfig
from resfast.training.data import load_dataset
from resfast.training.loop import Trainer
from resfast.training.model import create_for
from resfast.training.predict import restore_model

STEPS = 8
pytestmark = pytest.mark.usefixtures("one_thread")


class _Namespaces(TorchDispatchMode):
    """Which libraries' ops are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


def _trainer(fused: bool) -> Trainer:
    config = TrainConfig(
        data="synthetic",
        image_size=16,
        batch_size=32,
        optimizer="sgd",
        lr=5e-3,
        epochs=1,
        fused=fused,
    )
    data = load_dataset(config)
    torch.manual_seed(config.seed)
    model = create_for("resnet8", data.image_shape, len(data.classes), config.fused)
    return Trainer(model, data, config)


def _losses(fused: bool, roll: int = 0) -> torch.Tensor:
    """Of the first steps; `roll` puts each batch's images in another order."""
    trainer = _trainer(fused)
    losses = []
    for indices in trainer.sampler:
        inputs, labels = trainer.batch(indices.roll(roll))
        losses.append(float(trainer.train_step(inputs, labels)[0]))
        if len(losses) == STEPS:
            break
    return torch.tensor(losses, dtype=torch.float64)


def test_loss_curve_is_the_fused_one_but_for_rounding(monkeypatch):
    """As near to the stock runs as those are to each other, by the criterion's fp32 factor.

    A batch in another order is the same step rounded otherwise, and so is one without oneDNN.
    The band of the stock runs widens as rounding differences grow from step to step, so the bound
    needs no constant of its own. The shift is drawn by place in the batch, so there is none.
    """
    monkeypatch.setattr("resfast.training.data.Augment", lambda *_: lambda pixels, *_: pixels)
    runs = [_losses(False, roll) for roll in (0, 5, 11)]
    with torch.backends.mkldnn.flags(enabled=False):
        runs += [_losses(False, roll) for roll in (0, 5)]
    curves = torch.stack(runs)
    band = (curves.amax(0) - curves.amin(0)).cummax(0).values
    allowed = SINGLE_FACTOR * band + FLOOR_ULPS * 2.0**-24 * curves[0]
    ours = _losses(True)
    distance = (curves - ours).abs().amin(0)
    assert (distance <= allowed).all(), f"distance {distance}\nallowed {allowed}"
    assert (allowed < 1e-3 * curves[0]).all(), f"so wide a band says nothing: {allowed}"


@pytest.mark.parametrize("fused", [True, False])
def test_only_the_fused_run_calls_ops_of_resfast(fused):
    trainer = _trainer(fused)
    inputs, labels = trainer.batch(next(iter(trainer.sampler)))
    with _Namespaces() as ops:
        trainer.train_step(inputs, labels)
        trainer.evaluate(trainer.data.validation)
    assert "aten" in ops.seen
    assert ("resfast" in ops.seen) == fused


def test_run_folder_resume_and_predict(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="`resfast train` draws curves")
    run = tmp_path / "run"
    options = ["--data", "synthetic", "--image-size", "8", "--epochs", "1", "--no-fused"]
    assert cli.main(["train", *options, "--quiet", "--out", str(run)]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["options"]["fused"] is False
    assert metrics["comparison"] is None
    with _Namespaces() as ops:
        assert cli.main(["train", "--resume", str(run), "--epochs", "2"]) == 0
    assert "resfast" not in ops.seen
    assert "stock layers" in capsys.readouterr().out
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["comparison"] is None
    assert metrics["training"]["epochs"] == 2

    state = load(run / BEST)
    stock = restore_model(state, run / BEST)
    fused = create_for("resnet8", state["image_shape"], len(state["classes"]))
    assert list(stock.state_dict()) == list(fused.state_dict())
    fused.load_state_dict(state["model"])
    images = torch.randn(4, *state["image_shape"])
    with torch.no_grad(), _Namespaces() as ops:
        expected = stock.eval()(images)
    assert "resfast" not in ops.seen
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(images), expected)

    assert cli.main(["predict", str(run), "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)
    assert predicted["accuracy"] == metrics["test"]["accuracy"]
    assert cli.main(["train", "--resume", str(run), "--fused"]) == 2
    assert "--fused cannot change in a resumed run" in capsys.readouterr().err

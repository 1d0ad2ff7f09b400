"""The rows of metrics.jsonl as TensorBoard's scalars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resfast.diagnostics.curves import read_metrics

FOLDER = "tensorboard"
TAGS = {
    "step": {"loss": "loss/one_batch", "lr": "learning_rate"},
    "epoch": {
        "train_loss": "loss/train",
        "validation_loss": "loss/validation",
        "train_accuracy": "accuracy/train",
        "validation_accuracy": "accuracy/validation",
        "images_per_second": "images_per_second",
        "skipped": "skipped_steps",
    },
}


class Scalars:
    """Writes event files into a run's folder; called with each row.

    A resumed run hides what earlier files say of `step` and later, and repeats those of step
    `step` that metrics.jsonl kept; where there are no earlier files, all that it kept.
    """

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if not (run / FOLDER).exists():
            step = 0
        self._writer = SummaryWriter(run / FOLDER, purge_step=step or None)
        metrics = run / "metrics.jsonl"
        for row in read_metrics(metrics) if metrics.exists() else []:
            if row.get("step", -1) >= step:
                self(row)

    def __call__(self, row: dict[str, Any]) -> None:
        for field, tag in TAGS.get(row["kind"], {}).items():
            self._writer.add_scalar(tag, row[field], row["step"])
        if row["kind"] == "epoch":
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()

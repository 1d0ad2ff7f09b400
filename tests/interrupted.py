"""Runs that are stopped on the way and go on: what the tests of each part of training share."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from resfast.training.checkpoint import CheckpointFolder
from resfast.training.loop import Stopped, StopSignals, Trainer

COMMAND = [sys.executable, "-m", "resfast.cli", "train", "--no-compare", "--quiet"]


class StopAfter(StopSignals):
    """As if SIGTERM came during a trainer's given step."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        super().__init__()
        self.trainer = trainer
        self.step = step

    @property
    def signum(self) -> int | None:
        return signal.SIGTERM if self.trainer.step >= self.step else None

    @signum.setter
    def signum(self, value: int | None) -> None:
        pass


def losses_of(trainer: Trainer, losses: list) -> Trainer:
    trainer.progress = lambda step, loss: losses.append(loss)
    return trainer


def fit_in_two(
    first: Trainer, second: Callable[[], Trainer], folder: Path, stop_after: int
) -> tuple[Trainer, list]:
    """The trainer that went on from where ``first`` was stopped, and the losses of both."""
    losses: list = []
    losses_of(first, losses).stop = StopAfter(first, stop_after)
    with pytest.raises(Stopped):
        first.fit()
    state, _ = CheckpointFolder(folder).load_latest()
    torch.manual_seed(99)
    resumed = losses_of(second(), losses)
    resumed.load_state_dict(state)
    resumed.fit()
    return resumed, losses


@contextlib.contextmanager
def running(run: Path, *options: str, **more) -> Iterator[subprocess.Popen[str]]:
    """`resfast train` without an end in a process of its own, its first epoch behind it."""
    start = [*COMMAND, "--out", str(run), "--epochs", "500", "--threads", "1", *options]
    process = subprocess.Popen(start, stderr=subprocess.PIPE, text=True, **more)
    try:
        log, deadline = run / "metrics.jsonl", time.monotonic() + 100
        while not (log.exists() and '"epoch"' in log.read_text()):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        process.kill()

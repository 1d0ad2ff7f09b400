"""Processes that die while they save or train, forked by one that has torch loaded.

`python killed.py saves FOLDER COUNT SEED` or `python killed.py train FOLDER STEP… -- OPTION…`;
prints as JSON what was done. Nothing here judges: the tests do.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from resfast import cli
from resfast.training import checkpoint
from resfast.training.checkpoint import CheckpointFolder
from resfast.training.loop import Trainer

KEEP = 2
WRITING = {"save", "save_best", "write_atomically", "_replace", "_remove"}
Report = Callable[[int], None]


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((20_000,), float(step))}


def save_both(folder: CheckpointFolder, step: int, report: Report) -> None:
    folder.save_best(state(step))
    folder.save(step, state(step))
    report(step)


def forked(work: Callable[[Report], None]) -> tuple[int, int]:
    """Process id, and the end of a pipe from which the steps can be read that `work` reports."""
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(writing)
        return pid, reading
    status = 1
    try:
        os.close(reading)
        work(lambda step: os.write(writing, step.to_bytes(4, "little")) and None)
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def outcome(pid: int, reading: int, folder: Path, reported: int = 0, **more: Any) -> dict[str, Any]:
    """Waits for the process; `signal` is what ended it, or None."""
    _, status = os.waitpid(pid, 0)
    while data := os.read(reading, 4):  # a report is written in one piece
        reported = int.from_bytes(data, "little")
    os.close(reading)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(f"{folder.name}: exit status {os.WEXITSTATUS(status)}")
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    return {"folder": str(folder), "reported": reported, "signal": ended_by, **more}


def at_random(folder: Path, chance: random.Random) -> dict[str, Any]:
    """Saves in a loop, killed within about the time of two rounds."""

    def work(report: Report) -> None:
        for step in itertools.count(1):
            save_both(CheckpointFolder(folder, KEEP), step, report)

    started = time.perf_counter()
    pid, reading = forked(work)
    for _ in range(KEEP):
        reported = int.from_bytes(os.read(reading, 4), "little")
    time.sleep(chance.uniform(0, time.perf_counter() - started))
    os.kill(pid, signal.SIGKILL)
    return outcome(pid, reading, folder, reported)


def before_line(folder: Path, number: int) -> dict[str, Any]:
    """Killed before the given line of what writes checkpoints is executed, by count."""
    reading, writing = os.pipe()

    def work(report: Report) -> None:
        for step in range(1, KEEP + 1):
            save_both(CheckpointFolder(folder, KEEP), step, report)
        lines = itertools.count()

        def trace(frame: Any, event: str, _: Any) -> Any:
            code = frame.f_code
            if code.co_filename != checkpoint.__file__ or code.co_name not in WRITING:
                return None
            if event == "line" and next(lines) == number:
                os.write(writing, frame.f_lineno.to_bytes(4, "little"))
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        save_both(CheckpointFolder(folder, KEEP), KEEP + 1, report)

    pid, pipe = forked(work)
    os.close(writing)
    found = outcome(pid, pipe, folder)
    at = int.from_bytes(os.read(reading, 4), "little")
    os.close(reading)
    source = Path(checkpoint.__file__).read_text().splitlines()
    return found | {"line": source[at - 1].strip() if at else None}


def in_write(folder: Path, size: int) -> dict[str, Any]:
    """Killed by the kernel when the file has so many bytes."""

    def work(report: Report) -> None:
        for step in range(1, KEEP + 1):
            save_both(CheckpointFolder(folder, KEEP), step, report)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        save_both(CheckpointFolder(folder, KEEP), KEEP + 1, report)

    return outcome(*forked(work), folder)


def saves(root: Path, count: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    chance = random.Random(seed)
    numbers = itertools.count()

    def new() -> Path:
        folder = root / str(next(numbers))
        folder.mkdir(parents=True)
        return folder

    by_line = []
    while (found := before_line(new(), len(by_line)))["signal"] is not None:
        by_line.append(found)
    return {
        "lines": by_line,
        "sizes": [in_write(new(), size) for size in (0, 1, 40_000, 80_000)],
        "random": [at_random(new(), chance) for _ in range(count)],
    }


def train(root: Path, steps: list[int], options: list[str]) -> list[dict[str, Any]]:
    """A whole run, then one a step that is killed after it and resumed."""

    def run(arguments: list[str], die_after: int | None = None) -> Callable[[Report], None]:
        def work(report: Report) -> None:
            log = Trainer._log_step

            def last(trainer: Trainer, loss: torch.Tensor) -> None:
                log(trainer, loss)
                if trainer.step == die_after:
                    os.kill(os.getpid(), signal.SIGKILL)

            # in a forked process, which ends with this run: there is nothing to put back
            Trainer._log_step = last  # type: ignore[method-assign]
            if cli.main(["train", "--quiet", "--no-compare", *arguments]):
                raise RuntimeError(f"resfast train {' '.join(arguments)}")

        return work

    done = [outcome(*forked(run([*options, "--out", str(root / "whole")])), root / "whole")]
    for step in steps:
        folder = root / f"killed-{step}"
        done.append(outcome(*forked(run([*options, "--out", str(folder)], step)), folder))
        outcome(*forked(run(["--resume", str(folder)])), folder)
    return done


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where, *rest = sys.argv[1:]
    if what == "saves":
        result: Any = saves(Path(where), int(rest[0]), int(rest[1]))
    else:
        end = rest.index("--")
        result = train(Path(where), [int(step) for step in rest[:end]], rest[end + 1 :])
    print(json.dumps(result))

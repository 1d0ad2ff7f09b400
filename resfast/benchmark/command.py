"""The body of `resfast bench`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from resfast.benchmark import report, run
from resfast.benchmark.work import Work
from resfast.training.config import OptionError


def bench(
    work: Work,
    peers: str,
    *,
    budget: float,
    roofline: bool,
    threads: int | None,
    save: Path | None,
    plot: Path | None,
) -> int:
    """Measure, print the table, keep the record and the picture where asked."""
    _check_picture(plot)
    names = run.choose(peers)
    if threads is not None:
        torch.set_num_threads(threads)
    say = Progress()
    record = run.header(work.device)
    record |= run.measure(work, names, budget=budget, roofline=roofline, say=say)
    say.close()
    if save is not None:
        run.save(record, save)
    print(report.table(record))
    if plot is not None:
        report.plot([record], plot)
    return 0


def draw(paths: Sequence[Path], plot: Path | None) -> int:
    """Print README's table from saved records, and draw the picture."""
    _check_picture(plot)
    records = report.read(paths)
    print(report.markdown(records))
    if plot is not None:
        report.plot(records, plot)
    return 0


def _check_picture(path: Path | None) -> None:
    if path is not None and path.suffix not in (".png", ".svg", ".pdf"):
        raise OptionError(f"--plot {path}: the name must end in .png, .svg or .pdf")


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line for each new subject."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self.live:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif ": round " not in text or ": round 1 of" in text:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

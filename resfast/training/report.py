"""What a run writes and shows: metrics.jsonl, the progress bar, the table at the end."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resfast.training.checkpoint import write_atomically, writing

if TYPE_CHECKING:
    from resfast.training.loop import Score


def judged(score: Score) -> dict[str, Any]:
    """A score as a record keeps it, with its interval."""
    return {
        "accuracy": score.accuracy,
        "correct": score.correct,
        "images": score.images,
        "loss": score.loss,
        "interval_95": list(binomial_interval(score.correct, score.images)),
    }


class Recorder:
    """Appends rows to metrics.jsonl; each row is on its way to disk when `__call__` returns.

    WriteError where it cannot be written; a line cut short is dropped when the run is resumed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, row: dict[str, Any]) -> None:
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rewind(self, step: int, epochs: int) -> None:
        """Drops what a resumed run will write again: later steps, epochs not completed."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            late = row.get("step", 0) > step or row.get("epoch", 0) > epochs
            if not late:
                kept.append(line + "\n")
        write_atomically(self.path, "".join(kept).encode())


class Progress:
    """A live bar on a terminal, one line per epoch elsewhere, nothing when quiet; on stderr."""

    def __init__(self, total: int, initial: int, epochs: int, quiet: bool) -> None:
        self.epochs = epochs
        self.quiet = quiet
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True)

    def step(self, step: int, loss: float | None) -> None:
        if self._bar is None:
            return
        self._bar.update(step - self._bar.n)
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

    def epoch(self, row: dict[str, Any]) -> None:
        self.say(
            f"epoch {row['epoch']:>{len(str(self.epochs))}}/{self.epochs}  "
            f"loss {row['train_loss']:.4f}  train {row['train_accuracy']:6.2%}  "
            f"validation {row['validation_accuracy']:6.2%}  "
            f"{row['images_per_second']:,.0f} images/s"
        )

    def say(self, text: str) -> None:
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def on_row(progress: Progress, *records: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
    """Records every row in all of `records` and shows those of epochs."""

    def handle(row: dict[str, Any]) -> None:
        for record in records:
            record(row)
        if row["kind"] == "epoch":
            progress.epoch(row)

    return handle


def binomial_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    share, zz = correct / total, z * z / total
    centre = share + zz / 2
    half = z * math.sqrt(share * (1 - share) / total + zz / (4 * total))
    return max(0.0, (centre - half) / (1 + zz)), min(1.0, (centre + half) / (1 + zz))


def table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)

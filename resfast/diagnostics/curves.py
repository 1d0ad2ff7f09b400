"""The picture of a training run: loss, accuracy and learning rate over the epochs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

# At least 3:1 against white and against the dark page of a run, as WCAG 2 asks of lines.
TRAIN, VALIDATION, RATE, BATCH = "tab:blue", "#d95f02", "tab:green", "0.55"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def draw_curves(
    rows: list[dict[str, Any]], out: Path | IO[bytes], title: str | None, kind: str = "png"
) -> None:
    """`rows` as in metrics.jsonl: kind "step" gives the thin loss line and the learning rate,
    "epoch" the rest. `kind` of picture: png, svg or pdf.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = [row for row in rows if row["kind"] == "epoch"]
    steps = [row for row in rows if row["kind"] == "step"]
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), sharex=True, layout="constrained")
    left, right, rate = panels
    numbers = [row["epoch"] for row in epochs]
    if epochs and steps:
        per_epoch = epochs[-1]["step"] / epochs[-1]["epoch"]
        at = [row["step"] / per_epoch for row in steps]
        left.plot(at, [row["loss"] for row in steps], color=BATCH, lw=0.8, label="one batch")
        rate.plot(at, [row["lr"] for row in steps], color=RATE, label="learning rate")
    for name, colour in (("train", TRAIN), ("validation", VALIDATION)):
        style = {"color": colour, "marker": "o", "ms": 3, "label": name}
        left.plot(numbers, [row[f"{name}_loss"] for row in epochs], **style)
        right.plot(numbers, [row[f"{name}_accuracy"] for row in epochs], **style)
    left.set(ylabel="cross-entropy", yscale="log")
    right.set(ylabel="accuracy")
    rate.set(ylabel="learning rate")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    if title is not None:
        figure.suptitle(title)
    figure.savefig(out, dpi=120, format=kind)
    plt.close(figure)

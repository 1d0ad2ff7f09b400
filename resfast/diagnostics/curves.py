"""The picture of a training run: loss and accuracy over the epochs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def draw_curves(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """`rows` as in metrics.jsonl: kind "step" gives the thin loss line, "epoch" the rest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = [row for row in rows if row["kind"] == "epoch"]
    steps = [row for row in rows if row["kind"] == "step"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    numbers = [row["epoch"] for row in epochs]
    if epochs and steps:
        per_epoch = epochs[-1]["step"] / epochs[-1]["epoch"]
        at = [row["step"] / per_epoch for row in steps]
        left.plot(at, [row["loss"] for row in steps], color="0.75", lw=0.8, label="one batch")
    for name, colour in (("train", "tab:blue"), ("validation", "tab:orange")):
        style = {"color": colour, "marker": "o", "ms": 3, "label": name}
        left.plot(numbers, [row[f"{name}_loss"] for row in epochs], **style)
        right.plot(numbers, [row[f"{name}_accuracy"] for row in epochs], **style)
    left.set(ylabel="cross-entropy", yscale="log")
    right.set(ylabel="accuracy")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)

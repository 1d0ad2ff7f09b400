"""Records of `resfast bench` as text: a table for the terminal, Markdown for README, a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resfast.benchmark.peers import OURS, PEERS
from resfast.benchmark.run import SCHEMA
from resfast.training.config import UserError

Record = dict[str, Any]


def read(paths: Sequence[Path]) -> list[Record]:
    """The records in `paths`; UserError for a file that is none, or of another schema."""
    records = []
    for path in paths:
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}") from None
        if not isinstance(record, dict) or record.get("kind") != "resfast bench":
            continue  # results of other commands may lie in the same folder
        if record.get("schema") != SCHEMA:
            raise UserError(f"{path}: schema {record.get('schema')}, not {SCHEMA}")
        records.append(record)
    if not records:
        raise UserError("no record of `resfast bench --save` among the files given")
    return sorted(records, key=_order)


def _order(record: Record) -> tuple:
    work = record["work"]
    return not work["training"], work["model"], work["batch"], work["dtype"]


def title(work: dict[str, Any]) -> str:
    kind = "training step" if work["training"] else "inference"
    name = work["model"].replace("resnet", "ResNet-")
    return f"{name}, batch {work['batch']}, {kind}, {work['dtype']}, {work['image']}²"


def conditions(record: Record) -> str:
    device, versions = record["device"], record["versions"]
    where = device["name"]
    if "threads" in device:
        where += f" with {device['capability']}, {device['threads']} threads"
    packages = ", ".join(
        f"{name} {versions[name]}"
        for name in ("torch", "onnxruntime", "openvino", "triton")
        if name in versions
    )
    return f"{where}; {packages}; {record['date'][:10]}"


def _ratio(row: dict[str, Any]) -> str:
    if "ratio" not in row:
        return "–"
    text = f"{row['ratio']:.2f}× ({row['low']:.2f}–{row['high']:.2f})"
    return text if row["differs"] else f"{text} no difference"


def _cells(record: Record) -> list[list[str]]:
    floor = any("share_of_floor" in row for row in record["rows"])
    saved = record.get("saved_bytes_per_image", {})
    head = [
        "",
        "ms/image",
        "resfast is faster by",
        "error vs fp64" + ", its gradient's" * record["work"]["training"],
    ]
    head += ["of the roofline"] * floor + ["saved MiB/image"] * bool(saved)
    lines = [head]
    for row in record["rows"]:
        line = [PEERS[row["peer"]].title, f"{row['ms_per_image']:.2f} ±{row['spread']:.0%}"]
        errors = [f"{e:.1e}" for e in row["relative_error"].values() if e is not None]
        line += [_ratio(row), ", ".join(errors)]
        if floor:
            line.append(f"{row['share_of_floor']:.0%}")
        if saved:
            line.append(f"{saved[row['peer']] / 2**20:.1f}")
        lines.append(line)
    return lines


def table(record: Record) -> str:
    """For the terminal. Above 1, resfast is faster."""
    lines = _cells(record)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [title(record["work"]), conditions(record)]
    text += ["  ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)).rstrip() for x in lines]
    text += [f"left out {s['peer']}: {s['reason']}" for s in record["skipped"]]
    if record["floor"]:
        ceilings = record["floor"]["ceilings"]
        text.append(
            f"roofline {1e3 * record['floor']['seconds'] / record['work']['batch']:.2f} ms/image: "
            f"copy {ceilings['bytes_per_second'] / 1e9:.1f} GB/s, "
            f"matrix product {ceilings['operations_per_second'] / 1e9:,.0f} GFLOP/s, "
            f"{record['floor']['operations'] / 1e9:.1f} GFLOP by direct convolution"
        )
    return "\n".join(text)


def markdown(records: Sequence[Record]) -> str:
    """README's table: a row per work item, a column per peer that any of them raced."""
    raced = {row["peer"] for record in records for row in record["rows"]}
    columns = [name for name in PEERS if name in raced and name != OURS]
    head = ["ms per image", "resfast", *(PEERS[name].title for name in columns)]
    lines = [head, ["---"] * len(head)]
    for record in records:
        rows = {row["peer"]: row for row in record["rows"]}
        cells = [title(record["work"]), f"**{rows[OURS]['ms_per_image']:.1f}**"]
        for name in columns:
            row = rows.get(name)
            if row is None:
                cells.append("–")
                continue
            sign = "" if row["differs"] else "≈ "
            cells.append(f"{row['ms_per_image']:.1f} ({sign}{row['ratio']:.2f}×)")
        lines.append(cells)
    where = sorted({conditions(record) for record in records})
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*text, "", *where])


def plot(records: Sequence[Record], path: Path) -> None:
    """Bars of ms per image, a panel per work item, resfast highlighted; .png, .svg or .pdf."""
    import matplotlib

    matplotlib.use("Agg")
    # the same records give the same small file: fixed ids, text as text
    matplotlib.rcParams |= {"svg.hashsalt": "resfast", "svg.fonttype": "none"}
    from matplotlib import pyplot

    height = sum(0.32 * len(r["rows"]) + 0.75 for r in records)
    shares = [len(r["rows"]) + 1 for r in records]
    figure, axes = pyplot.subplots(
        len(records), 1, figsize=(7.5, height), squeeze=False, height_ratios=shares
    )
    for axis, record in zip(axes[:, 0], records, strict=True):
        rows = sorted(record["rows"], key=lambda row: -row["ms_per_image"])
        values = [row["ms_per_image"] for row in rows]
        colours = ["#d62728" if row["peer"] == OURS else "#b0b7c3" for row in rows]
        axis.barh([PEERS[row["peer"]].title for row in rows], values, color=colours)
        for place, row in enumerate(rows):
            text = f" {row['ms_per_image']:.1f}"
            axis.text(row["ms_per_image"], place, text, va="center", fontsize=8)
        axis.set_title(title(record["work"]), fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.1)
    axes[-1, 0].set_xlabel("ms per image, median (shorter is faster)", fontsize=8)
    figure.text(0.01, 0.002, conditions(records[0]), fontsize=6, color="#555555")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)

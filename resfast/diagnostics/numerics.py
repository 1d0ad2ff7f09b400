"""``resfast check``: every op on every backend of this machine, its error beside stock's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from resfast.backends import available, backend
from resfast.diagnostics.environment import device_info, now, versions
from resfast.testing import HALF_DTYPES, HALF_SEEDS, LAYOUTS, OpCase, Verdict, judge_seeds, op_cases

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class Row(NamedTuple):
    """One op on one backend in one dtype: the quantity nearest to, or furthest over, its limit."""

    op: str
    backend: str
    dtype: str
    layout: str
    worst: Verdict
    failed: tuple[Verdict, ...]


class Declined(NamedTuple):
    """A dtype that a backend of this device does not take, so that nothing was compared."""

    backend: str
    dtype: str
    reason: str


def _row(case: OpCase, name: str, dtype: str, layout: str, seeds: int, device: str) -> Row:
    with backend(name):
        verdicts = judge_seeds(case, DTYPES[dtype], seeds, device, layouts=(layout,))
    worst = max(verdicts, key=lambda v: v.ratio)
    return Row(str(case), name, dtype, layout, worst, tuple(v for v in verdicts if not v.ok))


def run(
    *,
    quick: bool = False,
    dtypes: Sequence[str] = tuple(DTYPES),
    backends: Sequence[str] = (),
    device: str = "cpu",
) -> Iterator[Row | Declined]:
    """Judge each op by the criterion of resfast.testing on every backend that runs on ``device``.

    A backend that does not take a dtype there gives one ``Declined`` instead of rows.
    ``quick`` takes 8 inputs a case instead of 8 (fp32, fp64) or 32 (16-bit), and training only.
    """
    for name in backends or [n for n, ok, _ in available(device) if ok]:
        for dtype in dtypes:
            ok, reason = {n: (ok, why) for n, ok, why in available(device, DTYPES[dtype])}[name]
            if not ok:
                yield Declined(name, dtype, reason)
                continue
            seeds = HALF_SEEDS if DTYPES[dtype] in HALF_DTYPES and not quick else 8
            for training in (True,) if quick else (True, False):
                for case in op_cases(training):
                    for layout in LAYOUTS:
                        yield _row(case, name, dtype, layout, seeds, device)


def main(
    quick: bool = False,
    dtypes: Sequence[str] | None = None,
    out: str | Path | None = None,
    device: str = "cpu",
) -> int:
    """Print the table as it is measured; write it to ``out`` as JSON. 1 if anything failed."""
    rows: list[Row] = []
    declined: list[Declined] = []
    print(
        f"{'op':38}{'backend':9}{'dtype':10}{'layout':8}{'worst of':14}"
        f"{'error':>10}{'stock':>10}{'of limit':>10}"
    )
    for row in run(quick=quick, dtypes=dtypes or tuple(DTYPES), device=device):
        if isinstance(row, Declined):
            declined.append(row)
            print(f"{'-':38}{row.backend:9}{row.dtype:10}declined: {row.reason}", flush=True)
            continue
        rows.append(row)
        v = row.worst
        print(
            f"{row.op:38}{row.backend:9}{row.dtype:10}{row.layout:8}{v.quantity:14}"
            f"{v.error:10.2e}{v.stock:10.2e}{v.ratio:9.0%}  {'FAIL' if row.failed else 'pass'}",
            flush=True,
        )
        for bad in row.failed:
            print(f"    {bad.quantity}: {bad}")
    failed = sum(bool(r.failed) for r in rows)
    print(f"{len(rows) - failed} of {len(rows)} pass (error: RMSE against float64)")
    if out is not None:
        record = {
            "kind": "resfast check",
            "date": now(),
            "versions": versions(),
            "device": device_info(torch.device(device)),
            "rows": [
                {**r._asdict(), "worst": r.worst._asdict(), "failed": len(r.failed)} for r in rows
            ],
            "declined": [d._asdict() for d in declined],
        }
        Path(out).write_text(json.dumps(record, indent=1))
    return 1 if failed else 0

"""What ``accelerate`` did: a row for each fused group and for each layer it left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class ReportRow(NamedTuple):
    """children of module and the op they became, or ``"unfused"`` with the reason."""

    module: str
    children: tuple[str, ...]
    op: str
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """``str()`` is the table."""

    rows: tuple[ReportRow, ...]

    @property
    def fused(self) -> tuple[ReportRow, ...]:
        return tuple(row for row in self.rows if row.op != "unfused")

    @property
    def left(self) -> tuple[ReportRow, ...]:
        return tuple(row for row in self.rows if row.op == "unfused")

    def __str__(self) -> str:
        header = ("module", "children", "became", "reason")
        table = [header] + [(r.module, " ".join(r.children), r.op, r.reason) for r in self.rows]
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        return "\n".join([*lines, f"{len(self.fused)} fused, {len(self.left)} left"])

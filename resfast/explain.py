"""explain(model, input): which op runs each layer, on which backend, and why not a better one."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resfast.backends.fusion import Fusion, current_fusion
from resfast.backends.interface import FUNCTIONS
from resfast.backends.select import Choice, listen
from resfast.inference import OptimizedModel
from resfast.nn.fuse import Fusible, PlanRow


@dataclass(frozen=True)
class Row:
    """One step of the forward pass."""

    module: str
    children: tuple[str, ...]
    op: str
    # function → backend, of the whole module's forward, "+" what else the kernel does; of blocks
    # that are one op together, of that op
    backends: dict[str, str]
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What ran; ``str()`` is the table. ``backward`` counts (function, backend) calls."""

    rows: list[Row]
    backward: dict[tuple[str, str], int]
    declined: dict[str, str]  # backend → the reason it gave, for those that were passed over
    fusion: Fusion  # the step in force and whose convolutions run

    def __str__(self) -> str:
        header = ("module", "children", "op", "backend", "reason")
        table = [header] + [
            (r.module, " ".join(r.children), r.op, _brief(r), r.reason) for r in self.rows
        ]
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        for (function, backend), n in sorted(self.backward.items()):
            lines.append(f"backward: {function} × {n} on {backend}")
        lines += [f"declined: {name}: {reason}" for name, reason in self.declined.items()]
        lines.append(f"fusion: step {self.fusion.step}, convolutions {self.fusion.convolutions}")
        return "\n".join(lines)


def _brief(row: Row) -> str:
    if row.op == "unfused":
        return "torch"
    used = list(dict.fromkeys(row.backends.values()))
    if len(used) <= 1:
        return "".join(used)
    return ", ".join(f"{f}: {b}" for f, b in row.backends.items())


def explain(model: nn.Module, x: Tensor) -> Explanation:
    """Run ``model(x)`` once, in its present mode, and report what ran each layer.

    With autograd on, backward runs too. Parameters, gradients, buffers and random state are as
    before afterwards.

    Of what ``optimize_for_inference`` made, the convolutions that a plan has prepared.

    Args:
        model: any module; the layers of resfast in it are reported.
        x: an input it accepts.
    """
    rows: list[Row] = []
    declined: dict[str, str] = {}
    forward_choices: dict[str, list[Choice]] = {}
    current: list[str] = []
    backward: Counter[tuple[str, str]] = Counter()
    outside: list[Choice] = []  # in forward: of no module's own
    in_forward = True

    def note(choice: Choice) -> None:
        declined.update(choice.declined)
        if current:
            forward_choices[current[-1]].append(choice)
        elif in_forward:
            outside.append(choice)
        else:
            backward[choice.function, _label(choice)] += 1

    plans: dict[str, list[PlanRow]] = {}
    parents: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_restored(model))
        if isinstance(model, OptimizedModel):
            model(x)  # makes the plan, for which every module runs once
        for name, m in model.named_modules():
            if isinstance(m, Fusible):
                stack.enter_context(_traced(name, m, current, plans, parents, forward_choices))
        stack.enter_context(listen(note))
        y = model(x)
        in_forward = False
        outputs = [t for t in _tensors(y) if t.requires_grad]
        wanted = [p for p in model.parameters() if p.requires_grad]
        if outputs and wanted:
            torch.autograd.grad([t.sum() for t in outputs], wanted, allow_unused=True)
    for name, plan in plans.items():
        labels: dict[str, dict[str, None]] = {}
        for c in forward_choices[parents.get(name, name)]:
            labels.setdefault(c.function, {})[_label(c)] = None
        backends = {f: " / ".join(labels[f]) for f in FUNCTIONS if f in labels}
        rows += [
            Row(name or type(model).__name__, r.children, r.op, backends, r.reason or "")
            for r in plan
        ]
    rows += [
        Row(type(model).__name__, (), c.function, {c.function: _label(c)}, _reasons(c))
        for c in outside
    ]
    return Explanation(rows, dict(backward), declined, current_fusion())


def _label(choice: Choice) -> str:
    return "+".join((choice.backend, *choice.fused))


def _reasons(choice: Choice) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in choice.declined.items())


def _tensors(y: object) -> list[Tensor]:
    if isinstance(y, Tensor):
        return [y]
    values = y.values() if isinstance(y, dict) else y if isinstance(y, (list, tuple)) else ()
    return [t for v in values for t in _tensors(v)]


@contextlib.contextmanager
def _traced(
    name: str,
    m: Fusible,
    current: list[str],
    plans: dict[str, list[PlanRow]],
    parents: dict[str, str],
    choices: dict[str, list[Choice]],
) -> Iterator[None]:
    """Note m's plan at its first call, and which module is running. No hook: those unfuse."""
    forward = m.forward
    overridden = "forward" in m.__dict__

    def note(op: str | None = None) -> None:
        if name not in plans:
            plan = getattr(m, "plan", None)
            rows = plan() if plan is not None else []
            plans[name] = rows if op is None else [r._replace(op=op) for r in rows]
            choices[name] = []
            if op is not None and current:
                parents[name] = current[-1]

    def traced(*args, **kwargs):
        note()
        current.append(name)
        try:
            return forward(*args, **kwargs)
        finally:
            current.pop()

    if not overridden:
        traced.note = note  # type: ignore[attr-defined]  # for who calls the module's op itself
    m.__dict__["forward"] = traced
    try:
        yield
    finally:
        if overridden:
            m.__dict__["forward"] = forward
        else:
            del m.__dict__["forward"]


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Buffers and random state as before afterwards."""
    before = [(b, b.detach().clone()) for b in model.buffers()]
    devices = {b.device for b in model.parameters() if b.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for b, value in before:
                    b.copy_(value)

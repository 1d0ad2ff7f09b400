"""Every Triton kernel of resfast is launched here, and says what memory it reads and writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)

if INTERPRETED:
    from resfast.kernels.interpreter import correct

    correct()


@dataclass(frozen=True)
class Traffic:
    """One launch: bytes of device memory it has to read and to write, each operand once."""

    kernel: str
    reads: int
    writes: int


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]


_ledgers: list[list[Traffic]] = []
_captures: list[list[Launch]] = []


@contextlib.contextmanager
def count_traffic() -> Iterator[list[Traffic]]:
    """A list that every launch inside is added to. On meta tensors nothing else happens."""
    ledger: list[Traffic] = []
    _ledgers.append(ledger)
    try:
        yield ledger
    finally:
        _ledgers.remove(ledger)


def counting() -> bool:
    """Whether launches on meta tensors serve anyone."""
    return bool(_ledgers or _captures)


@contextlib.contextmanager
def capture() -> Iterator[list[Launch]]:
    """A list that every launch on meta tensors inside is added to: what a compiler needs."""
    launches: list[Launch] = []
    _captures.append(launches)
    try:
        yield launches
    finally:
        _captures.remove(launches)


def _bytes(operands: Sequence[Tensor | int | None]) -> int:
    return sum(t.numel() * t.element_size() if isinstance(t, Tensor) else t or 0 for t in operands)


def record(name: str, reads: Sequence[Tensor | int | None], writes: Sequence[Tensor | int | None]):
    """Enter one launch into the open ledgers; an int stands for so many bytes, None for nothing."""
    if _ledgers:
        traffic = Traffic(name, _bytes(reads), _bytes(writes))
        for ledger in _ledgers:
            ledger.append(traffic)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    reads: Sequence[Tensor | int | None],
    writes: Sequence[Tensor | int | None],
    **constexprs: Any,
) -> None:
    """Run ``kernel[grid](*args, **constexprs)`` on the current stream.

    ``reads`` and ``writes``: the operands for the ledger, as ``record`` takes them. A grid without
    programs, and meta tensors, are not launched.
    """
    record(kernel.__name__, reads, writes)
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "meta":
        for launches in _captures:
            launches.append(Launch(kernel, grid, args, constexprs))
        return
    if 0 in grid:
        return
    run(kernel, grid, args, constexprs, device)


def run(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constexprs: dict[str, Any],
    device: torch.device,
) -> None:
    """The launch itself; tests replace it to put guards around every buffer."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, **constexprs)
    else:
        kernel[grid](*args, **constexprs)

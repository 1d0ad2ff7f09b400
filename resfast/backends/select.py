"""Which backend runs a function, and why; selection happens below the op boundary."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from resfast.backends import norm_race
from resfast.backends.cpu import CpuBackend
from resfast.backends.cuda import CudaBackend
from resfast.backends.cudnn import CudnnBackend
from resfast.backends.eager import EagerBackend
from resfast.backends.interface import Backend
from resfast.backends.triton import TritonBackend

# in order of preference; the last one takes everything. Triton fuses norms into convolutions, which
# the CUDA kernels and cuDNN's graphs do not; where these were measured to run a norm faster, they
# come first.
_BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (CpuBackend(), TritonBackend(), CudaBackend(), CudnnBackend(), EagerBackend())
}
_forced: str | None = None


@dataclass(frozen=True)
class Choice:
    """One function call: who ran it, on what, and why the backends before it did not."""

    function: str
    backend: str
    shape: tuple[int, ...]
    dtype: str
    declined: dict[str, str] = field(default_factory=dict)
    fused: tuple[str, ...] = ()  # what else the same kernel does


_listeners: list[Callable[[Choice], None]] = []


def names() -> tuple[str, ...]:
    """Backend names in order of preference."""
    return tuple(_BACKENDS)


def available(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> list[tuple[str, bool, str]]:
    """(name, usable on this machine, why not) for each backend in order of preference.

    With a device: usable for tensors of ``dtype`` there.
    """
    rows = []
    for name, candidate in _BACKENDS.items():
        reason = candidate.unavailable_reason()
        if reason is None and device is not None:
            reason = candidate.declines(
                "norm_stats", torch.empty(1, 8, 1, 1, device=device, dtype=dtype)
            )
        rows.append((name, reason is None, reason or ""))
    return rows


def _check_name(name: str) -> str:
    if name not in _BACKENDS:
        raise ValueError(f"unknown backend {name!r}; expected one of {', '.join(_BACKENDS)}")
    return name


def _reason_against(candidate: Backend, function: str, z: Tensor) -> str | None:
    reason = candidate.unavailable_reason() or candidate.declines(function, z)
    if reason is None and not _forced and candidate.emulates(z):
        return "it would be emulated: only where it is forced"
    return reason


def select(function: str, z: Tensor, declined: dict[str, str] | None = None) -> Backend:
    """The backend that runs ``function`` on a tensor like ``z``.

    ``declined``: reasons already given for not doing it in a better way, for the report.

    Raises:
        RuntimeError: a backend is forced and declines; it never falls back silently.
    """
    candidate, reasons = find(function, z)
    if _listeners:
        report(function, candidate, z, {**(declined or {}), **reasons})
    return candidate


def report(
    function: str,
    chosen: Backend | str,
    z: Tensor,
    declined: dict[str, str] | None = None,
    fused: tuple[str, ...] = (),
) -> None:
    """Tell the listeners what runs ``function`` on ``z``: a backend, or whose kernel by name."""
    name = chosen if isinstance(chosen, str) else chosen.name
    for listener in _listeners:
        listener(Choice(function, name, tuple(z.shape), str(z.dtype), declined or {}, fused))


def find(
    function: str, z: Tensor, window: norm_race.Window | None = None, saved: str | None = None
) -> tuple[Backend, dict[str, str]]:
    """``select`` without a report: the backend, and why the ones before it do not.

    ``window``: of the max-pool behind the norm. ``saved``: see ``norm_race.lost``.
    """
    declined: dict[str, str] = {}
    lost: dict[str, str] | None = None
    for name in (_forced,) if _forced else _BACKENDS:
        candidate = _BACKENDS[name]
        reason = _reason_against(candidate, function, z)
        if reason is None and name in norm_race.RACERS and not _forced:
            if lost is None:
                lost = norm_race.lost(function, z, window, saved, lambda: _racers(function, z))
            if name in lost:
                reason = f"{lost[name]} was measured to be faster"
        if reason is None:
            return candidate, declined
        declined[name] = reason
    raise RuntimeError(
        f"backend {_forced!r} is forced but does not run {function}: {declined[_forced or '']}"
    )


def _racers(function: str, z: Tensor) -> list[Backend]:
    backends = [_BACKENDS[name] for name in norm_race.RACERS if name in _BACKENDS]
    return [b for b in backends if _reason_against(b, function, z) is None]


def chains(z: Tensor) -> bool:
    """Whether blocks in a row are worth one op: where kernels fuse across their borders.

    Told from the device alone, so that a compiler can trace it: a choice of layout, not of results.
    """
    return _forced in ("triton", "cuda", "cudnn") if _forced else z.device.type == "cuda"


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend for everything inside, in the whole process.

    Process-wide because autograd runs backward in other threads. A forced backend that cannot
    run a function raises RuntimeError.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend cannot run on this machine.
    """
    global _forced
    reason = _BACKENDS[_check_name(name)].unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@contextlib.contextmanager
def listen(listener: Callable[[Choice], None]) -> Iterator[None]:
    """Call ``listener`` with each choice made inside."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


if os.environ.get("RESFAST_BACKEND"):
    _forced = _check_name(os.environ["RESFAST_BACKEND"])

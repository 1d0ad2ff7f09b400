"""Several processes of one gloo group that run a list of checks, for the tests of distributed work.

Starting a process imports torch, so one start serves many checks. A check is a function without
arguments that every rank calls; it fails if it raises on any of them.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVE_LIMIT = datetime.timedelta(seconds=30)


def run_checks(
    checks: Sequence[Callable[[], None]], folder: Path, size: int = 2, limit_s: float = 300
) -> dict[str, list[str]]:
    """Name of a check → what went wrong on each rank, "" for nothing."""
    start: Any = multiprocessing.get_context("spawn")
    ranks = [start.Process(target=_run, args=(checks, folder, r, size)) for r in range(size)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + limit_s
    for process in ranks:
        process.join(max(0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
    return {c.__name__: [_outcome(folder, c, r) for r in range(size)] for c in checks}


def _outcome(folder: Path, check: Callable[[], None], rank: int) -> str:
    path = folder / f"{check.__name__}.{rank}"
    return path.read_text() if path.exists() else "it never came to an end"


def _run(checks: Sequence[Callable[[], None]], folder: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    for check in checks:
        # a group for each: one that a failure left out of step does not spoil the next
        store = f"file://{folder / check.__name__}.store"
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=size, timeout=COLLECTIVE_LIMIT
        )
        try:
            torch.manual_seed(0)
            check()
            outcome = ""
        except BaseException:  # pytest's own failures are no Exceptions
            outcome = traceback.format_exc()
        (folder / f"{check.__name__}.{rank}").write_text(outcome)
        with contextlib.suppress(RuntimeError):  # after a failure the ranks may be out of step
            # who leaves first closes connections that the other may still be opening
            dist.barrier()
        dist.destroy_process_group()

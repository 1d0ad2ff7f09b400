"""Several processes, for the tests of distributed work: that run a list of checks, or the command.

Starting a process imports torch, so one start serves many checks. A check is a function without
arguments that every rank calls; it fails if it raises on any of them.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from resfast.training.checkpoint import CheckpointFolder
from resfast.training.distributed import Ranks

COMMAND_LIMIT_S = 120
COLLECTIVE_LIMIT = datetime.timedelta(seconds=30)


class Checks(list):
    """Marks functions, as a decorator, for every rank to run."""

    def __call__(self, check: Callable[[], None]) -> Callable[[], None]:
        self.append(check)
        return check


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


def train_on_two(*options: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    """`resfast train` under torchrun; the fault is faulty_rank.py's."""
    with socket.socket() as free:  # for the rendezvous: a plain torchrun does not find one itself
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = [str(Path(__file__).with_name("faulty_rank.py"))] if fault else ["-m", "resfast.cli"]
    launcher = f"-m torch.distributed.run --nproc-per-node 2 --master-port {port} --max-restarts"
    command = [sys.executable, *launcher.split(), "1" if "KILL" in fault else "0", *worker, "train"]
    return subprocess.run(
        [*command, *options],
        env=os.environ | {"FAULT": fault, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=COMMAND_LIMIT_S,
    )


# ---- what checks ask for


def ranks_here() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size())


def every(value: Any) -> list:
    """What each rank has, on all."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def shared_folder() -> Path:
    return Path(ranks_here().share(tempfile.mkdtemp()))


def latest_checkpoint(folder: Path) -> dict[str, Any]:
    """Rank 0's, which alone knows when it is written."""
    ranks = ranks_here()
    return ranks.share(None if ranks.rank else CheckpointFolder(folder).load_latest()[0])


# ---- in the processes


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

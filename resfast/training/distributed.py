"""Training in several processes that torchrun started, each on its part of every batch."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resfast.nn import convert_sync_batchnorm
from resfast.training.config import OptionError, TrainConfig, UserError, resolve_device

# For a rank that hangs: torchrun sees at once when one dies. Ranks wait for each other longest
# while they read their data.
TIMEOUT = datetime.timedelta(minutes=10)
# Seconds that a rank outlives the one it lost: torchrun, which looks ten times a second, then names
# that one as the cause.
GRACE = 1.0


@dataclass(frozen=True)
class Ranks:
    """This process, `rank` of `size`. Methods that communicate are for all ranks to call together.

    Alone, it talks to nobody, and hands back what it gets.
    """

    rank: int = 0
    size: int = 1

    def part(self, batch: Tensor) -> Tensor:
        """This rank's rows of a batch; ranks have equally many, or the first ones one more."""
        return batch.tensor_split(self.size)[self.rank] if self.size > 1 else batch

    def rows(self, batch: Tensor, parts: int) -> list[Tensor]:
        """This rank's rows of each part of a batch.

        Parts are of equal size, or one more: none may be left with a single image.
        """
        return [self.part(part) for part in batch.tensor_split(parts)]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def highest(self, value: int) -> int:
        """Over the CPU, so that no GPU is waited for."""
        if self.size == 1:
            return value
        highest = torch.tensor(value)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    def share(self, value: Any) -> Any:
        """What rank 0 has."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def union(self, values: dict[str, str]) -> dict[str, str]:
        """What any rank has; of a key that several have, the last one's value."""
        if self.size == 1:
            return values
        each: list[dict[str, str]] = [{}] * self.size
        dist.all_gather_object(each, values)
        return {key: value for one in each for key, value in one.items()}

    def first(self, problem: str | None) -> str | None:
        """What the first rank that has a problem says, on all ranks."""
        if not self.highest(int(problem is not None)):
            return None
        told = {} if problem is None else {str(self.rank): problem}
        rank, problem = next(iter(self.union(told).items()))
        return f"rank {rank}: {problem}" if int(rank) else problem

    def equalise(self, tensors: Iterable[Tensor]) -> None:
        """Makes them rank 0's, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def wrap(self, model: nn.Module, device: torch.device, sync_bn: bool) -> nn.Module:
        """DistributedDataParallel; rank 0's weights become everyone's, norms SyncBatchNorm."""
        if self.size == 1:
            return model
        devices = None if device.type == "cpu" else [device]
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=devices)
        if sync_bn:  # not before: on CPU, where only resfast has it, it would be refused
            convert_sync_batchnorm(model)
        return wrapped

    def device(self, name: str) -> torch.device:
        """The device that option --device means on this rank: of GPUs each rank has its own."""
        device: torch.device = resolve_device(name)
        if self.size == 1 or device.type == "cpu":
            return device
        if ":" in name:
            raise OptionError(f"--device {name} is one GPU for {self.size} ranks; give cuda")
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise OptionError(f"--device {name}: more ranks on this machine than its {count} GPUs")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def check(self, config: TrainConfig) -> None:
        """OptionError where a rank would have too few images for its norms."""
        least = 1 if config.sync_bn else 2
        smallest = config.batch_size // (config.accumulate * self.size)
        if self.size > 1 and smallest < least:
            parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
            remedy = "" if config.sync_bn else ", or --sync-bn"
            raise OptionError(
                f"--batch-size {config.batch_size}{parts} leaves {smallest} image(s) to one of "
                f"{self.size} ranks; its norms need {least}{remedy}"
            )

    def seed(self, seed: int, step: int) -> None:
        """Random numbers of a step, for dropout: rank 0's are saved, the others' come from here."""
        if self.rank:
            digest = hashlib.sha256(repr((seed, self.rank, step)).encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one rank fails on all, and is told once.

        The first rank that failed raises its error, the others leave with its exit status.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        statuses: list[int | None] = [None] * self.size
        status = None if error is None else getattr(error, "exit_code", 1)
        if self.size == 1:
            statuses = [status]
        else:
            dist.all_gather_object(statuses, status)
        failed = [rank for rank, status in enumerate(statuses) if status is not None]
        if not failed:
            return
        if error is None or self.rank != failed[0]:
            raise SystemExit(statuses[failed[0]])
        if isinstance(error, UserError) and len(failed) < self.size:
            raise type(error)(f"rank {self.rank}: {error}") from error
        raise error

    @contextlib.contextmanager
    def contact(self) -> Iterator[None]:
        """Turns the many errors of a connection whose other end is gone into one line."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            time.sleep(GRACE)
            raise UserError(f"rank {self.rank} lost contact: another rank has ended") from error

    def leave(self) -> None:
        """Ends the group, once every rank has come here."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def drop(self) -> None:
        """Ends the group on this rank alone, after an error.

        Gloo's threads may abort a process that ends with them running; NCCL's would wait here for
        ranks that are dead.
        """
        if self.size > 1 and dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()


def join() -> Ranks:
    """The ranks of this torchrun job, over gloo, and NCCL where there are GPUs; else one alone."""
    launched = dist.is_available() and dist.is_torchelastic_launched()
    if not launched or os.environ["WORLD_SIZE"] == "1":
        return Ranks()
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # torchrun's plain rendezvous keeps its store over a restart, with the addresses of the
        # dead. Machines may have started again unequally often, but of several each start is new.
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
    )
    return Ranks(rank, size)


def job() -> str | None:
    """Names the torchrun that started this process, the same when it starts its workers again."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    parent = os.getppid()
    # torchrun's start: numbers of processes come again, in containers above all
    status = Path(f"/proc/{parent}/stat")
    started = status.read_text().rpartition(")")[2].split()[19] if status.exists() else ""
    return f"{run_id} {socket.gethostname()} {parent} {started}"

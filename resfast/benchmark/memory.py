"""Bytes a training step holds: what autograd saves, and the process's or the device's peak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from resfast.benchmark.peers import PEERS
from resfast.benchmark.work import Contender, Work


def saved_bytes(contender: Contender) -> int:
    """Bytes autograd keeps for the backward of a step, each storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in contender.module.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), t)  # t keeps the address in use
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        contender.step()
    return sum(size for size, _ in kept.values())


def peak_bytes(work: Work, peer: str) -> int:
    """Highest memory of a step above what was held before it, in a process of its own.

    On CUDA what the allocator handed out; on CPU the resident set, allocator's slack included.
    """
    command = [sys.executable, "-m", __name__, json.dumps({**work.__dict__, "peer": peer})]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"{peer} {work}: {answer.stderr.strip().splitlines()[-1]}")
    return int(answer.stdout.split()[-1])


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def _measure(work: Work, peer: str) -> int:
    """CUDA: of the third step; CPU: of the first, before which the allocator holds nothing."""
    contender = PEERS[peer].build(work, work.build())
    if work.device.startswith("cuda"):
        for _ in range(2):
            contender.step()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contender.step()
        return torch.cuda.max_memory_allocated() - before
    before = _resident("VmRSS")
    contender.step()
    return _resident("VmHWM") - before


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    name = request.pop("peer")
    print(_measure(Work(**request), name))

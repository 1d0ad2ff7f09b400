"""`resfast bench`: one work item, every peer that can run it, one race; a record to keep."""

from __future__ import annotations

import gc
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from resfast import native
from resfast.benchmark import floor, memory
from resfast.benchmark.peers import OURS, PEERS, forget_compiled
from resfast.benchmark.timing import REST_SECONDS, race, timer_for
from resfast.benchmark.work import Contender, Errors, Work, errors, excess
from resfast.diagnostics.environment import device_info, now, versions
from resfast.training.checkpoint import write_atomically
from resfast.training.config import OptionError

SCHEMA = 1
Say = Callable[[str], object]


def choose(peers: str) -> list[str]:
    """`all`, `default` or names separated by commas → names, resfast's own first."""
    if peers == "all":
        return list(PEERS)
    if peers == "default":
        return [OURS, *(p.name for p in PEERS.values() if p.default)]
    names = [name.strip() for name in peers.split(",") if name.strip()]
    for name in names:
        if name not in PEERS:
            raise OptionError(f"unknown peer {name!r}; known: {', '.join(PEERS)}")
    return [OURS, *(n for n in names if n != OURS)]


def measure(
    work: Work, peers: Sequence[str], *, budget: float = 10.0, roofline: bool, say: Say
) -> dict[str, Any]:
    """Race `work` on every peer that can run it, about `budget` seconds each. The record's rows
    hold only contenders whose results were first found right; the others are under "skipped".
    """
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    contenders: dict[str, Contender] = {}
    found: dict[str, Errors] = {}
    forget_compiled()
    model = work.build()
    say(f"{work}: float64 reference")
    reference = work.reference(model)
    limits = work.limits(model, reference)
    for name in peers:
        peer = PEERS[name]
        reason = peer.why_not(work)
        if reason is None:
            say(f"{work}: preparing {peer.title}")
            try:
                contender = peer.build(work, model)
                found[name] = errors(contender.results(), reference)
                reason = excess(found[name], limits)
            except Exception as error:
                if name == OURS:
                    raise
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if reason is None:
                contenders[name] = contender
                continue
            if name == OURS:
                raise RuntimeError(f"resfast: {reason}")
        skipped.append({"peer": name, "reason": reason})
        say(f"  left out {name}: {reason}")
    del reference
    gc.collect()
    result = race(
        {name: c.step for name, c in contenders.items()},
        budget=budget * len(contenders),
        warmup=1,  # each has run once for its results
        timer=timer_for(work.device),
        rest=REST_SECONDS if any(PEERS[n].spins for n in contenders) else 0.0,
        on_round=lambda done, total: say(f"{work}: round {done} of {total}"),
    )
    assert result is not None
    limit = _roofline(work) if roofline else None
    for name in contenders:
        seconds = result.median(name)
        row = {
            "peer": name,
            "ms": 1e3 * seconds,
            "ms_per_image": 1e3 * seconds / work.batch,
            "images_per_second": work.batch / seconds,
            "spread": result.spread(name),
            "relative_error": found[name]._asdict(),
            "samples_ms": [round(1e3 * s, 4) for s in result.seconds[name]],
        }
        if name != OURS:
            row |= result.ratio(OURS, name).to_dict()
        if limit is not None:
            row["share_of_floor"] = limit["seconds"] / seconds
        rows.append(row)
    record = {
        "work": {**work.__dict__, "name": str(work)},
        "rows": rows,
        "skipped": skipped,
        "floor": limit,
    }
    if work.training:
        record["saved_bytes_per_image"] = {
            name: memory.saved_bytes(c) / work.batch for name, c in contenders.items()
        }
    return record


def _roofline(work: Work) -> dict[str, Any]:
    ceilings, costs = floor.measure_ceilings(work.device, work.dtype), floor.costs(work)
    return {
        "ceilings": ceilings.to_dict(),
        "bytes": sum(c.bytes for c in costs),
        "operations": sum(c.operations for c in costs),
        "seconds": ceilings.seconds(costs),
    }


def header(device: str) -> dict[str, Any]:
    """Where and when: device, clocks where they can be read, versions of everything measured."""
    return {
        "kind": "resfast bench",
        "schema": SCHEMA,
        "date": now(),
        "versions": versions() | _peer_versions(),
        "device": device_info(torch.device(device)) | _clocks(device),
        "isa": native.cpu_isa(),
    }


def _peer_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("onnxruntime", "openvino", "triton", "apex", "torchvision"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _clocks(device: str) -> dict[str, Any]:
    """MHz now: of the GPU's multiprocessors and memory, or the fastest core's."""
    if device.startswith("cuda"):
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            sm, mem = answer.splitlines()[0].split(",")
            return {"sm_mhz": float(sm), "memory_mhz": float(mem)}
        except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
            return {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return {"mhz": max(float(x.split(":")[1]) for x in lines if x.startswith("cpu MHz"))}
    except (OSError, ValueError):
        return {}


def save(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())

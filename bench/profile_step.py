"""Where a training step's time goes: resfast and its unfused twin under torch.profiler.

    python bench/profile_step.py --model resnet50 --batch 64 --dtype bfloat16 --out DIR

Writes profile.json, the kernels (on CPU: operators) by their own time, and one Chrome trace each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import resfast
from resfast.benchmark.work import Work, in_format
from resfast.diagnostics.environment import device_info, now, versions

WARMUP = 5
ROWS = 40
TRACE_BYTES = 6 << 20


def profiled(step: Callable[[], object], device: torch.device, steps: int) -> profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for _ in range(min(WARMUP, steps)):
        step()
    with profile(activities=activities) as result:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return result


def by_time(result: profile, device: torch.device, steps: int) -> dict[str, Any]:
    """Time of one step and its largest parts; on a GPU kernels, not the operators they are in."""
    rows = []
    for event in result.key_averages():
        if device.type == "cuda":
            if event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            microseconds = event.self_device_time_total
        else:
            microseconds = event.self_cpu_time_total
        if microseconds > 0:
            row = {"name": event.key, "calls": event.count / steps}
            rows.append(row | {"ms": microseconds / 1e3 / steps})
    rows.sort(key=lambda row: -row["ms"])
    total = sum(row["ms"] for row in rows)
    top = [row | {"share": row["ms"] / total} for row in rows[:ROWS]]
    return {"ms": total, "calls": sum(row["calls"] for row in rows), "rows": top}


def trace(result: profile, path: Path) -> str:
    """The file's name, or why there is none."""
    result.export_chrome_trace(str(path))
    size = path.stat().st_size
    if size > TRACE_BYTES:
        path.unlink()
        return f"left out: {size:,} bytes, over {TRACE_BYTES:,}"
    return path.name


def show(name: str, record: dict[str, Any], rows: int = 15) -> None:
    print(f"{name}: {record['ms']:.2f} ms a step in {record['calls']:.0f} calls")
    for row in record["rows"][:rows]:
        print(f"  {row['ms']:9.3f} ms {row['share']:6.1%} {row['calls']:7.1f}×  {row['name'][:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=3, help="profiled steps (default: 3)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    work = Work(options.model, options.batch, True, options.image, options.dtype, options.device)
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"date": now(), "versions": versions(), "device": device_info(device)}
    record |= {"work": {**work.__dict__, "name": str(work)}, "steps": options.steps}
    model = work.build()
    twin = in_format(resfast.unfused(model), torch.channels_last)
    for name, module in (("resfast", model), ("unfused", twin)):
        contender = work.contender(module, module, work.batches())
        result = profiled(contender.step, device, options.steps)
        record[name] = by_time(result, device, options.steps)
        record[name]["trace"] = trace(result, options.out / f"profile-{name}.trace.json.gz")
        show(name, record[name])
    (options.out / "profile.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

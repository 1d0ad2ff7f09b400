"""Build, test, check and measure on a GPU machine that has no network: one command, in stages.

    python bench/gpu_run.py --out build/gpu-run --stage build,test
    python bench/gpu_run.py --out build/gpu-run --stage models --resume --pack results.tar.gz

Each stage ends within --timeout seconds, so that each fits into one call on a machine whose calls
are short; what a stage had no time for, the next call with --resume does. summary.json is renewed
after every stage. Nothing is installed and no setting of the card is changed: libraries are built
beside their sources, and build/importable holds links that stand for an installation.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
IMPORTABLE = ROOT / "build" / "importable"
POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0  # from asking a process to end to ending it

DTYPES = ("bfloat16", "float16", "float32")
QUICK_TESTS = (
    *("tests/test_backends.py", "tests/test_native_norm.py", "tests/test_cuda_ops.py"),
    "tests/test_build.py",
)
# Tuning takes minutes and a record is written when all its peers are done: a race of its own.
PEERS = (
    *("eager-nhwc", "eager-nchw", "compile", "compile-freezing", "cuda-graph", "cudnn-fused"),
    *("cudnn-norms", "apex", "memory-efficient", "optimized"),
)
TUNED_PEERS = ("eager-nhwc", "compile-autotune")
PEER_SECONDS = 6
# most important first: (kind, model, batch, dtype)
WORKS = [
    *(("train", "resnet50", 256, dtype) for dtype in ("bfloat16", "float16")),
    *(("train", "resnet50", 64, dtype) for dtype in ("bfloat16", "float16")),
    *(("infer", "resnet50", batch, "float16") for batch in (1, 32, 128)),
    *(("train", "resnet18", b, dtype) for b in (256, 64) for dtype in ("bfloat16", "float16")),
    *(("infer", "resnet18", batch, "float16") for batch in (1, 32, 128)),
]
TUNED_WORKS = [WORKS[0], WORKS[4], WORKS[6]]
# How far norms are fused into convolutions, and whose convolutions run; "c" and "auto" are what
# the works above run with.
FUSIONS = [
    *((step, "auto") for step in ("b", "c0", "c+")),
    *((step, "own") for step in ("c0", "c")),
    ("b", "library"),
]

# What the machine is, asked of a fresh process: a library that was just built counts.
FACTS = """
import json, sys, torch
from resfast import native
from resfast.diagnostics.environment import device_info, now, versions
from resfast.training.config import resolve_device
device = resolve_device(sys.argv[1])
library = {"available": native.is_available(), "reason": native.load_error()}
library["build"] = native.build_info()
print(json.dumps({"date": now(), "versions": versions(), "device": device_info(device),
                  "native": library}))
"""
# Every op in every form once, forward and backward, by kernels that fuse little and much.
EVERY_OP = """
import sys, torch
import resfast.ops
from resfast.testing import op_cases
for dtype, step in ((torch.float32, "c+"), (torch.bfloat16, "c"), (torch.bfloat16, "b")):
    for case in op_cases(True) + op_cases(False):
        tensors = case.inputs(0, dtype, sys.argv[1])
        with resfast.fusion(step, "own"):
            y = case.run(resfast.ops, tensors, None, "nhwc")["y"]
            case.run(resfast.ops, tensors, torch.ones_like(y), "nhwc")
"""
# every op once more: by the CUDA C++ kernels, which come after Triton's where nothing is forced
CUDA_CPP = {"RESFAST_BACKEND": "cuda"}
# and through cuDNN's graphs: whether they are given the memory that they take
CUDNN = {"RESFAST_BACKEND": "cudnn"}
# small tensors: measuring tiles for them would take the stage's time
UNTUNED = {"RESFAST_TUNE": "never"}


class NotRun(Exception):
    """Why a stage cannot run; `status` is what that means for it."""

    def __init__(self, reason: str, status: str = "skipped") -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Options:
    out: Path
    device: str = "cuda"
    dry_run: bool = False
    resume: bool = False
    timeout: float = 480.0
    facts: dict[str, Any] = field(default_factory=dict)  # renewed by a build

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Job:
    """One command of a stage. `result` is the file it writes: with --resume, done if there.

    It is not started with fewer than `needs` seconds left. `fine`: its good exit statuses.
    """

    name: str
    argv: Sequence[str]
    result: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    limit: float = math.inf
    needs: float = 0.0
    fine: tuple[int, ...] = (0,)


class Done(NamedTuple):
    """`status`: the exit status, None if it ran out of time."""

    status: int | None
    last_line: str


# ---- processes


def run_command(argv: Sequence[str], log: Path, timeout: float, env: Mapping[str, str]) -> Done:
    """Run in the project's root, output shown and appended to `log`; nothing of it stays behind."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink, log.open("rb") as source:
        source.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            argv, cwd=ROOT, env=env, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + timeout
        said = b""
        try:
            while not (ended := has_ended(process)) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                said = echo(source, said)
        finally:
            end_group(process)
            said = echo(source, said)
    lines = said.decode(errors="replace").strip().splitlines()
    return Done(process.returncode if ended else None, lines[-1].strip() if lines else "")


def has_ended(process: subprocess.Popen) -> bool:
    """Without reaping it, so that its group's number stays taken and the group can be ended."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def end_group(process: subprocess.Popen) -> None:
    """End the process and all of its group: politely at first, if it still runs."""
    if not has_ended(process):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while not has_ended(process) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def echo(source: Any, before: bytes) -> bytes:
    """Print what is new; the end of all that was said."""
    new: bytes = source.read()
    if new:
        print(new.decode(errors="replace"), end="", flush=True)
    return (before + new)[-2000:]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a child: resfast from `IMPORTABLE`, not from the folder that a module is run in."""
    paths = [str(IMPORTABLE), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **ours, **(extra or {})}


def make_importable() -> None:
    """Links to what is in resfast/, and `kernels/` as resfast.kernels, as pyproject.toml has it."""
    package = IMPORTABLE / "resfast"
    package.mkdir(parents=True, exist_ok=True)
    for link in package.iterdir():
        if not link.exists():
            link.unlink()
    for source in [*(ROOT / "resfast").iterdir(), ROOT / "kernels"]:
        link = package / source.name
        if source.name != "__pycache__" and not link.is_symlink():
            link.symlink_to(source)


def ask_facts(device: str) -> dict[str, Any]:
    make_importable()
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FACTS, device],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        raise NotRun((answer.stderr.strip().splitlines() or ["no answer"])[-1], "failed")
    facts: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return facts


# ---- stages: what to run


def resfast_cli(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "resfast.cli", *arguments]


def pytest_on(*arguments: str) -> list[str]:
    if importlib.util.find_spec("pytest") is None:
        raise NotRun("pytest is not installed")
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def build(options: Options) -> list[Job]:
    missing = missing_for_build()
    if missing:
        built = options.facts["native"]["available"]
        raise NotRun(f"not installed: {', '.join(missing)}", "skipped" if built else "failed")
    env = {}
    if options.on_gpu and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        capability = options.facts["device"]["capability"]
        # Hopper's own instructions need the a
        env["TORCH_CUDA_ARCH_LIST"] = {"9.0": "9.0a"}.get(capability, capability)
    in_place = ("egg_info", "--egg-base", str(IMPORTABLE), "build_ext", "--inplace")
    return [Job("build", [sys.executable, "setup.py", *in_place], env=env)]


def missing_for_build() -> list[str]:
    """What setup.py needs and this Python lacks."""
    missing = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found = importlib.metadata.version("setuptools")
        if int(found.split(".")[0]) < 77:
            missing.append(f"setuptools>=77 (there is {found})")
    missing += [m for m in ("setuptools", "pybind11") if importlib.util.find_spec(m) is None]
    if importlib.util.find_spec("ninja") is None and not shutil.which("ninja"):
        missing.append("ninja")
    return missing


def test(options: Options) -> list[Job]:
    """The tests that need a GPU, then a few files that say whether the build is sound."""

    def run(name: str, *arguments: str) -> Job:
        report = f"test-{name}.xml"
        argv = pytest_on(*arguments, f"--junitxml={options.out / report}")
        return Job(name, argv, report, UNTUNED, fine=(0, 5))  # 5: there are no such tests

    files = QUICK_TESTS[:1] if options.dry_run else QUICK_TESTS
    # without a GPU the tests of kernels take minutes in Triton's interpreter and compiled for a CPU
    few = ("-k", "not triton and not cuda_kernels") if options.dry_run else ()
    return [run("cuda", "-m", "cuda", *few, "tests"), run("quick", "-m", "not cuda", *files)]


def check(options: Options) -> list[Job]:
    """A report for each dtype, so that a stage may end between them; every backend is in it."""
    quick = ["--quick"] if options.dry_run else []
    jobs = []
    for dtype in ("float32",) if options.dry_run else (*DTYPES, "float64"):
        result = f"check-{dtype}.json"
        where = ("--device", options.device, "--out", str(options.out / result))
        argv = resfast_cli("check", "--dtype", dtype, *quick, *where)
        jobs.append(Job(dtype, argv, result, UNTUNED, needs=min(60, options.timeout / 2)))
    return jobs


def sanitize(options: Options) -> list[Job]:
    if not options.on_gpu:
        raise NotRun("needs a GPU")
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    sanitizer = shutil.which("compute-sanitizer", path=path)
    if sanitizer is None:
        raise NotRun("compute-sanitizer is not installed")
    program = [sys.executable, "-c", EVERY_OP, options.device]
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **UNTUNED}
    runs = [
        (name, tool, forced)
        for tool in ("memcheck", "racecheck")
        for name, forced in ((tool, {}), (f"{tool}-cuda", CUDA_CPP))
    ]
    if importlib.util.find_spec("cudnn") is not None:
        runs.append(("memcheck-cudnn", "memcheck", CUDNN))
    return [
        Job(name, [sanitizer, "--tool", tool, "--error-exitcode", "9", *program], env=env | forced)
        for name, tool, forced in runs
    ]


def tiles(options: Options) -> list[Job]:
    """Tiles measured once, kept with the results; the stages after it use them."""
    if not options.on_gpu:
        raise NotRun("needs a GPU")
    if options.resume and list(options.out.glob("tiles-*.json")):
        raise NotRun("there are tiles already; what they lack is measured at its first use", "ok")
    return [
        Job(
            f"{model}-{dtype}",
            resfast_cli(
                *("tune", "--model", model, "--batch", "256", "--train", "--dtype", dtype),
                *("--device", options.device, "--step", "c0", "--step", "c", "--step", "c+"),
            ),
            env=tiles_in(options),
            needs=min(120, options.timeout / 2),
        )
        for model, dtype in (("resnet50", "bfloat16"), ("resnet50", "float16"))
    ]


def tiles_in(options: Options) -> dict[str, str]:
    return {"RESFAST_CACHE_DIR": str(options.out)}


def ops(options: Options) -> list[Job]:
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise NotRun("pytest-benchmark is not installed")
    if not (ROOT / "bench" / "test_ops.py").exists():
        raise NotRun("there is no bench/test_ops.py")
    few = ["-k", "stem_pool and infer"] if options.dry_run else []
    jobs = []
    for dtype in ("float32",) if options.dry_run else DTYPES:
        result = f"ops-{dtype}.json"
        argv = pytest_on("bench/test_ops.py", "--benchmark-only", "--device", options.device, *few)
        argv += ["--dtypes", dtype, "--budget", "0.02" if options.dry_run else "0.5"]
        argv += [f"--benchmark-json={options.out / result}"]
        needs = min(180, options.timeout / 2)
        jobs.append(Job(dtype, argv, result, tiles_in(options), needs=needs))
    return jobs


def models(options: Options) -> list[Job]:
    if options.dry_run:
        return [
            race(options, (kind, "resnet18", 1, "float32"), TUNED_PEERS[:1], 0.2, image=64)
            for kind in ("train", "infer")
        ]
    tuned = [race(options, work, TUNED_PEERS, PEER_SECONDS, "-tuned") for work in TUNED_WORKS]
    fused = [
        race(options, WORKS[0], ("eager-nhwc",), PEER_SECONDS, f"-{step}-{convolutions}")
        for step, convolutions in FUSIONS
    ]
    return (
        [race(options, work, PEERS, PEER_SECONDS) for work in WORKS[:1]]
        + fused
        + [race(options, work, PEERS, PEER_SECONDS) for work in WORKS[1:]]
        + tuned
    )


def race(
    options: Options,
    work: tuple[str, str, int, str],
    peers: Sequence[str],
    budget: float,
    suffix: str = "",
    image: int = 224,
) -> Job:
    """`resfast bench` of one work item, with time enough for what torch.compile does first."""
    kind, model, batch, dtype = work
    name = f"{kind}-{model}-b{batch}-{dtype}{suffix}"
    result = f"models-{name}.json"
    argv = resfast_cli("bench", "--model", model, f"--{kind}", "--batch", str(batch))
    argv += ["--image", str(image), "--dtype", dtype, "--device", options.device]
    argv += ["--peers", ",".join(peers), "--budget", str(budget), "--floor"]
    argv += ["--save", str(options.out / result)]
    env = tiles_in(options)
    if suffix.startswith("-") and suffix != "-tuned":
        step, convolutions = suffix[1:].split("-")
        env |= {"RESFAST_FUSION_STEP": step, "RESFAST_CONVOLUTIONS": convolutions}
    limit = 420 if suffix == "-tuned" else 300
    return Job(name, argv, result, env, limit, needs=min(limit / 2, options.timeout / 2))


def profile(options: Options) -> list[Job]:
    argv = [sys.executable, "bench/profile_step.py", "--device", options.device]
    argv += ["--out", str(options.out)]
    if options.dry_run:
        argv += ["--model", "resnet18", "--batch", "1", "--image", "64", "--steps", "1"]
    return [Job("profile", argv, "profile.json", tiles_in(options))]


# ---- stages: what to say of them afterwards


def report_build(options: Options, entry: dict[str, Any]) -> None:
    """build.json; a stage without its library has failed."""
    options.facts.update(ask_facts(options.device))
    native = options.facts["native"]
    cuda = native["build"].get("cuda", {})
    if not native["available"]:
        entry |= {"status": "failed", "reason": native["reason"]}
    elif options.on_gpu and not cuda.get("built"):
        entry |= {"status": "failed", "reason": f"CUDA library not built: {cuda.get('reason')}"}
    outcome = {key: entry[key] for key in ("status", "reason", "seconds")}
    write_json(options.out / "build.json", options.facts | outcome)


def report_test(options: Options, entry: dict[str, Any]) -> None:
    """test.json: counts and the names of what failed."""
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    failed = []
    for path in sorted(options.out.glob("test-*.xml")):
        suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
        for key in counts:
            counts[key] += sum(int(suite.get(key, 0)) for suite in suites)
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                failed.append(f"{case.get('classname')}.{case.get('name')}")
    write_json(options.out / "test.json", options.facts | counts | {"failed": failed})
    if failed:
        entry["reason"] = f"{len(failed)} of {counts['tests']} failed: {', '.join(failed)[:200]}"


class Stage(NamedTuple):
    jobs: Callable[[Options], list[Job]]
    report: Callable[[Options, dict[str, Any]], None] = lambda options, entry: None


STAGES = {
    "build": Stage(build, report_build),
    "test": Stage(test, report_test),
    "check": Stage(check),
    "sanitize": Stage(sanitize),
    "tiles": Stage(tiles),
    "ops": Stage(ops),
    "models": Stage(models),
    "profile": Stage(profile),
}


# ---- running them


def run_stage(name: str, options: Options, entry: dict[str, Any]) -> None:
    """Fill in `entry`, the stage's place in the summary, as the stage goes."""
    start = time.monotonic()
    entry |= {"status": "failed", "reason": "interrupted", "date": date(), "jobs": []}
    log = options.out / f"{name}.log"
    try:
        jobs = STAGES[name].jobs(options)
        if not options.resume:
            log.unlink(missing_ok=True)
        for job in jobs:
            left = options.timeout - (time.monotonic() - start)
            entry["jobs"].append(run_job(job, log, left, options))
        entry |= verdict(entry["jobs"])
        entry["seconds"] = round(time.monotonic() - start, 1)
        STAGES[name].report(options, entry)
    except NotRun as why:
        entry |= {"status": why.status, "reason": str(why)}
    finally:
        entry["seconds"] = round(time.monotonic() - start, 1)
        entry["files"] = files_of(name, options.out)


def run_job(job: Job, log: Path, left: float, options: Options) -> dict[str, Any]:
    """What became of it. The result of a job that failed is set aside as *.failed.*."""
    result = options.out / job.result if job.result else None
    said = {"name": job.name, "status": "kept", "reason": None, "seconds": 0.0}
    if options.resume and result and result.exists():
        return said
    if left < max(job.needs, POLL_SECONDS):
        return said | {"status": "not run", "reason": "no time left"}
    failed = result and result.with_name(f"{result.stem}.failed{result.suffix}")
    for stale in filter(None, (result, failed)):
        stale.unlink(missing_ok=True)
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(job.argv)}\n")
    print(f"==== {log.stem}: {job.name}", flush=True)
    start = time.monotonic()
    limit = min(left, job.limit)
    done = run_command(job.argv, log, limit, environment(job.env))
    said["seconds"] = round(time.monotonic() - start, 1)
    if done.status in job.fine:
        return said | {"status": "ok"}
    if result and failed and result.exists():
        result.replace(failed)
    if done.status is None:
        return said | {"status": "timeout", "reason": f"ended after {limit:.0f} s"}
    return said | {"status": "failed", "reason": f"exit status {done.status}: {done.last_line}"}


def verdict(jobs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Status and reason of a stage: its jobs' worst; work left over is no failure."""
    statuses = {job["status"] for job in jobs}
    status = next((s for s in ("failed", "timeout") if s in statuses), "ok")
    if statuses == {"not run"}:
        status = "skipped"
    told = [f"{job['name']}: {job['reason']}" for job in jobs if job["reason"]]
    return {"status": status, "reason": "; ".join(told) or None}


def files_of(stage: str, out: Path) -> list[str]:
    return [p.name for p in sorted(out.iterdir()) if re.match(rf"{stage}[.-]", p.name)]


def date() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, renamed to `path` at the end: readers see the old file or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def read_stages(path: Path) -> dict[str, Any]:
    """The stages that earlier calls left in the summary."""
    try:
        stages: dict[str, Any] = json.loads(path.read_text())["stages"]
    except (OSError, ValueError, KeyError):
        return {}
    return stages


def pack(out: Path, names: Sequence[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary, tarfile.open(temporary, "w:gz") as archive:
        for name in names:
            archive.add(out / name, arcname=name)


def run(stages: Sequence[str], options: Options, pack_into: Path | None = None) -> int:
    """Run the stages in order; 1 if any failed or ran out of time."""
    path = options.out / "summary.json"
    known = read_stages(path)
    for name in stages:
        entry = known[name] = {}
        try:
            run_stage(name, options, entry)
        finally:
            header = {"kind": "resfast gpu run", **options.facts, "dry_run": options.dry_run}
            write_json(path, header | {"stages": known})
            if pack_into:
                files = [f for stage in known for f in files_of(stage, options.out)]
                pack(options.out, [path.name, *files], pack_into)
    for name in stages:
        entry = known[name]
        print(f"{name:9}{entry['status']:8}{entry['seconds']:7.1f} s  {entry['reason'] or ''}")
    return int(any(known[name]["status"] in ("failed", "timeout") for name in stages))


def chosen(given: Sequence[str]) -> list[str]:
    """Stages in their order from `--stage a,b --stage c`; ValueError names an unknown one."""
    names = {name for text in given for name in text.split(",") if name}
    if unknown := names - {*STAGES, "all"}:
        raise ValueError(f"unknown stage {', '.join(sorted(unknown))}; known: {', '.join(STAGES)}")
    return [name for name in STAGES if name in names or "all" in names]


def terminated(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(STAGES)
    parser.add_argument("--stage", action="append", help=f"{names}, with commas, or all (default)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    parser.add_argument("--timeout", type=float, default=480, help="seconds a stage (default: 480)")
    parser.add_argument("--device", help="default: cuda; with --dry-run cpu")
    parser.add_argument(
        "--dry-run", action="store_true", help="every stage in miniature, on a machine without GPU"
    )
    parser.add_argument("--resume", action="store_true", help="keep results that are in --out")
    parser.add_argument(
        "--pack", type=Path, metavar="FILE", help="also keep all results in this .tar.gz"
    )
    given = parser.parse_args(argv)
    try:
        stages = chosen(given.stage or ["all"])
        device = given.device or ("cpu" if given.dry_run else "cuda")
        facts = ask_facts(device)
    except (ValueError, NotRun) as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, terminated)
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    options = Options(out, device, given.dry_run, given.resume, given.timeout, facts)
    return run(stages, options, given.pack)


if __name__ == "__main__":
    sys.exit(main())

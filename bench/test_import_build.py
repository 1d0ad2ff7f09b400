"""What people wait for before the first image: import, the first call, the build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from ratios import in_ratios, tell

from resfast.benchmark.timing import bootstrap_interval

ROOT = Path(__file__).resolve().parents[1]
BUILD_LIMIT_SECONDS = 60.0
ROUNDS = 5

FIRST_CALL = """
import time, torch, resfast
torch.set_grad_enabled(False)
x = torch.randn(1, 3, 224, 224).contiguous(memory_format=torch.channels_last)
model = resfast.resnet18().eval().to(memory_format=torch.channels_last)
model = {form}
start = time.perf_counter()
model(x)
print(time.perf_counter() - start)
"""
FORMS = {
    "resfast": "model",
    "eager": "resfast.unfused(model)",
    "compile": "torch.compile(resfast.unfused(model))",
}


def _python(code: str, **environment: str) -> tuple[float, str]:
    """Seconds that a fresh interpreter takes for `code`, and what it printed last."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return time.perf_counter() - start, (done.stdout.splitlines() or [""])[-1]


@in_ratios("import: torch alone is the peer")
def test_import(benchmark):
    rounds = []
    for _ in range(ROUNDS):
        alone, _ = _python("import torch")
        both, _ = _python("import torch, resfast")
        rounds.append(both / alone)
    tell(benchmark, rounds, interval=bootstrap_interval(rounds), torch_seconds=alone)


@in_ratios("first call")
@pytest.mark.parametrize("peer", ["eager", "compile"])
def test_first_call(benchmark, peer, tmp_path):
    """The first forward of ResNet-18 in a process, packing and compiling included."""
    rounds, seconds = [], {}
    for number in range(1 if peer == "compile" else ROUNDS):
        for form in ("resfast", peer):
            cold = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / str(number))}
            seconds[form] = float(_python(FIRST_CALL.format(form=FORMS[form]), **cold)[1])
        rounds.append(seconds["resfast"] / seconds[peer])
    tell(benchmark, rounds, last_seconds=seconds)


@in_ratios("build: 60 seconds is the peer")
def test_build(benchmark, tmp_path):
    """`pip wheel` of a fresh copy, without a CUDA toolkit: the libraries from nothing."""
    for path in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / path, tmp_path)
    for folder in ("build_backend", "csrc", "kernels", "resfast"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", "wheels", "."]
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "RESFAST_SKIP_CUDA_BUILD": "1"},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr[-2000:]
    wheel = zipfile.ZipFile(next((tmp_path / "wheels").glob("*.whl")))
    assert any(name.startswith("resfast/_C") for name in wheel.namelist()), "built nothing"
    tell(benchmark, [seconds / BUILD_LIMIT_SECONDS], seconds=seconds)

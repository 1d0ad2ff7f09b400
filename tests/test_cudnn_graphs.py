"""What cuDNN says of the graphs drawn for it: for A100 and H100, without either."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resfast.backends import cudnn_graphs

SCRIPT = Path(__file__).with_name("cudnn_plans.py")
CC = shutil.which("cc") or shutil.which("gcc")


def _cuda_header():
    roots = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    for module, folder in (
        ("nvidia", "cu13"),
        ("nvidia", "cuda_runtime"),
        ("triton", "backends/nvidia"),
    ):
        spec = importlib.util.find_spec(module)
        roots += [Path(p) / folder for p in spec.submodule_search_locations or ()] if spec else []
    return next((h for r in roots if (h := r / "include/cuda.h").exists()), None)


HEADER = _cuda_header()
pytestmark = [
    pytest.mark.skipif(
        not cudnn_graphs.installed(), reason="nvidia-cudnn-frontend is not installed"
    ),
    pytest.mark.skipif(torch.version.cuda is None, reason="a PyTorch without cuDNN"),
    pytest.mark.skipif(CC is None, reason="no C compiler"),
    pytest.mark.skipif(HEADER is None, reason="no cuda.h"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A folder with a libcuda.so.1 that finds no device and takes compiled kernels.

    Every other function says CUDA_ERROR_STUB_LIBRARY.
    """
    names = {n for n in re.findall(r"\bcu[A-Z]\w+", HEADER.read_text()) if not n.startswith("cuda")}
    loads = re.compile(r"cu(Library|Module|Kernel|Func|Link)")
    hands_out = re.compile(r"Load|GetKernel|GetFunction|GetModule|LinkCreate")
    lines = []
    for name in sorted(names):
        if not loads.match(name):
            lines.append(f"int {name}(void) {{ return 34; }}")
        elif hands_out.search(name):
            lines.append(f"int {name}(void **out) {{ *out = (void *)&{name}; return 0; }}")
        else:
            lines.append(f"int {name}(void) {{ return 0; }}")
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    build = [CC, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), "-xc", "-"]
    subprocess.run(build, input="\n".join(lines), text=True, check=True)
    return folder


@pytest.fixture(scope="module", params=[80, 90], ids=["sm_80", "sm_90"])
def answer(request, driver):
    path = os.pathsep.join(filter(None, [str(driver), os.environ.get("LD_LIBRARY_PATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(request.param)],
        env={**os.environ, "LD_LIBRARY_PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_cudnn_has_engines_for_every_graph_of_resnet50(answer):
    assert answer["asked"] > 400
    assert answer["refused"] == {}


def test_cudnn_compiles_them(answer):
    assert set(answer["compiled"].values()) == {None}, answer["compiled"]


def test_what_the_backend_declines_cudnn_does_too(answer):
    """Channels of a pixel are a multiple of 16 bytes; there are at most 2³¹ values."""
    assert answer["edges"] == {
        "(2, 4, 5, 7) float32": True,
        "(2, 4, 5, 7) bfloat16": False,
        "(2, 4, 5, 7) float16": False,
        "(2, 8, 5, 7) float32": True,
        "(2, 8, 5, 7) bfloat16": True,
        "(2, 8, 5, 7) float16": True,
        "(2, 12, 5, 7) float32": True,
        "(2, 12, 5, 7) bfloat16": False,
        "(2, 12, 5, 7) float16": False,
        "(2, 6, 5, 7) float32": False,
        "(2, 6, 5, 7) bfloat16": False,
        "(2, 6, 5, 7) float16": False,
        "1024·2^21 values": True,
        "1025·2^21 values": False,
    }


def test_its_fused_convolutions_are_fp16_with_a_rounded_affine(answer):
    """Why they are not taken (docs/numerics.md). Should this change, they may be worth it."""
    assert answer["convolutions"] == {
        "fp16, statistics": True,
        "fp16, fp16 affine": True,
        "fp16, fp32 affine": False,
        "fp16, centred": False,
        "bf16, statistics": False,
    }
    assert not answer["dbn_weight"]


def test_the_package_is_usable_but_for_a_device():
    assert cudnn_graphs.load_error() is None

"""Fixtures every test file may use."""

from __future__ import annotations

import os
import tempfile
import warnings

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # The processor's cores are divided among the workers: threads of several on one core wait for
    # each other. Before torch is imported, which reads it; processes that tests start inherit it.
    _share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _share)))

import torch

if not torch.cuda.is_available():
    # before anything imports Triton: its kernels then run on CPU tensors, in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # kernels by shape alone, whatever was measured on this machine
    os.environ.setdefault("RESFAST_TUNE", "never")
    os.environ.setdefault("RESFAST_CACHE_DIR", f"{tempfile.gettempdir()}/resfast-{os.getpid()}")

from resfast import native


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For files whose tensors are small: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def warnings_format():
    """For files that call the command line, which changes it."""
    before = warnings.formatwarning
    yield
    warnings.formatwarning = before


@pytest.fixture(params=["avx512", "avx2", "scalar"])
def isa(request):
    """Run with each instruction set the machine has."""
    if not native.is_available():
        pytest.skip(f"no native library: {native.load_error()}")
    before = native.cpu_isa()
    try:
        native._C.set_cpu_isa(request.param)
    except RuntimeError as error:
        if "is not available" not in str(error):  # anything but a chip without it is a failure
            raise
        pytest.skip(str(error))
    yield request.param
    native._C.set_cpu_isa(before)

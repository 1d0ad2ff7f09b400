"""Marks for what a test needs of the machine or the build, each with the reason it gives.

What is there and does not work is a failure, not an absence: a library that is built must load.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from resfast import native

native_library = pytest.mark.skipif(
    not native.is_available(), reason=f"no native library: {native.load_error()}"
)
CUDA_LIBRARY = Path(native.__file__).with_name("_C_cuda.so")
gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)
cuda_library = pytest.mark.skipif(
    not native.is_available() or not CUDA_LIBRARY.exists(),
    reason=f"no CUDA library: {native.cuda_library().get('reason')}",
)

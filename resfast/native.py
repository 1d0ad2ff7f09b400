"""Loads the compiled library and says why not where it cannot. Importing this never raises.

Loading registers the raw ops as ``torch.ops.resfast.norm_*``: every one writes into tensors that
the caller allocated and returns nothing. See ``csrc/library.cpp`` for their schemas. The CUDA
library adds the kernels of ``cuda_norm_*`` and ``cuda_conv_*`` and is loaded at first use.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

RAW_OPS = (
    "norm_stats",
    "norm_apply",
    "norm_backward_reduce",
    "norm_backward_apply",
    "norm_apply_max_pool",
    "max_pool",
    "norm_max_pool_backward_reduce",
    "norm_max_pool_backward_apply",
    "pointwise_weight",
    "pointwise_conv",
    "pointwise_conv_once",
    "direct_weight",
    "direct_conv",
    "im2col_dgrad",
    "im2col_wgrad",
    "bf16_weight",
    "bf16_conv",
    "winograd_weight",
    "winograd_conv",
    "winograd_conv_once",
    "winograd_wgrad",
)
# of the CUDA library
CUDA_RAW_OPS = (
    "cuda_norm_stats",
    "cuda_norm_prepare",
    "cuda_norm_coefficients",
    "cuda_norm_apply",
    "cuda_norm_backward_reduce",
    "cuda_norm_backward_apply",
    "cuda_norm_forward",
    "cuda_norm_backward",
)
# of the CUDA library too; their kernels only where it was built with CUTLASS
CUTLASS_RAW_OPS = ("cuda_conv_affine", "cuda_conv_stats")

_INSTALL = "pip install -e ."


def _load() -> tuple[ModuleType | None, str | None]:
    if os.environ.get("RESFAST_DISABLE_NATIVE", "0") not in ("", "0"):
        return None, "the native library is disabled by RESFAST_DISABLE_NATIVE; unset it"
    try:
        return importlib.import_module("resfast._C"), None
    except ModuleNotFoundError:
        return None, (
            f"the native library resfast._C is not built for this Python; run `{_INSTALL}` in a "
            "checkout of resfast, or reinstall the package"
        )
    except (ImportError, OSError) as error:
        return None, (
            f"the native library resfast._C does not load with torch {torch.__version__}: {error}; "
            f"rebuild it with `{_INSTALL}`"
        )


def _register_fakes() -> None:
    for name in RAW_OPS + CUDA_RAW_OPS + CUTLASS_RAW_OPS:
        torch.library.register_fake(f"resfast::{name}", lambda *args, **kwargs: None)


_C, _error = _load()
if _C is not None:
    _register_fakes()
_warned = False


def is_available() -> bool:
    return _C is not None


def load_error() -> str | None:
    """Why the library is not available, with what to do about it; None where it is."""
    return _error


def library_path() -> Path | None:
    """The library that is loaded; None where it is not available."""
    return None if _C is None else Path(str(_C.__file__))


def build_info() -> dict[str, Any]:
    """What was compiled in; empty where the library is not available."""
    return _C.build_info() if _C is not None else {}


def cpu_isa() -> str | None:
    """The instruction set the CPU kernels run with: avx512, avx2 or scalar."""
    return _C.cpu_isa() if _C is not None else None


def bf16_products() -> bool:
    """Whether the processor multiplies pairs of bfloat16, and the kernels that use it are there."""
    return _C is not None and torch.ops.resfast.bf16_products()


def cuda_library_path() -> Path:
    """Where the CUDA library is, if it was built."""
    return Path(__file__).with_name("_C_cuda.so")


@functools.cache
def _load_cuda() -> tuple[ctypes.CDLL | None, str | None]:
    """The CUDA library, its ops registered, or why there is none. Needs no GPU and no driver."""
    if _C is None:
        return None, _error  # the schemas of its ops are there
    path = cuda_library_path()
    if not path.exists():
        return None, build_info().get("cuda", {}).get("reason") or "it is not installed"
    try:
        library = ctypes.CDLL(str(path))
        library.resfast_cuda_build_info.restype = ctypes.c_char_p
        library.resfast_cuda_unusable.restype = ctypes.c_char_p
        library.resfast_cuda_unusable.argtypes = [ctypes.c_int]
    except (OSError, AttributeError) as error:
        return None, f"{path.name} does not load: {error}"
    return library, None


def cuda_library() -> dict[str, Any]:
    """Facts about the CUDA library, or under "reason" why there is none."""
    library, reason = _load_cuda()
    if library is None:
        return {"built": False, "reason": reason}
    return {"built": True, **json.loads(library.resfast_cuda_build_info())}


@functools.cache
def cutlass_missing() -> str | None:
    """Why the CUDA library has no CUTLASS kernels, or None."""
    library = cuda_library()
    if not library["built"]:
        return f"no CUDA library: {library['reason']}"
    reason: str | None = library["cutlass"].get("reason")
    return reason


@functools.cache
def cuda_unusable(index: int) -> str | None:
    """Why the CUDA library's kernels do not run on a device, in CUDA's words, or None."""
    library, reason = _load_cuda()
    if library is None:
        return reason
    said = library.resfast_cuda_unusable(index)
    return None if said is None else said.decode()


def warn_if_unavailable() -> None:
    """Warns once per process where the library is not available."""
    global _warned
    if _error is not None and not _warned:
        _warned = True
        warnings.warn(
            f"resfast runs without its native kernels: {_error}", RuntimeWarning, stacklevel=2
        )

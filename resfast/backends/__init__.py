"""Backends: implementations of the seven functions, and the choice among them."""

import torch

from resfast import native
from resfast.backends.fusion import fusion
from resfast.backends.packed import clear_packed_weights
from resfast.backends.scratch import clear_scratch
from resfast.backends.select import available, backend, names

__all__ = ["available", "backend", "clear_caches", "fusion", "names"]


def clear_caches() -> None:
    """Free packed inference weights, the calling thread's scratch, and memory kept of activations.

    All return when needed.
    """
    clear_packed_weights()
    clear_scratch()
    if native.is_available():
        torch.ops.resfast.release_kept()

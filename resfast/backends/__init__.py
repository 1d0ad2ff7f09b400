"""Backends: implementations of the seven functions, and the choice among them."""

from resfast.backends.fusion import fusion
from resfast.backends.packed import clear_packed_weights
from resfast.backends.scratch import clear_scratch
from resfast.backends.select import available, backend, names

__all__ = ["available", "backend", "clear_caches", "fusion", "names"]


def clear_caches() -> None:
    """Free packed inference weights and the calling thread's scratch; both return when needed."""
    clear_packed_weights()
    clear_scratch()

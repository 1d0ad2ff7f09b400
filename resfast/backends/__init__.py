"""Backends: implementations of the seven functions, and the choice among them."""

from resfast.backends.select import available, backend, names

__all__ = ["available", "backend", "names"]

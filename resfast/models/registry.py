"""Names of the models, for the command line and for configuration files."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch

from torch import nn

_REGISTRY: dict[str, Callable[..., nn.Module]] = {}


def register_model(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Decorator: make a constructor known to ``create_model`` under its own name."""
    _REGISTRY[build.__name__] = build
    return build


def list_models(pattern: str = "*") -> list[str]:
    """Registered names that match a shell-style pattern, sorted."""
    return sorted(name for name in _REGISTRY if fnmatch(name, pattern))


def create_model(name: str, **kwargs) -> nn.Module:
    """Build a registered model; keyword arguments go to its constructor. ValueError if unknown."""
    if name not in _REGISTRY:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(list_models())}")
    return _REGISTRY[name](**kwargs)

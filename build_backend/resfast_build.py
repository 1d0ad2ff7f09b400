"""setuptools' build backend, asking for torch only where the environment has none.

Build isolation would otherwise download a second torch, perhaps of another version than the one
resfast will run on. The headers and libtorch_cpu are taken by path from the torch that is already
installed; nothing else of that environment becomes visible to the build.
"""

from __future__ import annotations

from setuptools import build_meta as _setuptools
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from torch_lookup import MINIMUM, find_torch

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def _torch() -> list[str]:
    return [] if find_torch() else ["torch>={}.{}".format(*MINIMUM)]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return _setuptools.get_requires_for_build_wheel(config_settings) + _torch()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return _setuptools.get_requires_for_build_editable(config_settings) + _torch()

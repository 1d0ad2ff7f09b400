"""Finds the torch that resfast is to be built against, without importing it; and other packages."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

MINIMUM = (2, 11)

# Run by a fresh interpreter with -E: the environment's own view of its packages, .pth files
# included, which build isolation (a PYTHONPATH) hides from this process.
_ASK = """
import importlib.util, sys
sys.path[:] = [p for p in sys.path if p]
spec = importlib.util.find_spec(sys.argv[1])
print(next(iter(spec.submodule_search_locations), "") if spec else "")
"""


class Torch(NamedTuple):
    path: Path  # the package folder
    version: str

    @property
    def include(self) -> Path:
        return self.path / "include"

    @property
    def lib(self) -> Path:
        return self.path / "lib"

    @property
    def new_enough(self) -> bool:
        numbers = re.match(r"(\d+)\.(\d+)", self.version)
        return bool(numbers) and tuple(map(int, numbers.groups())) >= MINIMUM


def _at(path: str | Path) -> Torch | None:
    path = Path(path)
    try:
        text = (path / "version.py").read_text()
    except OSError:
        return None
    version = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", text)
    if not version or not (path / "include" / "torch" / "csrc" / "stable").is_dir():
        return None
    return Torch(path, version.group(1))


def _importable_here(package: str = "torch") -> list[str]:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return []
    return list(spec.submodule_search_locations or []) if spec else []


def _in_site_packages(package: str = "torch") -> list[str]:
    paths = sysconfig.get_paths()
    return [os.path.join(paths[key], package) for key in ("purelib", "platlib")]


def _outside_isolation(package: str = "torch") -> list[str]:
    ask = [sys.executable, "-E", "-c", _ASK, package]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.stdout.split("\n")[:1] if answer.stdout.strip() else []


def find_torch() -> Torch | None:
    """The first torch >= 2.11 with headers: importable here, in site-packages, or hidden by
    build isolation."""
    for places in (_importable_here, _in_site_packages, _outside_isolation):
        for place in places():
            torch = _at(place)
            if torch is not None and torch.new_enough:
                return torch
    return None


def package_folders(package: str) -> list[Path]:
    """Where a package may lie, looked for as ``find_torch`` does."""
    places = (_importable_here, _in_site_packages, _outside_isolation)
    return [Path(folder) for place in places for folder in place(package)]

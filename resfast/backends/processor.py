"""What processor this is: its name, and the size of its last cache."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_LAST_CACHE = 32 * 2**20  # where the system does not say
_LARGEST = 256 * 2**20


def cpu_name() -> str:
    """The model's name, as the system has it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def last_cache() -> int:
    """Bytes of the largest cache that the first core has a share in; 256 MiB at most."""
    sizes = []
    for path in _CACHES.glob("index*/size"):
        try:
            sizes.append(int(path.read_text().strip().removesuffix("K")) * 2**10)
        except (OSError, ValueError):
            continue
    return min(max(sizes, default=_LAST_CACHE), _LARGEST)

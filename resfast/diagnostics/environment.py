"""What a measurement was made on: versions, device names, date."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from typing import Any

import torch

from resfast.backends.processor import cpu_name


def versions() -> dict[str, str]:
    import resfast

    return {
        "resfast": resfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def device_info(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {
            "type": "cuda",
            "name": torch.cuda.get_device_name(device),
            "capability": f"{major}.{minor}",
            "cuda": torch.version.cuda,
        }
    return {
        "type": "cpu",
        "name": cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

"""`resfast info`: what is built, what runs on this machine, and what to do about the rest."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from typing import Any

import torch

from resfast.backends.processor import cpu_name
from resfast.diagnostics.environment import versions
from resfast.training.report import table


def info(as_json: bool = False) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if as_json else _text(facts))
    return 0


def collect() -> dict[str, Any]:
    from resfast.backends.select import available
    from resfast.training.model import model_names

    return {
        "versions": versions() | {"cuda": torch.version.cuda},
        "cpu": {
            "name": cpu_name(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "gpu": _gpu(),
        "native": _native(),
        "triton": _triton(),
        "backends": [
            {"name": name, "available": usable, "reason": reason}
            for name, usable, reason in available()
        ],
        "models": model_names(),
    }


def _gpu() -> dict[str, Any]:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return {"available": True, "names": names, "reason": None}
    if torch.version.cuda is None:
        reason = "this PyTorch is built without CUDA"
    else:
        reason = "PyTorch finds no GPU or no driver"
    return {"available": False, "names": [], "reason": reason}


def _native() -> dict[str, Any]:
    from resfast import native

    return {
        "available": native.is_available(),
        "reason": native.load_error(),
        "build": native.build_info(),
        "cpu_isa": native.cpu_isa(),
        "cuda_library": native.cuda_library(),
        "cutlass_missing": native.cutlass_missing(),
    }


def _triton() -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        return {"available": False, "version": None, "reason": "not installed: pip install triton"}
    try:
        import triton
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return {"available": False, "version": None, "reason": reason}
    return {"available": True, "version": triton.__version__, "reason": None}


def _text(facts: dict[str, Any]) -> str:
    versions_, cpu, gpu, native = (facts[k] for k in ("versions", "cpu", "gpu", "native"))
    cuda, triton = native["cuda_library"], facts["triton"]
    build = native["build"]
    isas = ", ".join(build.get("isas", ()))
    rows = [
        ("resfast", versions_["resfast"]),
        ("torch", f"{versions_['torch']}, CUDA {versions_['cuda'] or 'not built in'}"),
        ("python", f"{versions_['python']}, {versions_['platform']}"),
        ("cpu", f"{cpu['name']}, {cpu['threads']} threads, {cpu['capability']}"),
        ("gpu", ", ".join(gpu["names"]) if gpu["available"] else f"none: {gpu['reason']}"),
        ("native library", "loaded" if native["available"] else f"no: {native['reason']}"),
        ("  built with", f"{build['compiler']}, torch {build['torch']}" if build else "–"),
        ("  CPU kernels for", isas or "–"),
        ("  chosen here", native["cpu_isa"] or "none: stock PyTorch operators run instead"),
        ("  CUDA library", _cuda_text(cuda)),
        ("  CUTLASS kernels", _cutlass_text(native["cutlass_missing"], cuda)),
        ("triton", triton["version"] if triton["available"] else f"no: {triton['reason']}"),
    ]
    for number, backend in enumerate(facts["backends"]):
        verdict = "yes" if backend["available"] else f"no: {backend['reason']}"
        rows.append(("backends" if number == 0 else "", f"{backend['name']}: {verdict}"))
    for number, line in enumerate(textwrap.wrap(", ".join(facts["models"]), 76)):
        rows.append(("models" if number == 0 else "", line))
    return table(rows)


def _cuda_text(cuda: dict[str, Any]) -> str:
    if not cuda["built"]:
        return f"no: {cuda['reason']}"
    shown = {k: v for k, v in cuda.items() if k not in ("built", "cutlass")}
    return "yes; " + ", ".join(
        f"{key}: {' '.join(map(str, v)) if isinstance(v, (list, tuple)) else v}"
        for key, v in shown.items()
    )


def _cutlass_text(missing: str | None, cuda: dict[str, Any]) -> str:
    return f"no: {missing}" if missing else f"yes; CUTLASS {cuda['cutlass']['version']}, sm_90a"

"""A CUDA device pretended on the CPU: backends, cuDNN's fused convolutions and a stopwatch.

What only decides and prepares runs as on a device; what would be launched is PyTorch's own, or a
stand-in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from resfast.backends import norm_race, select, tuning
from resfast.backends.eager import EagerBackend
from resfast.backends.interface import nhwc
from resfast.backends.triton import TritonBackend

GPU = "Pretended GPU"


class Cuda(EagerBackend):
    """The CUDA backend with PyTorch's own norms."""

    name = "cuda"


class Triton(TritonBackend):
    """Takes everything, and is not emulated."""

    def unavailable_reason(self):
        return None

    def declines(self, function, z):
        return None

    def emulates(self, z):
        return False


def device(monkeypatch, folder, *backends) -> None:
    """CPU tensors count as a device's, on which ``backends`` are to be had, and nothing is known.

    Measurements are kept in ``folder``.
    """
    monkeypatch.setenv("RESFAST_CACHE_DIR", str(folder))
    monkeypatch.setattr(select, "_BACKENDS", {b.name: b for b in (*backends, EagerBackend())})
    monkeypatch.setattr(select, "_forced", None)
    monkeypatch.setattr(tuning, "measures", lambda device: True)
    monkeypatch.setattr(tuning, "_name", lambda index: GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    forget(monkeypatch)


def forget(monkeypatch) -> None:
    """What a new process does not know: all but the file."""
    tiles = tuning.Tiles(GPU, {})
    monkeypatch.setattr(tuning, "_measured", set())
    monkeypatch.setattr(norm_race, "_known", {})
    monkeypatch.setattr(tuning, "tiles_of", lambda device: tiles)


class Stopwatch:
    """``tuning.time_on_cuda``: what a run says by ``tell`` that it takes; those told, in order."""

    def __init__(self, monkeypatch, milliseconds: dict[str, float]) -> None:
        self.milliseconds = milliseconds
        self.told: list[str] = []
        self.runs = 0
        monkeypatch.setattr(tuning, "time_on_cuda", self)

    def tell(self, name: str) -> None:
        self.told.append(name)

    def __call__(self, run, repetitions: int) -> float:
        self.runs += 1
        before = len(self.told)
        run()
        return sum(self.milliseconds[name] for name in self.told[before:])


class CudnnCalls(list):
    """Arguments of each call of cuDNN's fused convolutions, by name."""

    refusal: str | None = None


@contextlib.contextmanager
def cudnn(monkeypatch) -> Iterator[CudnnCalls]:
    """The two aten functions on CPU: float32 throughout, one rounding at the end."""
    calls = CudnnCalls()

    def fused(name, x, weight, z, alpha, bias, *geometry):
        if calls.refusal is not None:
            raise RuntimeError(calls.refusal)
        stride, padding, dilation, groups = geometry
        calls.append({"name": name, "x": x, "weight": weight, "z": z, "bias": bias})
        for t in (x, weight) if z is None else (x, weight, z):
            assert t.stride() == nhwc(t).stride(), "another layout is copied"
            assert t.dtype == x.dtype
        assert bias.dtype == x.dtype
        y = F.conv2d(x.float(), weight.float(), bias.float(), stride, padding, dilation, groups)
        y = y if z is None else y + alpha * z.float()
        return nhwc(y.relu().to(x.dtype))

    def relu(x, weight, bias, *geometry):
        return fused("relu", x, weight, None, None, bias, *geometry)

    def add_relu(x, weight, z, alpha, bias, *geometry):
        return fused("add_relu", x, weight, z, alpha, bias, *geometry)

    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("cudnn_convolution_relu", relu, "CPU")
        library.impl("cudnn_convolution_add_relu", add_relu, "CPU")
        yield calls

"""Whose norms run on a CUDA device, triton's or cuda's: measured once a pass and size.

Both backends keep to the formats of interface.py and round alike where a mask is recomputed, so
that forward and backward may be run by different ones. What must agree is a pass: its functions are
one where z is read once, and a block's end has one form of it throughout. So a pass is the unit: a
norm and ReLU forward, with the batch's statistics, or backward; the same with a max-pool behind is
another. Residuals, bit masks and second norms follow what was measured without. Never executed on a
GPU so far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resfast.backends import tuning
from resfast.backends.interface import Affine, Backend, empty_nhwc, nhwc

PASSES = {
    "norm_stats": "norm_forward",
    "norm_apply": "norm_forward",
    "norm_backward_reduce": "norm_backward",
    "norm_backward_apply": "norm_backward",
}
Window = tuple[int, ...]  # of a max-pool: kernel size, stride, padding

_EPS = 1e-5
# by pass, shape, dtype, device and window: whether the rival is faster
_known: dict[tuple, bool] = {}


def loses(
    function: str, backend: Backend, rival: Backend | None, z: Tensor, window: Window | None
) -> bool:
    """Whether ``rival`` was measured to run the pass of ``function`` faster than ``backend``."""
    name = PASSES.get(function)
    if name is None:
        return False
    key = (name, z.shape, z.dtype, z.device, window)
    known = _known.get(key)
    if known is not None and not tuning.is_retuning():
        return known
    if not tuning.measures(z.device):
        return False
    slower = (
        rival is not None
        and z.dim() == 4
        and z.numel() > 0
        and rival.unavailable_reason() is None
        and rival.declines(function, z) is None
        and _fastest(name, (backend, rival), z, window) == rival.name
    )
    if not torch.cuda.is_current_stream_capturing():  # then nothing was measured
        _known[key] = slower
    return slower


def _fastest(name: str, backends: tuple[Backend, ...], z: Tensor, window: Window | None) -> str:
    dtype, shape = str(z.dtype).removeprefix("torch."), "x".join(map(str, z.shape))
    pool = "" if window is None else f" max-pool {','.join(map(str, window))}"
    setup = _SETUPS[name, window is not None]
    made: list[Callable[[Backend], Any]] = []  # only if anything is measured

    def run(backend: Backend) -> Callable[[], Any]:
        def measured() -> Any:
            if not made:
                made.append(setup(nhwc(z), window or (), backends[0]))
            return made[0](backend)

        return measured

    try:
        return tuning.choose_name(
            f"{name} {dtype} {shape}{pool}", {b.name: run(b) for b in backends}, z.device
        )
    except RuntimeError:  # neither runs beside what is in memory: the pass itself may
        return backends[0].name


def _vectors(z: Tensor) -> tuple[Affine, Tensor, Tensor]:
    """(an affine, ones, zeros): what they hold does not matter."""
    ones = z.new_ones(z.shape[1], dtype=torch.float32)
    zeros = torch.zeros_like(ones)
    return Affine(zeros, ones, zeros), ones, zeros


def _forward(z: Tensor, window: Window, own: Backend) -> Callable[[Backend], Any]:
    _, ones, zeros = _vectors(z)

    def run(backend: Backend) -> Any:
        if backend.reads_once(z):
            return backend.norm_forward(z, ones, zeros, _EPS, None, True, False, None)
        mean, m2 = backend.norm_stats(z)
        affine, _ = backend.norm_prepare(mean, m2, ones, zeros, _EPS)
        return backend.norm_apply(z, affine, None, None, True, False)

    return run


def _backward(z: Tensor, window: Window, own: Backend) -> Callable[[Backend], Any]:
    affine, ones, zeros = _vectors(z)
    dy = z.clone()

    def run(backend: Backend) -> Any:
        if backend.reads_once(z):
            return backend.norm_backward(dy, z, affine, ones, None, True, None, None)
        backend.norm_backward_reduce(dy, z, affine, ones, None, True, None)
        dz = empty_nhwc(z.shape, z)
        return backend.norm_backward_apply(dy, z, affine, None, True, zeros, zeros, dz, None)

    return run


def _pool_forward(z: Tensor, window: Window, own: Backend) -> Callable[[Backend], Any]:
    affine, _, _ = _vectors(z)
    kernel, stride, padding = window
    return lambda backend: backend.norm_apply_max_pool(z, affine, kernel, stride, padding)


def _pool_backward(z: Tensor, window: Window, own: Backend) -> Callable[[Backend], Any]:
    affine, ones, zeros = _vectors(z)
    kernel, stride, padding = window
    dy, index = own.norm_apply_max_pool(z, affine, kernel, stride, padding)

    def run(backend: Backend) -> Any:
        backend.norm_max_pool_backward_reduce(dy, z, affine, ones, index, kernel, stride, padding)
        return backend.norm_max_pool_backward_apply(
            dy, z, affine, index, kernel, stride, padding, zeros, zeros
        )

    return run


_SETUPS = {
    ("norm_forward", False): _forward,
    ("norm_backward", False): _backward,
    ("norm_forward", True): _pool_forward,
    ("norm_backward", True): _pool_backward,
}

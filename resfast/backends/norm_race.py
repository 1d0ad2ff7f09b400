"""Whose norms run on a CUDA device, triton's, cuda's or cudnn's: measured once a pass and size.

triton and cuda keep to the formats of interface.py and round alike where a mask is recomputed, so
that forward and backward may be run by different ones. What must agree is a pass: its functions are
one where z is read once, and a block's end has one form of it throughout. So a pass is the unit: a
norm and ReLU forward, with the batch's statistics, or backward; the same with a max-pool behind is
another. Between these two residuals, bit masks and second norms follow what was measured without.

cudnn races the faster of them where a whole pass is asked for at once and the ReLU's mask is not
computed again backward, with the residual, bits and second gradient that its graphs take: see
``SAVED``. Elsewhere it does not race: it rounds u in a way of its own, which may have the other
sign where u is 0 but for rounding, and its statistics and sums alone are whole passes. It races
only at sizes where the pass is found to keep what docs/numerics.md promises.

Never executed on a GPU so far.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from resfast.backends import tuning
from resfast.backends.interface import (
    Affine,
    Backend,
    Below,
    NormGradient,
    empty_nhwc,
    mask_shape,
    nhwc,
)

PASSES = {
    "norm_stats": "norm_forward",
    "norm_apply": "norm_forward",
    "norm_backward_reduce": "norm_backward",
    "norm_backward_apply": "norm_backward",
}
OWN = ("triton", "cuda")
RACERS = (*OWN, "cudnn")
Window = tuple[int, ...]  # of a max-pool: kernel size, stride, padding

# Forms of a pass whose ReLU's mask is known without z: by bits or by the output, both with a
# residual before the ReLU; without one neither a residual nor du, which cuDNN's graphs have then
# no place for.
BITS, OUTPUT, NO_RELU = SAVED = ("bits", "output", "no relu")
MAX_POOL = "max-pool"

_EPS = 1e-5
# of docs/numerics.md: the relative error of a variance, of values this far from 0
_EXACT = 1e-5
_BASE = 900.0
# by pass, shape, dtype, device and form: who lost, and to whom
_known: dict[tuple, dict[str, str]] = {}


def forward_form(
    residual: Tensor | None, mask: Tensor | None, relu: bool, add_after_act: bool
) -> str | None:
    """Of ``SAVED``, or None where backward computes the mask again or cuDNN has no graph."""
    if not relu:
        return NO_RELU if residual is None else None
    if residual is None or add_after_act:
        return None
    return OUTPUT if mask is None else BITS


def backward_form(
    y: Tensor | None, mask: Tensor | None, relu: bool, du: Tensor | None
) -> str | None:
    """``forward_form`` of a backward pass."""
    if not relu:
        return NO_RELU if du is None else None
    if mask is not None:
        return BITS
    return None if y is None else OUTPUT


def lost(
    function: str,
    z: Tensor,
    window: Window | None,
    saved: str | None,
    racers: Callable[[], Sequence[Backend]],
) -> dict[str, str]:
    """Who was measured to be slower at the pass of ``function``, and than whom, by name.

    ``saved``: of ``SAVED``, where a whole pass is asked for in such a form. ``racers``: those of
    ``RACERS`` that take z, in order; asked only where nothing is known.
    """
    name = PASSES.get(function)
    if name is None or z.dim() != 4 or z.numel() == 0:
        return {}
    key = (name, z.shape, z.dtype, z.device, window, saved)
    known = _known.get(key)
    if known is not None and not tuning.is_retuning():
        return known
    if not tuning.measures(z.device):
        return {}
    found: dict[str, str] = {}
    candidates = list(racers())
    own = [b for b in candidates if b.name in OWN]
    if saved is not None:
        found |= lost(function, z, window, None, lambda: own)
        own = [b for b in own if b.name not in found]
        candidates = own + [b for b in candidates if b.name not in OWN]
    else:
        candidates = own
    if len(candidates) == 2:
        form = saved if window is None else MAX_POOL
        winner = _fastest(name, candidates, z, form or "", window)
        found |= {b.name: winner for b in candidates if b.name != winner}
    if not torch.cuda.is_current_stream_capturing():  # then nothing was measured
        _known[key] = found
    return found


def winners(known: Mapping[str, Sequence[int]]) -> Counter[str]:
    """How many of the remembered races each backend has won."""
    return Counter(
        tuning.chosen_name(key, choice)
        for key, choice in known.items()
        if key.startswith(tuple(PASSES.values()))
    )


def _fastest(
    name: str, backends: Sequence[Backend], z: Tensor, form: str, window: Window | None
) -> str:
    dtype, shape = str(z.dtype).removeprefix("torch."), "x".join(map(str, z.shape))
    size = "" if window is None else f" {','.join(map(str, window))}"
    made: list[Callable[[Backend], Any]] = []  # only if anything is measured
    passed: set[str] = set()

    def run(backend: Backend) -> Callable[[], Any]:
        def measured() -> Any:
            if not (backend.exact_statistics or backend.name in passed):
                fault = _FAULTS[name](backend, z, form)
                if fault is not None:
                    raise ArithmeticError(f"{backend.name} {fault}")
                passed.add(backend.name)
            if not made:
                made.append(_SETUPS[name, form](nhwc(z), form, window or (), backends[0]))
            return made[0](backend)

        return measured

    key = " ".join(filter(None, (name, dtype, shape, form)))
    try:
        return tuning.choose_name(f"{key}{size}", {b.name: run(b) for b in backends}, z.device)
    except RuntimeError:  # neither runs beside what is in memory: the pass itself may
        return backends[0].name


def _far_from_zero(like: Tensor) -> tuple[Tensor, Tensor, float]:
    """(z, high, step): z = _BASE + step·high, of which high is 0 or 1 at random."""
    step = max(0.1875, 512 * torch.finfo(like.dtype).eps)
    generator = torch.Generator(like.device).manual_seed(0)  # nobody's random numbers change
    high = torch.empty(like.shape, dtype=torch.uint8, device=like.device)
    high = nhwc(high.random_(0, 2, generator=generator))
    high[:, 0] = 0
    return nhwc((_BASE + step * high).to(like.dtype)), high, step


def _forward_fault(backend: Backend, like: Tensor, form: str) -> str | None:
    """What its forward pass at this size breaks of docs/numerics.md, or None.

    Of values far from 0 whose variance is known exactly; the first channel is constant, the second
    has a NaN, and so has the residual in the third.
    """
    z, high, step = _far_from_zero(like)
    share = high.sum((0, 2, 3), dtype=torch.float64) / (z.numel() // z.shape[1])
    z[0, 1, 0, 0] = torch.nan
    residual = mask = None
    if form in (BITS, OUTPUT):
        residual = torch.zeros_like(z)
        residual[0, 2, 0, 0] = torch.nan
    if form == BITS:
        mask = z.new_empty(mask_shape(z.shape), dtype=torch.uint8)
    _, ones, _ = _vectors(z)
    y, _, var = backend.norm_forward(z, ones, ones, _EPS, residual, form != NO_RELU, False, mask)
    exact = step**2 * share * (1 - share)
    held = (var.double() - exact).abs() <= _EXACT * (exact + _EPS)
    held[1] = True
    if not held.all():
        return "loses the variance of values far from 0"
    if not ((y[:, 0].float() - 1).abs() < 1e-3).all():
        return "does not return beta for a constant channel"
    nan = y[:, 1].isnan().all() and (residual is None or y[0, 2, 0, 0].isnan())
    return None if nan else "hides a NaN"


def _backward_fault(backend: Backend, like: Tensor, form: str) -> str | None:
    """``_forward_fault`` of its backward pass: gradients of 1 and 2 at values far from 0."""
    z, high, step = _far_from_zero(like)
    n = z.numel() // z.shape[1]
    _, ones, zeros = _vectors(z)
    rstd = ones * (0.7 / step)
    affine = Affine(ones * _BASE, rstd, zeros)
    dy = high.flip(0) + 1
    relu = form != NO_RELU
    y = mask = None
    if form == OUTPUT:
        y = high.to(z.dtype)
    if form == BITS:
        bits = high.permute(0, 2, 3, 1).reshape(*mask_shape(z.shape), 8)
        mask = (bits << torch.arange(8, dtype=torch.uint8, device=z.device)).sum(2).to(torch.uint8)
    dz, *sums = backend.norm_backward(
        dy.to(z.dtype),
        z,
        affine,
        rstd,
        y,
        relu,
        None,
        None if y is None else torch.empty_like(z),
        None,
        mask,
    )
    du = dy * high if relu else dy
    width = step * rstd.double()  # between two x̂
    exact = (
        du.sum((0, 2, 3), dtype=torch.float64),
        width * (du * high).sum((0, 2, 3), dtype=torch.float64),
    )
    if not all(((s - e).abs() <= _EXACT * n).all() for s, e in zip(sums, exact, strict=True)):
        return "loses the sums of values far from 0"
    few = slice(8)  # channels: float64 takes memory
    mean_du, mean_du_xhat = ((e / n)[few].view(-1, 1, 1) for e in exact)
    xhat = width[few].view(-1, 1, 1) * high[:, few]
    expected = rstd[0].double() * (du[:, few] - mean_du - xhat * mean_du_xhat)
    allowed = torch.finfo(z.dtype).eps * expected.abs() + _EXACT * rstd[0]
    if not ((dz[:, few].double() - expected).abs() <= allowed).all():
        return "loses the gradient of values far from 0"
    return None


_FAULTS = {"norm_forward": _forward_fault, "norm_backward": _backward_fault}


def _vectors(z: Tensor) -> tuple[Affine, Tensor, Tensor]:
    """(an affine, ones, zeros): what they hold does not matter."""
    ones = z.new_ones(z.shape[1], dtype=torch.float32)
    zeros = torch.zeros_like(ones)
    return Affine(zeros, ones, zeros), ones, zeros


def _forward(z: Tensor, form: str, window: Window, own: Backend) -> Callable[[Backend], Any]:
    _, ones, zeros = _vectors(z)
    relu = form != NO_RELU
    residual = z.clone() if form in (BITS, OUTPUT) else None
    mask = z.new_empty(mask_shape(z.shape), dtype=torch.uint8) if form == BITS else None

    def run(backend: Backend) -> Any:
        if backend.reads_once(z):
            return backend.norm_forward(z, ones, zeros, _EPS, residual, relu, False, mask)
        mean, m2 = backend.norm_stats(z)
        affine, _ = backend.norm_prepare(mean, m2, ones, zeros, _EPS)
        return backend.norm_apply(z, affine, residual, None, relu, False, None, mask)

    return run


def _backward(z: Tensor, form: str, window: Window, own: Backend) -> Callable[[Backend], Any]:
    affine, ones, zeros = _vectors(z)
    dy = z.clone()
    relu = form != NO_RELU
    y = z.clone() if form == OUTPUT else None
    du = empty_nhwc(z.shape, z) if form == OUTPUT else None

    def run(backend: Backend) -> Any:
        if backend.reads_once(z):
            return backend.norm_backward(dy, z, affine, ones, y, relu, None, du)
        backend.norm_backward_reduce(dy, z, affine, ones, y, relu, None)
        dz = empty_nhwc(z.shape, z)
        return backend.norm_backward_apply(dy, z, affine, y, relu, zeros, zeros, dz, du)

    return run


def _block_backward(z: Tensor, form: str, window: Window, own: Backend) -> Callable[[Backend], Any]:
    """A block's end: the bits tell the mask, two gradients arrive."""
    affine, ones, zeros = _vectors(z)
    dy, dy2, du = z.clone(), z.clone(), empty_nhwc(z.shape, z)
    mask = z.new_zeros(mask_shape(z.shape), dtype=torch.uint8)

    def run(backend: Backend) -> Any:
        if backend.reads_once(z):
            return backend.norm_backward(dy, z, affine, ones, None, True, None, du, dy2, mask)
        backend.norm_join_reduce(dy, dy2, z, Below(z, affine, mask), du)
        gradient = NormGradient(du, z, zeros, ones, zeros, zeros)
        return backend.norm_join_apply(gradient, empty_nhwc(z.shape, z), None, None)

    return run


def _pool_forward(z: Tensor, form: str, window: Window, own: Backend) -> Callable[[Backend], Any]:
    affine, _, _ = _vectors(z)
    kernel, stride, padding = window
    return lambda backend: backend.norm_apply_max_pool(z, affine, kernel, stride, padding)


def _pool_backward(z: Tensor, form: str, window: Window, own: Backend) -> Callable[[Backend], Any]:
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
    **{("norm_forward", form): _forward for form in ("", *SAVED)},
    **{("norm_backward", form): _backward for form in ("", OUTPUT, NO_RELU)},
    ("norm_backward", BITS): _block_backward,
    ("norm_forward", MAX_POOL): _pool_forward,
    ("norm_backward", MAX_POOL): _pool_backward,
}

"""Argument checks of the ops: stock PyTorch's exception types and key words, before any write."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

_strict = False


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Raise ValueError for what stock PyTorch lets through silently.

    eps that is NaN or infinite; momentum outside [0, 1]; non-finite or negative
    running_var; non-finite running_mean, weight or bias of a norm. Costs reads of the vectors.
    """
    global _strict
    before, _strict = _strict, True
    try:
        yield
    finally:
        _strict = before


def check_activation(t: Tensor, name: str = "input") -> None:
    """4-D and floating point, else ValueError / RuntimeError."""
    if t.dim() != 4:
        raise ValueError(f"expected 4D input (got {t.dim()}D {name} of shape {tuple(t.shape)})")
    if not t.is_floating_point():
        raise RuntimeError(f"{name} must be floating point, not implemented for {t.dtype}")


def check_norm(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    synchronised: bool = False,
) -> None:
    """Vectors of z's channel count, dtype and device that batch norm accepts.

    A synchronised norm's values are counted over all ranks, in ``ops/norm.py``.

    Raises:
        RuntimeError: a vector's size, dtype or device is wrong, or running statistics are missing.
        ValueError: training with one value per channel, or eps ≤ 0.
    """
    if eps <= 0:
        raise ValueError(f"batch_norm eps must be positive, but got {eps}")
    c = z.shape[1]
    vectors = (
        ("weight", gamma),
        ("bias", beta),
        ("running_mean", running_mean),
        ("running_var", running_var),
    )
    for name, v in vectors:
        if v is None:
            continue
        if v.dim() != 1 or v.shape[0] != c:
            raise RuntimeError(
                f"{name} should contain {c} elements not {v.numel()} (shape {tuple(v.shape)})"
            )
        if v.device != z.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} is on {v.device} "
                f"and the input on {z.device}"
            )
        if v.dtype not in (z.dtype, torch.float32) or (
            z.dtype == torch.float64 and v.dtype != torch.float64
        ):
            raise RuntimeError(
                f"expected scalar type {z.dtype} or float32 for {name} but found {v.dtype}"
            )
    if (running_mean is None) != (running_var is None):
        raise RuntimeError(
            "running_mean and running_var must either both be None or neither be None"
        )
    if not training and running_mean is None:
        raise RuntimeError(
            "Expected running_mean and running_var to be defined when training=False"
        )
    if training and not synchronised and z.shape[0] * z.shape[2] * z.shape[3] == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {z.shape}"
        )


def check_residual(residual: Tensor | None, z: Tensor, name: str = "residual") -> None:
    """Same shape, dtype and device as z, a gradient too: ops never broadcast or promote."""
    if residual is None:
        return
    if residual.shape != z.shape:
        raise RuntimeError(
            f"The size of {name} {tuple(residual.shape)} must match the size of the normalised "
            f"tensor {tuple(z.shape)}"
        )
    if residual.dtype != z.dtype:
        raise RuntimeError(f"expected {name} to have dtype {z.dtype} but found {residual.dtype}")
    if residual.device != z.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} is on {residual.device} "
            f"and the input on {z.device}"
        )


def check_strict(norm) -> None:
    """Under ``resfast.strict()``: the ValueErrors it promises for one ``NormParams``."""
    if not _strict:
        return
    if not math.isfinite(norm.eps):
        raise ValueError(f"eps must be finite, got {norm.eps}")
    if norm.momentum is not None and not 0 <= norm.momentum <= 1:
        raise ValueError(f"momentum must lie in [0, 1], got {norm.momentum}")
    for name in ("weight", "bias", "running_mean", "running_var"):
        v = getattr(norm, name)
        if v is not None and not bool(torch.isfinite(v).all()):
            raise ValueError(f"{name} has a value that is not finite")
    if norm.running_var is not None and bool((norm.running_var < 0).any()):
        raise ValueError("running_var has a negative value")

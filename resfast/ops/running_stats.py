"""Updating a norm's running statistics: the one op that mutates, and it has no autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from resfast.ops.params import NormParams
from resfast.ops.registry import FusedOp


def _kernel(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
    total: Tensor | None = None,
) -> None:
    # Inside a backward pass this is activation checkpointing's second forward of the same batch.
    if torch._C._current_graph_task_id() != -1:
        return
    if not running_mean.shape == running_var.shape == mean.shape == var.shape:
        raise RuntimeError(
            f"running_mean {tuple(running_mean.shape)}, running_var {tuple(running_var.shape)}, "
            f"mean {tuple(mean.shape)} and var {tuple(var.shape)} must have one shape"
        )
    if momentum is None and num_batches_tracked is None:
        raise RuntimeError("momentum=None (cumulative average) needs num_batches_tracked")
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    # a rank with values need not ask the device for the total
    if count == 0 and (total is None or not total):
        return
    if total is None:
        unbiased = var * (count / max(1, count - 1))
    else:
        unbiased = var * (total / (total - 1).clamp(min=1)).to(var.dtype)
    share: Tensor | float
    if momentum is not None:
        share = momentum
    else:
        assert num_batches_tracked is not None
        share = num_batches_tracked.to(mean.dtype).reciprocal()
    for running, batch in ((running_mean, mean), (running_var, unbiased)):
        if running.dtype == batch.dtype:
            running.lerp_(batch, share)
        else:  # 16-bit buffers are rounded once, as in stock
            running.copy_(running.to(batch.dtype).lerp(batch, share))


def _fake(
    running_mean, running_var, num_batches_tracked, mean, var, count, momentum, total=None
) -> None:
    return None


_update = FusedOp(
    "update_running_stats",
    "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, "
    "Tensor mean, Tensor var, SymInt count, float? momentum, Tensor? total=None) -> ()",
    _kernel,
    _fake,
)


def update_running_stats(
    norm: NormParams, mean: Tensor, var: Tensor, count: int, total: Tensor | None = None
) -> None:
    """Fold one batch's mean and biased variance into the norm's buffers, where it has them.

    count: values per channel, of a synchronised norm this rank's beside the total ``[1]``.

    running ← (1 − momentum)·running + momentum·batch, the variance unbiased; once per batch, also
    under activation checkpointing. An empty batch only counts.
    """
    if not norm.training or norm.running_mean is None or norm.running_var is None:
        return
    with torch.no_grad():
        _update(
            norm.running_mean,
            norm.running_var,
            norm.num_batches_tracked,
            mean,
            var,
            count,
            norm.momentum,
            total,
        )

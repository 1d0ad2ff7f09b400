"""bn_act with the statistics of all ranks' values: one collective forward, one backward."""

from __future__ import annotations

import torch
from torch import Tensor

from resfast.backends.interface import empty_nhwc, nhwc
from resfast.ops import gradients, reference
from resfast.ops import norm as N
from resfast.ops.bn_act import recomputed_mask
from resfast.ops.checks import check_activation, check_norm, check_residual, check_strict
from resfast.ops.params import NormParams
from resfast.ops.registry import FusedOp, double_backward, present
from resfast.ops.running_stats import update_running_stats


def _check(z, gamma, beta, running_mean, running_var, residual, eps) -> None:
    check_activation(z)
    check_norm(z, gamma, beta, running_mean, running_var, True, eps, synchronised=True)
    check_residual(residual, z)


def _kernel(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
    add_after_act: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(z, gamma, beta, running_mean, running_var, residual, eps)
    z = nhwc(z)
    stats, ranks = N.synchronised(z, group)
    norm = N.prepare(stats, gamma, beta, eps)
    return N.apply(z, norm, residual, None, relu, add_after_act), *stats, ranks.total


def fake_total(z: Tensor) -> Tensor:
    """Fake of ``Ranks.total``."""
    return z.new_empty(1, dtype=torch.float64)


def _fake(z, gamma, beta, running_mean, running_var, residual, eps, relu, add_after_act, group):
    _check(z, gamma, beta, running_mean, running_var, residual, eps)
    return empty_nhwc(z.shape, z), *N.fake_statistics(z), fake_total(z)


_op = FusedOp(
    "bn_act_synchronised",
    "(Tensor z, Tensor? gamma, Tensor? beta, Tensor? running_mean, Tensor? running_var, "
    "Tensor? residual, float eps, bool relu, bool add_after_act, str group) "
    "-> (Tensor y, Tensor mean, Tensor var, Tensor total)",
    _kernel,
    _fake,
)


# ---- backward


def _backward_kernel(
    dy: Tensor,
    z: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    total: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    relu: bool,
    need_residual: bool,
    add_after_act: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_residual(dy, z, "dy")
    norm = N.prepare(N.Statistics(mean, var), gamma, beta, eps)
    dr, du = gradients.of_residual(dy, z, need_residual, add_after_act)
    ranks = N.Ranks(group, total)
    g = N.backward(dy, z, norm, y=y, relu=relu, training=True, du=du, ranks=ranks)
    return g.dz, *gradients.of_norm(g, gamma, beta), dr


def _backward_fake(
    dy, z, y, mean, var, total, gamma, beta, eps, relu, need_residual, add_after_act, group
):
    dr = gradients.fake_of_residual(z, need_residual)
    return empty_nhwc(z.shape, z), *gradients.fake_of_norm(z, gamma, beta), dr


_backward_op = FusedOp(
    "bn_act_synchronised_backward",
    "(Tensor dy, Tensor z, Tensor? y, Tensor mean, Tensor var, Tensor total, Tensor? gamma, "
    "Tensor? beta, float eps, bool relu, bool need_residual, bool add_after_act, str group) "
    "-> (Tensor dz, Tensor dgamma, Tensor dbeta, Tensor dresidual)",
    _backward_kernel,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    z, gamma, beta, _, _, residual, eps, relu, add_after_act, group = inputs
    y, mean, var, total = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, var, total)
    # only a residual joined before the ReLU hides the mask from norm(z)
    keep_y = y if relu and residual is not None and not add_after_act else None
    ctx.save_for_backward(z, keep_y, mean, var, total, gamma, beta)
    ctx.options = (eps, relu, residual is not None, add_after_act, group)


def _backward(ctx, dy, _dmean, _dvar, _dtotal):
    if dy is None:
        return (None,) * 10
    eps, relu, has_residual, add_after_act, group = ctx.options
    need = ctx.needs_input_grad
    need_residual = has_residual and need[5]
    dz, dgamma, dbeta, dr = _backward_op(
        dy, *ctx.saved_tensors, eps, relu, need_residual, add_after_act, group
    )
    return (
        present(dz, need[0]),
        present(dgamma, need[1]),
        present(dbeta, need[2]),
        None,
        None,
        present(dr, need_residual),
        *(None,) * 4,
    )


_op.autograd(_setup_context, _backward)


def _backward_setup_context(ctx, inputs, output):
    *tensors, eps, relu, need_residual, add_after_act, group = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.options = (eps, relu, need_residual, add_after_act, group)


def _double_backward(ctx, ddz, ddgamma, ddbeta, ddr):
    dy, z, y, mean, var, _, gamma, beta = ctx.saved_tensors
    eps, relu, need_residual, add_after_act, group = ctx.options
    mask = recomputed_mask(z, y, mean, var, gamma, beta, eps) if relu else None

    def forward(z, gamma, beta, residual):
        norm = NormParams(gamma, beta, None, None, None, True, None, eps)
        options = {"relu": relu, "add_after_act": add_after_act}
        return reference.bn_act(z, norm, residual, **options, mask=mask, group=group)

    # the residual enters linearly: zeros do for its values
    residual = torch.zeros_like(z) if need_residual else None
    d_dy, (d_z, d_gamma, d_beta, _) = double_backward(
        forward, (z, gamma, beta, residual), dy, (ddz, ddgamma, ddbeta, ddr)
    )
    return d_dy, d_z, None, None, None, None, d_gamma, d_beta, *(None,) * 5


_backward_op.autograd(_backward_setup_context, _double_backward)


def bn_act_synchronised(
    x: Tensor,
    norm: NormParams,
    group: str,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    add_after_act: bool = False,
) -> Tensor:
    """``bn_act`` in training, of the batch that the ranks of a process group hold together.

    Every rank of the group makes the same calls, forward and backward.

    Args:
        x: as in ``bn_act``; the ranks' batches may differ in size and be empty.
        norm: as in ``bn_act``; its ``training`` is taken as True.
        group: the process group's ``group_name``.

    Raises:
        ValueError: x is not 4-D, or one value per channel on all ranks together.
        RuntimeError: as ``bn_act``; before the collective, whose other ranks then wait in vain.
    """
    norm = norm._replace(training=True)
    check_strict(norm)
    if residual is not None and torch.is_autocast_enabled(x.device.type):
        residual = residual.to(x.dtype)
    vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    y, mean, var, total = _op(x, *vectors, residual, norm.eps, relu, add_after_act, group)
    update_running_stats(norm, mean, var, N.count(x), total)
    return y

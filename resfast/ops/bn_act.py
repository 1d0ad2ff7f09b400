"""bn_act: batch norm, residual and ReLU in one op, on any tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from resfast.backends.interface import empty_nhwc, nhwc
from resfast.ops import gradients, reference
from resfast.ops import norm as N
from resfast.ops.checks import check_activation, check_norm, check_residual, check_strict
from resfast.ops.params import NormParams
from resfast.ops.registry import FusedOp, double_backward, needs_grad, present
from resfast.ops.running_stats import update_running_stats


def _check(z, gamma, beta, running_mean, running_var, residual, training, eps) -> None:
    check_activation(z)
    check_norm(z, gamma, beta, running_mean, running_var, training, eps)
    check_residual(residual, z)


# ---- training form: also returns the statistics used


def _kernel(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    add_after_act: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(z, gamma, beta, running_mean, running_var, residual, training, eps)
    z = nhwc(z)
    y, stats = N.forward(
        z, gamma, beta, running_mean, running_var, residual, training, eps, relu, add_after_act
    )
    return y, *stats


def _fake(z, gamma, beta, running_mean, running_var, residual, training, eps, relu, add_after_act):
    _check(z, gamma, beta, running_mean, running_var, residual, training, eps)
    return empty_nhwc(z.shape, z), *N.fake_statistics(z)


_op = FusedOp(
    "bn_act",
    "(Tensor z, Tensor? gamma, Tensor? beta, Tensor? running_mean, Tensor? running_var, "
    "Tensor? residual, bool training, float eps, bool relu, bool add_after_act) "
    "-> (Tensor y, Tensor mean, Tensor var)",
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
    gamma: Tensor | None,
    beta: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    need_residual: bool,
    add_after_act: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_residual(dy, z, "dy")
    norm = N.prepare(N.Statistics(mean, var), gamma, beta, eps)
    dr, du = gradients.of_residual(dy, z, need_residual, add_after_act)
    g = N.backward(dy, z, norm, y=y, relu=relu, training=training, du=du)
    return g.dz, *gradients.of_norm(g, gamma, beta), dr


def _backward_fake(
    dy, z, y, mean, var, gamma, beta, training, eps, relu, need_residual, add_after_act
):
    dr = gradients.fake_of_residual(z, need_residual)
    return empty_nhwc(z.shape, z), *gradients.fake_of_norm(z, gamma, beta), dr


_backward_op = FusedOp(
    "bn_act_backward",
    "(Tensor dy, Tensor z, Tensor? y, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, "
    "bool training, float eps, bool relu, bool need_residual, bool add_after_act) "
    "-> (Tensor dz, Tensor dgamma, Tensor dbeta, Tensor dresidual)",
    _backward_kernel,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    z, gamma, beta, _, _, residual, training, eps, relu, add_after_act = inputs
    y, mean, var = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, var)
    # only a residual joined before the ReLU hides the mask from norm(z)
    keep_y = y if relu and residual is not None and not add_after_act else None
    ctx.save_for_backward(z, keep_y, mean, var, gamma, beta)
    ctx.options = (training, eps, relu, residual is not None, add_after_act)


def _backward(ctx, dy, _dmean, _dvar):
    if dy is None:
        return (None,) * 10
    z, y, mean, var, gamma, beta = ctx.saved_tensors
    training, eps, relu, has_residual, add_after_act = ctx.options
    need = ctx.needs_input_grad
    dz, dgamma, dbeta, dr = _backward_op(
        dy,
        z,
        y,
        mean,
        var,
        gamma,
        beta,
        training,
        eps,
        relu,
        has_residual and need[5],
        add_after_act,
    )
    return (
        present(dz, need[0]),
        present(dgamma, need[1]),
        present(dbeta, need[2]),
        None,
        None,
        present(dr, has_residual and need[5]),
        None,
        None,
        None,
        None,
    )


_op.autograd(_setup_context, _backward)


def _backward_setup_context(ctx, inputs, output):
    dy, z, y, mean, var, gamma, beta, training, eps, relu, need_residual, add_after_act = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dy, z, y, mean, var, gamma, beta)
    ctx.options = (training, eps, relu, need_residual, add_after_act)


def recomputed_mask(
    z: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> Tensor:
    """The mask the backward kernels use: off the saved output, else off norm(z)."""
    if y is None:
        y = N.apply(z, N.prepare(N.Statistics(mean, var), gamma, beta, eps), relu=False)
    return reference.positive(y)


def _double_backward(ctx, ddz, ddgamma, ddbeta, ddr):
    dy, z, y, mean, var, gamma, beta = ctx.saved_tensors
    training, eps, relu, need_residual, add_after_act = ctx.options
    mask = recomputed_mask(z, y, mean, var, gamma, beta, eps) if relu else None

    def forward(z, gamma, beta, residual):
        norm = NormParams(gamma, beta, mean, var, None, training, None, eps)
        return reference.bn_act(
            z, norm, residual, relu=relu, add_after_act=add_after_act, mask=mask
        )

    # the residual enters linearly: zeros do for its values
    residual = torch.zeros_like(z) if need_residual else None
    d_dy, (d_z, d_gamma, d_beta, _) = double_backward(
        forward, (z, gamma, beta, residual), dy, (ddz, ddgamma, ddbeta, ddr)
    )
    return d_dy, d_z, None, None, None, d_gamma, d_beta, None, None, None, None, None


_backward_op.autograd(_backward_setup_context, _double_backward)


# ---- inference form: the output alone


def _inference_kernel(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    eps: float,
    relu: bool,
    add_after_act: bool,
) -> Tensor:
    return _kernel(
        z, gamma, beta, running_mean, running_var, residual, False, eps, relu, add_after_act
    )[0]


def _inference_fake(z, gamma, beta, running_mean, running_var, residual, eps, relu, add_after_act):
    _check(z, gamma, beta, running_mean, running_var, residual, False, eps)
    return empty_nhwc(z.shape, z)


_inference_op = FusedOp(
    "bn_act_inference",
    "(Tensor z, Tensor? gamma, Tensor? beta, Tensor running_mean, Tensor running_var, "
    "Tensor? residual, float eps, bool relu, bool add_after_act) -> Tensor",
    _inference_kernel,
    _inference_fake,
)


def bn_act(
    x: Tensor,
    norm: NormParams,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    add_after_act: bool = False,
) -> Tensor:
    """act(bn(x) + residual), or act(bn(x)) + residual with ``add_after_act``.

    Args:
        x: ``[N, C, H, W]``; float32, bfloat16, float16 or float64, any layout.
        norm: parameters of C channels; running buffers are updated in training.
        residual: shape and dtype of x.

    Returns:
        ``[N, C, H, W]``, channels_last, dtype of x.

    Raises:
        ValueError: x is not 4-D, eps ≤ 0, or training with one value per channel.
        RuntimeError: wrong size, dtype or device of another argument.
    """
    check_strict(norm)
    if residual is not None and torch.is_autocast_enabled(x.device.type):
        residual = residual.to(x.dtype)
    vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if norm.training or needs_grad(x, norm.weight, norm.bias, residual):
        y, mean, var = _op(x, *vectors, residual, norm.training, norm.eps, relu, add_after_act)
        update_running_stats(norm, mean, var, N.count(x))
        return y
    if norm.running_mean is None or norm.running_var is None:
        check_norm(x, *vectors, False, norm.eps)
    return _inference_op(x, *vectors, residual, norm.eps, relu, add_after_act)

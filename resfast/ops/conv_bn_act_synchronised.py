"""conv_bn_act with the statistics of all ranks' values: one collective forward, one backward."""

from __future__ import annotations

import torch
from torch import Tensor

from resfast.ops import convolution as C
from resfast.ops import gradients, reference
from resfast.ops import norm as N
from resfast.ops.bn_act import recomputed_mask
from resfast.ops.bn_act_synchronised import fake_total
from resfast.ops.checks import check_activation, check_norm, check_residual, check_strict
from resfast.ops.conv_bn_act import GEOMETRY, fake_conv, geometry_of, needed
from resfast.ops.params import ConvParams, NormParams
from resfast.ops.registry import FusedOp, absent, double_backward
from resfast.ops.running_stats import update_running_stats


def _kernel(
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    relu: bool,
    add_after_act: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_activation(x)
    g = geometry_of(stride, padding, dilation, groups)
    z, local = C.fprop(C.Activation(x), weight, conv_bias, g, True, exact=True)
    check_norm(z, gamma, beta, running_mean, running_var, True, eps, synchronised=True)
    check_residual(residual, z)
    stats, ranks = N.synchronised(z, group, local)
    y = N.apply(z, N.prepare(stats, gamma, beta, eps), residual, None, relu, add_after_act)
    return y, z, *stats, ranks.total


def _fake(
    x,
    weight,
    conv_bias,
    gamma,
    beta,
    running_mean,
    running_var,
    residual,
    stride,
    padding,
    dilation,
    groups,
    eps,
    relu,
    add_after_act,
    group,
):
    check_activation(x)
    z = fake_conv(x, weight, conv_bias, geometry_of(stride, padding, dilation, groups))
    check_norm(z, gamma, beta, running_mean, running_var, True, eps, synchronised=True)
    check_residual(residual, z)
    return torch.empty_like(z), z, *N.fake_statistics(z), fake_total(z)


_op = FusedOp(
    "conv_bn_act_synchronised",
    "(Tensor x, Tensor weight, Tensor? conv_bias, Tensor? gamma, Tensor? beta, "
    "Tensor? running_mean, Tensor? running_var, Tensor? residual, "
    f"{GEOMETRY}, float eps, bool relu, bool add_after_act, str group) "
    "-> (Tensor y, Tensor z, Tensor mean, Tensor var, Tensor total)",
    _kernel,
    _fake,
)
_op.autocast((0, 1, 2, 7))


# ---- backward


def _backward_kernel(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    z: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    total: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    relu: bool,
    add_after_act: bool,
    need: list[bool],
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_residual(dy, z, "dy")
    need_x, need_weight, need_bias, need_residual = need
    geometry = geometry_of(stride, padding, dilation, groups)
    norm = N.prepare(N.Statistics(mean, var), gamma, beta, eps)
    dr, du = gradients.of_residual(dy, z, need_residual, add_after_act)
    ranks = N.Ranks(group, total)
    g = N.backward(dy, z, norm, y=y, relu=relu, training=True, du=du, ranks=ranks)
    return (
        *gradients.of_conv(g.dz, x, weight, geometry, need_x, need_weight),
        # batch statistics subtract the bias again: its gradient is exactly zero
        absent(z) if conv_bias is None or not need_bias else torch.zeros_like(conv_bias),
        *gradients.of_norm(g, gamma, beta),
        dr,
    )


def _backward_fake(
    dy,
    x,
    weight,
    conv_bias,
    z,
    y,
    mean,
    var,
    total,
    gamma,
    beta,
    stride,
    padding,
    dilation,
    groups,
    eps,
    relu,
    add_after_act,
    need,
    group,
):
    need_x, need_weight, need_bias, need_residual = need
    return (
        *gradients.fake_of_conv(z, x, weight, need_x, need_weight),
        torch.empty_like(conv_bias) if need_bias else absent(z),
        *gradients.fake_of_norm(z, gamma, beta),
        gradients.fake_of_residual(z, need_residual),
    )


_backward_op = FusedOp(
    "conv_bn_act_synchronised_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor? conv_bias, Tensor z, Tensor? y, Tensor mean, "
    f"Tensor var, Tensor total, Tensor? gamma, Tensor? beta, {GEOMETRY}, float eps, bool relu, "
    "bool add_after_act, bool[] need, str group) "
    "-> (Tensor dx, Tensor dweight, Tensor dconv_bias, Tensor dgamma, Tensor dbeta, "
    "Tensor dresidual)",
    _backward_kernel,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, weight, conv_bias, gamma, beta, _, _, residual, *options, group = inputs
    relu, add_after_act = options[5], options[6]
    y, z, mean, var, total = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(z, mean, var, total)
    # only a residual joined before the ReLU hides the mask from norm(z)
    keep_y = y if relu and residual is not None and not add_after_act else None
    ctx.save_for_backward(x, weight, conv_bias, z, keep_y, mean, var, total, gamma, beta)
    ctx.options = options
    ctx.group = group


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 16
    need, as_inputs = needed(ctx)
    return as_inputs(_backward_op(dy, *ctx.saved_tensors, *ctx.options, need, ctx.group))


_op.autograd(_setup_context, _backward)


def _backward_setup_context(ctx, inputs, output):
    *tensors, stride, padding, dilation, groups, eps, relu, add_after_act, need, group = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.geometry = geometry_of(stride, padding, dilation, groups)
    ctx.options = (eps, relu, add_after_act, need, group)


def _double_backward(ctx, ddx, ddw, ddb, ddgamma, ddbeta, ddr):
    dy, x, weight, conv_bias, z, y, mean, var, _, gamma, beta = ctx.saved_tensors
    eps, relu, add_after_act, need, group = ctx.options
    mask = recomputed_mask(z, y, mean, var, gamma, beta, eps) if relu else None

    def forward(x, weight, conv_bias, gamma, beta, residual):
        conv = ConvParams(weight, conv_bias, *ctx.geometry)
        norm = NormParams(gamma, beta, None, None, None, True, None, eps)
        options = {"relu": relu, "add_after_act": add_after_act}
        return reference.conv_bn_act(x, conv, norm, residual, **options, mask=mask, group=group)

    # the residual enters linearly: zeros do for its values
    residual = torch.zeros_like(z) if need[3] else None
    d_dy, (d_x, d_w, d_b, d_gamma, d_beta, _) = double_backward(
        forward,
        (x, weight, conv_bias, gamma, beta, residual),
        dy,
        (ddx, ddw, ddb, ddgamma, ddbeta, ddr),
    )
    return d_dy, d_x, d_w, d_b, None, None, None, None, None, d_gamma, d_beta, *(None,) * 9


_backward_op.autograd(_backward_setup_context, _double_backward)


def conv_bn_act_synchronised(
    x: Tensor,
    conv: ConvParams,
    norm: NormParams,
    group: str,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    add_after_act: bool = False,
) -> Tensor:
    """``conv_bn_act`` in training, of the batch that the ranks of a process group hold together.

    Every rank of the group makes the same calls, forward and backward.

    Args:
        x, conv, residual: as in ``conv_bn_act``; the ranks' batches may differ or be empty.
        norm: as in ``conv_bn_act``; its ``training`` is taken as True.
        group: the process group's ``group_name``.

    Raises:
        ValueError: x is not 4-D, or one value per channel on all ranks together.
        RuntimeError: as ``conv_bn_act``; before the collective, whose other ranks wait in vain.
    """
    norm = norm._replace(training=True)
    check_strict(norm)
    vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    tensors = (x, conv.weight, conv.bias, *vectors, residual)
    y, z, mean, var, total = _op(*tensors, *conv.geometry, norm.eps, relu, add_after_act, group)
    update_running_stats(norm, mean, var, N.count(z), total)
    return y

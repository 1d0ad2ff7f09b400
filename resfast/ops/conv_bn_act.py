"""conv_bn_act: convolution, batch norm, residual and ReLU in one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from resfast.backends.interface import (
    ConvGeometry,
    Kernel,
    NormVectors,
    conv_output_shape,
    empty_nhwc,
)
from resfast.backends.select import find, report, select
from resfast.ops import convolution as C
from resfast.ops import gradients, reference
from resfast.ops import norm as N
from resfast.ops.bn_act import recomputed_mask
from resfast.ops.checks import check_activation, check_norm, check_residual, check_strict
from resfast.ops.params import ConvParams, NormParams
from resfast.ops.registry import FusedOp, absent, double_backward, needs_grad, present
from resfast.ops.running_stats import update_running_stats

GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"


def geometry_of(stride, padding, dilation, groups) -> ConvGeometry:
    """From the lists an op's kernel and fake receive."""
    return ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)


def fake_conv(x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    """Fake of z: stock convolution's own fake, so its errors too, in channels_last."""
    z = torch.nn.functional.conv2d(x, weight, bias, *g)
    return empty_nhwc(z.shape, x)


# ---- training form: also returns the raw convolution output and the statistics


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
    training: bool,
    eps: float,
    relu: bool,
    add_after_act: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_activation(x)
    g = geometry_of(stride, padding, dilation, groups)
    z, stats = C.fprop(C.Activation(x), weight, conv_bias, g, training)
    check_norm(z, gamma, beta, running_mean, running_var, training, eps)
    check_residual(residual, z)
    y, stats = N.forward(
        z,
        gamma,
        beta,
        running_mean,
        running_var,
        residual,
        training,
        eps,
        relu,
        add_after_act,
        stats,
    )
    return y, z, *stats


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
    training,
    eps,
    relu,
    add_after_act,
):
    check_activation(x)
    z = fake_conv(x, weight, conv_bias, geometry_of(stride, padding, dilation, groups))
    check_norm(z, gamma, beta, running_mean, running_var, training, eps)
    check_residual(residual, z)
    return torch.empty_like(z), z, *N.fake_statistics(z)


_op = FusedOp(
    "conv_bn_act",
    "(Tensor x, Tensor weight, Tensor? conv_bias, Tensor? gamma, Tensor? beta, "
    "Tensor? running_mean, Tensor? running_var, Tensor? residual, "
    f"{GEOMETRY}, bool training, float eps, bool relu, bool add_after_act) "
    "-> (Tensor y, Tensor z, Tensor mean, Tensor var)",
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
    gamma: Tensor | None,
    beta: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    training: bool,
    eps: float,
    relu: bool,
    add_after_act: bool,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_residual(dy, z, "dy")
    need_x, need_weight, need_bias, need_residual = need
    geometry = geometry_of(stride, padding, dilation, groups)
    norm = N.prepare(N.Statistics(mean, var), gamma, beta, eps)
    dr, du = gradients.of_residual(dy, z, need_residual, add_after_act)
    g = N.backward(dy, z, norm, y=y, relu=relu, training=training, du=du)
    dx, dw = gradients.of_conv(g.dz, x, weight, geometry, need_x, need_weight)
    db = absent(z)
    if need_bias and conv_bias is not None:
        # batch statistics subtract the bias again: its gradient is exactly zero
        db = (
            torch.zeros_like(conv_bias)
            if training
            else (g.dbeta * norm.affine.scale).to(conv_bias.dtype)
        )
    return dx, dw, db, *gradients.of_norm(g, gamma, beta), dr


def _backward_fake(
    dy,
    x,
    weight,
    conv_bias,
    z,
    y,
    mean,
    var,
    gamma,
    beta,
    stride,
    padding,
    dilation,
    groups,
    training,
    eps,
    relu,
    add_after_act,
    need,
):
    need_x, need_weight, need_bias, need_residual = need
    return (
        *gradients.fake_of_conv(z, x, weight, need_x, need_weight),
        torch.empty_like(conv_bias) if need_bias else absent(z),
        *gradients.fake_of_norm(z, gamma, beta),
        gradients.fake_of_residual(z, need_residual),
    )


_backward_op = FusedOp(
    "conv_bn_act_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor? conv_bias, Tensor z, Tensor? y, Tensor mean, "
    f"Tensor var, Tensor? gamma, Tensor? beta, {GEOMETRY}, bool training, float eps, bool relu, "
    "bool add_after_act, bool[] need) "
    "-> (Tensor dx, Tensor dweight, Tensor dconv_bias, Tensor dgamma, Tensor dbeta, "
    "Tensor dresidual)",
    _backward_kernel,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, weight, conv_bias, gamma, beta, _, _, residual, *options = inputs
    relu, add_after_act = options[6], options[7]
    y, z, mean, var = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(z, mean, var)
    # only a residual joined before the ReLU hides the mask from norm(z)
    keep_y = y if relu and residual is not None and not add_after_act else None
    ctx.save_for_backward(x, weight, conv_bias, z, keep_y, mean, var, gamma, beta)
    ctx.options = options


def needed(ctx) -> tuple[list[bool], Callable[[Sequence[Tensor]], tuple[Tensor | None, ...]]]:
    """``need`` of the backward op, and what puts its outputs in the order of the op's 16 inputs."""
    n = ctx.needs_input_grad

    def as_inputs(grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        *first, dr = grads
        head = (present(g, needs) for g, needs in zip(first, n[:5], strict=True))
        return *head, None, None, present(dr, n[7]), *(None,) * 8

    return [n[0], n[1], n[2], n[7]], as_inputs


def _backward(ctx, dy, _dz, _dmean, _dvar):
    if dy is None:
        return (None,) * 16
    need, as_inputs = needed(ctx)
    return as_inputs(_backward_op(dy, *ctx.saved_tensors, *ctx.options, need))


_op.autograd(_setup_context, _backward)


def _backward_setup_context(ctx, inputs, output):
    *tensors, stride, padding, dilation, groups, training, eps, relu, add_after_act, need = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.geometry = geometry_of(stride, padding, dilation, groups)
    ctx.options = (training, eps, relu, add_after_act, need)


def _double_backward(ctx, ddx, ddw, ddb, ddgamma, ddbeta, ddr):
    dy, x, weight, conv_bias, z, y, mean, var, gamma, beta = ctx.saved_tensors
    training, eps, relu, add_after_act, need = ctx.options
    mask = recomputed_mask(z, y, mean, var, gamma, beta, eps) if relu else None

    def forward(x, weight, conv_bias, gamma, beta, residual):
        return reference.conv_bn_act(
            x,
            ConvParams(weight, conv_bias, *ctx.geometry),
            NormParams(gamma, beta, mean, var, None, training, None, eps),
            residual,
            relu=relu,
            add_after_act=add_after_act,
            mask=mask,
        )

    # the residual enters linearly: zeros do for its values
    residual = torch.zeros_like(z) if need[3] else None
    d_dy, (d_x, d_w, d_b, d_gamma, d_beta, _) = double_backward(
        forward,
        (x, weight, conv_bias, gamma, beta, residual),
        dy,
        (ddx, ddw, ddb, ddgamma, ddbeta, ddr),
    )
    return d_dy, d_x, d_w, d_b, None, None, None, None, d_gamma, d_beta, *(None,) * 9


_backward_op.autograd(_backward_setup_context, _double_backward)


# ---- inference form: the output alone, everything in the convolution's epilogue where it can be


def _inference_kernel(
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    relu: bool,
    add_after_act: bool,
) -> Tensor:
    g = geometry_of(stride, padding, dilation, groups)
    check_activation(x)
    norm = NormVectors(gamma, beta, running_mean, running_var, eps)
    backend, declined = find("conv_fprop", x)
    arguments = (x, weight, conv_bias, g, norm, residual, relu, add_after_act)
    y = backend.conv_fprop_affine_again(*arguments)
    if y is not None:
        report("conv_fprop", backend, x, declined, ("epilogue",))
        return y
    # shape, dtype and device of z, and stock convolution's errors, without computing it
    z = output_like(x, weight, conv_bias, g)
    check_norm(z, gamma, beta, running_mean, running_var, False, eps)
    check_residual(residual, z)
    kernel = backend.affine_kernel(*arguments)
    if isinstance(kernel, Kernel):
        report("conv_fprop", kernel.name, x, declined, ("epilogue",))
        return cast(Tensor, kernel.run())
    report("conv_fprop", backend, x, declined)
    z = backend.conv_fprop(x, weight, conv_bias, g)
    second = select("norm_apply", z, {f"{backend.name} convolution epilogue": kernel})
    return second.norm_apply(z, norm.affine(z.dtype), residual, None, relu, add_after_act, out=z)


def _inference_fake(
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
):
    check_activation(x)
    z = fake_conv(x, weight, conv_bias, geometry_of(stride, padding, dilation, groups))
    check_norm(z, gamma, beta, running_mean, running_var, False, eps)
    check_residual(residual, z)
    return z


def output_like(x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    """A memoryless tensor of the convolution's output shape, dtype and device.

    Raises:
        RuntimeError: whatever stock convolution raises for these arguments.
    """
    legal = (
        weight.dim() == 4
        and g.groups > 0
        and x.shape[1] == weight.shape[1] * g.groups
        and weight.shape[0] % g.groups == 0
        and x.dtype == weight.dtype
        and x.device == weight.device
        and min(g.stride) > 0
        and min(g.padding) >= 0
        and min(g.dilation) > 0
        and (
            bias is None
            or (
                bias.shape == weight.shape[:1] and bias.dtype == x.dtype and bias.device == x.device
            )
        )
    )
    if legal:
        shape = conv_output_shape(x, weight, g)
        legal = min(shape[2:]) > 0
    if not legal:
        torch.nn.functional.conv2d(x, weight, bias, *g)
        raise RuntimeError(
            f"convolution of input {tuple(x.shape)} with weight {tuple(weight.shape)} and {g} "
            "is not supported"
        )
    return x.new_empty(1).expand(shape)


_inference_op = FusedOp(
    "conv_bn_act_inference",
    "(Tensor x, Tensor weight, Tensor? conv_bias, Tensor? gamma, Tensor? beta, "
    "Tensor running_mean, Tensor running_var, Tensor? residual, "
    f"{GEOMETRY}, float eps, bool relu, bool add_after_act) -> Tensor",
    _inference_kernel,
    _inference_fake,
)
_inference_op.autocast((0, 1, 2, 7))


def conv_bn_act(
    x: Tensor,
    conv: ConvParams,
    norm: NormParams,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    add_after_act: bool = False,
) -> Tensor:
    """act(bn(conv(x)) + residual), or act(bn(conv(x))) + residual with ``add_after_act``.

    Args:
        x: ``[N, C, H, W]``; float32, bfloat16, float16 or float64, any layout.
        conv: weight ``[K, C/groups, R, S]`` of x's dtype.
        norm: parameters of K channels; running buffers are updated in training.
        residual: shape and dtype of the convolution's output ``[N, K, P, Q]``.

    Returns:
        ``[N, K, P, Q]``, channels_last.

    Raises:
        ValueError: x is not 4-D, eps ≤ 0, or training with one value per channel.
        RuntimeError: what ``conv2d`` raises; wrong size, dtype or device of another argument.
    """
    check_strict(norm)
    geometry = conv.geometry
    tensors = (
        x,
        conv.weight,
        conv.bias,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        residual,
    )
    if norm.training or needs_grad(*tensors):
        y, z, mean, var = _op(*tensors, *geometry, norm.training, norm.eps, relu, add_after_act)
        update_running_stats(norm, mean, var, N.count(z))
        return y
    if norm.running_mean is None or norm.running_var is None:
        raise RuntimeError(
            "Expected running_mean and running_var to be defined when training=False"
        )
    return _inference_op(*tensors, *geometry, norm.eps, relu, add_after_act)

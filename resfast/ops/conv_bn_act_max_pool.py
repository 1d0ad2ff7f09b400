"""conv_bn_act_max_pool: the whole stem, convolution, batch norm, ReLU and max-pool, in one op.

As ``bn_act_max_pool``, and the statistics come out of the convolution where its kernel takes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resfast.backends.interface import empty_nhwc
from resfast.ops import convolution as C
from resfast.ops import gradients, reference
from resfast.ops import norm as N
from resfast.ops.bn_act_max_pool import apply_pool, check_pool, pool_backward, pooled
from resfast.ops.checks import check_activation, check_strict
from resfast.ops.conv_bn_act import GEOMETRY, fake_conv, geometry_of
from resfast.ops.params import ConvParams, NormParams
from resfast.ops.registry import FusedOp, double_backward, present
from resfast.ops.running_stats import update_running_stats

# ---- training form


def _kernel(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    window: list[int],
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_activation(x)
    g = geometry_of(stride, padding, dilation, groups)
    z, stats = C.fprop(C.Activation(x), weight, None, g, training)
    check_pool(z, (gamma, beta, running_mean, running_var), window, training, eps)
    if stats is None:
        stats = N.statistics(z, running_mean, running_var, training)
    y, index = apply_pool(z, N.prepare(stats, gamma, beta, eps), window)
    return y, z, index, *stats


def _fake(
    x,
    weight,
    gamma,
    beta,
    running_mean,
    running_var,
    stride,
    padding,
    dilation,
    groups,
    window,
    training,
    eps,
):
    check_activation(x)
    z = fake_conv(x, weight, None, geometry_of(stride, padding, dilation, groups))
    check_pool(z, (gamma, beta, running_mean, running_var), window, training, eps)
    y = empty_nhwc(pooled(z, window), z)
    return y, z, torch.empty_like(y, dtype=torch.uint8), *N.fake_statistics(z)


_op = FusedOp(
    "conv_bn_act_max_pool",
    "(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor? running_mean, "
    f"Tensor? running_var, {GEOMETRY}, SymInt[3] window, bool training, float eps) "
    "-> (Tensor y, Tensor z, Tensor index, Tensor mean, Tensor var)",
    _kernel,
    _fake,
)
_op.autocast((0, 1))


# ---- backward


def _backward_kernel(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor,
    index: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    window: list[int],
    training: bool,
    eps: float,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm = N.prepare(N.Statistics(mean, var), gamma, beta, eps)
    g = pool_backward(dy, z, norm, index, window, training)
    geometry = geometry_of(stride, padding, dilation, groups)
    dx, dw = gradients.of_conv(g.dz, x, weight, geometry, *need)
    return dx, dw, *gradients.of_norm(g, gamma, beta)


def _backward_fake(
    dy,
    x,
    weight,
    z,
    index,
    mean,
    var,
    gamma,
    beta,
    stride,
    padding,
    dilation,
    groups,
    window,
    training,
    eps,
    need,
):
    dx, dw = gradients.fake_of_conv(z, x, weight, *need)
    return dx, dw, *gradients.fake_of_norm(z, gamma, beta)


_backward_op = FusedOp(
    "conv_bn_act_max_pool_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor z, Tensor index, Tensor mean, Tensor var, "
    f"Tensor? gamma, Tensor? beta, {GEOMETRY}, SymInt[3] window, bool training, float eps, "
    "bool[] need) -> (Tensor dx, Tensor dweight, Tensor dgamma, Tensor dbeta)",
    _backward_kernel,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, weight, gamma, beta, _, _, *options = inputs
    _, z, index, mean, var = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(z, index, mean, var)
    ctx.save_for_backward(x, weight, z, index, mean, var, gamma, beta)
    ctx.options = options


def _backward(ctx, dy, _dz, _dindex, _dmean, _dvar):
    if dy is None:
        return (None,) * 13
    need = ctx.needs_input_grad
    grads = _backward_op(dy, *ctx.saved_tensors, *ctx.options, [need[0], need[1]])
    return *(present(g, n) for g, n in zip(grads, need[:4], strict=True)), *(None,) * 9


_op.autograd(_setup_context, _backward)


def _backward_setup_context(ctx, inputs, output):
    *tensors, stride, padding, dilation, groups, window, training, eps, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.geometry = geometry_of(stride, padding, dilation, groups)
    ctx.options = (window, training, eps)


def _double_backward(ctx, ddx, ddw, ddgamma, ddbeta):
    dy, x, weight, _, _, mean, var, gamma, beta = ctx.saved_tensors
    (kernel_size, stride, padding), training, eps = ctx.options

    def forward(x, weight, gamma, beta):
        norm = NormParams(gamma, beta, mean, var, None, training, None, eps)
        z = reference.conv(x, ConvParams(weight, None, *ctx.geometry))
        return reference.bn_act_max_pool(
            z, norm, kernel_size=kernel_size, stride=stride, padding=padding
        )

    d_dy, (d_x, d_w, d_gamma, d_beta) = double_backward(
        forward, (x, weight, gamma, beta), dy, (ddx, ddw, ddgamma, ddbeta)
    )
    return d_dy, d_x, d_w, None, None, None, None, d_gamma, d_beta, *(None,) * 8


_backward_op.autograd(_backward_setup_context, _double_backward)


def conv_bn_act_max_pool(
    x: Tensor,
    conv: ConvParams,
    norm: NormParams,
    *,
    kernel_size: int = 3,
    stride: int = 2,
    padding: int = 1,
) -> Tensor:
    """maxpool(relu(bn(conv(x)))).

    Args:
        x: ``[N, C, H, W]``; float32, bfloat16, float16 or float64, any layout.
        conv: weight ``[K, C/groups, R, S]`` of x's dtype, no bias.
        norm: parameters of K channels; running buffers are updated in training.
        kernel_size: side of the pool's square window, 1 to 15; stride and padding are the pool's.

    Returns:
        ``[N, K, P, Q]``, channels_last.

    Raises:
        ValueError: a bias; x is not 4-D, or training with one value per channel.
        RuntimeError: what ``conv2d`` and ``max_pool2d`` raise; a wrong vector's size or dtype.
    """
    if conv.bias is not None:
        raise ValueError("conv_bn_act_max_pool takes a convolution without bias")
    check_strict(norm)
    vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    y, z, _, mean, var = _op(
        x,
        conv.weight,
        *vectors,
        *conv.geometry,
        (kernel_size, stride, padding),
        norm.training,
        norm.eps,
    )
    update_running_stats(norm, mean, var, N.count(z))
    return y

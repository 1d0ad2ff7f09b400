"""bn_act_max_pool: the stem's batch norm, ReLU and max-pool in one op.

Saves the raw input and one byte per pooled value; the activation and its 64-bit indices, which
stock modules keep, never exist.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resfast.backends.interface import Backend, empty_nhwc, nhwc
from resfast.backends.select import find, report
from resfast.ops import gradients, reference
from resfast.ops import norm as N
from resfast.ops.checks import check_activation, check_norm, check_residual, check_strict
from resfast.ops.params import NormParams
from resfast.ops.registry import FusedOp, double_backward, present
from resfast.ops.running_stats import update_running_stats


def check_pool(
    z: Tensor,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    window: Sequence[int],
    training: bool,
    eps: float,
) -> None:
    """``window``: kernel size, stride and padding; ``vectors``: gamma to the running variance."""
    check_activation(z)
    kernel_size, stride, padding = window
    if not 0 < kernel_size <= 15:
        raise RuntimeError(f"kernel_size must lie in 1..15, got {kernel_size}")
    if stride < 1:
        raise RuntimeError(f"stride should not be zero or negative, got {stride}")
    if not 0 <= padding <= kernel_size // 2:
        raise RuntimeError(
            f"pad should be at most half of effective kernel size, but got pad={padding} "
            f"and kernel_size={kernel_size}"
        )
    if min(pooled(z, window)[2:]) < 1:
        raise RuntimeError(f"Output size is too small for input of shape {tuple(z.shape)}")
    check_norm(z, *vectors, training, eps)


def pooled(z: Tensor, window: Sequence[int]) -> tuple[int, int, int, int]:
    """Shape of the pooled output."""
    kernel_size, stride, padding = window
    n, c, h, w = z.shape
    p, q = ((size + 2 * padding - kernel_size) // stride + 1 for size in (h, w))
    return n, c, p, q


def _select(function: str, z: Tensor, window: Sequence[int]) -> Backend:
    backend, declined = find(function, z, tuple(window))
    if backend.pool_reason is not None:
        declined[f"{backend.name} max-pool"] = backend.pool_reason
    report(function, backend, z, declined)
    return backend


def apply_pool(z: Tensor, norm: N.Norm, window: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(maxpool(relu(norm(z))), its positions); window: kernel size, stride and padding."""
    return _select("norm_apply", z, window).norm_apply_max_pool(z, norm.affine, *window)


def pool_backward(
    dy: Tensor, z: Tensor, norm: N.Norm, index: Tensor, window: Sequence[int], training: bool
) -> N.NormGradients:
    """dz, dgamma and dbeta from the pooled output's gradient.

    Raises:
        RuntimeError: dy is not of the pooled output's shape, dtype and device.
    """
    check_residual(dy, z.new_empty(1).expand(pooled(z, window)), "dy")
    sum_du, sum_du_xhat = _select("norm_backward_reduce", z, window).norm_max_pool_backward_reduce(
        dy, z, norm.affine, norm.rstd, index, *window
    )
    coef_z, coef_1 = N.coefficients(norm, sum_du, sum_du_xhat, N.count(z), training)
    kernel_size, stride, padding = window
    dz = _select("norm_backward_apply", z, window).norm_max_pool_backward_apply(
        dy, z, norm.affine, index, kernel_size, stride, padding, coef_z, coef_1
    )
    return N.NormGradients(dz, sum_du_xhat, sum_du)


# ---- training form


def _kernel(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    kernel_size: int,
    stride: int,
    padding: int,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    window = (kernel_size, stride, padding)
    check_pool(z, (gamma, beta, running_mean, running_var), window, training, eps)
    z = nhwc(z)
    stats = N.statistics(z, running_mean, running_var, training)
    norm = N.prepare(stats, gamma, beta, eps)
    y, index = apply_pool(z, norm, window)
    return y, index, *stats


def _fake(z, gamma, beta, running_mean, running_var, kernel_size, stride, padding, training, eps):
    window = (kernel_size, stride, padding)
    check_pool(z, (gamma, beta, running_mean, running_var), window, training, eps)
    y = empty_nhwc(pooled(z, window), z)
    return y, torch.empty_like(y, dtype=torch.uint8), *N.fake_statistics(z)


_op = FusedOp(
    "bn_act_max_pool",
    "(Tensor z, Tensor? gamma, Tensor? beta, Tensor? running_mean, Tensor? running_var, "
    "SymInt kernel_size, SymInt stride, SymInt padding, bool training, float eps) "
    "-> (Tensor y, Tensor index, Tensor mean, Tensor var)",
    _kernel,
    _fake,
)


# ---- backward


def _backward_kernel(
    dy: Tensor,
    z: Tensor,
    index: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    kernel_size: int,
    stride: int,
    padding: int,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    norm = N.prepare(N.Statistics(mean, var), gamma, beta, eps)
    g = pool_backward(dy, z, norm, index, (kernel_size, stride, padding), training)
    return g.dz, *gradients.of_norm(g, gamma, beta)


def _backward_fake(
    dy, z, index, mean, var, gamma, beta, kernel_size, stride, padding, training, eps
):
    return empty_nhwc(z.shape, z), *gradients.fake_of_norm(z, gamma, beta)


_backward_op = FusedOp(
    "bn_act_max_pool_backward",
    "(Tensor dy, Tensor z, Tensor index, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, "
    "SymInt kernel_size, SymInt stride, SymInt padding, bool training, float eps) "
    "-> (Tensor dz, Tensor dgamma, Tensor dbeta)",
    _backward_kernel,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    z, gamma, beta, _, _, *options = inputs
    _, index, mean, var = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(index, mean, var)
    ctx.save_for_backward(z, index, mean, var, gamma, beta)
    ctx.options = options


def _backward(ctx, dy, _dindex, _dmean, _dvar):
    if dy is None:
        return (None,) * 10
    need = ctx.needs_input_grad
    grads = _backward_op(dy, *ctx.saved_tensors, *ctx.options)
    return *(present(g, n) for g, n in zip(grads, need[:3], strict=True)), *(None,) * 7


_op.autograd(_setup_context, _backward)


def _backward_setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _double_backward(ctx, ddz, ddgamma, ddbeta):
    dy, z, _, mean, var, gamma, beta = ctx.saved_tensors
    kernel_size, stride, padding, training, eps = ctx.options

    def forward(z, gamma, beta):
        norm = NormParams(gamma, beta, mean, var, None, training, None, eps)
        return reference.bn_act_max_pool(
            z, norm, kernel_size=kernel_size, stride=stride, padding=padding
        )

    d_dy, (d_z, d_gamma, d_beta) = double_backward(
        forward, (z, gamma, beta), dy, (ddz, ddgamma, ddbeta)
    )
    return d_dy, d_z, None, None, None, d_gamma, d_beta, *(None,) * 5


_backward_op.autograd(_backward_setup_context, _double_backward)


def bn_act_max_pool(
    x: Tensor,
    norm: NormParams,
    *,
    kernel_size: int = 3,
    stride: int = 2,
    padding: int = 1,
) -> Tensor:
    """maxpool(relu(bn(x))).

    Args:
        x: ``[N, C, H, W]``; float32, bfloat16, float16 or float64, any layout.
        norm: parameters of C channels; running buffers are updated in training.
        kernel_size: side of the square window, 1 to 15.

    Returns:
        ``[N, C, P, Q]``, channels_last.

    Raises:
        ValueError: x is not 4-D, eps ≤ 0, or training with one value per channel.
        RuntimeError: what ``max_pool2d`` raises; wrong size, dtype or device of a vector.
    """
    check_strict(norm)
    vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    y, _, mean, var = _op(x, *vectors, kernel_size, stride, padding, norm.training, norm.eps)
    update_running_stats(norm, mean, var, N.count(x))
    return y

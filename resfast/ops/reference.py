"""What every op means, in plain differentiable PyTorch; in float64 the judge of the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resfast.ops.params import ConvParams, NormParams


def _channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def conv(x: Tensor, conv: ConvParams) -> Tensor:
    """z = conv2d(x)."""
    return F.conv2d(
        x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )


def _all_ranks(t: Tensor, group: str) -> Tensor:
    """The sum of all ranks' t, differentiable; its gradient is that of the sum of their losses."""
    from torch.distributed.nn.functional import all_reduce

    process_group = torch.distributed.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]  # a NewType of str
    return all_reduce(t, group=process_group)


def batch_norm(z: Tensor, norm: NormParams, group: str | None = None) -> Tensor:
    """(z − mean)/√(var + eps)·gamma + beta; biased batch variance in training.

    With a group the batch is that of all its ranks.
    """
    if norm.training and group is not None:
        n = _all_ranks(z.new_full((), z.numel() // z.shape[1]), group)
        mean = _all_ranks(z.sum((0, 2, 3)), group) / n
        var = _all_ranks((z - _channel(mean)).square().sum((0, 2, 3)), group) / n
    elif norm.training:
        mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)
    else:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, var = norm.running_mean, norm.running_var
    u = (z - _channel(mean)) * _channel((var + norm.eps).rsqrt())
    if norm.weight is not None:
        u = u * _channel(norm.weight)
    return u if norm.bias is None else u + _channel(norm.bias)


def running_stats(z: Tensor, norm: NormParams) -> tuple[Tensor, Tensor]:
    """The running mean and variance after this batch; the unbiased variance goes in."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = norm.momentum
    if factor is None:
        assert norm.num_batches_tracked is not None
        factor = 1.0 / (int(norm.num_batches_tracked) + 1)
    mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=True)
    return (
        (1 - factor) * norm.running_mean + factor * mean,
        (1 - factor) * norm.running_var + factor * var,
    )


def _act(u: Tensor, relu: bool, mask: Tensor | None) -> Tensor:
    if not relu:
        return u
    return F.relu(u) if mask is None else u * mask


def bn_act(
    z: Tensor,
    norm: NormParams,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    add_after_act: bool = False,
    mask: Tensor | None = None,
    group: str | None = None,
) -> Tensor:
    """act(bn(z) + r), or act(bn(z)) + r. ``mask`` replaces the ReLU by a given 0/1 factor."""
    u = batch_norm(z, norm, group)
    if residual is None:
        return _act(u, relu, mask)
    if add_after_act:
        return _act(u, relu, mask) + residual
    return _act(u + residual, relu, mask)


def conv_bn_act(
    x: Tensor,
    conv_params: ConvParams,
    norm: NormParams,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    add_after_act: bool = False,
    mask: Tensor | None = None,
    group: str | None = None,
) -> Tensor:
    """bn_act of a convolution."""
    options = {"relu": relu, "add_after_act": add_after_act}
    return bn_act(conv(x, conv_params), norm, residual, **options, mask=mask, group=group)


def bn_act_max_pool(
    z: Tensor, norm: NormParams, *, kernel_size: int = 3, stride: int = 2, padding: int = 1
) -> Tensor:
    """maxpool(relu(bn(z)))."""
    return F.max_pool2d(F.relu(batch_norm(z, norm)), kernel_size, stride, padding)


def residual_block(
    x: Tensor,
    convs: Sequence[ConvParams],
    norms: Sequence[NormParams],
    *,
    shortcut_conv: ConvParams | None = None,
    shortcut_norm: NormParams | None = None,
    shortcut_input: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """relu(bn(conv(… relu(bn(conv(x))) …)) + shortcut), He et al. 2015 (arXiv:1512.03385)."""
    a = x
    for c, n in zip(convs[:-1], norms[:-1], strict=True):
        a = conv_bn_act(a, c, n)
    shortcut = x if shortcut_input is None else shortcut_input
    if shortcut_conv is not None:
        assert shortcut_norm is not None
        shortcut = conv_bn_act(shortcut, shortcut_conv, shortcut_norm, relu=False)
    return conv_bn_act(a, convs[-1], norms[-1], shortcut, mask=mask)


def positive(y: Tensor) -> Tensor:
    """The ReLU's mask as a factor of y's dtype."""
    return torch.where(y <= 0, 0, 1).to(y.dtype)

"""residual_block: a whole BasicBlock or Bottleneck, forward and backward scheduled by hand.

Only raw convolution outputs and the block's own output are kept for backward; normalised
activations are recomputed there, each in the pass that already reads the tensor it comes from.
With ``memory_efficient`` the last convolution's output and the projection's are recomputed too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resfast.backends.interface import ConvGeometry, empty_nhwc, nhwc
from resfast.backends.scratch import scratch
from resfast.backends.select import select
from resfast.ops import norm as N
from resfast.ops import reference
from resfast.ops.checks import check_activation, check_norm, check_residual, check_strict
from resfast.ops.conv_bn_act import conv_bn_act, fake_conv
from resfast.ops.params import ConvParams, NormParams
from resfast.ops.registry import FusedOp, absent, double_backward, needs_grad, present
from resfast.ops.running_stats import update_running_stats


class _Layer(NamedTuple):
    """One convolution and its norm; the projection, where there is one, is the last layer."""

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    mean: Tensor  # running statistics in forward, the ones used in backward
    var: Tensor
    geometry: ConvGeometry
    eps: float
    training: bool

    def conv(self, x: Tensor) -> Tensor:
        return select("conv_fprop", x).conv_fprop(x, self.weight, None, self.geometry)

    def prepare(self, stats: N.Statistics) -> N.Norm:
        return N.prepare(stats, self.gamma, self.beta, self.eps)


def _layers(
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    geometry: Sequence[int],
    eps: Sequence[float],
    training: Sequence[bool],
    projection: bool,
) -> tuple[list[_Layer], _Layer | None]:
    """(main chain, projection or None) from an op's flat arguments."""
    layers = [
        _Layer(*tensors, _geometry(geometry[7 * i : 7 * i + 7]), eps[i], training[i])
        for i, tensors in enumerate(zip(weights, gammas, betas, means, variances, strict=True))
    ]
    return (layers[:-1], layers[-1]) if projection else (layers, None)


def _geometry(v: Sequence[int]) -> ConvGeometry:
    return ConvGeometry((v[0], v[1]), (v[2], v[3]), (v[4], v[5]), v[6])


def _flat_geometry(conv: ConvParams) -> list[int]:
    return [*conv.stride, *conv.padding, *conv.dilation, conv.groups]


def _check_layer(z: Tensor, layer: _Layer) -> None:
    check_norm(z, layer.gamma, layer.beta, layer.mean, layer.var, layer.training, layer.eps)


# ---- forward


def _kernel(
    x: Tensor,
    shortcut_input: Tensor | None,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
    geometry: list[int],
    eps: list[float],
    training: list[bool],
    projection: bool,
    memory_efficient: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    check_activation(x)
    chain, shortcut = _layers(
        weights, gammas, betas, running_means, running_vars, geometry, eps, training, projection
    )
    x = nhwc(x)
    residual = x if shortcut_input is None else nhwc(shortcut_input)
    zs: list[Tensor] = []
    statistics: list[N.Statistics] = []

    def normalised(layer: _Layer, a: Tensor) -> tuple[Tensor, N.Norm]:
        z = layer.conv(a)
        _check_layer(z, layer)
        stats = N.statistics(z, layer.mean, layer.var, layer.training)
        statistics.append(stats)
        return z, layer.prepare(stats)

    a = x
    for layer in chain[:-1]:
        z, norm = normalised(layer, a)
        zs.append(z)
        a = N.apply(z, norm, out=scratch("activation", z))
    z, norm = normalised(chain[-1], a)
    residual_norm = None
    saved = [z]
    if shortcut is not None:
        residual, residual_norm = normalised(shortcut, residual)
        saved.append(residual)
    check_residual(residual, z, "shortcut")
    if not memory_efficient:
        zs.extend(saved)
    out = N.apply(z, norm, residual, residual_norm, out=z if memory_efficient else None)
    return out, zs, [s.mean for s in statistics], [s.var for s in statistics]


def _fake(
    x,
    shortcut_input,
    weights,
    gammas,
    betas,
    running_means,
    running_vars,
    geometry,
    eps,
    training,
    projection,
    memory_efficient,
):
    check_activation(x)
    chain, shortcut = _layers(
        weights, gammas, betas, running_means, running_vars, geometry, eps, training, projection
    )
    zs = []
    a = x
    for layer in chain:
        a = fake_conv(a, layer.weight, None, layer.geometry)
        _check_layer(a, layer)
        zs.append(a)
    residual = x if shortcut_input is None else shortcut_input
    if shortcut is not None:
        residual = fake_conv(residual, shortcut.weight, None, shortcut.geometry)
        _check_layer(residual, shortcut)
        zs.append(residual)
    check_residual(residual, a, "shortcut")
    statistics = [N.fake_statistics(z) for z in zs]
    if memory_efficient:
        zs = zs[: len(chain) - 1]
    return torch.empty_like(a), zs, [s.mean for s in statistics], [s.var for s in statistics]


_op = FusedOp(
    "residual_block",
    "(Tensor x, Tensor? shortcut_input, Tensor[] weights, Tensor[] gammas, Tensor[] betas, "
    "Tensor[] running_means, Tensor[] running_vars, SymInt[] geometry, float[] eps, "
    "bool[] training, bool projection, bool memory_efficient) "
    "-> (Tensor out, Tensor[] zs, Tensor[] means, Tensor[] variances)",
    _kernel,
    _fake,
)
_op.autocast((0, 1, 2))


# ---- backward


class _Gradients(NamedTuple):
    dweight: Tensor
    dgamma: Tensor
    dbeta: Tensor


def _backward_kernel(
    dy: Tensor,
    x: Tensor,
    shortcut_input: Tensor | None,
    out: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    zs: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    geometry: list[int],
    eps: list[float],
    training: list[bool],
    projection: bool,
    memory_efficient: bool,
    need: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    chain, shortcut = _layers(
        weights, gammas, betas, means, variances, geometry, eps, training, projection
    )
    check_residual(dy, out, "dy")
    need_x, need_shortcut_input, *need_weights = need
    residual = x if shortcut_input is None else shortcut_input
    norms = [layer.prepare(N.Statistics(layer.mean, layer.var)) for layer in chain]
    last = len(chain) - 1

    def wgrad(i: int, layer: _Layer, dz: Tensor, a: Tensor | None) -> Tensor:
        if not need_weights[i]:
            return absent(layer.weight)
        assert a is not None
        return select("conv_wgrad", dz).conv_wgrad(dz, a, layer.weight, layer.geometry)

    def dgrad(layer: _Layer, dz: Tensor, like: Tensor) -> Tensor:
        return select("conv_dgrad", dz).conv_dgrad(dz, like, layer.weight, layer.geometry)

    def result(i: int, dw: Tensor, g: N.NormGradients) -> _Gradients:
        return _Gradients(dw, g.dgamma.to(gammas[i].dtype), g.dbeta.to(betas[i].dtype))

    # the block's end: its ReLU's mask is read off the saved output
    a = None
    if memory_efficient:
        a = N.apply(zs[last - 1], norms[last - 1], out=scratch("activation", zs[last - 1]))
        z = chain[last].conv(a)
    else:
        z = zs[last]
    need_residual = need_shortcut_input if shortcut_input is not None else need_x
    du = None
    if shortcut is not None or (need_residual and shortcut_input is None):
        du = scratch("du", z)
    elif need_residual:
        du = empty_nhwc(z.shape, z)  # it is the shortcut input's gradient itself
    g = N.backward(
        dy,
        z,
        norms[last],
        y=out,
        relu=True,
        training=chain[last].training,
        dz=scratch("dz", z),
        du=du,
    )
    dz = g.dz
    gradients: list[_Gradients | None] = [None] * len(weights)

    # down the chain; each norm's backward writes the activation its convolution's wgrad needs
    for i in range(last, 0, -1):
        before = zs[i - 1]
        da = dgrad(chain[i], dz, before)
        wanted = scratch("activation", before) if need_weights[i] and a is None else None
        inner = N.backward(
            da,
            before,
            norms[i - 1],
            y=None,
            relu=True,
            training=chain[i - 1].training,
            dz=da,
            activation=wanted,
        )
        a = wanted if a is None else a
        gradients[i] = result(i, wgrad(i, chain[i], dz, a), g)
        g, dz, a = inner, inner.dz, None
    gradients[0] = result(0, wgrad(0, chain[0], dz, x), g)
    dx = dgrad(chain[0], dz, x) if need_x else absent(x)

    dshortcut = du
    if shortcut is not None:
        assert du is not None
        j = len(chain)
        zd = shortcut.conv(residual) if memory_efficient else zs[j]
        norm = shortcut.prepare(N.Statistics(shortcut.mean, shortcut.var))
        g = N.backward(du, zd, norm, y=None, relu=False, training=shortcut.training, dz=du)
        gradients[j] = result(j, wgrad(j, shortcut, g.dz, residual), g)
        dshortcut = dgrad(shortcut, g.dz, residual) if need_residual else None

    if shortcut_input is None and dshortcut is not None:
        dx.add_(dshortcut)
        dshortcut = None
    return (
        dx,
        absent(x) if dshortcut is None else dshortcut,
        [g.dweight for g in gradients if g is not None],
        [g.dgamma for g in gradients if g is not None],
        [g.dbeta for g in gradients if g is not None],
    )


def _backward_fake(
    dy,
    x,
    shortcut_input,
    out,
    weights,
    gammas,
    betas,
    zs,
    means,
    variances,
    geometry,
    eps,
    training,
    projection,
    memory_efficient,
    need,
):
    need_x, need_shortcut_input, *need_weights = need
    return (
        empty_nhwc(x.shape, x) if need_x else absent(x),
        empty_nhwc(shortcut_input.shape, x) if need_shortcut_input else absent(x),
        [
            torch.empty_like(w) if n else absent(w)
            for w, n in zip(weights, need_weights, strict=True)
        ],
        [torch.empty_like(v) for v in gammas],
        [torch.empty_like(v) for v in betas],
    )


_backward_op = FusedOp(
    "residual_block_backward",
    "(Tensor dy, Tensor x, Tensor? shortcut_input, Tensor out, Tensor[] weights, "
    "Tensor[] gammas, Tensor[] betas, Tensor[] zs, Tensor[] means, Tensor[] variances, "
    "SymInt[] geometry, float[] eps, bool[] training, bool projection, bool memory_efficient, "
    "bool[] need) "
    "-> (Tensor dx, Tensor dshortcut, Tensor[] dweights, Tensor[] dgammas, Tensor[] dbetas)",
    _backward_kernel,
    _backward_fake,
)


class _Saved(NamedTuple):
    """The tensors kept for backward, flat for autograd and grouped for the op."""

    x: Tensor
    shortcut_input: Tensor | None
    out: Tensor
    lists: list[list[Tensor]]

    def save(self, ctx, *more: Tensor) -> None:
        ctx.save_for_backward(
            self.x,
            self.shortcut_input,
            self.out,
            *(t for group in self.lists for t in group),
            *more,
        )
        ctx.lengths = [len(group) for group in self.lists]

    @classmethod
    def load(cls, ctx) -> tuple[_Saved, list[Tensor]]:
        x, shortcut_input, out, *rest = ctx.saved_tensors
        lists = []
        for n in ctx.lengths:
            lists.append(rest[:n])
            rest = rest[n:]
        return cls(x, shortcut_input, out, lists), rest


def _setup_context(ctx, inputs, output):
    x, shortcut_input, weights, gammas, betas, _, _, *options = inputs
    out, zs, means, variances = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*zs, *means, *variances)
    _Saved(x, shortcut_input, out, [weights, gammas, betas, zs, means, variances]).save(ctx)
    ctx.options = options


def _backward(ctx, dy, _dzs, _dmeans, _dvariances):
    layers = len(ctx.needs_input_grad[2])
    nothing = [None] * layers
    if dy is None:
        return None, None, nothing, nothing, nothing, nothing, nothing, *(None,) * 5
    saved, _ = _Saved.load(ctx)
    need_x, need_shortcut, need_weights, need_gammas, need_betas, *_ = ctx.needs_input_grad
    dx, dshortcut, dweights, dgammas, dbetas = _backward_op(
        dy,
        saved.x,
        saved.shortcut_input,
        saved.out,
        *saved.lists,
        *ctx.options,
        [need_x, need_shortcut, *need_weights],
    )

    def wanted(gradients, need):
        return [present(g, n) for g, n in zip(gradients, need, strict=True)]

    return (
        present(dx, need_x),
        present(dshortcut, need_shortcut),
        wanted(dweights, need_weights),
        wanted(dgammas, need_gammas),
        wanted(dbetas, need_betas),
        nothing,
        nothing,
        *(None,) * 5,
    )


_op.autograd(_setup_context, _backward)


def _backward_setup_context(ctx, inputs, output):
    dy, x, shortcut_input, out, *rest = inputs
    ctx.set_materialize_grads(False)
    _Saved(x, shortcut_input, out, rest[:6]).save(ctx, dy)
    ctx.options = rest[6:]


def _double_backward(ctx, ddx, ddshortcut, ddweights, ddgammas, ddbetas):
    saved, (dy,) = _Saved.load(ctx)
    weights, gammas, betas, zs, means, variances = saved.lists
    geometry, eps, training, projection, *_ = ctx.options
    n = len(weights)
    mask = reference.positive(saved.out)

    def forward(x, shortcut_input, *tensors):
        convs = [
            ConvParams(w, None, *_geometry(geometry[7 * i : 7 * i + 7]))
            for i, w in enumerate(tensors[:n])
        ]
        norms = [
            NormParams(g, b, means[i], variances[i], None, training[i], None, eps[i])
            for i, (g, b) in enumerate(zip(tensors[n : 2 * n], tensors[2 * n :], strict=True))
        ]
        return reference.residual_block(
            x,
            convs[:-1] if projection else convs,
            norms[:-1] if projection else norms,
            shortcut_conv=convs[-1] if projection else None,
            shortcut_norm=norms[-1] if projection else None,
            shortcut_input=shortcut_input,
            mask=mask,
        )

    d_dy, (d_x, d_shortcut, *d) = double_backward(
        forward,
        (saved.x, saved.shortcut_input, *weights, *gammas, *betas),
        dy,
        (ddx, ddshortcut, *ddweights, *ddgammas, *ddbetas),
    )
    nothing = [None] * n
    return (
        d_dy,
        d_x,
        d_shortcut,
        None,
        d[:n],
        d[n : 2 * n],
        d[2 * n :],
        [None] * len(zs),
        nothing,
        nothing,
        *(None,) * 6,
    )


_backward_op.autograd(_backward_setup_context, _double_backward)


# ---- public


def residual_block(
    x: Tensor,
    convs: Sequence[ConvParams],
    norms: Sequence[NormParams],
    *,
    shortcut_conv: ConvParams | None = None,
    shortcut_norm: NormParams | None = None,
    shortcut_input: Tensor | None = None,
    memory_efficient: bool = False,
) -> Tensor:
    """relu(bnL(convL(… relu(bn1(conv1(x))))) + shortcut), He et al. 2015 (arXiv:1512.03385).

    The shortcut is ``shortcut_input`` (x by default), through shortcut_conv and shortcut_norm
    where given. Kept for backward: x, the raw convolution outputs, the output; with
    ``memory_efficient`` not the last convolution's and the projection's, which are recomputed.

    Args:
        x: ``[N, C, H, W]``; float32, bfloat16, float16 or float64, any layout.
        convs: two or more convolutions without bias.
        norms: one for each, with weight, bias and running buffers.

    Returns:
        ``[N, K, P, Q]``, channels_last.

    Raises:
        ValueError: fewer than two convolutions, unequal lengths, a bias, a norm without weight,
            bias or buffers; x is not 4-D; training with one value per channel.
        RuntimeError: what ``conv2d`` raises; wrong size, dtype or device of another argument.
    """
    if len(convs) < 2 or len(convs) != len(norms):
        raise ValueError(
            f"expected ≥ 2 convolutions and as many norms, got {len(convs)}, {len(norms)}"
        )
    if (shortcut_conv is None) != (shortcut_norm is None):
        raise ValueError("shortcut_conv and shortcut_norm go together")
    all_convs = [*convs, *([] if shortcut_conv is None else [shortcut_conv])]
    all_norms = [*norms, *([] if shortcut_norm is None else [shortcut_norm])]
    for c, n in zip(all_convs, all_norms, strict=True):
        if c.bias is not None:
            raise ValueError("residual_block takes convolutions without bias")
        if n.weight is None or n.bias is None or n.running_mean is None or n.running_var is None:
            raise ValueError("residual_block takes norms with weight, bias and running statistics")
        check_strict(n)
    weights = [c.weight for c in all_convs]
    gammas, betas = [n.weight for n in all_norms], [n.bias for n in all_norms]
    training = [n.training for n in all_norms]
    if not any(training) and not needs_grad(x, shortcut_input, weights, gammas, betas):
        return _inference(x, convs, norms, shortcut_conv, shortcut_norm, shortcut_input)
    out, _, means, variances = _op(
        x,
        shortcut_input,
        weights,
        gammas,
        betas,
        [n.running_mean for n in all_norms],
        [n.running_var for n in all_norms],
        [v for c in all_convs for v in _flat_geometry(c)],
        [n.eps for n in all_norms],
        training,
        shortcut_conv is not None,
        memory_efficient,
    )
    if any(training):
        counts = _counts(x, convs, out)
        if shortcut_conv is not None:
            counts.append(N.count(out))
        for n, mean, var, values in zip(all_norms, means, variances, counts, strict=True):
            update_running_stats(n, mean, var, values)
    return out


def _counts(x: Tensor, convs: Sequence[ConvParams], out: Tensor) -> list[int]:
    """Values per channel after each convolution."""
    counts = []
    size: Sequence[int] = x.shape[2:]
    for c in convs:
        size = [
            (s + 2 * p - d * (k - 1) - 1) // stride + 1
            for s, k, stride, p, d in zip(
                size, c.weight.shape[2:], c.stride, c.padding, c.dilation, strict=True
            )
        ]
        counts.append(x.shape[0] * size[0] * size[1])
    return counts


def _inference(
    x: Tensor,
    convs: Sequence[ConvParams],
    norms: Sequence[NormParams],
    shortcut_conv: ConvParams | None,
    shortcut_norm: NormParams | None,
    shortcut_input: Tensor | None,
) -> Tensor:
    """Each convolution with its norm, ReLU and the addition in its epilogue."""
    shortcut = x if shortcut_input is None else shortcut_input
    if shortcut_conv is not None and shortcut_norm is not None:
        shortcut = conv_bn_act(shortcut, shortcut_conv, shortcut_norm, relu=False)
    a = x
    for c, n in zip(convs[:-1], norms[:-1], strict=True):
        a = conv_bn_act(a, c, n)
    return conv_bn_act(a, convs[-1], norms[-1], shortcut)

"""residual_block: BasicBlocks or Bottlenecks, one or several in a row, scheduled by hand.

Only raw convolution outputs and each block's output are kept for backward; normalised activations
are recomputed there, each in a pass that already reads the tensor it comes from. With
``memory_efficient`` a block's last convolution's output and the projection's are recomputed too.
Blocks in a row are one op where kernels fuse across their borders: a block's first dgrad then adds
the shortcut's gradient, masks it by the ReLU below and takes the sums of the norm below.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resfast.backends.interface import (
    Below,
    ConvGeometry,
    NormGradient,
    empty_nhwc,
    mask_shape,
    nhwc,
)
from resfast.backends.scratch import scratch
from resfast.backends.select import chains, find, select
from resfast.ops import convolution as C
from resfast.ops import norm as N
from resfast.ops import reference
from resfast.ops.checks import check_activation, check_norm, check_residual, check_strict
from resfast.ops.conv_bn_act import conv_bn_act, fake_conv
from resfast.ops.params import ConvParams, NormParams
from resfast.ops.registry import FusedOp, absent, double_backward, needs_grad, present
from resfast.ops.running_stats import update_running_stats


class _Layer(NamedTuple):
    """One convolution and its norm; a block's projection, where there is one, is its last layer."""

    position: int  # among all layers of the op
    weight: Tensor
    gamma: Tensor
    beta: Tensor
    mean: Tensor  # running statistics in forward, the ones used in backward
    var: Tensor
    geometry: ConvGeometry
    eps: float
    training: bool

    def prepare(self, stats: N.Statistics) -> N.Norm:
        return N.prepare(stats, self.gamma, self.beta, self.eps)


class _Block(NamedTuple):
    chain: list[_Layer]
    shortcut: _Layer | None

    @property
    def layers(self) -> list[_Layer]:
        return [*self.chain, *([] if self.shortcut is None else [self.shortcut])]

    def kept(self, memory_efficient: bool) -> int:
        """Raw convolution outputs kept for backward."""
        return len(self.chain) - 1 if memory_efficient else len(self.layers)


def _blocks(
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    geometry: Sequence[int],
    eps: Sequence[float],
    training: Sequence[bool],
    lengths: Sequence[int],
    projections: Sequence[bool],
) -> list[_Block]:
    """The blocks from an op's flat arguments."""
    layers = [
        _Layer(i, *tensors, _geometry(geometry[7 * i : 7 * i + 7]), eps[i], training[i])
        for i, tensors in enumerate(zip(weights, gammas, betas, means, variances, strict=True))
    ]
    blocks = []
    for length, projection in zip(lengths, projections, strict=True):
        chain, layers = layers[:length], layers[length:]
        blocks.append(_Block(chain, layers[0] if projection else None))
        layers = layers[projection:]
    return blocks


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
    lengths: list[int],
    projections: list[bool],
    memory_efficient: bool,
    pack_masks: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    check_activation(x)
    blocks = _blocks(
        weights,
        gammas,
        betas,
        running_means,
        running_vars,
        geometry,
        eps,
        training,
        lengths,
        projections,
    )
    x = nhwc(x)
    residual = x if shortcut_input is None else nhwc(shortcut_input)
    outs: list[Tensor] = []
    masks: list[Tensor] = []
    zs: list[Tensor] = []
    statistics: list[N.Statistics] = []

    def convolved(layer: _Layer, a: C.Activation) -> tuple[Tensor, N.Statistics | None]:
        z, stats = C.fprop(a, layer.weight, None, layer.geometry, layer.training)
        _check_layer(z, layer)
        return z, stats

    def normalised(
        layer: _Layer, z: Tensor, stats: N.Statistics | None, y: Tensor | None = None
    ) -> C.Activation:
        if stats is None:
            stats = N.statistics(z, layer.mean, layer.var, layer.training)
        statistics.append(stats)
        return C.Activation(z, layer.prepare(stats), y)

    def once(
        layer: _Layer,
        z: Tensor,
        stats: N.Statistics | None,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | None, N.Statistics | None]:
        """relu(norm(z) + residual) in one read, where the statistics are not known and it fits."""
        done = None
        if stats is None and layer.training:
            done = N.forward_once(z, layer.gamma, layer.beta, layer.eps, residual, mask)
        return (None, stats) if done is None else done

    for block in blocks:
        a = C.Activation(x)
        for layer, above in itertools.pairwise(block.chain):
            z, stats = convolved(layer, a)
            y = None
            if not C.fuses("conv_fprop", z, above.weight, above.geometry).prologue:
                y, stats = once(layer, z, stats)
            a = normalised(layer, z, stats, y)
            zs.append(z)
        last = block.chain[-1]
        z, stats = convolved(last, a)
        mask = written = None
        if pack_masks:
            mask = z.new_empty(mask_shape(z.shape), dtype=torch.uint8)
            masks.append(mask)
            written = mask if mask.numel() else None
        y = None
        if block.shortcut is None and not memory_efficient:
            check_residual(residual, z, "shortcut")
            y, stats = once(last, z, stats, residual, written)
        a = normalised(last, z, stats, y)
        zs.append(z)
        r = C.Activation(residual)
        if block.shortcut is not None:
            r = normalised(block.shortcut, *convolved(block.shortcut, r))
            zs.append(r.z)
        check_residual(r.z, z, "shortcut")
        if y is None:
            assert a.norm is not None
            out = z if memory_efficient else None
            y = N.apply(z, a.norm, r.z, r.norm, out=out, mask=written)
        x = residual = y
        del zs[len(zs) - len(block.layers) + block.kept(memory_efficient) :]
        outs.append(x)
    return x, outs[:-1], masks, zs, [s.mean for s in statistics], [s.var for s in statistics]


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
    lengths,
    projections,
    memory_efficient,
    pack_masks,
):
    check_activation(x)
    blocks = _blocks(
        weights,
        gammas,
        betas,
        running_means,
        running_vars,
        geometry,
        eps,
        training,
        lengths,
        projections,
    )
    outs, masks, zs, statistics = [], [], [], []
    residual = x if shortcut_input is None else shortcut_input
    for block in blocks:
        block_zs = []
        a = x
        for layer in block.chain:
            a = fake_conv(a, layer.weight, None, layer.geometry)
            _check_layer(a, layer)
            block_zs.append(a)
        if block.shortcut is not None:
            residual = fake_conv(residual, block.shortcut.weight, None, block.shortcut.geometry)
            _check_layer(residual, block.shortcut)
            block_zs.append(residual)
        check_residual(residual, a, "shortcut")
        statistics += [N.fake_statistics(z) for z in block_zs]
        zs += block_zs[: block.kept(memory_efficient)]
        if pack_masks:
            masks.append(a.new_empty(mask_shape(a.shape), dtype=torch.uint8))
        x = residual = torch.empty_like(a)
        outs.append(x)
    return x, outs[:-1], masks, zs, [s.mean for s in statistics], [s.var for s in statistics]


_op = FusedOp(
    "residual_block",
    "(Tensor x, Tensor? shortcut_input, Tensor[] weights, Tensor[] gammas, Tensor[] betas, "
    "Tensor[] running_means, Tensor[] running_vars, SymInt[] geometry, float[] eps, "
    "bool[] training, int[] lengths, bool[] projections, bool memory_efficient, bool pack_masks) "
    "-> (Tensor out, Tensor[] outs, Tensor[] masks, Tensor[] zs, Tensor[] means, "
    "Tensor[] variances)",
    _kernel,
    _fake,
)
_op.autocast((0, 1, 2))


# ---- backward


class _Incoming(NamedTuple):
    """The gradient dy + dy2 of a block's output; or, with sums, du: masked by its last ReLU."""

    dy: Tensor
    dy2: Tensor | None = None
    sums: Tensor | None = None


class _End(NamedTuple):
    """Behind a block's last norms: gradients of their inputs and parameters, and du."""

    dz: Tensor | NormGradient
    norm: N.NormGradients
    du: Tensor | None
    dz_shortcut: Tensor | NormGradient | None = None
    norm_shortcut: N.NormGradients | None = None


class _Backward:
    """One run of the backward op, from the last block to the first."""

    def __init__(self, layers: int, need_weights: Sequence[bool]):
        self.norms: list[N.Norm | None] = [None] * layers
        self.need_weights = need_weights
        self.dweights: list[Tensor | None] = [None] * layers
        self.norm_gradients: list[N.NormGradients | None] = [None] * layers

    def norm(self, layer: _Layer) -> N.Norm:
        made = self.norms[layer.position]
        if made is None:
            made = layer.prepare(N.Statistics(layer.mean, layer.var))
            self.norms[layer.position] = made
        return made

    def gradient(
        self, layer: _Layer, du: Tensor, z: Tensor, sums: Sequence[Tensor]
    ) -> tuple[NormGradient, N.NormGradients]:
        """The norm's backward from du and its two sums, dz not stored yet."""
        norm = self.norm(layer)
        sum_du, sum_du_centred = sums
        backend, _ = find("norm_backward_apply", z)
        sum_du_xhat, coef_z, coef_1 = backend.norm_coefficients(
            norm.affine.scale, norm.rstd, sum_du, sum_du_centred, N.count(z)
        )
        coefs = (coef_z, coef_1) if layer.training else (None, None)
        lazy = NormGradient(du, z, norm.affine.mean, norm.affine.scale, *coefs)
        return lazy, N.NormGradients(du, sum_du_xhat, sum_du)

    def lazily(self, layer: _Layer, du: Tensor) -> bool:
        """Whether the layer's convolution applies the norm's backward itself."""
        passes = ["conv_dgrad"]
        if self.need_weights[layer.position]:
            passes.append("conv_wgrad")
        return all(C.fuses(p, du, layer.weight, layer.geometry).norm_backward for p in passes)

    def wgrad(self, layer: _Layer, dz: Tensor | NormGradient, a: C.Activation) -> None:
        if self.need_weights[layer.position]:
            self.dweights[layer.position] = C.wgrad(dz, a, layer.weight, layer.geometry)

    # ---- a block's end: last norms, addition and ReLU

    def end(
        self,
        block: _Block,
        incoming: _Incoming,
        out: Tensor,
        mask: Tensor | None,
        z: Tensor,
        zd: Tensor | None,
        need_du: bool,
        own_du: bool,
    ) -> _End:
        """``need_du``: for the shortcut. ``own_du``: it leaves the op, so no scratch."""
        if find("norm_backward_reduce", z)[0].joins:
            return self._joined_end(block, incoming, out, mask, z, zd)
        assert incoming.sums is None
        dy = incoming.dy if incoming.dy2 is None else incoming.dy + incoming.dy2
        du = None
        if own_du:
            du = empty_nhwc(z.shape, z)
        elif need_du or block.shortcut is not None:
            du = scratch("du", z)
        layer = block.chain[-1]
        g = N.backward(
            dy,
            z,
            self.norm(layer),
            y=out,
            relu=True,
            training=layer.training,
            dz=scratch("dz", z),
            du=du,
        )
        if block.shortcut is None:
            return _End(g.dz, g, du)
        assert du is not None
        assert zd is not None
        shortcut = block.shortcut
        gd = N.backward(
            du, zd, self.norm(shortcut), y=None, relu=False, training=shortcut.training, dz=du
        )
        return _End(g.dz, g, None, gd.dz, gd)

    def _joined_end(
        self,
        block: _Block,
        incoming: _Incoming,
        out: Tensor,
        mask: Tensor | None,
        z: Tensor,
        zd: Tensor | None,
    ) -> _End:
        layer, shortcut = block.chain[-1], block.shortcut
        du, sums = incoming.dy, incoming.sums
        if sums is None:
            du = empty_nhwc(z.shape, z)
            if shortcut is None and layer.training and not self.lazily(layer, du):
                y = out if mask is None else None
                once = N.backward_once(
                    incoming.dy, z, self.norm(layer), y, True, du=du, dy2=incoming.dy2, mask=mask
                )
                if once is not None:
                    return _End(once.dz, once, du)
            backend = select("norm_backward_reduce", z)
            sums = backend.norm_join_reduce(
                incoming.dy, incoming.dy2, out, self.below(block, z, mask, zd), du
            )
        lazy, g = self.gradient(layer, du, z, (sums[0], sums[1]))
        dz: Tensor | NormGradient = lazy
        dzd: Tensor | NormGradient | None = None
        gd = second = None
        if shortcut is not None:
            assert zd is not None
            # Σdu is dbeta of both norms: outputs may not share memory
            second, gd = self.gradient(shortcut, du, zd, (sums[0].clone(), sums[2]))
            dzd = second
        if not (self.lazily(layer, du) and (shortcut is None or self.lazily(shortcut, du))):
            dz = empty_nhwc(z.shape, z)
            dzd = None if zd is None else empty_nhwc(zd.shape, zd)
            select("norm_backward_apply", z).norm_join_apply(lazy, dz, second, dzd)
        return _End(dz, g, du, dzd, gd)

    def below(self, block: _Block, z: Tensor, mask: Tensor | None, zd: Tensor | None) -> Below:
        """The end of a block as the dgrad above it sees it."""
        mean2 = None if block.shortcut is None else block.shortcut.mean
        return Below(z, self.norm(block.chain[-1]).affine, mask, zd, mean2)

    # ---- the chain of convolutions

    def inner(
        self,
        layer: _Layer,
        dz: Tensor | NormGradient,
        a: C.Activation | None,
        below: _Layer,
        z: Tensor,
    ) -> tuple[Tensor | NormGradient, N.NormGradients]:
        """Through one convolution and the norm and ReLU below it: (dz, gradients) of that norm.

        ``a``: the convolution's input where it is stored already.
        """
        norm = self.norm(below)
        gradient = C.dgrad(dz, z, layer.weight, layer.geometry, below=Below(z, norm.affine, None))
        if gradient.sums is not None:
            self.wgrad(layer, dz, a or C.Activation(z, norm))
            lazy, g = self.gradient(below, gradient.dx, z, (gradient.sums[0], gradient.sums[1]))
            if self.lazily(below, gradient.dx):
                return lazy, g
            select("norm_backward_apply", z).norm_join_apply(lazy, gradient.dx, None, None)
            return gradient.dx, g
        activation = None
        if a is None and self.need_weights[layer.position]:
            du = dz.du if isinstance(dz, NormGradient) else dz
            if C.fuses("conv_wgrad", du, layer.weight, layer.geometry).prologue:
                a = C.Activation(z, norm)
            else:
                activation = scratch("activation", z)
                a = C.Activation(activation)
        g = N.backward(
            gradient.dx,
            z,
            norm,
            y=None,
            relu=True,
            training=below.training,
            dz=gradient.dx,
            activation=activation,
        )
        if a is not None:
            self.wgrad(layer, dz, a)
        return g.dz, g


def _backward_kernel(
    dy: Tensor,
    x: Tensor,
    shortcut_input: Tensor | None,
    out: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    outs: list[Tensor],
    masks: list[Tensor],
    zs: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    geometry: list[int],
    eps: list[float],
    training: list[bool],
    lengths: list[int],
    projections: list[bool],
    memory_efficient: bool,
    need: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    blocks = _blocks(
        weights, gammas, betas, means, variances, geometry, eps, training, lengths, projections
    )
    check_residual(dy, out, "dy")
    need_x, need_shortcut_input, *need_layers = need
    run = _Backward(len(weights), need_layers[: len(weights)])
    need_norms = need_layers[len(weights) :]
    outputs = [*outs, out]
    starts = [0]
    for block in blocks:
        starts.append(starts[-1] + block.kept(memory_efficient))

    incoming = _Incoming(nhwc(dy))
    dshortcut: Tensor | None = None
    dx: Tensor | None = None
    for b in range(len(blocks) - 1, -1, -1):
        block, chain, shortcut = blocks[b], blocks[b].chain, blocks[b].shortcut
        z_in = zs[starts[b] : starts[b + 1]]
        separate = b == 0 and shortcut_input is not None
        x_block = outputs[b - 1] if b else x
        x_shortcut = shortcut_input if separate and shortcut_input is not None else x_block
        before = [layer for earlier in blocks[:b] for layer in earlier.layers]
        need_dx = (
            need_x
            if b == 0
            else need_x
            or need_shortcut_input
            or any(run.need_weights[j.position] or need_norms[j.position] for j in before)
        )
        need_dshortcut = need_shortcut_input if separate else need_dx
        last = len(chain) - 1

        a: C.Activation | None = None
        if memory_efficient:
            below_last = chain[last - 1]
            a = C.Activation(z_in[last - 1], run.norm(below_last))
            if not _takes(a, outputs[b], chain[last], run.need_weights[last]):
                a = C.Activation(C.stored(a))
            z, _ = C.fprop(a, chain[last].weight, None, chain[last].geometry, False)
            zd = None
            if shortcut is not None:
                source = C.Activation(x_shortcut)
                zd, _ = C.fprop(source, shortcut.weight, None, shortcut.geometry, False)
        else:
            z = z_in[last]
            zd = z_in[last + 1] if shortcut is not None else None
        mask = masks[b] if masks and masks[b].numel() else None
        end = run.end(
            block, incoming, outputs[b], mask, z, zd, need_dshortcut, separate and shortcut is None
        )
        run.norm_gradients[chain[last].position] = end.norm
        dz = end.dz
        for i in range(last, 0, -1):
            below = chain[i - 1]
            dz, g = run.inner(chain[i], dz, a, below, z_in[i - 1])
            run.norm_gradients[below.position] = g
            a = None
        first = chain[0]
        run.wgrad(first, dz, C.Activation(x_block))

        skip, stride = end.du, (1, 1)
        if shortcut is not None:
            assert end.dz_shortcut is not None
            run.norm_gradients[shortcut.position] = end.norm_shortcut
            run.wgrad(shortcut, end.dz_shortcut, C.Activation(x_shortcut))
            skip = None
            if need_dshortcut:
                du = end.dz_shortcut
                like = du.du if isinstance(du, NormGradient) else du
                g_shortcut = shortcut.geometry
                compact = (
                    not separate
                    and need_dx
                    and shortcut.weight.shape[2:] == (1, 1)
                    and g_shortcut.padding == (0, 0)
                    and C.fuses("conv_dgrad", like, shortcut.weight, g_shortcut).own
                    and C.fuses("conv_dgrad", like, first.weight, first.geometry).epilogue
                )
                target = x_shortcut
                if compact:  # only the pixels it has read have a gradient
                    stride = g_shortcut.stride
                    g_shortcut = g_shortcut._replace(stride=(1, 1))
                    n, _, p, q = like.shape
                    target = x_shortcut.new_empty(1).expand(n, x_shortcut.shape[1], p, q)
                skip = C.dgrad(du, target, shortcut.weight, g_shortcut).dx
        if separate:
            dshortcut, skip = skip, None
        if not need_dx:
            break
        beneath = None
        if b and not memory_efficient:
            earlier = zs[starts[b - 1] : starts[b]]
            length = len(blocks[b - 1].chain)
            mask = masks[b - 1] if masks and masks[b - 1].numel() else None
            if mask is not None:
                beneath = run.below(
                    blocks[b - 1],
                    earlier[length - 1],
                    mask,
                    earlier[length] if blocks[b - 1].shortcut is not None else None,
                )
        gradient = C.dgrad(dz, x_block, first.weight, first.geometry, skip, stride, below=beneath)
        incoming = _Incoming(gradient.dx, gradient.rest, gradient.sums)
        if b == 0:
            dx = gradient.dx
            if gradient.rest is not None:
                dx.add_(gradient.rest)

    def gradients(vectors: list[Tensor], name: str) -> list[Tensor]:
        return [
            torch.zeros_like(v) if g is None else getattr(g, name).to(v.dtype)
            for v, g in zip(vectors, run.norm_gradients, strict=True)
        ]

    return (
        absent(x) if dx is None else dx,
        absent(x) if dshortcut is None else dshortcut,
        [absent(w) if dw is None else dw for w, dw in zip(weights, run.dweights, strict=True)],
        gradients(gammas, "dgamma"),
        gradients(betas, "dbeta"),
    )


def _takes(a: C.Activation, z_like: Tensor, layer: _Layer, need_weight: bool) -> bool:
    """Whether the layer's convolution, and its weight's gradient, normalise their input."""
    passes = [("conv_fprop", a.z)] + [("conv_wgrad", z_like)] * need_weight
    return all(C.fuses(p, t, layer.weight, layer.geometry).prologue for p, t in passes)


def _backward_fake(
    dy,
    x,
    shortcut_input,
    out,
    weights,
    gammas,
    betas,
    outs,
    masks,
    zs,
    means,
    variances,
    geometry,
    eps,
    training,
    lengths,
    projections,
    memory_efficient,
    need,
):
    need_x, need_shortcut_input, *need_layers = need
    need_weights = need_layers[: len(weights)]
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
    "Tensor[] gammas, Tensor[] betas, Tensor[] outs, Tensor[] masks, Tensor[] zs, "
    "Tensor[] means, Tensor[] variances, SymInt[] geometry, float[] eps, bool[] training, "
    "int[] lengths, bool[] projections, bool memory_efficient, bool[] need) "
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
    out, outs, masks, zs, means, variances = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*outs, *masks, *zs, *means, *variances)
    lists = [weights, gammas, betas, outs, masks, zs, means, variances]
    _Saved(x, shortcut_input, out, lists).save(ctx)
    ctx.options = options[:-1]  # all but pack_masks


def _backward(ctx, dy, *_others):
    layers = len(ctx.needs_input_grad[2])
    nothing = [None] * layers
    if dy is None:
        return None, None, nothing, nothing, nothing, nothing, nothing, *(None,) * 7
    saved, _ = _Saved.load(ctx)
    need_x, need_shortcut, need_weights, need_gammas, need_betas, *_ = ctx.needs_input_grad
    dx, dshortcut, dweights, dgammas, dbetas = _backward_op(
        dy,
        saved.x,
        saved.shortcut_input,
        saved.out,
        *saved.lists,
        *ctx.options,
        [
            need_x,
            need_shortcut,
            *need_weights,
            *(g or b for g, b in zip(need_gammas, need_betas, strict=True)),
        ],
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
        *(None,) * 7,
    )


_op.autograd(_setup_context, _backward)


def _backward_setup_context(ctx, inputs, output):
    dy, x, shortcut_input, out, *rest = inputs
    ctx.set_materialize_grads(False)
    _Saved(x, shortcut_input, out, rest[:8]).save(ctx, dy)
    ctx.options = rest[8:]


def _double_backward(ctx, ddx, ddshortcut, ddweights, ddgammas, ddbetas):
    saved, (dy,) = _Saved.load(ctx)
    weights, gammas, betas, outs, masks, zs, means, variances = saved.lists
    geometry, eps, training, lengths, projections, *_ = ctx.options
    n = len(weights)
    positive = [reference.positive(out) for out in (*outs, saved.out)]

    def forward(x, shortcut_input, *tensors):
        convs = [
            ConvParams(w, None, *_geometry(geometry[7 * i : 7 * i + 7]))
            for i, w in enumerate(tensors[:n])
        ]
        norms = [
            NormParams(g, b, means[i], variances[i], None, training[i], None, eps[i])
            for i, (g, b) in enumerate(zip(tensors[n : 2 * n], tensors[2 * n :], strict=True))
        ]
        for length, projection, mask in zip(lengths, projections, positive, strict=True):
            x = reference.residual_block(
                x,
                convs[:length],
                norms[:length],
                shortcut_conv=convs[length] if projection else None,
                shortcut_norm=norms[length] if projection else None,
                shortcut_input=shortcut_input,
                mask=mask,
            )
            convs, norms = convs[length + projection :], norms[length + projection :]
            shortcut_input = None
        return x

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
        [None] * len(outs),
        [None] * len(masks),
        [None] * len(zs),
        nothing,
        nothing,
        *(None,) * 7,
    )


_backward_op.autograd(_backward_setup_context, _double_backward)


# ---- public


class BlockParams(NamedTuple):
    """One residual block: its chain of convolutions and norms, and its shortcut's, if any."""

    convs: Sequence[ConvParams]
    norms: Sequence[NormParams]
    shortcut_conv: ConvParams | None = None
    shortcut_norm: NormParams | None = None


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
    block = BlockParams(convs, norms, shortcut_conv, shortcut_norm)
    return _run(x, [block], shortcut_input, memory_efficient)


def residual_blocks(
    x: Tensor, blocks: Sequence[BlockParams], *, memory_efficient: bool = False
) -> Tensor:
    """``residual_block`` of each block in a row, as one op.

    Args:
        x: ``[N, C, H, W]``; float32, bfloat16, float16 or float64, any layout.
        blocks: one or more.

    Returns:
        The last block's output, channels_last.

    Raises:
        ValueError: no blocks; what ``residual_block`` raises.
        RuntimeError: what ``residual_block`` raises.
    """
    if not blocks:
        raise ValueError("expected at least one block, got none")
    return _run(x, blocks, None, memory_efficient)


def _run(
    x: Tensor,
    blocks: Sequence[BlockParams],
    shortcut_input: Tensor | None,
    memory_efficient: bool,
) -> Tensor:
    all_convs: list[ConvParams] = []
    all_norms: list[NormParams] = []
    for convs, norms, shortcut_conv, shortcut_norm in blocks:
        if len(convs) < 2 or len(convs) != len(norms):
            raise ValueError(
                f"expected ≥ 2 convolutions and as many norms, got {len(convs)}, {len(norms)}"
            )
        if (shortcut_conv is None) != (shortcut_norm is None):
            raise ValueError("shortcut_conv and shortcut_norm go together")
        all_convs += [*convs, *([] if shortcut_conv is None else [shortcut_conv])]
        all_norms += [*norms, *([] if shortcut_norm is None else [shortcut_norm])]
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
        for block in blocks:
            x = _inference(x, *block, shortcut_input)
            shortcut_input = None
        return x
    out, _, _, _, means, variances = _op(
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
        [len(block.convs) for block in blocks],
        [block.shortcut_conv is not None for block in blocks],
        memory_efficient,
        chains(x),
    )
    if any(training):
        counts = []
        size: Sequence[int] = x.shape[2:]
        for block in blocks:
            block_counts, size = _counts(x.shape[0], size, block)
            counts += block_counts
        for n, mean, var, values in zip(all_norms, means, variances, counts, strict=True):
            update_running_stats(n, mean, var, values)
    return out


def _counts(batch: int, size: Sequence[int], block: BlockParams) -> tuple[list[int], Sequence[int]]:
    """(values per channel after each convolution, size of the output)."""
    counts = []
    for c in block.convs:
        size = [
            (s + 2 * p - d * (k - 1) - 1) // stride + 1
            for s, k, stride, p, d in zip(
                size, c.weight.shape[2:], c.stride, c.padding, c.dilation, strict=True
            )
        ]
        counts.append(batch * size[0] * size[1])
    if block.shortcut_conv is not None:
        counts.append(counts[-1])
    return counts, size


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

"""Conv+BN+ReLU layers and residual blocks whose children are stock modules.

``BasicBlock`` and ``Bottleneck`` take torchvision's arguments in torchvision's order and have its
children's names, so state dicts, initialisers and module surgery carry over. A forward is one
``residual_block`` op where every child allows it, else one op per layer; ``plan()`` says which.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resfast.backends.select import chains
from resfast.nn.fuse import (
    Fusible,
    PlanRow,
    _global_hook_reason,
    _hook_reason,
    conv_params,
    conv_reason,
    layer_op,
    norm_params,
    norm_reason,
    plain_reason,
    read,
    run_bn_act,
    run_conv_bn_act,
    traced,
    unfused_norm_reason,
    unfused_reason,
)
from resfast.nn.layers import BlurPool2d, DropPath, SqueezeExcite
from resfast.ops import BlockParams, residual_block, residual_blocks

NormLayer = Callable[[int], nn.Module]


class ConvBNAct(Fusible):
    """relu(bn(conv(x)) + residual), in one op where the children allow it.

    Args:
        conv, bn: the children, usually ``nn.Conv2d`` and ``nn.BatchNorm2d``.
        relu: apply ReLU.
        add_after_act: relu(bn(conv(x))) + residual instead.

    ``forward(x, residual=None)``: x ``[N, C, H, W]``, residual of the output's shape and dtype.
    """

    def __init__(
        self, conv: nn.Module, bn: nn.Module, relu: bool = True, *, add_after_act: bool = False
    ) -> None:
        super().__init__()
        self.conv = conv
        self.bn = bn
        self.relu = relu
        self.add_after_act = add_after_act

    @classmethod
    def make(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm_layer: NormLayer | None = None,
        relu: bool = True,
        add_after_act: bool = False,
    ) -> ConvBNAct:
        """Build the children too; padding defaults to the one that keeps the size at stride 1."""
        if padding is None:
            padding = dilation * (kernel_size - 1) // 2
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
        )
        bn = (norm_layer or nn.BatchNorm2d)(out_channels)
        return cls(conv, bn, relu, add_after_act=add_after_act)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return run_conv_bn_act(
            self.conv, self.bn, x, residual, self.relu, self.add_after_act, fused=self.fused
        )

    def plan(self) -> list[PlanRow]:
        return [layer_row(self, "conv", "bn")]

    def extra_repr(self) -> str:
        return f"relu={self.relu}, add_after_act={self.add_after_act}"


def layer_row(module: Fusible, conv: str, bn: str, why_layer: str | None = None) -> PlanRow:
    """The plan's row of one conv+bn pair, named by paths below module."""
    norm = module.get_submodule(bn)
    reason = _off(module) or unfused_reason(module.get_submodule(conv), norm)
    return PlanRow((conv, bn), "unfused" if reason else layer_op(norm), reason or why_layer)


def norm_row(module: Fusible, bn: str) -> PlanRow:
    """The plan's row of a norm without a convolution before it."""
    norm = module.get_submodule(bn)
    reason = _off(module) or unfused_norm_reason(norm)
    return PlanRow((bn,), "unfused" if reason else layer_op(norm, convolved=False), reason)


def _off(module: Fusible) -> str | None:
    return None if module.fused else "fusion is switched off (set_fused)"


@contextlib.contextmanager
def _scratch_statistics(module: nn.Module) -> Iterator[None]:
    """Let stock norms write their running statistics to copies: a recomputation counts nothing."""
    kept = []
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase) and m.training:
            for name, buffer in m._buffers.items():
                if buffer is not None:
                    kept.append((m, name, buffer))
                    m._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for m, name, buffer in kept:
            m._buffers[name] = buffer


class Block(Fusible):
    """A residual block of any kind: a forward that may be checkpointed, and a plan."""

    checkpoint: bool

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpoint or not torch.is_grad_enabled() or traced(x):
            return self._forward(x)
        options: dict[str, Any] = {}
        # Fused ops, and compiled graphs, count a batch once by themselves.
        if not torch.compiler.is_compiling() and any(r.op == "unfused" for r in self.plan()):
            options["context_fn"] = lambda: (contextlib.nullcontext(), _scratch_statistics(self))
        return checkpoint(self._forward, x, use_reentrant=False, **options)

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def plan(self) -> list[PlanRow]:
        """What forward would call now, row by row: children, op, and what prevents more fusion."""
        raise NotImplementedError


class ResidualBlock(Block):
    """relu(F(x) + shortcut(x)) with F a chain of conv+bn+relu: what both block kinds share.

    A subclass sets conv1, bn1, … and lists them in ``layer_names``. ``downsample`` is None, or
    ``[pool,] conv, bn`` in a Sequential, or any module.
    """

    expansion: int
    layer_names: tuple[tuple[str, str], ...]
    blur_after: int  # index of the layer whose stride an anti-aliased block gives to the blur

    def _finish(
        self,
        downsample: nn.Module | None,
        *,
        out_channels: int,
        stride: int,
        blur_channels: int,
        se: int | bool,
        antialias: bool,
        drop_path: float,
        memory_efficient: bool,
        checkpoint: bool,
    ) -> None:
        """The children after the last norm, in torchvision's order, and the flags."""
        self.relu = nn.ReLU()
        self.downsample = downsample
        self.stride = stride
        self.blur = BlurPool2d(blur_channels, stride) if antialias and stride > 1 else None
        self.se = SqueezeExcite(out_channels, 16 if se is True else se) if se else None
        self.drop_path = DropPath(drop_path) if drop_path else None
        self.memory_efficient = memory_efficient
        self.checkpoint = checkpoint

    @property
    def last_norm(self) -> nn.Module:
        """The norm whose zeroed gamma makes the block an identity at the start."""
        return getattr(self, self.layer_names[-1][1])

    def _forward(self, x: Tensor) -> Tensor:
        if traced(x) or self._block_reason() is not None:
            return self._forward_layers(x)
        convs, norms, shortcut_conv, shortcut_norm = self._params()
        pool = None if self.downsample is None else _split_shortcut(self.downsample)[0]
        return residual_block(
            x,
            convs,
            norms,
            shortcut_conv=shortcut_conv,
            shortcut_norm=shortcut_norm,
            shortcut_input=None if pool is None else pool(x),
            memory_efficient=self.memory_efficient,
        )

    def _params(self) -> BlockParams:
        """Of a block that ``_block_reason`` accepts."""
        children: dict[str, Any] = self._modules
        convs = [conv_params(children[conv]) for conv, _ in self.layer_names]
        norms = [norm_params(children[bn]) for _, bn in self.layer_names]
        if self.downsample is None:
            return BlockParams(convs, norms)
        _, conv, bn = _split_shortcut(self.downsample)
        return BlockParams(convs, norms, conv_params(conv), norm_params(bn))

    def _chain_reason(self) -> str | None:
        """Why this block cannot be one of several in a ``residual_blocks`` op now, or None."""
        if type(self)._forward is not ResidualBlock._forward:
            return f"{type(self).__name__} has a forward of its own"
        if self.checkpoint and torch.is_grad_enabled():
            return "the block is checkpointed"
        reason = None if _explains(self) else _hook_reason(self)
        reason = reason or self._block_reason()
        if reason is None and self.downsample is not None:
            pool, _, _ = _split_shortcut(self.downsample)
            reason = None if pool is None else "a pool in the shortcut"
        return reason

    def _forward_layers(self, x: Tensor) -> Tensor:
        y = x
        last = len(self.layer_names) - 1
        for i, (conv, bn) in enumerate(self.layer_names[:-1]):
            y = run_conv_bn_act(
                getattr(self, conv), getattr(self, bn), y, relu=self.relu, fused=self.fused
            )
            if self.blur is not None and i == self.blur_after:
                y = self.blur(y)
        conv, bn = (getattr(self, name) for name in self.layer_names[last])
        shortcut = self._shortcut(x)
        if self.se is None and not self._drops():
            return run_conv_bn_act(conv, bn, y, shortcut, self.relu, fused=self.fused)
        y = run_conv_bn_act(conv, bn, y, relu=False, fused=self.fused)
        if self.se is not None:
            y = self.se(y)
        if self.drop_path is not None and self.drop_path.active:
            y = self.drop_path(y)
        y = y + shortcut
        return F.relu(y) if plain_reason(self.relu, nn.ReLU) is None else self.relu(y)

    def _drops(self) -> bool:
        return self.drop_path is not None and self.drop_path.active

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.downsample is None:
            return x
        if not self.fused or traced(x) or _shortcut_reason(self.downsample) is not None:
            return self.downsample(x)
        pool, conv, bn = _split_shortcut(self.downsample)
        return run_conv_bn_act(conv, bn, x if pool is None else pool(x), relu=False)

    def _block_reason(self) -> str | None:
        """Why the whole block is not one op in this very state, or None."""
        # On every call's path: children by dict, nn.Module's attribute lookup is slow.
        children: dict[str, Any] = self._modules
        if not self.fused:
            return _off(self)
        if self.se is not None:
            return "squeeze-excitation before the addition"
        if self.blur is not None:
            return "anti-aliasing inside the block"
        if self._drops():
            return "drop_path before the addition"
        reason = plain_reason(children["relu"], nn.ReLU)
        for conv, bn in self.layer_names:
            if reason is not None:
                return reason
            reason = _block_layer_reason(children[conv], children[bn])
        shortcut = self.downsample
        if reason is None and shortcut is not None:
            reason = _shortcut_reason(shortcut)
            if reason is None:
                _, projection_conv, projection_bn = _split_shortcut(shortcut)
                reason = _block_layer_reason(projection_conv, projection_bn)
        return reason

    def plan(self) -> list[PlanRow]:
        names = [name for pair in self.layer_names for name in pair]
        why = self._block_reason()
        if self.downsample is not None:
            children = [f"downsample.{name}" for name, _ in self.downsample.named_children()]
            names += children or ["downsample"]
        if why is None:
            return [PlanRow(tuple(names), "residual_block", None)]
        rows = [layer_row(self, conv, bn, why) for conv, bn in self.layer_names]
        if self.downsample is not None:
            reason = _off(self) or _shortcut_reason(self.downsample)
            if reason is None:
                rows.append(layer_row(self, children[-2], children[-1], why))
            else:
                rows.append(PlanRow(tuple(children or ["downsample"]), "unfused", reason))
        return rows


def _explains(m: nn.Module) -> Callable[[str], None] | None:
    """``explain``'s stand-in for a module's forward only watches: how to tell it of a call."""
    return getattr(m.__dict__.get("forward"), "note", None)


def run_stages(stages: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The stages in turn; blocks in a row as one op where the kernels fuse across their borders.

    With torch.distributed in use a row ends with its stage, so that gradients are exchanged while
    backward goes on.
    """
    if traced(x) or not chains(x) or _global_hook_reason() is not None:
        for stage in stages:
            x = stage(x)
        return x
    split = torch.distributed.is_available() and torch.distributed.is_initialized()
    row: list[ResidualBlock] = []

    def flush(x: Tensor) -> Tensor:
        if not row:
            return x
        for block in row:
            note = _explains(block)
            if note is not None:
                note("residual_blocks" if len(row) > 1 else "residual_block")
        params = [block._params() for block in row]
        memory_efficient = row[0].memory_efficient
        row.clear()
        return residual_blocks(x, params, memory_efficient=memory_efficient)

    for stage in stages:
        if plain_reason(stage, nn.Sequential) is not None:
            x = stage(flush(x))
            continue
        for block in stage._modules.values():
            assert block is not None
            if not isinstance(block, ResidualBlock) or block._chain_reason() is not None:
                x = block(flush(x))
                continue
            if row and row[0].memory_efficient != block.memory_efficient:
                x = flush(x)
            row.append(block)
        if split:
            x = flush(x)
    return flush(x)


def _block_layer_reason(conv: nn.Module, bn: nn.Module) -> str | None:
    """Why ``residual_block`` cannot take this pair, or None."""
    reason = conv_reason(conv) or norm_reason(bn)
    if reason is not None:
        return reason
    if read(conv, conv._parameters, "bias") is not None:
        return "a convolution with bias"
    if read(bn, bn._parameters, "weight") is None or read(bn, bn._parameters, "bias") is None:
        return "a norm without affine parameters"
    if (
        not getattr(bn, "track_running_stats", True)
        or read(bn, bn._buffers, "running_mean") is None
    ):
        return "a norm without running statistics"
    return None


def _shortcut_reason(downsample: nn.Module) -> str | None:
    """Why a shortcut is not ``[pool,] conv, bn`` in a plain Sequential, or None."""
    reason = plain_reason(downsample, nn.Sequential)
    if reason is None and len(downsample._modules) not in (2, 3):
        reason = f"a shortcut of {len(downsample._modules)} layers"
    return reason


def _split_shortcut(
    downsample: nn.Sequential | Any,  # of a kind that ``_shortcut_reason`` accepts
) -> tuple[nn.Module | None, nn.Module, nn.Module]:
    layers = list(downsample._modules.values())
    pool = layers[0] if len(layers) == 3 else None
    if type(pool) is nn.Identity and _hook_reason(pool) is None:
        pool = None
    return pool, layers[-2], layers[-1]


def conv3x3(c_in: int, c_out: int, stride: int = 1, groups: int = 1, dilation: int = 1):
    return nn.Conv2d(
        c_in, c_out, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False
    )


def conv1x1(c_in: int, c_out: int, stride: int = 1):
    return nn.Conv2d(c_in, c_out, 1, stride, bias=False)


def projection(
    c_in: int,
    c_out: int,
    stride: int,
    norm_layer: NormLayer,
    kind: str = "conv",
    antialias: bool = False,
) -> nn.Sequential:
    """A shortcut that changes the shape: ``[pool,] 1×1 conv, norm``.

    kind "conv": strided convolution (a blur first and stride 1 where antialias); "d": average
    pooling, then stride 1 (ResNet-D, arXiv:1812.01187), with an Identity in the pool's place
    where there is no stride, so that state dict keys do not depend on it.
    """
    if kind == "d":
        pool: nn.Module = nn.Identity()
        if stride > 1:
            pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
        return nn.Sequential(pool, conv1x1(c_in, c_out), norm_layer(c_out))
    if antialias and stride > 1:
        return nn.Sequential(BlurPool2d(c_in, stride), conv1x1(c_in, c_out), norm_layer(c_out))
    return nn.Sequential(conv1x1(c_in, c_out, stride), norm_layer(c_out))


class BasicBlock(ResidualBlock):
    """Two 3×3 convolutions: relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), arXiv:1512.03385.

    Args:
        inplanes, planes: input channels and output channels.
        stride: of conv1.
        downsample: the shortcut, None for identity.
        groups: of conv2.
        base_width: inner width is ``planes · base_width / 64 · groups``.
        dilation: of conv2, and of conv1 where ``first_dilation`` is None.
        norm_layer: called with the channel count; default ``nn.BatchNorm2d``.
        se: squeeze-excitation reduction, or False. antialias: stride by a blur after conv1.
        drop_path: probability of dropping the branch in training.
        memory_efficient: recompute more in backward, save less. checkpoint: save x only.

    Input ``[N, inplanes, H, W]`` → ``[N, planes, ceil(H/stride), ceil(W/stride)]``.
    """

    expansion = 1
    layer_names = (("conv1", "bn1"), ("conv2", "bn2"))
    blur_after = 0

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        *,
        first_dilation: int | None = None,
        stride_position: str = "3x3",
        se: int | bool = False,
        antialias: bool = False,
        drop_path: float = 0.0,
        memory_efficient: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_stride_position(stride_position)  # both mean conv1 here
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        conv_stride = 1 if antialias else stride
        self.conv1 = conv3x3(inplanes, width, conv_stride, dilation=first_dilation or dilation)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, planes, groups=groups, dilation=dilation)
        self.bn2 = norm_layer(planes)
        self._finish(
            downsample,
            out_channels=planes,
            stride=stride,
            blur_channels=width,
            se=se,
            antialias=antialias,
            drop_path=drop_path,
            memory_efficient=memory_efficient,
            checkpoint=checkpoint,
        )


class Bottleneck(ResidualBlock):
    """1×1 reduce, 3×3, 1×1 expand by 4, each with a norm (arXiv:1512.03385), plus the shortcut.

    Args:
        inplanes, planes: input channels; the output has ``4 · planes``.
        groups, base_width: the 3×3 has ``planes · base_width / 64 · groups`` channels in groups
            (ResNeXt, arXiv:1611.05431; wide ResNet, arXiv:1605.07146).
        stride_position: "3x3" strides conv2 (v1.5, as torchvision), "1x1" strides conv1 (v1).
        The rest as in :class:`BasicBlock`.
    """

    expansion = 4
    layer_names = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        *,
        first_dilation: int | None = None,
        stride_position: str = "3x3",
        se: int | bool = False,
        antialias: bool = False,
        drop_path: float = 0.0,
        memory_efficient: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_stride_position(stride_position)
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        v1 = stride_position == "1x1"
        conv_stride = 1 if antialias else stride
        # A stride that became a dilation spreads the taps of what came after it.
        inner_dilation = dilation if v1 else first_dilation or dilation
        self.blur_after = 0 if v1 else 1
        self.conv1 = conv1x1(inplanes, width, conv_stride if v1 else 1)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, 1 if v1 else conv_stride, groups, inner_dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self._finish(
            downsample,
            out_channels=planes * self.expansion,
            stride=stride,
            blur_channels=width,
            se=se,
            antialias=antialias,
            drop_path=drop_path,
            memory_efficient=memory_efficient,
            checkpoint=checkpoint,
        )


def check_stride_position(stride_position: str) -> None:
    if stride_position not in ("3x3", "1x1"):
        raise ValueError(f"stride_position must be '3x3' or '1x1', got {stride_position!r}")


class PreActBlock(Block):
    """Pre-activation block, arXiv:1603.05027: each norm+ReLU comes before its convolution.

    bn1 and ReLU run alone (``bn_act``), every later norm joins the convolution before it
    (``conv_bn_act``), and the last convolution's raw output meets the shortcut: no ReLU after.

    Args:
        preact: False for a network's first block, whose input is activated already: no bn1.
        downsample: projection of the *activated* input, or None for the raw input itself.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        norm_layer: NormLayer | None = None,
        *,
        preact: bool = True,
        drop_path: float = 0.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        self.bn1 = norm_layer(inplanes) if preact else None
        self._make_convs(inplanes, planes, stride, norm_layer)
        self.relu = nn.ReLU()
        self.downsample = downsample
        self.drop_path = DropPath(drop_path) if drop_path else None
        self.checkpoint = checkpoint

    def _make_convs(self, inplanes: int, planes: int, stride: int, norm_layer: NormLayer) -> None:
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes)

    # (convolution, the norm that follows it); the last convolution has none.
    layer_names: tuple[tuple[str, str], ...] = (("conv1", "bn2"),)
    last_conv = "conv2"

    def _forward(self, x: Tensor) -> Tensor:
        a = x
        if self.bn1 is not None:
            a = run_bn_act(self.bn1, x, relu=self.relu, fused=self.fused)
        y = a
        for conv, bn in self.layer_names:
            y = run_conv_bn_act(
                getattr(self, conv), getattr(self, bn), y, relu=self.relu, fused=self.fused
            )
        y = getattr(self, self.last_conv)(y)
        if self.drop_path is not None:
            y = self.drop_path(y)
        return y + (x if self.downsample is None else self.downsample(a))

    def plan(self) -> list[PlanRow]:
        rows = []
        if self.bn1 is not None:
            rows.append(norm_row(self, "bn1"))
        return rows + [layer_row(self, conv, bn) for conv, bn in self.layer_names]


class PreActBottleneck(PreActBlock):
    """The 1×1, 3×3, 1×1 form of :class:`PreActBlock`; the output has ``4 · planes`` channels."""

    expansion = 4
    layer_names = (("conv1", "bn2"), ("conv2", "bn3"))
    last_conv = "conv3"

    def _make_convs(self, inplanes: int, planes: int, stride: int, norm_layer: NormLayer) -> None:
        self.conv1 = conv1x1(inplanes, planes)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn3 = norm_layer(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)

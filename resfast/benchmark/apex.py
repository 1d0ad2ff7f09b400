"""NVIDIA apex's NHWC BatchNorm (contrib.groupbn) in a ResNet's blocks: norm, addition and ReLU in
one kernel each way, float16. Its contrib.bottleneck is left out: it only has frozen statistics.
"""

from __future__ import annotations

import importlib.util

from torch import Tensor, nn

from resfast.nn import BasicBlock, Bottleneck


def why_not() -> str | None:
    if importlib.util.find_spec("apex") is None:
        return "not installed: apex, built with --bnp"
    try:
        from apex.contrib.groupbn import BatchNorm2d_NHWC  # noqa: F401
    except ImportError as error:
        return f"apex without groupbn: {error}"
    return None


class NormActNHWC(nn.Module):
    """apex's norm behind logical NCHW tensors in channels_last; `norm` gives the parameters."""

    def __init__(self, norm: nn.BatchNorm2d, relu: bool) -> None:
        from apex.contrib.groupbn import BatchNorm2d_NHWC

        super().__init__()
        self.inner = BatchNorm2d_NHWC(norm.num_features, fuse_relu=relu).to(norm.weight.device)
        self.inner.weight, self.inner.bias = norm.weight, norm.bias
        self.inner.eps, self.inner.momentum = norm.eps, norm.momentum

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        y = self.inner(x) if residual is None else self.inner(x, residual.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


class Block(nn.Module):
    """A basic or bottleneck block on `NormActNHWC`, around a resfast block's own parameters."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        count = 3 if isinstance(block, Bottleneck) else 2
        self.convs = nn.ModuleList(getattr(block, f"conv{i + 1}") for i in range(count))
        self.norms = nn.ModuleList(
            NormActNHWC(getattr(block, f"bn{i + 1}"), relu=True) for i in range(count)
        )
        self.shortcut: nn.Module = nn.Identity()
        if block.downsample is not None:
            conv, norm = block.downsample  # type: ignore[misc]
            self.shortcut = nn.Sequential(conv, NormActNHWC(norm, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        a, last = x, len(self.convs) - 1
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            a = norm(conv(a), self.shortcut(x)) if i == last else norm(conv(a))
        return a


def replace_blocks(model: nn.Module) -> nn.Module:
    """In place: every residual block of an unfused resfast model becomes a `Block`."""
    for name, child in model.named_children():
        if isinstance(child, (BasicBlock, Bottleneck)):
            setattr(model, name, Block(child))
        else:
            replace_blocks(child)
    return model

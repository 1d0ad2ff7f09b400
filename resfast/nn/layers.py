"""Small layers that residual networks hang beside their convolutions; no fused op of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


class SqueezeExcite(nn.Module):
    """x · sigmoid(fc2(relu(fc1(mean over H, W of x)))) per channel (arXiv:1709.01507).

    Args:
        channels: of the input ``[N, C, H, W]``.
        reduction: the bottleneck has ``max(channels // reduction, 8)`` units.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        if reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {reduction}")
        hidden = max(channels // reduction, 8)
        self.fc1 = nn.Conv2d(channels, hidden, kernel_size=1)
        self.fc2 = nn.Conv2d(hidden, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class BlurPool2d(nn.Module):
    """Binomial [1 2 1]² low-pass with a stride: anti-aliased subsampling (arXiv:1904.11486).

    ``[N, C, H, W]`` → ``[N, C, ceil(H / stride), ceil(W / stride)]``, borders reflected.
    """

    filter: Tensor

    def __init__(self, channels: int, stride: int = 2) -> None:
        super().__init__()
        self.channels = channels
        self.stride = stride
        row = torch.tensor([1.0, 2.0, 1.0])
        kernel = torch.outer(row, row) / 16
        self.register_buffer("filter", kernel.repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        mode = "reflect"
        if not isinstance(x, fx.Proxy) and min(x.shape[2:]) == 1:
            mode = "replicate"  # nothing to reflect
        x = F.pad(x, (1, 1, 1, 1), mode=mode)
        return F.conv2d(x, self.filter.to(x.dtype), stride=self.stride, groups=self.channels)

    def extra_repr(self) -> str:
        return f"{self.channels}, stride={self.stride}"


class DropPath(nn.Module):
    """In training, zero each sample's branch with probability p, others times 1/(1−p).

    Stochastic depth, arXiv:1603.09382. Identity in eval.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"drop probability must lie in [0, 1), got {p}")
        self.p = p

    @property
    def active(self) -> bool:
        return self.training and self.p > 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        keep = 1 - self.p
        mask = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"

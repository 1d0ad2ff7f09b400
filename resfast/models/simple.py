"""The teaching network: one residual block, small enough to read in one sitting."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from resfast.models.backbone import as_input
from resfast.models.registry import register_model
from resfast.models.weights import load_weights
from resfast.nn.blocks import layer_row
from resfast.nn.fuse import Fusible, PlanRow, run_conv_bn_act


class SimpleResNet(Fusible):
    """relu(bn2(conv2(relu(bn1(conv1(x)))))) + shortcut(x), global average pool, linear head.

    The shortcut is conv–bn–relu–conv, the sum comes after the activation, every convolution is
    3×3 with a bias. Input ``[N, in_channels, H, W]`` → logits ``[N, num_classes]``.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, channels: int = 64) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels),
            ("num_classes", num_classes),
            ("channels", channels),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.fc = nn.Linear(channels, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` → ``[N, channels, H, W]``."""
        x = as_input(x)
        conv, bn, relu, project = self.shortcut
        shortcut = project(run_conv_bn_act(conv, bn, x, relu=relu, fused=self.fused))
        y = run_conv_bn_act(self.conv1, self.bn1, x, fused=self.fused)
        return run_conv_bn_act(
            self.conv2, self.bn2, y, shortcut, add_after_act=True, fused=self.fused
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_features(x).mean((2, 3)))

    def plan(self) -> list[PlanRow]:
        pairs = (("shortcut.0", "shortcut.1"), ("conv1", "bn1"), ("conv2", "bn2"))
        return [layer_row(self, conv, bn) for conv, bn in pairs]


@register_model
def simple_resnet(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> SimpleResNet:
    """The teaching network. weights: None or a local state_dict file."""
    model = SimpleResNet(**kwargs)
    load_weights(model, weights, progress)
    return model

"""What every residual network shares: stem, four stages, head, and the ways to call them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resfast.nn.blocks import NormLayer, _off, layer_row, run_stages
from resfast.nn.fuse import Fusible, PlanRow, plain_reason, run_conv_bn_act, traced
from resfast.nn.layers import BlurPool2d
from resfast.nn.stem import pool_rows, run_conv_bn_pool

STEMS = ("imagenet", "cifar", "deep")
STAGES = ("layer1", "layer2", "layer3", "layer4")


class FeatureInfo(NamedTuple):
    """One stage's output: module name, channels, and input size over output size."""

    name: str
    channels: int
    reduction: int


class Backbone(Fusible):
    """Stem, ``layer1`` … ``layer4``, ``avgpool``, ``fc``; a subclass fills in the stages.

    ``feature_info`` lists the stages' channels and reductions.
    """

    feature_info: list[FeatureInfo]
    features_only: bool

    def _build_stem(
        self, stem: str, in_channels: int, norm_layer: NormLayer, antialias: bool
    ) -> None:
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}")
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        self.conv1: nn.Module
        self.maxpool: nn.Module
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        elif stem == "cifar":
            self.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
        else:
            self.conv1 = nn.Sequential(
                nn.Conv2d(in_channels, 32, 3, 2, 1, bias=False),
                norm_layer(32),
                nn.ReLU(),
                nn.Conv2d(32, 32, 3, 1, 1, bias=False),
                norm_layer(32),
                nn.ReLU(),
                nn.Conv2d(32, 64, 3, 1, 1, bias=False),
            )
        self.bn1 = norm_layer(64)
        self.relu = nn.ReLU()
        if stem == "cifar":
            self.maxpool = nn.Identity()
        elif antialias:
            self.maxpool = nn.Sequential(nn.MaxPool2d(3, 1, 1), BlurPool2d(64, 2))
        else:
            self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stem_reduction = 1 if stem == "cifar" else 4

    def _build_head(self, channels: int, num_classes: int) -> None:
        self.num_features = channels
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = _classifier(channels, num_classes)
        self.num_classes = num_classes

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Replace ``fc`` by a fresh one on the same device and dtype; 0 classes: by an Identity."""
        like = next(self.parameters())
        self.fc = _classifier(self.num_features, num_classes).to(like.device, like.dtype)
        self.num_classes = num_classes

    def _is_deep(self) -> bool:
        return plain_reason(self.conv1, nn.Sequential) is None and len(self.conv1._modules) == 7

    def stem(self, x: Tensor) -> Tensor:
        """conv1, bn1, ReLU and max-pool: ``[N, in_channels, H, W]`` → ``[N, 64, H/4, W/4]``."""
        conv: Any = self.conv1  # indexed only where it is a plain nn.Sequential
        fused = self.fused and not traced(x)
        if fused and self._is_deep():  # its first two layers fuse too
            x = run_conv_bn_act(conv[0], conv[1], x, relu=conv[2])
            x = run_conv_bn_act(conv[3], conv[4], x, relu=conv[5])
            conv = conv[6]
        return run_conv_bn_pool(conv, self.bn1, x, self.relu, self.maxpool, fused=fused)

    def plan(self) -> list[PlanRow]:
        """What the stem would call now; each block has a plan of its own."""
        rows, conv = [], "conv1"
        if self._is_deep():
            rows = [layer_row(self, f"conv1.{i}", f"conv1.{i + 1}") for i in (0, 3)]
            conv = "conv1.6"
        return [*rows, *pool_rows(self, conv, "bn1", "relu", "maxpool", _off(self))]

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Outputs of layer1 … layer4 for an image batch ``[N, C, H, W]``, see ``feature_info``."""
        x = self.stem(as_input(x))
        stages = []
        for name in STAGES:
            x = run_stages([getattr(self, name)], x)
            stages.append(x)
        return stages

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, ``[N, num_features, H / reduction, W / reduction]``."""
        return run_stages([getattr(self, name) for name in STAGES], self.stem(as_input(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Average pool and classifier: ``[N, num_features, H, W]`` → ``[N, num_classes]``.

        ``pre_logits``: without the classifier, ``[N, num_features]``.
        """
        x = torch.flatten(self.avgpool(x), 1)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.features_only:
            return self.forward_stages(x)
        return self.forward_head(self.forward_features(x))


def as_input(x: Tensor) -> Tensor:
    """A batch of images in channels_last. ValueError if x is not 4-D."""
    if traced(x):
        return x
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input of shape {tuple(x.shape)})")
    return x.contiguous(memory_format=torch.channels_last)


def _classifier(channels: int, num_classes: int) -> nn.Module:
    if num_classes < 0:
        raise ValueError(f"num_classes must not be negative, got {num_classes}")
    return nn.Linear(channels, num_classes) if num_classes else nn.Identity()


def init_weights(model: nn.Module) -> None:
    """kaiming_normal (fan_out) convolutions, gamma 1, beta 0, in module order as torchvision."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)) and m.weight is not None:
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)


def check_layers(layers: list[int]) -> None:
    if len(layers) != len(STAGES) or any(int(n) != n or n < 1 for n in layers):
        raise ValueError(f"layers must be {len(STAGES)} block counts of at least 1, got {layers}")


def drop_path_rates(drop_path: float, blocks: int) -> list[float]:
    """Probabilities growing linearly from 0 at the first block to drop_path at the last."""
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path must lie in [0, 1), got {drop_path}")
    return [drop_path * i / max(blocks - 1, 1) for i in range(blocks)]

"""Pre-activation ResNets: an identity path from end to end (arXiv:1603.05027)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from resfast.models.backbone import (
    STAGES,
    Backbone,
    FeatureInfo,
    check_layers,
    drop_path_rates,
    init_weights,
)
from resfast.models.registry import register_model
from resfast.models.weights import load_weights
from resfast.nn.blocks import NormLayer, PreActBlock, PreActBottleneck, conv1x1, norm_row
from resfast.nn.fuse import PlanRow, run_bn_act


class PreActResNet(Backbone):
    """Input ``[N, in_channels, H, W]`` → ``[N, num_classes]``.

    The stem keeps its norm and ReLU, so the first block has no pre-activation; a norm and ReLU
    (``bn2``) follow the last block. Stage outputs are the raw sums, except the last, activated one.

    Args:
        block: ``PreActBlock`` or ``PreActBottleneck``.
        The rest as in :class:`resfast.models.ResNet`.
    """

    def __init__(
        self,
        block: type[PreActBlock],
        layers: list[int],
        num_classes: int = 1000,
        norm_layer: NormLayer | None = None,
        *,
        in_channels: int = 3,
        stem: str = "imagenet",
        drop_path: float = 0.0,
        checkpoint: bool = False,
        features_only: bool = False,
    ) -> None:
        super().__init__()
        if not (isinstance(block, type) and issubclass(block, PreActBlock)):
            raise TypeError(f"block must be PreActBlock or PreActBottleneck, got {block!r}")
        check_layers(layers)
        rates = iter(drop_path_rates(drop_path, sum(layers)))
        norm_layer = norm_layer or nn.BatchNorm2d

        self.features_only = features_only
        self._build_stem(stem, in_channels, norm_layer, antialias=False)
        self.feature_info = []
        inplanes, reduction = 64, self.stem_reduction
        for stage, (name, count) in enumerate(zip(STAGES, layers, strict=True)):
            planes = 64 * 2**stage
            stride = 1 if stage == 0 else 2
            reduction *= stride
            blocks = []
            for i in range(count):
                first = i == 0
                downsample = None
                if first and (stride != 1 or inplanes != planes * block.expansion):
                    downsample = conv1x1(inplanes, planes * block.expansion, stride)
                blocks.append(
                    block(
                        inplanes,
                        planes,
                        stride if first else 1,
                        downsample,
                        norm_layer,
                        preact=not (first and stage == 0),
                        drop_path=next(rates),
                        checkpoint=checkpoint,
                    )
                )
                inplanes = planes * block.expansion
            setattr(self, name, nn.Sequential(*blocks))
            self.feature_info.append(FeatureInfo(name, inplanes, reduction))
        self.bn2 = norm_layer(inplanes)
        self._build_head(inplanes, 0 if features_only else num_classes)
        init_weights(self)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        stages = super().forward_stages(x)
        stages[-1] = run_bn_act(self.bn2, stages[-1], relu=self.relu, fused=self.fused)
        return stages

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_stages(x)[-1]

    def plan(self) -> list[PlanRow]:
        return [*super().plan(), norm_row(self, "bn2")]


def _preact(block: type[PreActBlock], layers: list[int], weights, progress, kwargs):
    return load_weights(PreActResNet(block, layers, **kwargs), weights, progress)


@register_model
def preact_resnet18(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-18, arXiv:1603.05027. weights: None or a local state_dict file."""
    return _preact(PreActBlock, [2, 2, 2, 2], weights, progress, kwargs)


@register_model
def preact_resnet34(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-34, arXiv:1603.05027. weights: None or a local state_dict file."""
    return _preact(PreActBlock, [3, 4, 6, 3], weights, progress, kwargs)


@register_model
def preact_resnet50(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-50, arXiv:1603.05027. weights: None or a local state_dict file."""
    return _preact(PreActBottleneck, [3, 4, 6, 3], weights, progress, kwargs)


@register_model
def preact_resnet101(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-101, arXiv:1603.05027. weights: None or a local state_dict file."""
    return _preact(PreActBottleneck, [3, 4, 23, 3], weights, progress, kwargs)


@register_model
def preact_resnet152(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-152, arXiv:1603.05027. weights: None or a local state_dict file."""
    return _preact(PreActBottleneck, [3, 8, 36, 3], weights, progress, kwargs)

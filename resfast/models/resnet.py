"""The ResNet family with fused blocks: ResNet, ResNeXt, wide ResNet and their usual variants."""

from __future__ import annotations

from typing import Any, cast

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
from resfast.models.weights import load_weights, num_classes_of
from resfast.nn.blocks import (
    BasicBlock,
    Bottleneck,
    NormLayer,
    ResidualBlock,
    check_stride_position,
    projection,
)

_DILATED = {32: (False, False, False), 16: (False, False, True), 8: (False, True, True)}


class ResNet(Backbone):
    """Residual network, arXiv:1512.03385. Input ``[N, in_channels, H, W]``, any memory format.

    Positional arguments are torchvision's; with the keyword ones at their defaults the state dict
    has torchvision's keys and a seed gives torchvision's weights.

    Args:
        block: ``BasicBlock`` or ``Bottleneck`` of resfast.
        layers: block counts of the four stages.
        num_classes: 0 leaves the pooled features ``[N, num_features]``.
        zero_init_residual: each block starts as its shortcut (last gamma 0).
        groups, width_per_group: of the 3×3 convolutions (ResNeXt, wide ResNet).
        replace_stride_with_dilation: for layer2, layer3, layer4.
        norm_layer: called with the channel count; BatchNorm2d and SyncBatchNorm fuse.
        stem: "imagenet" (7×7 and max-pool), "cifar" (one 3×3, no pool), "deep" (three 3×3).
        stride_position: of Bottleneck, "3x3" (v1.5) or "1x1" (v1).
        shortcut: "conv" or "d" (average pool, then 1×1: ResNet-D, arXiv:1812.01187).
        se: squeeze-excitation reduction (True: 16), arXiv:1709.01507.
        antialias: blur before subsampling, arXiv:1904.11486.
        drop_path: probability at the last block, growing linearly, arXiv:1603.09382.
        output_stride: 32, 16 or 8, counted with a stem of stride 4: later strides become dilation.
        memory_efficient: blocks save less and recompute more.
        checkpoint: save only each block's input (statistics still count once).
        features_only: forward returns the list of the four stages' outputs; no ``fc``.

    Raises:
        ValueError: a value outside what is listed here. TypeError: a block of another kind.
    """

    def __init__(
        self,
        block: type[ResidualBlock],
        layers: list[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: list[bool] | None = None,
        norm_layer: NormLayer | None = None,
        *,
        in_channels: int = 3,
        stem: str = "imagenet",
        stride_position: str = "3x3",
        shortcut: str = "conv",
        se: int | bool = False,
        antialias: bool = False,
        drop_path: float = 0.0,
        output_stride: int = 32,
        memory_efficient: bool = False,
        checkpoint: bool = False,
        features_only: bool = False,
    ) -> None:
        super().__init__()
        if not (isinstance(block, type) and issubclass(block, ResidualBlock)):
            raise TypeError(f"block must be resfast's BasicBlock or Bottleneck, got {block!r}")
        check_layers(layers)
        check_stride_position(stride_position)
        if shortcut not in ("conv", "d"):
            raise ValueError(f"shortcut must be 'conv' or 'd', got {shortcut!r}")
        dilated = _dilated_stages(replace_stride_with_dilation, output_stride)
        rates = iter(drop_path_rates(drop_path, sum(layers)))
        norm_layer = norm_layer or nn.BatchNorm2d

        self.features_only = features_only
        self._build_stem(stem, in_channels, norm_layer, antialias)
        self.feature_info = []
        inplanes, dilation, reduction = 64, 1, self.stem_reduction
        for name, count, dilate in zip(STAGES, layers, (False, *dilated), strict=True):
            planes = 64 * 2 ** len(self.feature_info)
            out_channels = planes * block.expansion
            first_dilation = dilation
            stride = 1 if name == "layer1" else 2
            if dilate:
                dilation, stride = dilation * stride, 1
            reduction *= stride
            blocks = []
            for i in range(count):
                downsample = None
                if i == 0 and (stride != 1 or inplanes != out_channels):
                    downsample = projection(
                        inplanes, out_channels, stride, norm_layer, shortcut, antialias
                    )
                blocks.append(
                    block(
                        inplanes,
                        planes,
                        stride if i == 0 else 1,
                        downsample,
                        groups,
                        width_per_group,
                        dilation,
                        norm_layer,
                        first_dilation=first_dilation if i == 0 else dilation,
                        stride_position=stride_position,
                        se=se,
                        antialias=antialias,
                        drop_path=next(rates),
                        memory_efficient=memory_efficient,
                        checkpoint=checkpoint,
                    )
                )
                inplanes = out_channels
            setattr(self, name, nn.Sequential(*blocks))
            self.feature_info.append(FeatureInfo(name, out_channels, reduction))
        self._build_head(inplanes, 0 if features_only else num_classes)

        init_weights(self)
        if zero_init_residual:
            for m in self.modules():
                if isinstance(m, ResidualBlock) and m.last_norm.weight is not None:
                    nn.init.zeros_(cast(Tensor, m.last_norm.weight))


def _dilated_stages(replace: list[bool] | None, output_stride: int) -> tuple[bool, ...]:
    if output_stride not in _DILATED:
        raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
    if replace is None:
        return _DILATED[output_stride]
    if len(replace) != 3:
        raise ValueError(
            f"replace_stride_with_dilation should be None or a 3-element tuple, got {replace}"
        )
    if output_stride != 32:
        raise ValueError("give replace_stride_with_dilation or output_stride, not both")
    return tuple(bool(r) for r in replace)


def _resnet(
    block: type[ResidualBlock], layers: list[int], weights: Any, progress: bool, kwargs: dict
) -> ResNet:
    num_classes = num_classes_of(weights)
    if num_classes is not None:
        kwargs.setdefault("num_classes", num_classes)
    model = ResNet(block, layers, **kwargs)
    load_weights(model, weights, progress)
    return model


@register_model
def resnet18(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18, arXiv:1512.03385. weights: None or a local state_dict file."""
    return _resnet(BasicBlock, [2, 2, 2, 2], weights, progress, kwargs)


@register_model
def resnet34(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34, arXiv:1512.03385. weights: None or a local state_dict file."""
    return _resnet(BasicBlock, [3, 4, 6, 3], weights, progress, kwargs)


@register_model
def resnet50(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50 (v1.5), arXiv:1512.03385. weights: None or a local state_dict file."""
    return _resnet(Bottleneck, [3, 4, 6, 3], weights, progress, kwargs)


@register_model
def resnet101(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 (v1.5), arXiv:1512.03385. weights: None or a local state_dict file."""
    return _resnet(Bottleneck, [3, 4, 23, 3], weights, progress, kwargs)


@register_model
def resnet152(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152 (v1.5), arXiv:1512.03385. weights: None or a local state_dict file."""
    return _resnet(Bottleneck, [3, 8, 36, 3], weights, progress, kwargs)


@register_model
def resnext50_32x4d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-50 32×4d, arXiv:1611.05431. weights: None or a local state_dict file."""
    kwargs = {"groups": 32, "width_per_group": 4, **kwargs}
    return _resnet(Bottleneck, [3, 4, 6, 3], weights, progress, kwargs)


@register_model
def resnext101_32x8d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101 32×8d, arXiv:1611.05431. weights: None or a local state_dict file."""
    kwargs = {"groups": 32, "width_per_group": 8, **kwargs}
    return _resnet(Bottleneck, [3, 4, 23, 3], weights, progress, kwargs)


@register_model
def resnext101_64x4d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101 64×4d, arXiv:1611.05431. weights: None or a local state_dict file."""
    kwargs = {"groups": 64, "width_per_group": 4, **kwargs}
    return _resnet(Bottleneck, [3, 4, 23, 3], weights, progress, kwargs)


@register_model
def wide_resnet50_2(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-50-2, arXiv:1605.07146. weights: None or a local state_dict file."""
    kwargs = {"width_per_group": 128, **kwargs}
    return _resnet(Bottleneck, [3, 4, 6, 3], weights, progress, kwargs)


@register_model
def wide_resnet101_2(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-101-2, arXiv:1605.07146. weights: None or a local state_dict file."""
    kwargs = {"width_per_group": 128, **kwargs}
    return _resnet(Bottleneck, [3, 4, 23, 3], weights, progress, kwargs)

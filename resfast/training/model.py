"""Networks by name for training: those of `resfast.models`, and two for small images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from resfast.models import create_model, list_models
from resfast.nn import BasicBlock, ConvBNAct, set_fused

CIFAR_STEM_SIDE = 64
NO_STEM = ("simple_resnet",)


class SmallResNet(nn.Module):
    """He et al. 2015, section 4.2: three stages of `blocks` basic blocks, 6·blocks + 2 layers.

    Input ``[N, in_channels, H, W]`` → logits ``[N, num_classes]``; stages have width, 2·width and
    4·width channels at 1, ½ and ¼ of the side. Shortcuts that change shape are 1×1 convolutions.
    """

    def __init__(self, blocks: int, width: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = ConvBNAct.make(in_channels, width)
        stages: list[nn.Module] = []
        channels = width
        for stage in range(3):
            planes = width * 2**stage
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                shortcut = None
                if stride != 1:
                    shortcut = nn.Sequential(
                        nn.Conv2d(channels, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
                    )
                stages.append(BasicBlock(channels, planes, stride, shortcut))
                channels = planes
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(self.stem(x)).mean((2, 3)))


SMALL = {"resnet8": (1, 48), "resnet20": (3, 16)}


def model_names() -> list[str]:
    return sorted({*list_models(), *SMALL})


def create_for(
    name: str, image_shape: Sequence[int], classes: int, fused: bool = True
) -> nn.Module:
    """A model for images of (channels, height, width); small ones get the CIFAR stem.

    ``fused=False``: the same weights and keys, run by stock layers.
    """
    return set_fused(_create(name, image_shape, classes), fused)


def _create(name: str, image_shape: Sequence[int], classes: int) -> nn.Module:
    channels, height, width = image_shape
    if name in SMALL:
        return SmallResNet(*SMALL[name], in_channels=channels, num_classes=classes)
    if name in NO_STEM:
        return create_model(name, in_channels=channels, num_classes=classes)
    stem = "cifar" if min(height, width) <= CIFAR_STEM_SIDE else "imagenet"
    return create_model(name, in_channels=channels, num_classes=classes, stem=stem)

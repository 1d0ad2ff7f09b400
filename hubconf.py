"""Entry points for ``torch.hub.load``."""

dependencies = ["torch"]

from resfast.models import (  # noqa: E402, F401
    preact_resnet18,
    preact_resnet34,
    preact_resnet50,
    preact_resnet101,
    preact_resnet152,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    simple_resnet,
    wide_resnet50_2,
    wide_resnet101_2,
)

"""The model families, and ``create_model`` / ``list_models`` to reach them by name."""

from resfast.models.backbone import FeatureInfo
from resfast.models.preact import (
    PreActResNet,
    preact_resnet18,
    preact_resnet34,
    preact_resnet50,
    preact_resnet101,
    preact_resnet152,
)
from resfast.models.registry import create_model, list_models, register_model
from resfast.models.resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from resfast.models.simple import SimpleResNet, simple_resnet

__all__ = [
    "FeatureInfo",
    "PreActResNet",
    "ResNet",
    "SimpleResNet",
    "create_model",
    "list_models",
    "preact_resnet18",
    "preact_resnet34",
    "preact_resnet50",
    "preact_resnet101",
    "preact_resnet152",
    "register_model",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "simple_resnet",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

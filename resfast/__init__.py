"""resfast: fused Conv + BatchNorm + ReLU + residual for ResNets, in training and inference."""

__version__ = "0.1.0"

from resfast import native
from resfast.backends import backend, clear_caches, fusion
from resfast.convert import accelerate, restore
from resfast.explain import explain
from resfast.inference import OptimizedModel, optimize_for_inference
from resfast.models import (
    PreActResNet,
    ResNet,
    SimpleResNet,
    create_model,
    list_models,
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
from resfast.nn import (
    BasicBlock,
    Bottleneck,
    ConvBNAct,
    convert_sync_batchnorm,
    revert_sync_batchnorm,
    set_fused,
    unfused,
)
from resfast.ops import strict

native.warn_if_unavailable()

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ConvBNAct",
    "OptimizedModel",
    "PreActResNet",
    "ResNet",
    "SimpleResNet",
    "__version__",
    "accelerate",
    "backend",
    "clear_caches",
    "convert_sync_batchnorm",
    "create_model",
    "explain",
    "fusion",
    "list_models",
    "optimize_for_inference",
    "preact_resnet18",
    "preact_resnet34",
    "preact_resnet50",
    "preact_resnet101",
    "preact_resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "restore",
    "revert_sync_batchnorm",
    "set_fused",
    "simple_resnet",
    "strict",
    "unfused",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

"""Layers and blocks with stock children and fused forwards."""

from resfast.nn.blocks import (
    BasicBlock,
    Bottleneck,
    ConvBNAct,
    PreActBlock,
    PreActBottleneck,
    ResidualBlock,
)
from resfast.nn.fuse import (
    Fusible,
    PlanRow,
    conv_params,
    norm_params,
    run_bn_act,
    run_conv_bn_act,
    set_fused,
    unfused,
    unfused_reason,
)
from resfast.nn.layers import BlurPool2d, DropPath, SqueezeExcite
from resfast.nn.synchronise import convert_sync_batchnorm, revert_sync_batchnorm

__all__ = [
    "BasicBlock",
    "BlurPool2d",
    "Bottleneck",
    "ConvBNAct",
    "DropPath",
    "Fusible",
    "PlanRow",
    "PreActBlock",
    "PreActBottleneck",
    "ResidualBlock",
    "SqueezeExcite",
    "conv_params",
    "convert_sync_batchnorm",
    "norm_params",
    "revert_sync_batchnorm",
    "run_bn_act",
    "run_conv_bn_act",
    "set_fused",
    "unfused",
    "unfused_reason",
]

"""The fused ops: ``torch.ops.resfast.*``, and the functions that call them."""

from resfast.ops.bn_act import bn_act
from resfast.ops.bn_act_max_pool import bn_act_max_pool
from resfast.ops.bn_act_synchronised import bn_act_synchronised
from resfast.ops.checks import strict
from resfast.ops.conv_bn_act import conv_bn_act
from resfast.ops.conv_bn_act_max_pool import conv_bn_act_max_pool
from resfast.ops.conv_bn_act_synchronised import conv_bn_act_synchronised
from resfast.ops.params import ConvParams, NormParams
from resfast.ops.residual_block import BlockParams, residual_block, residual_blocks
from resfast.ops.running_stats import update_running_stats

__all__ = [
    "BlockParams",
    "ConvParams",
    "NormParams",
    "bn_act",
    "bn_act_max_pool",
    "bn_act_synchronised",
    "conv_bn_act",
    "conv_bn_act_max_pool",
    "conv_bn_act_synchronised",
    "residual_block",
    "residual_blocks",
    "strict",
    "update_running_stats",
]

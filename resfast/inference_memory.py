"""Memory of an inference plan's inner activations, planned ahead and kept from call to call.

Values that are not needed at the same time share a buffer. On CPU a fresh large tensor costs
several times what the kernel that fills it does (see backends/scratch.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

PREPARED = "resfast prepared convolution"  # in a node's meta; its value: the kernel is our own

# Calls whose results never share memory with what they read.
_COPYING = {
    torch.ops.aten.convolution.default,
    torch.ops.aten.max_pool2d_with_indices.default,
    torch.ops.aten.avg_pool2d.default,
    torch.ops.aten.adaptive_avg_pool2d.default,
    torch.ops.aten._adaptive_avg_pool2d.default,
    torch.ops.aten.mean.dim,
    torch.ops.aten.add.Tensor,
    torch.ops.aten.cat.default,
    torch.ops.resfast.conv_bn_act_inference.default,
    torch.ops.resfast.bn_act_inference.default,
}


@dataclass
class Memory:
    """Shapes of the results that get planned memory, and the buffer of each, by position."""

    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    buffers: list[int]
    sizes: list[int]  # of the buffers, in bytes

    def allocate(self, like: Tensor) -> list[Tensor]:
        """A channels_last tensor for each result."""
        flat = [like.new_empty(size, dtype=torch.uint8) for size in self.sizes]
        tensors = []
        for shape, dtype, buffer in zip(self.shapes, self.dtypes, self.buffers, strict=True):
            _, c, h, w = shape
            memory = flat[buffer][: prod(shape) * dtype.itemsize].view(dtype)
            tensors.append(memory.as_strided(shape, (h * w * c, 1, w * c, c)))
        return tensors


def plan_memory(graph: fx.Graph) -> tuple[Memory, dict[fx.Node, int]]:
    """Memory for prepared convolutions of our own kernels, and each one's position in it.

    Left out: values that the plan returns, or that a call may return a view of.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    memory = Memory([], [], [], [])
    positions: dict[fx.Node, int] = {}
    free_after: list[int] = []  # by buffer: the last call that reads what is in it
    for node in graph.nodes:
        if not node.meta.get(PREPARED) or _overwritten(node) is not None:
            continue
        last = _last_use(node, order)
        if last is None:
            continue
        value = node.meta["val"]
        size = value.numel() * value.dtype.itemsize
        free = [b for b, until in enumerate(free_after) if until < order[node]]
        if free:
            buffer = min(free, key=lambda b: abs(memory.sizes[b] - size))
            memory.sizes[buffer] = max(memory.sizes[buffer], size)
            free_after[buffer] = last
        else:
            buffer = len(free_after)
            memory.sizes.append(size)
            free_after.append(last)
        positions[node] = len(memory.shapes)
        memory.shapes.append(value.shape)
        memory.dtypes.append(value.dtype)
        memory.buffers.append(buffer)
    return memory, positions


def _last_use(node: fx.Node, order: dict[fx.Node, int]) -> int | None:
    """Position of the last call that reads the memory of ``node``; None where it may get out."""
    last = order[node]
    for user in node.users:
        if PREPARED in user.meta:
            last = max(last, order[user])
            if _overwritten(user) is node:
                beyond = _last_use(user, order)
                if beyond is None:
                    return None
                last = max(last, beyond)
        elif user.target in _COPYING:
            last = max(last, order[user])
        else:
            return None
    return last


def _overwritten(node: fx.Node) -> Any:
    """The residual whose memory a prepared convolution takes, or None."""
    _, residual, _, out = node.args
    return residual if out is residual else None

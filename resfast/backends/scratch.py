"""Memory for tensors that never leave an op's kernel, kept from call to call.

On CPU a fresh large tensor costs several times what a kernel that fills it does: the system hands
out its pages one by one, zeroed, and takes them back when the tensor dies.
"""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor

from resfast.backends.interface import empty_nhwc

_threads = threading.local()


def scratch(slot: str, like: Tensor) -> Tensor:
    """An uninitialised channels_last tensor of ``like``'s shape, dtype and device.

    On CPU its memory is the calling thread's for that slot: the next request of the same slot
    reuses it, so a kernel may hold one tensor a slot and return none of them.
    """
    if like.device.type != "cpu":
        return empty_nhwc(like.shape, like)
    n, c, h, w = like.shape
    flat = flat_scratch(slot, prod(like.shape), like.dtype)
    return flat.as_strided((n, c, h, w), (h * w * c, 1, w * c, c))


def flat_scratch(slot: str, count: int, dtype: torch.dtype) -> Tensor:
    """As ``scratch``, of ``count`` values on CPU."""
    slots: dict[str, Tensor] = _threads.__dict__.setdefault("slots", {})
    size = count * dtype.itemsize
    memory = slots.get(slot)
    if memory is None or memory.numel() < size:
        memory = slots[slot] = torch.empty(size, dtype=torch.uint8)
    return memory[:size].view(dtype)


def clear_scratch() -> None:
    """Free the calling thread's scratch memory."""
    _threads.__dict__.pop("slots", None)

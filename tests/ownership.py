"""Whether ops return memory of their own, as PyTorch's contract for custom ops asks."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import resfast.ops as fused
from resfast.testing import OpCase


class _OwnMemory(TorchDispatchMode):
    """Fails where an op of resfast returns an input's memory or one output's twice.

    PyTorch warns of it under ``torch.compile`` only, and not for lists; autograd may then hand
    two parameters one gradient, which a change in place would hit twice.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # what ends in _ changes its arguments; the native library writes into what it is given
        if func.namespace == "resfast" and not func._schema.is_mutable:
            seen = {self._address(t): "an input" for t in tree_leaves((args, kwargs))}
            for i, t in enumerate(tree_leaves(out)):
                address = self._address(t)
                if address:
                    assert address not in seen, f"{func}: output {i} is also {seen[address]}"
                    seen[address] = f"output {i}"
        return out

    @staticmethod
    def _address(t) -> int:
        return t.untyped_storage().data_ptr() if isinstance(t, torch.Tensor) else 0


def check_own_memory(case: OpCase, device: str = "cpu") -> None:
    """Run the case's ops forward and backward, and in inference."""
    tensors = case.inputs(0, torch.float32, device)
    with torch.no_grad(), _OwnMemory():
        dy = torch.randn_like(case.run(fused, tensors, None, "nhwc")["y"])
    with _OwnMemory():
        case.run(fused, tensors, dy, "nhwc")

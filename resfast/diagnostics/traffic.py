"""Bytes of device memory that a step has to move, counted from its schedule without running it.

Kernels of resfast say what each launch reads and writes; of every other op the operands' sizes are
taken. Each operand counts once: caches between kernels are not modelled. Tensors are on ``meta``,
so any batch size can be counted on any machine with Triton.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resfast.backends import backend
from resfast.backends.fusion import current_fusion
from resfast.ops.registry import KERNELS


class _CountEveryOp(TorchDispatchMode):
    """Records stock ops, and runs the kernels of resfast's own on meta tensors."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        from resfast.kernels.launch import record

        if func in KERNELS:
            with self:
                return KERNELS[func](*args)
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            # as cuDNN does; on meta it comes out in NCHW
            out = out.contiguous(memory_format=torch.channels_last)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        owned = {_storage(t) for t in inputs}
        written = [t for t in outputs if func._schema.is_mutable or _storage(t) not in owned]
        is_factory = "empty" in func.name() or not inputs
        if written and not is_factory:
            reads = [] if func._schema.is_mutable and len(inputs) == 1 else inputs
            name = func.name().split("::")[1]
            record(name, [_bytes(t) for t in reads], [_bytes(t) for t in written])
        return out


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _bytes(t: Tensor) -> int:
    """An expanded dimension is read once."""
    count = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * t.element_size()


Shape = tuple[int, int, int, int]


def training_traffic(
    model: nn.Module, shape: Shape, dtype: torch.dtype = torch.bfloat16
) -> list[Any]:
    """Forward and backward of a classifier on images of ``shape``: a ``Traffic`` per kernel.

    Convolutions and linear layers are in ``dtype``, norms in float32; Triton's kernels run, by the
    step in force (``resfast.fusion``). No optimizer, no copies of weights for autocast.

    Raises:
        RuntimeError: Triton is not installed.
    """
    from resfast.kernels.launch import count_traffic

    model, x = _on_meta(model, shape, dtype)
    target = torch.empty(shape[0], dtype=torch.int64, device="meta")
    with count_traffic() as ledger, backend("triton"), _CountEveryOp():
        F.cross_entropy(model(x), target).backward()
    return ledger


def inference_traffic(
    model: nn.Module, shape: Shape, dtype: torch.dtype = torch.bfloat16
) -> list[Any]:
    """Forward in eval mode without gradients; otherwise as ``training_traffic``."""
    from resfast.kernels.launch import count_traffic

    model, x = _on_meta(model, shape, dtype)
    with torch.no_grad(), count_traffic() as ledger, backend("triton"), _CountEveryOp():
        model.eval()(x)
    return ledger


def _on_meta(model: nn.Module, shape: Shape, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    model = copy.deepcopy(model).to("meta")
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.to(dtype)
        if isinstance(m, nn.Conv2d):
            m.weight.data = m.weight.data.contiguous(memory_format=torch.channels_last)
    return model, torch.empty(shape, dtype=dtype, device="meta").to(
        memory_format=torch.channels_last
    )


def summary(ledger: list[Any], images: int) -> str:
    """A table by kernel: launches, megabytes an image read and written."""
    launches: Counter[str] = Counter()
    reads: Counter[str] = Counter()
    writes: Counter[str] = Counter()
    for t in ledger:
        launches[t.kernel] += 1
        reads[t.kernel] += t.reads
        writes[t.kernel] += t.writes
    names = sorted(launches, key=lambda n: -(reads[n] + writes[n]))
    width = max(len(n) for n in names)
    mega = 1e6 * images
    lines = [f"{'kernel':{width}}  launches  MB read  MB written   (an image)"]
    lines += [
        f"{n:{width}}  {launches[n]:8}  {reads[n] / mega:7.2f}  {writes[n] / mega:10.2f}"
        for n in names
    ]
    total = sum(reads.values()) + sum(writes.values())
    fusion = current_fusion()
    lines.append(
        f"{total / mega:.1f} MB an image at step {fusion.step}, convolutions {fusion.convolutions}"
    )
    return "\n".join(lines)

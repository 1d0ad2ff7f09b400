"""How fast this machine could be: its measured ceilings, and what each work item must cost.

A network's floor counts its convolutions and linear layers only, everything else fused into them:
each pass reads its operands once and writes its result once, and takes the larger of the time
for its bytes and for its arithmetic (the roofline of Williams, Waterman and Patterson 2009, pass
by pass). Arithmetic is that of direct convolution, so an algorithm with fewer multiplications
(Winograd) can pass below it; so can operands that stay in cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import resfast
from resfast.benchmark.timing import timer_for
from resfast.benchmark.work import Work
from resfast.diagnostics.numerics import DTYPES

COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
REPEATS = 7


class Cost(NamedTuple):
    """Bytes and floating-point operations (2 per multiply-add) of one pass over one layer."""

    bytes: float
    operations: float


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a copy (read + written); operations per second of a matrix product."""

    bytes_per_second: float
    operations_per_second: float

    def seconds(self, costs: list[Cost]) -> float:
        return sum(
            max(c.bytes / self.bytes_per_second, c.operations / self.operations_per_second)
            for c in costs
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _best(step: Callable[[], object], device: str) -> float:
    timer = timer_for(device)
    timer(step, 2)
    return min(timer(step, 1) for _ in range(REPEATS))


def measure_ceilings(device: str, dtype: str) -> Ceilings:
    """The best of several copies far larger than the caches, and of several square products."""
    kind = torch.device(device).type
    source = torch.ones(COPY_BYTES[kind], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), device)
    side = MATRIX_SIDE[kind]
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    product = _best(lambda: torch.mm(a, b), device)
    return Ceilings(2 * source.numel() / copy, 2 * side**3 / product)


def costs(work: Work) -> list[Cost]:
    """Every pass of every convolution and linear layer: forward, and both gradients in training.

    The gradient with respect to the images is not computed.
    """
    size = DTYPES[work.dtype].itemsize
    found: list[Cost] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        moved = size * (inputs[0].numel() + weight.numel() + y.numel())
        cost = Cost(moved, 2.0 * y.numel() * math.prod(weight.shape[1:]))
        passes = 1 if not work.training else 2 if inputs[0].shape[1] == 3 else 3
        found.extend([cost] * passes)

    model = resfast.unfused(resfast.create_model(work.model)).to("meta")
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(note)
    model(torch.empty(work.batch, 3, work.image, work.image, device="meta"))
    return found

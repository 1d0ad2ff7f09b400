"""Each op at every stage's shape of ResNet-18 and ResNet-50, beside the same maths in stock ops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resfast.ops as fused_ops
from resfast.benchmark.floor import Cost
from resfast.benchmark.work import INPUT_SETS, Contender, Errors, Results, errors, limits_from
from resfast.diagnostics.numerics import DTYPES
from resfast.ops import NormParams, reference
from resfast.testing import (
    LAYOUTS,
    OpCase,
    Tensors,
    basic_weights,
    block_by_layers,
    block_case,
    bn_case,
    bottleneck_weights,
    conv_case,
    max_pool_case,
    stock_ops,
)

MODES = ("infer", "forward", "step")
# what `OpWork.contender` takes
OURS = (fused_ops, "nhwc", False)
PEERS = {
    "eager-nhwc": (stock_ops, "nhwc", False),
    "eager-nchw": (stock_ops, "nchw", False),
    "compile": (stock_ops, "nhwc", True),
}
# channels of a basic block, side of its output, at 224²
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))


def stage_cases(batch: int, training: bool) -> list[OpCase]:
    """Names say op, channels and side of the input, e.g. ``bottleneck-512x28``."""

    def named(build: Callable[..., OpCase], name: str, c: int, side: int, *args, **options):
        return build(f"{name}-{c}x{side}", (batch, c, side, side), *args, training, **options)

    cases = [named(max_pool_case, "stem_pool", 64, 112)]
    for planes, side in STAGES:
        wide = 4 * planes
        first = planes == 64
        cases += [
            named(bn_case, "bn_relu", planes, side),
            named(bn_case, "bn_add_relu", wide, side, residual=True),
            named(conv_case, "conv3x3", planes, side, (planes, planes, 3, 3)),
            named(conv_case, "conv1x1_reduce", wide, side, (planes, wide, 1, 1)),
            named(conv_case, "conv1x1_expand", planes, side, (wide, planes, 1, 1), residual=True),
            named(block_case, "basic", planes, side, basic_weights(planes, planes)),
            named(block_case, "bottleneck", wide, side, bottleneck_weights(wide, planes, wide)),
        ]
        down = {"stride": 1 if first else 2, "projection": True}
        c, from_side = (64, side) if first else (2 * planes, 2 * side)
        weights = bottleneck_weights(c, planes, wide)
        cases.append(named(block_case, "bottleneck_down", c, from_side, weights, **down))
        if not first:
            half = planes // 2
            weights = basic_weights(half, planes)
            cases.append(named(block_case, "basic_down", half, 2 * side, weights, **down))
    return cases


class Inputs(NamedTuple):
    tensors: Tensors
    leaves: list[Tensor]
    norms: dict[str, NormParams]


@dataclass(frozen=True)
class OpWork:
    """One op call: "infer" (eval, no gradients), "forward" in training, "step": and backward."""

    case: OpCase
    mode: str
    dtype: str = "float32"
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.case.name}-{self.mode}-{self.dtype}"

    def contender(self, ops: Any, layout: str = "nhwc", compiled: bool = False) -> Contender:
        """`ops`: a namespace with the ops of resfast.ops, taking input sets by turns."""
        sets = [self._inputs(seed, layout) for seed in range(INPUT_SETS)]

        def call(tensors: Tensors, norms: dict[str, NormParams]) -> Tensor:
            return self.case.call(ops, tensors, norms)

        return self._contender(torch.compile(call) if compiled else call, sets, layout)

    def reference(self) -> Results:
        """What `Contender.results` should be: stock ops in float64 on the rounded inputs."""
        exact = self._inputs(0, "nchw", torch.float64)

        def call(tensors: Tensors, norms: dict[str, NormParams]) -> Tensor:
            return self.case.call(stock_ops, tensors, norms)

        return self._contender(call, [exact], "nchw").results()

    def _inputs(self, seed: int, layout: str, dtype: torch.dtype | None = None) -> Inputs:
        rounded = self.case.inputs(seed, DTYPES[self.dtype], self.device)
        if dtype is not None:
            rounded = {k: v.to(dtype) for k, v in rounded.items()}
        tensors, leaves, norms = self.case.prepare(rounded, layout, self.mode != "infer")
        return Inputs(tensors, [tensors[k] for k in leaves], norms)

    def _contender(self, call: Callable, sets: list[Inputs], layout: str) -> Contender:
        turn = itertools.cycle(sets)
        gradient: list[Tensor] = []

        def step(inputs: Inputs | None = None) -> Results:
            inputs = inputs or next(turn)
            with torch.set_grad_enabled(self.mode != "infer"):
                y = call(inputs.tensors, inputs.norms)
            if self.mode != "step":
                return Results(y.detach(), [])
            if not gradient:
                gradient.append(_random_like(y, layout))
            return Results(y.detach(), list(torch.autograd.grad(y, inputs.leaves, gradient[0])))

        return Contender(step, lambda: step(sets[0]), nn.Module())

    def limits(self, reference: Results) -> Errors:
        """`limits_from` the errors of stock ops, eager, channels_last."""
        return limits_from(errors(self.contender(stock_ops).results(), reference))

    def costs(self) -> list[Cost]:
        """Every operand once in each pass, norms free beside a convolution (see `floor`)."""
        tensors = {k: torch.empty(shape, device="meta") for k, shape in self.case.shapes.items()}
        nothing = NormParams(None, None, None, None, None, True)
        norms = dict.fromkeys(self.case.norms, nothing)
        counting = _Counting(self)
        self.case.call(counting, tensors, norms)
        return counting.costs


class _Counting:
    """The ops' namespace on meta tensors, noting what each call must cost."""

    def __init__(self, work: OpWork) -> None:
        self.size = DTYPES[work.dtype].itemsize
        self.backward = work.mode == "step"
        self.costs: list[Cost] = []

    def bn_act(self, x, norm, residual=None, **options):
        tensors = 2 if residual is None else 3
        self._norm(x.numel() * tensors, x.numel() * (tensors + 1))
        return x

    def bn_act_max_pool(self, x, norm):
        y = F.max_pool2d(x, 3, 2, 1)
        self._norm(x.numel() + y.numel(), 2 * x.numel() + y.numel())
        return y

    def conv_bn_act(self, x, conv, norm, residual=None, **options):
        y = reference.conv(x, conv)
        moved = self.size * (x.numel() + conv.weight.numel() + y.numel())
        operations = 2.0 * y.numel() * math.prod(conv.weight.shape[1:])
        self.costs += [Cost(moved, operations)] * (3 if self.backward else 1)
        return y

    def residual_block(self, x, convs, norms, **options):
        return block_by_layers(self, x, convs, norms, **options)

    def _norm(self, forward: int, backward: int) -> None:
        self.costs.append(Cost(self.size * (forward + self.backward * backward), 0.0))


def _random_like(y: Tensor, layout: str) -> Tensor:
    generator = torch.Generator().manual_seed(INPUT_SETS)
    dy = torch.randn(y.shape, generator=generator).to(torch.bfloat16)  # exact in every type
    return dy.to(y.device, y.dtype).contiguous(memory_format=LAYOUTS[layout])

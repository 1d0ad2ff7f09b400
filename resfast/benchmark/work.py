"""What is measured: one model, one batch, one kind of step, and its error against float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resfast
from resfast.diagnostics.numerics import DTYPES

INPUT_SETS = 3
JUDGED_IMAGES = 2

# Folded weights or Winograd round differently from eager layers by small factors; errors of logic
# are at order 1.
OUTPUT_FACTOR = 10.0
# One activation within rounding of 0 that falls on the other side of a ReLU changes a random
# network's gradient by up to 1e-2 in float32, stock's own as often as ours.
GRADIENT_LIMIT = 0.1
FLOAT64_ROUNDING = 1e-10
# gradients of float16 activations underflow without one
LOSS_SCALE = {"float16": 1024.0}

Batch = tuple[Tensor, Tensor]


class Results(NamedTuple):
    """Of the first input set: logits (of JUDGED_IMAGES in inference), gradients of parameters."""

    output: Tensor
    gradients: list[Tensor]


class Errors(NamedTuple):
    """Relative RMSE against float64; `gradient` is None in inference."""

    output: float
    gradient: float | None


@dataclass(frozen=True)
class Contender:
    """`step()` is what is timed; `module` owns the parameters."""

    step: Callable[[], object]
    results: Callable[[], Results]
    module: nn.Module


@dataclass(frozen=True)
class Work:
    """`training`: forward, cross-entropy and backward of one batch; else a forward in eval mode.

    Images are ``[batch, 3, image, image]``. 16-bit training runs under autocast with float32
    parameters, 16-bit inference on parameters of that type.
    """

    model: str
    batch: int
    training: bool = False
    image: int = 224
    dtype: str = "float32"
    device: str = "cpu"

    def __str__(self) -> str:
        kind = "train" if self.training else "infer"
        return f"{self.model}-{kind}-b{self.batch}-{self.image}px-{self.dtype}"

    @property
    def autocast(self) -> bool:
        return self.training and self.dtype in ("float16", "bfloat16")

    @property
    def image_dtype(self) -> torch.dtype:
        return torch.float32 if self.autocast else DTYPES[self.dtype]

    def build(self, **options: Any) -> nn.Module:
        """resfast's model, channels_last; the same weights at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = resfast.create_model(self.model, **options)
        model = model.to(self.device, self.image_dtype).train(self.training)
        return in_format(model, torch.channels_last)

    def batches(self, memory_format: torch.memory_format = torch.channels_last) -> list[Batch]:
        """Input sets to take by turns: random images and labels, the same at every call."""
        generator = torch.Generator().manual_seed(1)

        def images() -> Tensor:
            x = torch.randn(self.batch, 3, self.image, self.image, generator=generator)
            return x.to(self.device, self.image_dtype).contiguous(memory_format=memory_format)

        def labels() -> Tensor:
            return torch.randint(1000, (self.batch,), generator=generator).to(self.device)

        return [(images(), labels()) for _ in range(INPUT_SETS)]

    def contender(
        self, run: Callable[[Tensor], Tensor], module: nn.Module, batches: Sequence[Batch]
    ) -> Contender:
        """`run` is `module` or a compiled form of it; the module owns the gradients."""
        turn = itertools.cycle(batches)
        if not self.training:

            @torch.no_grad()
            def infer(batch: Batch | None = None) -> Tensor:
                return run((batch or next(turn))[0])

            return Contender(infer, lambda: Results(infer(batches[0])[:JUDGED_IMAGES], []), module)
        parameters = [p for p in module.parameters() if p.requires_grad]
        scale = LOSS_SCALE.get(self.dtype, 1.0)

        def train(batch: Batch | None = None) -> Tensor:
            x, label = batch or next(turn)
            for p in parameters:
                p.grad = None
            with torch.autocast(x.device.type, DTYPES[self.dtype], enabled=self.autocast):
                y = run(x)
            (F.cross_entropy(y.float(), label) * scale).backward()
            return y.detach()

        def results() -> Results:
            y = train(batches[0])
            return Results(y, [p.grad / scale for p in parameters if p.grad is not None])

        return Contender(train, results, module)

    def reference(self, model: nn.Module) -> Results:
        """What `Contender.results` should be, in float64 by stock layers."""
        exact = copy.deepcopy(resfast.unfused(model)).double()
        x, label = self.batches()[0]
        if not self.training:
            with torch.no_grad():
                return Results(exact(x[:JUDGED_IMAGES].double()), [])
        y = exact(x.double())
        F.cross_entropy(y, label).backward()
        gradients = [p.grad for p in exact.parameters() if p.grad is not None]
        return Results(y.detach(), gradients)

    def limits(self, model: nn.Module, reference: Results) -> Errors:
        """`limits_from` the errors of stock layers, eager, channels_last."""
        stock = in_format(resfast.unfused(model), torch.channels_last)
        own = errors(self.contender(stock, stock, self.batches()).results(), reference)
        return limits_from(own)


def limits_from(stock: Errors) -> Errors:
    """The largest errors that can be rounding, where stock's own are these."""
    output = max(OUTPUT_FACTOR * stock.output, FLOAT64_ROUNDING)
    if stock.gradient is None:
        return Errors(output, None)
    return Errors(output, max(OUTPUT_FACTOR * stock.gradient, GRADIENT_LIMIT))


def errors(results: Results, reference: Results) -> Errors:
    gradient = None
    if reference.gradients:
        gradient = relative_error(results.gradients, reference.gradients)
    return Errors(relative_error([results.output], [reference.output]), gradient)


def excess(found: Errors, limits: Errors) -> str | None:
    """What is wrong with `found`, or None."""
    for name, error, limit in zip(Errors._fields, found, limits, strict=True):
        if error is not None and limit is not None and not error <= limit:
            return f"wrong {name}: relative error {error:.1e}, over {limit:.1e}"
    return None


def in_format(model: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    return model.to(memory_format=memory_format)  # type: ignore[call-overload]


def relative_error(results: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """√(Σ‖result − reference‖² / Σ‖reference‖²) over all tensors; inf where shapes differ."""
    if [r.shape for r in results] != [r.shape for r in reference]:
        return float("inf")
    difference = size = 0.0
    for result, exact in zip(results, reference, strict=True):
        difference += float((result.double() - exact).square().sum())
        size += float(exact.square().sum())
    return (difference / size) ** 0.5

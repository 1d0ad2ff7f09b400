"""One training step of a whole model, and how two implementations' steps are compared."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SINGLE_FACTOR = 1.5  # fp32: error allowed over the worst of stock's own layouts
SINGLE_FLOOR = 8 * 2.0**-24


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def step(model: nn.Module, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Loss, outputs, gradients and buffers of one training step without the update."""
    model.zero_grad()
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = model(x)
    y = list(y.values()) if isinstance(y, dict) else y
    y = torch.cat([t.flatten(1) for t in (y if isinstance(y, list) else [y])], 1)
    loss = F.cross_entropy(y, torch.arange(len(x)) % y.shape[1])
    loss.backward()
    assert x.grad is not None
    result = {"loss": loss.detach(), "y": y.detach(), "d input": x.grad}
    result |= {f"d {k}": p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return result | {k: b.clone() for k, b in model.named_buffers()}


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm().detach() / b.norm().detach().clamp_min(1e-30))


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-8) -> None:
    """Float64 runs of two implementations: only the order of summation differs.

    1e-8 is 2⁻⁵³ times the depth times the amplification of the last stages' norms over a few
    values; a convolution's bias before a batch norm has gradient 0 but for rounding.
    """
    assert got.keys() == want.keys()
    for k in want:
        error = float((got[k].double() - want[k].double()).abs().max())
        assert error <= rtol * max(float(want[k].abs().max()), 1e-3), f"{k}: {error}"


def randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0, 0.2)
            nn.init.normal_(m.bias, 0.0, 0.2)
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2.0)
    return model


def stock_runs(theirs: nn.Module, x: Tensor, run) -> list:
    """Stock's own layouts, whose worst error is the measure."""
    runs = []
    for layout, onednn in (
        (torch.contiguous_format, True),
        (torch.channels_last, True),
        (torch.contiguous_format, False),
    ):
        with torch.backends.mkldnn.flags(enabled=onednn):
            model = copy.deepcopy(theirs).to(memory_format=layout)
            runs.append(run(model, x.contiguous(memory_format=layout)))
    return runs


def assert_training_error(
    ours: nn.Module, theirs: nn.Module, batches: Sequence[Tensor], depth: int
) -> None:
    """Each quantity's error over the worst of stock's layouts, over the batches.

    What goes forward is continuous: the worst batch counts. A gradient jumps where some ReLU's
    input rounds across zero, in stock as here and in neither's favour: the median batch counts.
    """
    exact = copy.deepcopy(theirs).double()
    ratios: dict[str, list[float]] = {}
    for x in batches:
        want = step(copy.deepcopy(exact), x.double())
        stock = stock_runs(theirs, x, step)
        got = step(copy.deepcopy(ours), x)
        assert got.keys() == want.keys()
        for k, v in want.items():
            if not v.is_floating_point():
                assert torch.equal(got[k], v)
                continue
            # the loss is one number, which can be right by luck: a rounding per layer for it
            floor = SINGLE_FLOOR * (depth if k == "loss" else 1)
            limit = max(SINGLE_FACTOR * max(relative(s[k], v) for s in stock), floor)
            ratios.setdefault(k, []).append(relative(got[k], v) / limit)
    for k, r in ratios.items():
        value = statistics.median(r) if k.startswith("d ") else max(r)
        assert value <= 1, f"{k}: {value} of the limit"

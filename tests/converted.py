"""A model before and after ``accelerate``, for the tests of conversion."""

from __future__ import annotations

import copy

import torch
from model_step import assert_same, relative, step
from torch import Tensor, nn

from resfast import accelerate
from resfast.convert import Report


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """All outputs of an evaluation in one vector."""
    with torch.no_grad():
        y = model(x)
    values = list(y.values()) if isinstance(y, dict) else [y]
    return torch.cat([v.flatten() for v in values])


def check(model: nn.Module, x: Tensor, **options) -> Report:
    """In float64 a step and evaluations before and after; the report of accelerate."""
    model = model.double()
    x = x.double()
    stock = copy.deepcopy(model)
    report = accelerate(model, **options)
    assert_same(step(model, x), step(stock, x))
    model.eval(), stock.eval()
    assert relative(outputs(model, x), outputs(stock, x)) < 1e-9
    assert_same(step(model, x), step(stock, x))
    return report

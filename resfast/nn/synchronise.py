"""Batch norms that normalise over all ranks' batches: conversion to SyncBatchNorm, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def convert_sync_batchnorm(model: nn.Module, process_group: Any | None = None) -> nn.Module:
    """Make every ``BatchNorm2d`` of model an ``nn.SyncBatchNorm`` in place, and return model.

    resfast's layers fuse these, on CPU too. Unlike stock's conversion it keeps the modules
    themselves, so that hooks and sharing stay. ``revert_sync_batchnorm`` undoes it.

    Args:
        process_group: whose ranks normalise together; None for all. Norms that are SyncBatchNorms
            already get it too. With one given, model can be copied or pickled only once reverted.

    Raises:
        TypeError: a batch norm of another kind: converted, it would lose its own forward.
        ValueError: this rank is not in process_group. Nothing is converted then.
    """
    if process_group is not None and torch.distributed.get_world_size(process_group) < 1:
        raise ValueError("this rank is not in the process group")
    norms = []
    for name, m in model.named_modules():
        if type(m) is nn.BatchNorm2d or type(m) is nn.SyncBatchNorm:
            norms.append(m)
        elif isinstance(m, _BatchNorm):
            raise TypeError(f"{name or 'model'} is a {type(m).__name__}, not a plain BatchNorm2d")
    for norm in norms:
        norm.__class__ = nn.SyncBatchNorm
        norm.process_group = process_group
    return model


def revert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Make every ``nn.SyncBatchNorm`` of model a ``BatchNorm2d`` in place, and return model."""
    norms = [m for m in model.modules() if type(m) is nn.SyncBatchNorm]
    for norm in norms:
        norm.__class__ = nn.BatchNorm2d  # type: ignore[assignment]  # the same attributes but one
        del norm.process_group
    return model

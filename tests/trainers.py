"""Trainers of tiny networks, made alike by the tests of each part of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from resfast.training.checkpoint import CheckpointFolder
from resfast.training.config import TrainConfig
from resfast.training.data import load_dataset
from resfast.training.distributed import Ranks
from resfast.training.loop import Trainer


def tiny_net(width: int, channels: int = 1, classes: int = 10, **conv: int) -> nn.Module:
    """Stock layers with all kinds of state: weights, running statistics, random numbers."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, bias=False, **conv),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(16 * width, classes),
    )


def trainer_for(
    config: TrainConfig,
    net: Callable[[], nn.Module],
    folder: Path | None = None,
    ranks: Ranks | None = None,
) -> Trainer:
    """The weights are the seed's; of several ranks the first keeps checkpoints."""
    ranks = ranks or Ranks()
    kept = None if folder is None or ranks.rank else CheckpointFolder(folder)
    data = load_dataset(config.validate())
    torch.manual_seed(config.seed)
    return Trainer(net(), data, config, folder=kept, ranks=ranks)

"""Batches whose images and labels are mixed in pairs: mixup and CutMix."""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor

from resfast.training.data import seeded

_MIX = 4  # after data.py's keys


class Mix:
    """(inputs, labels) → (inputs, targets ``[N, classes]``), a function of (seed, epoch, batch).

    mixup (arXiv:1710.09412): λ·x + (1 − λ)·x', λ from Beta(α, α), one for the batch. CutMix
    (arXiv:1905.04899): a box of x' in x, 1 − λ the share of its pixels. Targets are mixed alike.
    """

    def __init__(self, mixup: float, cutmix: float, classes: int, seed: int) -> None:
        self.mixup = mixup
        self.cutmix = cutmix
        self.classes = classes
        self.seed = seed

    def __call__(
        self, inputs: Tensor, labels: Tensor, epoch: int, batch: int
    ) -> tuple[Tensor, Tensor]:
        if not (self.mixup or self.cutmix):
            return inputs, labels
        generator = seeded(self.seed, _MIX, epoch, batch)
        draw = random.Random(generator.initial_seed())
        partner = torch.randperm(len(labels), generator=generator).to(labels.device)
        if self.cutmix and (not self.mixup or draw.random() < 0.5):
            share = draw.betavariate(self.cutmix, self.cutmix)
            inputs, share = self._paste(inputs, partner, share, draw)
        else:
            share = draw.betavariate(self.mixup, self.mixup)
            inputs = torch.lerp(inputs[partner], inputs, share)
        targets = F.one_hot(labels, self.classes).to(inputs.dtype)
        return inputs, torch.lerp(targets[partner], targets, share)

    @staticmethod
    def _paste(
        inputs: Tensor, partner: Tensor, share: float, draw: random.Random
    ) -> tuple[Tensor, float]:
        """A box of about 1 − share of the area, at a random place, cut off at the border."""
        height, width = inputs.shape[2:]
        ratio = math.sqrt(1 - share)
        y, x = draw.randrange(height), draw.randrange(width)
        half_y, half_x = int(height * ratio) // 2, int(width * ratio) // 2
        rows = slice(max(0, y - half_y), min(height, y + half_y))
        columns = slice(max(0, x - half_x), min(width, x + half_x))
        mixed = inputs.clone()
        mixed[:, :, rows, columns] = inputs[partner][:, :, rows, columns]
        pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
        return mixed, 1 - pasted / (height * width)

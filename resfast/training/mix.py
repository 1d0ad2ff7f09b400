"""Batches whose images and labels are mixed in pairs: mixup and CutMix."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resfast.training.data import seeded

_MIX = 4  # after data.py's keys


class Share(NamedTuple):
    """What one of several ranks needs of a batch."""

    rows: Tensor  # of the batch: its own, then those that are only mixed into them
    own: int  # how many
    partners: Tensor  # of each of its own: where in `rows` the one is that is mixed into it


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

    def share(self, own: Tensor, size: int, epoch: int, batch: int) -> Share:
        """For these rows of a batch of ``size`` images."""
        if not (self.mixup or self.cutmix):
            return Share(own, len(own), own)
        generator = seeded(self.seed, _MIX, epoch, batch)
        partners = torch.randperm(size, generator=generator)[own]
        rows = torch.cat([own, partners[~torch.isin(partners, own)]])
        place = torch.empty(size, dtype=torch.long)
        place[rows] = torch.arange(len(rows))
        return Share(rows, len(own), place[partners])

    def __call__(
        self, inputs: Tensor, labels: Tensor, share: Share, epoch: int, batch: int
    ) -> tuple[Tensor, Tensor]:
        """``inputs``, ``labels``: of the share's rows; what is returned: of its own."""
        if not (self.mixup or self.cutmix):
            return inputs, labels
        draw = random.Random(seeded(self.seed, _MIX, epoch, batch).initial_seed())
        partners = share.partners.to(labels.device)
        targets = F.one_hot(labels, self.classes).to(inputs.dtype)
        others, other_targets = inputs[partners], targets[partners]
        inputs, targets = inputs[: share.own], targets[: share.own]
        if self.cutmix and (not self.mixup or draw.random() < 0.5):
            ratio = draw.betavariate(self.cutmix, self.cutmix)
            inputs, ratio = self._paste(inputs, others, ratio, draw)
        else:
            ratio = draw.betavariate(self.mixup, self.mixup)
            inputs = torch.lerp(others, inputs, ratio)
        return inputs, torch.lerp(other_targets, targets, ratio)

    @staticmethod
    def _paste(
        inputs: Tensor, others: Tensor, ratio: float, draw: random.Random
    ) -> tuple[Tensor, float]:
        """A box of about 1 − ratio of the area, at a random place, cut off at the border."""
        height, width = inputs.shape[2:]
        side = math.sqrt(1 - ratio)
        y, x = draw.randrange(height), draw.randrange(width)
        half_y, half_x = int(height * side) // 2, int(width * side) // 2
        rows = slice(max(0, y - half_y), min(height, y + half_y))
        columns = slice(max(0, x - half_x), min(width, x + half_x))
        mixed = inputs.clone()
        mixed[:, :, rows, columns] = others[:, :, rows, columns]
        pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
        return mixed, 1 - pasted / (height * width)

"""What an op needs to know of a convolution and of a norm: plain tuples of tensors and numbers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from resfast.backends.interface import ConvGeometry


class ConvParams(NamedTuple):
    """A 2-d convolution: weight ``[K, C/groups, R, S]``, bias ``[K]`` or None, (h, w) pairs."""

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> ConvGeometry:
        return ConvGeometry(self.stride, self.padding, self.dilation, self.groups)


class NormParams(NamedTuple):
    """A batch norm over C channels, as ``torch.nn.functional.batch_norm`` takes it.

    weight (gamma), bias (beta), running_mean, running_var: ``[C]`` or None;
    num_batches_tracked: int64 scalar or None. ``training`` normalises by the batch's statistics
    and updates the running ones where they are given. ``momentum`` None: cumulative average.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None = None
    training: bool = False
    momentum: float | None = 0.1
    eps: float = 1e-5

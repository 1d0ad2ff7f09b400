"""What the ranks of a process group tell each other: statistics in forward, sums in backward.

``group`` is a ``ProcessGroup.group_name``. One collective each, of fp64 vectors per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _size(group: str) -> int:
    return torch.distributed.distributed_c10d._get_group_size_by_name(group)  # type: ignore[arg-type]  # a NewType of str


def gathered(t: Tensor, group: str) -> Tensor:
    """The ranks' ``t``, of equal shapes ``[n]``, as rows ``[ranks, n]``."""
    size = _size(group)
    rows = torch.ops._c10d_functional.all_gather_into_tensor(t, size, group)
    return torch.ops._c10d_functional.wait_tensor(rows).view(size, -1)


def summed(t: Tensor, group: str) -> Tensor:
    """The sum of the ranks' ``t``, of equal shapes."""
    return torch.ops._c10d_functional.wait_tensor(
        torch.ops._c10d_functional.all_reduce(t, "sum", group)
    )

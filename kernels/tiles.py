"""Tile sizes of every kernel: the shapes that ship, and which of them a call takes."""

from __future__ import annotations

from typing import NamedTuple


class ConvTile(NamedTuple):
    """One program's part of an implicit matrix product, and how it runs.

    fprop: block_m output pixels × block_n output channels, block_k input channels a step.
    dgrad: block_m input pixels × block_n input channels, block_k output channels a step.
    wgrad: block_m output channels × block_n input channels of one tap, block_k pixels a step.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


class NormTile(NamedTuple):
    """block_m pixels × block_c channels at a time."""

    block_m: int
    block_c: int
    warps: int

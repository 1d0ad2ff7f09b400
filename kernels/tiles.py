"""Tile sizes of every kernel: what they mean, and in which order a call tries them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch


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


_COMMON = (
    ConvTile(128, 128, 64, 8, 3),
    ConvTile(128, 64, 64, 4, 3),
    ConvTile(64, 64, 64, 4, 3),
    ConvTile(64, 32, 32, 4, 3),
    ConvTile(32, 32, 32, 4, 3),
)
CONV_TILES = {"conv_fprop": _COMMON, "conv_dgrad": _COMMON, "conv_wgrad": _COMMON}


class NormTile(NamedTuple):
    """block_m pixels × block_c channels at a time."""

    block_m: int
    block_c: int
    warps: int


class Chip(NamedTuple):
    """What of a device decides which tile is fast."""

    processors: int
    shared_bytes: int  # a multiprocessor's, for all its programs
    registers: int  # 32 bits each, likewise


H100 = Chip(132, 227 << 10, 1 << 16)


@functools.cache
def _cuda_chip(index: int) -> Chip:
    p = torch.cuda.get_device_properties(index)
    return Chip(
        p.multi_processor_count, p.shared_memory_per_multiprocessor, p.regs_per_multiprocessor
    )


def chip(device: torch.device) -> Chip:
    """Of a CUDA device; the interpreter runs one program at a time; for meta tensors an H100's."""
    if device.type == "cuda":
        return _cuda_chip(device.index or 0)
    return H100._replace(processors=1) if device.type == "cpu" else H100


def _cost(tile: ConvTile, m: int, n: int, k: int, itemsize: int, on: Chip) -> float:
    """Time in units of a multiply-add of one multiprocessor; only the order means anything."""
    programs = -(-m // tile.block_m) * -(-n // tile.block_n)
    steps = -(-k // tile.block_k)
    stage = (tile.block_m + tile.block_n) * tile.block_k * itemsize
    accumulator = tile.block_m * tile.block_n
    resident = max(
        1,
        min(
            on.shared_bytes // (tile.stages * stage),
            on.registers // (2 * accumulator),  # as much again for addresses and operands
        ),
    )
    waves = -(-programs // (on.processors * resident))
    # a step multiplies block_m·block_n·block_k, and moves its operands once from L2 to shared
    # memory, at some 64 multiply-adds a 16-bit value: small tiles wait for that
    work = tile.block_k * (accumulator + 64 * (tile.block_m + tile.block_n) * itemsize / 2)
    fill = tile.stages + 2  # steps' worth of waiting before the first product and after the last
    return waves * resident * work * (steps + fill / resident)


def ranked(
    tiles: Sequence[ConvTile], m: int, n: int, k: int, itemsize: int, on: Chip
) -> list[ConvTile]:
    """The tiles for an ``m × n`` result of products of length k, the likely fastest first.

    A tile more than twice as wide as the result, or deeper than k, is last: its rest is padding.
    """

    def padded(tile: ConvTile) -> bool:
        return tile.block_n > max(16, 2 * n - 1) or tile.block_k > max(16, 2 * k - 1)

    return sorted(tiles, key=lambda t: (padded(t), _cost(t, m, n, k, itemsize, on)))

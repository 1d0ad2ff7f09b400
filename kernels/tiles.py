"""Tile sizes of every kernel: what they mean, and in which order a call tries them."""

from __future__ import annotations

import functools
import math
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


def _tiles(*numbers: str) -> tuple[ConvTile, ...]:
    return tuple(ConvTile(*map(int, n.replace("x", " ").split())) for n in numbers)


# block_m x block_n x block_k, warps, stages: none spills registers on sm_80, sm_90 and sm_100 in
# what resfast/diagnostics/aot.py compiles; odd channels may. "normed": where an operand is made
# from others on the way in, which passes through registers. "exact": float32 as three products of
# TF32, which takes twice as many.
CONV_TILES: dict[str, dict[str, tuple[ConvTile, ...]]] = {
    "conv_fprop": {
        "half": _tiles(
            "128x256x32 8 4",
            "128x128x64 8 3",
            "128x128x32 8 4",
            "128x64x64 4 3",
            "128x64x32 4 4",
            "128x32x32 4 4",
            "64x64x64 4 4",
            "64x32x64 4 3",
        ),
        "half normed": _tiles(
            "128x128x64 8 3",
            "128x128x32 8 4",
            "128x64x32 4 4",
            "128x32x32 4 4",
            "64x64x64 4 4",
            "64x32x64 4 3",
        ),
        "tf32": _tiles("128x128x32 8 3", "128x64x32 4 3", "64x64x32 4 3", "64x32x32 4 4"),
        "tf32 normed": _tiles("128x64x32 4 3", "64x64x32 4 3", "64x32x32 4 4"),
        "exact": _tiles("64x64x32 8 3", "64x32x32 4 4"),
        "exact normed": _tiles("64x64x32 4 3", "64x32x32 4 4"),
    },
    "conv_dgrad": {
        "half": _tiles(
            "256x64x64 8 3",
            "128x128x64 8 3",
            "128x128x32 8 4",
            "128x64x64 8 3",
            "128x64x64 4 3",
            "128x32x64 4 3",
            "64x128x64 8 3",
            "64x64x64 4 3",
            "64x64x32 4 4",
            "64x32x64 4 3",
            "64x32x32 4 4",
        ),
        "half normed": _tiles(
            "128x128x32 8 4",
            "128x64x64 8 3",
            "128x64x32 8 3",
            "128x32x64 4 3",
            "64x128x64 8 3",
            "64x128x32 8 3",
            "64x64x32 4 4",
            "64x32x32 4 4",
        ),
        "tf32": _tiles(
            "128x128x32 8 3", "128x64x32 8 3", "64x64x32 8 3", "64x64x32 4 3", "64x32x32 4 3"
        ),
        "tf32 normed": _tiles(
            "128x128x32 8 3", "128x64x32 8 3", "64x64x32 8 3", "64x64x32 4 3", "64x32x32 4 3"
        ),
        "exact": _tiles(
            "128x128x16 8 4", "128x64x16 8 4", "64x64x32 8 3", "64x64x16 4 4", "64x32x32 4 3"
        ),
        "exact normed": _tiles(
            "128x64x16 8 4", "64x128x16 8 3", "64x64x32 8 3", "64x64x16 4 4", "64x32x32 4 3"
        ),
    },
    "conv_wgrad": {
        "half": _tiles(
            "128x128x64 8 3",
            "128x128x32 8 3",
            "128x64x64 8 3",
            "256x64x32 8 3",
            "64x256x32 8 3",
            "64x128x64 8 3",
            "64x128x32 4 3",
            "64x64x64 4 3",
        ),
        "half normed": _tiles("256x64x32 8 3", "128x64x32 8 3", "64x128x32 4 3"),
        "tf32": _tiles("128x128x32 8 3", "64x128x32 8 3", "64x64x32 8 3", "64x64x32 4 3"),
        "tf32 normed": _tiles("64x128x32 8 3", "64x64x32 8 3", "64x64x32 4 3"),
        "exact": _tiles("128x64x32 8 3", "64x128x32 8 3", "64x64x32 8 3"),
        "exact normed": _tiles("128x64x32 8 3"),
    },
}


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


def _cost(tile: ConvTile, m: int, n: int, k: int, itemsize: int, on: Chip, shared: bool) -> float:
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
    rounds = programs / (on.processors * resident)
    # a step multiplies block_m·block_n·block_k, and moves its operands once from L2 to shared
    # memory, at some 64 multiply-adds a 16-bit value: small tiles wait for that
    work = tile.block_k * (accumulator + 64 * (tile.block_m + tile.block_n) * itemsize / 2)
    fill = tile.stages + 2  # steps' worth of waiting before the first product and after the last
    if shared:
        return rounds * resident * work * steps
    return math.ceil(rounds) * resident * work * (steps + fill / resident)


def ranked(
    tiles: Sequence[ConvTile],
    m: int,
    n: int,
    k: int,
    itemsize: int,
    on: Chip,
    shared: bool = False,
) -> list[ConvTile]:
    """The tiles for an ``m × n`` result of products of length k, the likely fastest first.

    ``shared``: several programs share one tile's products (split-K). A tile more than twice as wide
    as the result is last: its rest is padding.
    """

    def padded(tile: ConvTile) -> bool:
        return tile.block_n > max(16, 2 * n - 1)

    return sorted(tiles, key=lambda t: (padded(t), _cost(t, m, n, k, itemsize, on, shared)))


def shipped(
    function: str, channels: int, dtype: torch.dtype, precision: str, normed: bool
) -> list[ConvTile]:
    """Tiles that keep to registers.

    Args:
        function: "conv_fprop", "conv_dgrad" or "conv_wgrad".
        channels: what a step of the product walks over; for wgrad, the fewer of its operands'.
        precision: "tf32", or anything else for exact float32; of no meaning in 16 bits.
        normed: an operand is made from others on the way in.
    """
    half = dtype.itemsize == 2
    kind = "half" if half else "tf32" if precision == "tf32" else "exact"
    tiles = CONV_TILES[function][f"{kind} normed" if normed else kind]
    return list(dict.fromkeys(_fitted(tile, function, channels, half) for tile in tiles))


def likely(
    function: str,
    sizes: tuple[int, int, int],
    channels: int,
    t: torch.Tensor,
    precision: str,
    normed: bool,
) -> list[ConvTile]:
    """``shipped``, the likely fastest first, for an operand t.

    ``sizes``: rows, columns and length of the matrix product, see ``ConvTile``.
    """
    tiles = shipped(function, channels, t.dtype, precision, normed)
    split = function == "conv_wgrad"
    return ranked(tiles, *sizes, t.element_size(), chip(t.device), split)


def _fitted(tile: ConvTile, function: str, channels: int, half: bool) -> ConvTile:
    """Steps no deeper than there are channels; asynchronous copies only where there can be any.

    Those are of 4 bytes or more, which Triton sees only in multiples of 16 channels.
    """
    if function != "conv_wgrad":
        tile = tile._replace(block_k=min(tile.block_k, max(16, _power_of_2(channels))))
    return tile._replace(stages=1) if half and channels % 16 else tile


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()

"""Ratios in pytest-benchmark's tables: the unit of "time" there is the peer's own time.

A ratio is measured by `resfast.benchmark.timing.race`, both contenders by turns; its rounds are
then told to pytest-benchmark through a clock that advances by them. So its statistics, histograms
and ``--benchmark-compare-fail`` speak of ratios, which survive a change of machine or of load.
Below 1 resfast is faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now


CLOCK = Clock()
TOLD: list[tuple[str, dict]] = []  # of this session: test, and what was kept beside its ratio


def in_ratios(group: str) -> pytest.MarkDecorator:
    return pytest.mark.benchmark(group=group, timer=CLOCK.read, disable_gc=True)


def tell(benchmark, ratios: Sequence[float], **extra) -> None:
    """Hand measured values to the `benchmark` fixture; `extra` is kept beside them."""
    benchmark.extra_info.update(extra)
    TOLD.append((benchmark.name, extra))
    turn = iter(ratios)

    def advance() -> None:
        CLOCK.now += next(turn)

    benchmark.pedantic(advance, rounds=len(ratios), iterations=1)

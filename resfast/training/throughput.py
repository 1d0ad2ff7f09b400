"""Which of two step functions is faster, measured so that drift of the machine hits both.

After warm-up the two are timed in turn, A B A B. A pair of neighbours gives one ratio; the
median ratio comes with a distribution-free interval of at least 95 % (order statistics of the
pairs). An interval that contains 1 is reported as "no difference".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

MIN_PAIRS = 7
MAX_PAIRS = 41
MIN_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Comparison:
    """Rates in images per second; `ratio` > 1 means A is faster."""

    rate_a: float
    rate_b: float
    ratio: float
    low: float
    high: float
    pairs: int
    steps_per_sample: int

    @property
    def differs(self) -> bool:
        return not self.low <= 1 <= self.high

    def verdict(self) -> str:
        spread = f"95 % interval {self.low:.2f}–{self.high:.2f}, {self.pairs} pairs"
        if not self.differs:
            return f"no difference: {self.ratio:.2f}× ({spread})"
        return f"{self.ratio:.2f}× ({spread})"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"differs": self.differs}


def compare(
    step_a: Callable[[], object],
    step_b: Callable[[], object],
    images: int,
    *,
    budget: float = 10.0,
    warmup: int = 3,
    sync: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    stopped: Callable[[], bool] = lambda: False,
) -> Comparison | None:
    """`images` per step; about `budget` seconds. None when `stopped` says so before the end."""

    def timed(step: Callable[[], object], repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            step()
        sync()
        return (clock() - start) / repeats

    sync()
    estimates = []
    for _ in range(warmup):
        estimates = [timed(step_a, 1), timed(step_b, 1)]
        if stopped():
            return None
    repeats = max(1, math.ceil(MIN_SAMPLE_SECONDS / max(min(estimates), 1e-6)))
    pairs = int(budget / max(repeats * sum(estimates), 1e-9))
    pairs = min(max(pairs, MIN_PAIRS), MAX_PAIRS)
    a, b = [], []
    for _ in range(pairs):
        a.append(timed(step_a, repeats))
        b.append(timed(step_b, repeats))
        if stopped():
            return None
    ratios = sorted(y / x for x, y in zip(a, b, strict=True))
    low, high = median_interval(pairs)
    return Comparison(
        rate_a=images / median(a),
        rate_b=images / median(b),
        ratio=median(ratios),
        low=ratios[low],
        high=ratios[high],
        pairs=pairs,
        steps_per_sample=repeats,
    )


def median_interval(count: int, confidence: float = 0.95) -> tuple[int, int]:
    """Ranks (from 0) of the sorted sample that enclose its median with `confidence`.

    P(median outside) = 2·P(Binomial(count, ½) ≤ low); below 6 values the range itself.
    """
    low, tail = 0, 2 * 0.5**count
    while low + 1 < count / 2:
        tail += 2 * math.comb(count, low + 1) * 0.5**count
        if tail > 1 - confidence:
            break
        low += 1
    return low, count - 1 - low

"""Which contender is faster, measured so that drift of the machine hits all of them alike.

After warm-up every round times each contender once. The rounds' paired ratios give a median with
a bootstrap interval (Efron 1979, percentile form); an interval that contains 1 is reported as
"no difference".

A library whose worker threads spin after a call slows whoever runs next. With such a contender in
the race, each timed sample is preceded by a rest and by one untimed call, in shuffled order.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Protocol

import torch

MIN_ROUNDS = 7
MAX_ROUNDS = 61
MIN_SAMPLE_SECONDS = 0.02
REST_SECONDS = 0.05
RESAMPLES = 2000

Step = Callable[[], object]


class Timer(Protocol):
    """Seconds that `repeats` calls of a step take."""

    def __call__(self, step: Step, repeats: int) -> float: ...


@dataclass
class WallTimer:
    clock: Callable[[], float] = time.perf_counter

    def __call__(self, step: Step, repeats: int) -> float:
        start = self.clock()
        for _ in range(repeats):
            step()
        return self.clock() - start


class CudaTimer:
    """Device time between two events of the current stream."""

    def __call__(self, step: Step, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3


def timer_for(device: torch.device | str) -> Timer:
    return CudaTimer() if torch.device(device).type == "cuda" else WallTimer()


@dataclass(frozen=True)
class Ratio:
    """How many times as long the other contender takes; above 1, ours is faster."""

    ratio: float
    low: float
    high: float
    rounds: int

    @property
    def differs(self) -> bool:
        return not self.low <= 1 <= self.high

    def verdict(self) -> str:
        spread = f"95 % interval {self.low:.2f}–{self.high:.2f}, {self.rounds} rounds"
        if not self.differs:
            return f"no difference: {self.ratio:.2f}× ({spread})"
        return f"{self.ratio:.2f}× ({spread})"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"differs": self.differs}


@dataclass
class Race:
    """Seconds per call of each contender, one sample a round."""

    repeats: dict[str, int]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return min(map(len, self.seconds.values()))

    def median(self, name: str) -> float:
        return median(self.seconds[name])

    def spread(self, name: str) -> float:
        """Half the distance between the quartiles, over the median."""
        ordered = torch.tensor(self.seconds[name], dtype=torch.float64)
        low, high = torch.quantile(ordered, torch.tensor([0.25, 0.75], dtype=torch.float64))
        return float((high - low) / 2) / self.median(name)

    def ratio(self, ours: str, other: str) -> Ratio:
        pairs = zip(self.seconds[ours], self.seconds[other], strict=True)
        ratios = [b / a for a, b in pairs]
        low, high = bootstrap_interval(ratios)
        return Ratio(median(ratios), low, high, len(ratios))


def bootstrap_interval(values: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the median; the same values give the same interval."""
    sample = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    medians = torch.quantile(sample[drawn], 0.5, dim=1)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(medians, torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(low), float(high)


def race(
    contenders: Mapping[str, Step],
    *,
    budget: float = 10.0,
    warmup: int = 3,
    timer: Timer | None = None,
    rest: float = 0.0,
    sleep: Callable[[float], object] = time.sleep,
    on_round: Callable[[int, int], object] = lambda done, total: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Race | None:
    """Time `contenders` by turns for about `budget` seconds; None when `stopped` says so.

    `rest` > 0 (seconds) shuffles each round and puts a pause and one untimed call before each
    sample. `on_round` is told how many rounds are done, of how many.
    """
    timer = timer or WallTimer()
    cost: dict[str, float] = {}
    for _ in range(max(warmup, 1)):
        for name, step in contenders.items():
            cost[name] = timer(step, 1)
            if stopped():
                return None
    repeats = {n: max(1, math.ceil(MIN_SAMPLE_SECONDS / max(c, 1e-6))) for n, c in cost.items()}
    untimed = 1 if rest else 0
    round_seconds = sum((repeats[n] + untimed) * cost[n] + rest for n in contenders)
    rounds = min(max(int(budget / max(round_seconds, 1e-9)), MIN_ROUNDS), MAX_ROUNDS)
    result = Race(repeats, {name: [] for name in contenders})
    order, shuffle = list(contenders), random.Random(0)
    for done in range(rounds):
        if rest:
            shuffle.shuffle(order)
        for name in order:
            if rest:
                sleep(rest)
                contenders[name]()
            result.seconds[name].append(timer(contenders[name], repeats[name]) / repeats[name])
        if stopped():
            return None
        on_round(done + 1, rounds)
    return result

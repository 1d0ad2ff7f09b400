"""Cost against batch, resolution, depth and threads, in units of the linear law: 1 is linear.

The law is drawn from the first size through the operations of direct convolution. Below 1 the
larger size is relatively cheaper; a curve that bends upwards shows as values that grow beyond 1.
"""

from __future__ import annotations

import pytest
import torch
from ratios import in_ratios, tell

from resfast.benchmark.floor import costs
from resfast.benchmark.peers import OURS, PEERS
from resfast.benchmark.timing import race, timer_for
from resfast.benchmark.work import Work

DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
SIDES = (128, 192, 256, 320)
BATCHES = {"cpu": (2, 4, 8, 16), "cuda": (16, 32, 64, 128, 256)}
MODES = pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])


def _operations(work: Work) -> float:
    return sum(cost.operations for cost in costs(work))


def _race(benchmark, works: list[Work], budget: float) -> None:
    contenders = {work: PEERS[OURS].build(work, work.build()) for work in works}
    result = race(
        {str(work): c.step for work, c in contenders.items()},
        budget=budget * len(works),
        warmup=2,
        timer=timer_for(works[0].device),
    )
    first, last = works[0], works[-1]
    growth = {str(work): _operations(work) / _operations(first) for work in works}
    base = result.seconds[str(first)]
    over_law = {
        name: result.ratio(str(first), name).ratio / growth[name] for name in result.seconds
    }
    tell(
        benchmark,
        [t / b / growth[str(last)] for t, b in zip(result.seconds[str(last)], base, strict=True)],
        milliseconds={name: 1e3 * result.median(name) for name in result.seconds},
        over_linear_law=over_law,
    )


@MODES
@in_ratios("scaling: largest over smallest")
def test_batch(benchmark, device, budget, training):
    sizes = BATCHES[device.split(":")[0]]
    _race(benchmark, [Work("resnet18", n, training, 128, device=device) for n in sizes], budget)


@MODES
@in_ratios("scaling: largest over smallest")
def test_resolution(benchmark, device, budget, training):
    _race(benchmark, [Work("resnet18", 2, training, s, device=device) for s in SIDES], budget)


@MODES
@in_ratios("scaling: largest over smallest")
def test_depth(benchmark, device, budget, training):
    _race(benchmark, [Work(name, 2, training, 128, device=device) for name in DEPTHS], budget)


@MODES
@in_ratios("scaling: all threads, one is the law")
def test_threads(benchmark, device, budget, training):
    """1: n threads take 1/n of one thread's time."""
    threads = torch.get_num_threads()
    if device != "cpu" or threads == 1:
        pytest.skip("needs a CPU of two cores or more")
    work = Work("resnet18", 4, training)
    contender = PEERS[OURS].build(work, work.build())

    def on(count: int):
        def step() -> None:
            torch.set_num_threads(count)
            contender.step()

        return step

    try:
        result = race({"one": on(1), "all": on(threads)}, budget=4 * budget, warmup=2)
    finally:
        torch.set_num_threads(threads)
    assert result is not None
    pairs = zip(result.seconds["one"], result.seconds["all"], strict=True)
    tell(
        benchmark,
        [threads * every / one for one, every in pairs],
        threads=threads,
        faster_by=result.ratio("all", "one").verdict(),
    )

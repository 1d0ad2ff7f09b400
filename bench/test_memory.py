"""Bytes of a training step over those of eager, channels_last; below 1 resfast needs less."""

from __future__ import annotations

import pytest
from ratios import in_ratios, tell

from resfast.benchmark.memory import peak_bytes, saved_bytes
from resfast.benchmark.peers import OURS, PEERS
from resfast.benchmark.work import Work

STOCK = "eager-nhwc"
BATCH = {"cpu": 4, "cuda": 64}
CASES = [("resnet18", OURS), ("resnet50", OURS), ("resnet50", "memory-efficient")]


def _work(model: str, device: str) -> Work:
    kind = device.split(":")[0]
    dtype = "float32" if kind == "cpu" else "bfloat16"
    return Work(model, BATCH[kind], training=True, dtype=dtype, device=device)


@in_ratios("memory: saved for backward")
@pytest.mark.parametrize(("model", "form"), CASES)
def test_saved(benchmark, model, form, device):
    work = _work(model, device)
    network = work.build()
    saved = {n: saved_bytes(PEERS[n].build(work, network)) / work.batch for n in (form, STOCK)}
    mib = {name: round(size / 2**20, 2) for name, size in saved.items()}
    tell(benchmark, [saved[form] / saved[STOCK]], mib_per_image=mib)


@in_ratios("memory: peak")
@pytest.mark.parametrize(("model", "form"), CASES)
def test_peak(benchmark, model, form, device):
    work = _work(model, device)
    peak = {name: peak_bytes(work, name) / work.batch for name in (form, STOCK)}
    mib = {name: round(size / 2**20, 2) for name, size in peak.items()}
    tell(benchmark, [peak[form] / peak[STOCK]], mib_per_image=mib)

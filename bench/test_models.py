"""Whole networks against everything people would run instead; below 1 resfast is faster."""

from __future__ import annotations

import pytest
from ratios import in_ratios, tell

from resfast.benchmark import run
from resfast.benchmark.peers import OURS, PEERS
from resfast.benchmark.work import Work

# batches by device and kind of step
PLAN = {
    "cpu": {"infer": (1, 16), "train": {"resnet18": (16,), "resnet50": (8,)}},
    "cuda": {"infer": (1, 128), "train": {"resnet18": (256,), "resnet50": (64, 256)}},
}
DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16", "float16")}


def _works(config) -> list[Work]:
    device = config.getoption("--device")
    kind = device.split(":")[0]
    asked = config.getoption("--dtypes")
    plan = PLAN[kind]
    return [
        Work(model, batch, training, dtype=dtype, device=device)
        for dtype in (asked.split(",") if asked else DTYPES[kind])
        for model in ("resnet18", "resnet50")
        for training in (False, True)
        for batch in (plan["train"][model] if training else plan["infer"])
    ]


def pytest_generate_tests(metafunc):
    peers = run.choose(metafunc.config.getoption("--peers"))
    pairs = [(work, peer) for work in _works(metafunc.config) for peer in peers if peer != OURS]
    if metafunc.config.getoption("--peers") == "default":
        # of compiled inference only its faster form, with freezing
        pairs = [(w, p) for w, p in pairs if w.training or p != "compile"]
    metafunc.parametrize(("work", "peer"), pairs, ids=lambda value: str(value))


@pytest.fixture(scope="session")
def records(request, budget):
    """One race per work item, of all the peers that this session asks for."""
    wanted: dict[Work, list[str]] = {}
    for item in request.session.items:
        parameters = getattr(item, "callspec", None)
        if parameters is not None and isinstance(parameters.params.get("work"), Work):
            wanted.setdefault(parameters.params["work"], [OURS]).append(parameters.params["peer"])
    measured: dict[Work, dict] = {}

    def record(work: Work) -> dict:
        if work not in measured:
            measured[work] = run.measure(
                work, wanted[work], budget=3 * budget, roofline=False, say=lambda text: None
            )
        return measured[work]

    return record


@in_ratios("models")
def test_model(benchmark, work, peer, records):
    if reason := PEERS[peer].why_not(work):
        pytest.skip(reason)
    record = records(work)
    reasons = {s["peer"]: s["reason"] for s in record["skipped"]}
    assert peer not in reasons, reasons[peer]
    rows = {row["peer"]: row for row in record["rows"]}
    pairs = zip(rows[OURS]["samples_ms"], rows[peer]["samples_ms"], strict=True)
    tell(
        benchmark,
        [ours / other for ours, other in pairs],
        resfast_ms=rows[OURS]["ms"],
        peer_ms=rows[peer]["ms"],
        faster_by={key: rows[peer][key] for key in ("ratio", "low", "high", "differs")},
        relative_errors={name: rows[name]["relative_error"] for name in (OURS, peer)},
    )

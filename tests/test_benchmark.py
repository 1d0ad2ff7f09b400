"""resfast.benchmark: timing, errors, peers, records and reports; `resfast bench` itself."""

from __future__ import annotations

import json
import math
import shutil

import cudnn_interpreter
import pytest
import torch
from torch import nn

import resfast
from resfast.backends import select
from resfast.benchmark import floor, memory, report, run
from resfast.benchmark.peers import OURS, PEERS
from resfast.benchmark.timing import MAX_ROUNDS, MIN_ROUNDS, WallTimer, bootstrap_interval, race
from resfast.benchmark.work import Errors, Work, excess, relative_error
from resfast.cli import main
from resfast.training.config import OptionError, UserError

SMALL = Work("resnet18", batch=2, image=64)


# Timing


class FakeSteps:
    """Step functions that advance a clock of their own and note the order."""

    def __init__(self, a: float, b: float, drift: float = 0.0, noise: float = 0.0) -> None:
        self.now, self.drift, self.calls = 0.0, drift, ""
        self.seconds = {"a": a, "b": b}
        self.random = torch.Generator().manual_seed(0)
        self.noise = noise

    def step(self, name: str) -> None:
        self.calls += name
        wobble = 1 + self.noise * (torch.rand((), generator=self.random).item() - 0.5)
        self.now += self.seconds[name] * wobble * (1 + self.drift * len(self.calls))

    def race(self, **options):
        steps = {"a": lambda: self.step("a"), "b": lambda: self.step("b")}
        return race(steps, timer=WallTimer(lambda: self.now), **options)


def test_known_ratio_is_found_through_drift():
    """The machine slows down threefold over the measurement; the ratio stays 1.5."""
    fake = FakeSteps(0.1, 0.15, drift=0.02)
    result = fake.race(budget=10.0).ratio("a", "b")
    assert result.ratio == pytest.approx(1.5, rel=0.03)
    assert result.differs
    assert 1 < result.low <= result.ratio <= result.high
    assert fake.calls == "ab" * (len(fake.calls) // 2)


def test_seconds_are_per_call_and_the_slower_other_gives_a_ratio_above_one():
    result = FakeSteps(0.1, 0.2).race()
    assert result.median("a") == pytest.approx(0.1)
    assert result.median("b") == pytest.approx(0.2)
    assert result.repeats == {"a": 1, "b": 1}
    assert result.spread("a") == pytest.approx(0)
    assert result.ratio("a", "b").verdict().startswith("2.00×")


def test_equal_steps_under_noise_are_called_no_difference():
    ratio = FakeSteps(0.1, 0.1, noise=0.5).race().ratio("a", "b")
    assert not ratio.differs
    assert ratio.verdict().startswith("no difference")


def test_short_steps_are_grouped_and_a_stop_ends_the_measurement():
    result = FakeSteps(0.0011, 0.0043).race(budget=1.0)
    assert result.repeats == {"a": 19, "b": 5}
    assert result.median("a") == pytest.approx(0.0011)
    fake = FakeSteps(0.1, 0.1)
    assert fake.race(stopped=lambda: len(fake.calls) >= 10) is None
    assert len(fake.calls) == 10


def test_rounds_follow_the_budget_within_bounds():
    assert FakeSteps(1.0, 1.0).race(budget=0.1).rounds == MIN_ROUNDS
    assert FakeSteps(1.0, 1.0).race(budget=40.0).rounds == 20
    assert FakeSteps(0.1, 0.1).race(budget=1e4).rounds == MAX_ROUNDS


def test_with_rest_every_sample_follows_a_pause_and_an_untimed_call_in_shuffled_order():
    fake, rests = FakeSteps(0.1, 0.1), []
    result = fake.race(
        warmup=1, budget=0.1, rest=0.5, sleep=lambda s: rests.append(len(fake.calls))
    )
    after_warmup = fake.calls[2:]
    assert len(after_warmup) == 2 * 2 * result.rounds
    assert rests == list(range(2, len(fake.calls), 2))
    pairs = [after_warmup[i : i + 4] for i in range(0, len(after_warmup), 4)]
    assert set(pairs) == {"aabb", "bbaa"}


def test_bootstrap_interval_covers_the_median_of_many_samples_as_often_as_it_says():
    """200 samples of 15 from a lognormal of median 1: about 95 % of the intervals hold 1."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(200, 15, generator=generator).mul(0.1).exp()
    held = sum(low <= 1 <= high for low, high in (bootstrap_interval(d.tolist()) for d in draws))
    assert 0.90 <= held / 200 <= 0.995
    assert bootstrap_interval([2.0] * 9) == (2.0, 2.0)


# Work and errors


def test_relative_error_pools_tensors_and_refuses_other_shapes():
    exact = [torch.tensor([3.0]), torch.tensor([4.0])]
    assert relative_error([torch.tensor([3.0]), torch.tensor([4.5])], exact) == pytest.approx(0.1)
    assert relative_error([torch.tensor([3.0])], exact) == math.inf
    assert relative_error([torch.tensor([math.nan]), exact[1]], exact) != 0


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        (Errors(1e-6, 1e-6), None),
        (Errors(1e-3, 1e-6), "wrong output"),
        (Errors(1e-6, 1.0), "wrong gradient"),
        (Errors(math.nan, 1e-6), "wrong output"),
    ],
)
def test_excess_names_what_is_wrong(found, wrong):
    answer = excess(found, Errors(1e-5, 1e-1))
    assert answer is None if wrong is None else answer.startswith(wrong)


@pytest.mark.parametrize("training", [False, True])
def test_a_contender_is_judged_by_float64_and_takes_input_sets_by_turns(training):
    work = Work("resnet18", 2, training, image=64)
    model = work.build()
    reference = work.reference(model)
    limits = work.limits(model, reference)
    assert limits.output < 1e-3
    contender = PEERS[OURS].build(work, model)
    from resfast.benchmark.work import errors

    assert excess(errors(contender.results(), reference), limits) is None
    seen = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for _ in range(4):
        contender.step()
    handle.remove()
    assert len({x.data_ptr() for x in seen}) == 3
    assert seen[0] is seen[3]
    with torch.no_grad():
        model.fc.weight.mul_(1.01)
    assert excess(errors(contender.results(), reference), limits) is not None


def test_the_same_weights_at_every_build_and_the_generator_is_left_alone():
    state = torch.get_rng_state()
    a, b = SMALL.build(), SMALL.build(zero_init_residual=True)
    assert torch.equal(a.conv1.weight, b.conv1.weight)
    assert torch.equal(torch.get_rng_state(), state)


# Peers


@pytest.mark.parametrize("name", [n for n, p in PEERS.items() if n not in ("cuda-graph", "apex")])
def test_every_peer_that_can_run_here_computes_the_same(name):
    peer = PEERS[name]
    model = {"memory-efficient": "resnet50"}.get(name, "resnet18")
    work = Work(model, batch=2, training=name == "memory-efficient", image=64)
    if reason := peer.why_not(work):
        pytest.skip(reason)
    record = run.measure(work, [OURS, name], budget=0.01, roofline=False, say=lambda text: None)
    assert record["skipped"] == []
    assert {row["peer"] for row in record["rows"]} == {OURS, name}


def test_the_peer_on_cudnns_norms_forces_them_for_its_steps_alone(monkeypatch):
    cudnn_interpreter.install(monkeypatch)
    work = Work("resnet18", batch=2, training=True, image=32)
    assert PEERS["cudnn-norms"].why_not(work) is None
    model = work.build()
    contenders = [PEERS[name].build(work, model) for name in ("cudnn-norms", OURS)]
    ran = []
    with select.listen(lambda choice: ran.append(choice.backend)):
        for call in (contenders[0].step, contenders[0].results):
            call()
            assert set(ran) == {"cudnn"}
        contenders[1].step()
    assert ran[-1] != "cudnn"


def test_compiled_peers_of_one_model_run_code_of_their_own(monkeypatch):
    """Dynamo would hand the second module the first one's code: freezing would then not freeze."""
    from torch._dynamo.utils import counters

    if reason := PEERS["compile"].why_not(SMALL):
        pytest.skip(reason)
    counters.clear()
    run.forget_compiled()
    model = SMALL.build()
    for name in ("compile", "compile-freezing"):
        PEERS[name].build(SMALL, model).results()
    assert counters["stats"]["unique_graphs"] == 2


def test_peers_say_why_they_cannot_run():
    assert PEERS["openvino"].why_not(Work("resnet18", 1, training=True))
    assert PEERS["cuda-graph"].why_not(SMALL) == "needs CUDA"
    assert PEERS["apex"].why_not(Work("resnet18", 1, training=True)) == "trains in float16"
    assert PEERS["cudnn-norms"].why_not(SMALL) == "for training"
    assert PEERS["cudnn-norms"].why_not(Work("resnet18", 1, training=True))
    assert PEERS["compile-freezing"].why_not(Work("resnet18", 1, training=True))


def test_wrong_and_broken_contenders_are_left_out_by_name(monkeypatch):
    def wrong(work, model):
        other = work.build()
        with torch.no_grad():
            other.fc.bias.add_(0.1)
        return work.contender(other, other, work.batches())

    def broken(work, model):
        raise ValueError("no such thing")

    peer = type(PEERS[OURS])
    monkeypatch.setitem(PEERS, "wrong", peer("wrong", "wrong", wrong))
    monkeypatch.setitem(PEERS, "broken", peer("broken", "broken", broken))
    peers = [OURS, "wrong", "broken"]
    record = run.measure(SMALL, peers, budget=0.01, roofline=False, say=lambda text: None)
    assert [row["peer"] for row in record["rows"]] == [OURS]
    reasons = {s["peer"]: s["reason"] for s in record["skipped"]}
    assert reasons["wrong"].startswith("wrong output")
    assert reasons["broken"] == "ValueError: no such thing"


def test_choose_puts_resfast_first_and_refuses_unknown_names():
    assert run.choose("eager-nchw, compile") == [OURS, "eager-nchw", "compile"]
    assert run.choose("all") == list(PEERS)
    assert "compile-autotune" not in run.choose("default")
    with pytest.raises(OptionError, match="unknown peer 'tensorrt'"):
        run.choose("tensorrt")


# Floor and memory


def test_costs_of_resnet18_by_hand():
    """1.814 GMAC an image (torchvision's count); the stem's input gradient is not computed."""
    forward = floor.costs(Work("resnet18", 2))
    assert len(forward) == 21
    assert sum(c.operations for c in forward) == pytest.approx(2 * 2 * 1.814e9, rel=1e-3)
    training = floor.costs(Work("resnet18", 2, training=True))
    assert len(training) == 3 * 21 - 1
    stem = 2 * 2 * 64 * 3 * 49 * 112 * 112
    assert sum(c.operations for c in training) == pytest.approx(
        3 * sum(c.operations for c in forward) - stem
    )
    fc = forward[-1]
    assert fc.bytes == 4 * (2 * 512 + 512 * 1000 + 2 * 1000)


def test_floor_takes_the_larger_of_bytes_and_operations():
    ceilings = floor.Ceilings(bytes_per_second=10.0, operations_per_second=100.0)
    assert ceilings.seconds([floor.Cost(10, 50), floor.Cost(10, 500)]) == pytest.approx(1 + 5)


def test_saved_bytes_counts_each_storage_once_and_no_parameters():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, x):
            y = x * self.weight  # saves x and the weight
            return y * y  # saves y, twice

    module, x = Twice(), torch.ones(10, 1000, requires_grad=True)
    work = SMALL.contender(module, module, [])
    contender = type(work)(lambda: module(x).sum().backward(), work.results, module)
    assert memory.saved_bytes(contender) == 2 * x.nbytes


def test_peak_bytes_sees_what_a_step_holds():
    work = Work("resnet18", 8, training=True, image=64)
    model_bytes = sum(p.nbytes for p in work.build().parameters())
    peak = memory.peak_bytes(work, "eager-nhwc")
    assert peak > model_bytes  # the gradients alone
    assert peak < 40 * model_bytes
    with pytest.raises(RuntimeError, match="no_such_model"):
        memory.peak_bytes(Work("no_such_model", 1), OURS)


# Records, reports and the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    common = ["bench", "--image", "64", "--budget", "0.01", "--peers", "eager-nhwc,openvino"]
    training = ["--train", "--batch", "4", "--floor", "--plot", str(folder / "b.png")]
    assert main([*common, "--batch", "2", "--save", str(folder / "a.json")]) == 0
    assert main([*common, *training, "--save", str(folder / "b.json")]) == 0
    return folder


def test_bench_writes_what_it_measured(saved):
    record = json.loads((saved / "b.json").read_text())
    ours, eager = record["rows"]
    assert (ours["peer"], eager["peer"]) == (OURS, "eager-nhwc")
    assert eager["low"] <= eager["ratio"] <= eager["high"]
    assert eager["ms"] == pytest.approx(4 * eager["ms_per_image"])
    assert len(eager["samples_ms"]) == eager["rounds"]
    assert ours["relative_error"]["output"] < 1e-3
    assert ours["share_of_floor"] > 0
    assert record["saved_bytes_per_image"][OURS] < record["saved_bytes_per_image"]["eager-nhwc"]
    assert {s["peer"] for s in record["skipped"]} == {"openvino"}
    assert record["device"]["name"]
    assert record["versions"]["torch"] == torch.__version__
    assert (saved / "b.png").read_bytes().startswith(b"\x89PNG")


def test_report_draws_saved_records_again(saved, tmp_path, capsys):
    picture = tmp_path / "speed.svg"
    files = [str(saved / "b.json"), str(saved / "a.json")]
    assert main(["bench", "--report", *files, "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| ResNet-18")]
    assert [("training" in row) for row in rows] == [True, False]
    record = json.loads((saved / "b.json").read_text())
    assert f"**{record['rows'][0]['ms_per_image']:.1f}**" in rows[0]
    assert f"{record['rows'][1]['ratio']:.2f}×" in rows[0]
    first = picture.read_text()
    report.plot(report.read([saved / "b.json", saved / "a.json"]), picture)
    assert picture.read_text() == first


def test_report_refuses_what_is_no_record(tmp_path, saved):
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(UserError, match="no record"):
        report.read([other])
    other.write_text("{")
    with pytest.raises(UserError, match=r"other\.json"):
        report.read([other])
    record = json.loads((saved / "a.json").read_text())
    other.write_text(json.dumps(record | {"schema": 0}))
    with pytest.raises(UserError, match="schema 0"):
        report.read([other])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--peers", "tensorrt"], "unknown peer"),
        (["--plot", "out.txt"], "must end in"),
        (["--model", "resnet19"], "resnet18"),
        (["--train", "--infer"], "not allowed with"),
        (["--batch", "0"], "at least 1"),
        (["--budget", "0"], "above 0"),
    ],
)
def test_bad_options_end_with_status_2_in_one_line(options, words, capsys):
    try:
        status = main(["bench", *options])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error


def test_the_compiler_is_asked_for(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert PEERS["compile"].why_not(SMALL) == "needs a C++ compiler"


def test_stock_peers_leave_resfast_out():
    stock = resfast.unfused(SMALL.build())
    assert not any(m.fused for m in stock.modules() if hasattr(m, "fused"))

"""Plans on CPU: the fastest kernel that is exact enough, measured once a size."""

from __future__ import annotations

import collections
import functools
import json
import threading
import time

import needs
import pytest
import torch
from torch import nn

import resfast
from resfast.backends import cpu_engines, tuning
from resfast.backends.accuracy import Judge, window
from resfast.backends.cpu_engines import CpuEngines, Layer, fastest
from resfast.backends.interface import ConvGeometry, NormVectors, nhwc
from resfast.backends.processor import cpu_name, last_cache
from resfast.nn import ConvBNAct

pytestmark = [needs.native_library, pytest.mark.usefixtures("one_thread")]
PLAIN = ConvGeometry((1, 1), (1, 1), (1, 1), 1)
POINTWISE = ConvGeometry((1, 1), (0, 0), (1, 1), 1)
STRIDED = ConvGeometry((2, 2), (1, 1), (1, 1), 1)


# ---- whom times favour


class Watch:
    """``seconds`` of calls that say who they are, round by round; what else was done, in order."""

    def __init__(self, monkeypatch, rounds, **times):
        self.times = {
            name: list(t) if isinstance(t, list) else [t] * rounds for name, t in times.items()
        }
        self.did = []
        monkeypatch.setattr(cpu_engines, "seconds", self)
        monkeypatch.setattr(cpu_engines, "ROUNDS", (rounds, rounds))

    def __call__(self, call):
        name = call()
        self.did.append(name)
        return self.times[name].pop(0)

    def fastest(self):
        calls = {name: (lambda name=name: name) for name in self.times}
        return fastest(calls, lambda: self.did.append("round"), lambda: self.did.append("call"))


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ({"rule": 1.0, "b": 0.98, "c": 2.0}, "rule"),  # within the margin
        ({"rule": 1.0, "b": 0.95, "c": 2.0}, "b"),
        ({"rule": 1.0, "b": 0.9, "c": 0.8}, "c"),
        ({"rule": 1.0, "b": 0.8, "c": 0.9}, "b"),
        # its median is less, but not often enough
        ({"rule": 1.0, "b": [0.9] * 7 + [1.1] * 3}, "rule"),
        ({"rule": 1.0, "b": [0.9] * 8 + [1.1] * 2}, "b"),
        # undisturbed, the rule is faster
        ({"rule": [1.0] * 9 + [0.85], "b": 0.9}, "rule"),
        # somebody else has the processor
        ({"rule": [3.0] * 9 + [1.0], "b": 0.9}, None),
        ({"rule": 1.0, "b": [0.5] * 4 + [0.9] * 6}, None),
    ],
    ids=str,
)
def test_another_kernel_must_be_faster_by_a_margin_and_nearly_always(monkeypatch, times, winner):
    assert Watch(monkeypatch, 10, **times).fastest() == winner


def test_everyone_has_a_turn_in_every_round_and_nobody_is_always_first(monkeypatch):
    watch = Watch(monkeypatch, 3, a=1.0, b=1.0)
    watch.fastest()
    first, second = ["call", "a", "call", "b"], ["call", "b", "call", "a"]
    assert watch.did == ["round", *first, "round", *second, "round", *first]


def test_a_measurement_ends_with_its_time(monkeypatch):
    """After the least number of rounds, however long those took, or fewer in vain."""
    watch = Watch(monkeypatch, 9, a=1.0, b=1.0)
    monkeypatch.setattr(cpu_engines, "ROUNDS", (4, 9))
    monkeypatch.setattr(cpu_engines, "SECONDS", 0.0)
    assert watch.fastest() == "a"
    assert watch.did.count("round") == 4
    watch = Watch(monkeypatch, 9, a=[1.0, 9.0, 9.0, 9.0], b=1.0)
    monkeypatch.setattr(cpu_engines, "ROUNDS", (4, 9))
    assert watch.fastest() is None
    assert watch.did.count("round") == 3  # nothing would come of more


def test_a_real_measurement_runs(monkeypatch, tmp_path):
    """With its own clock, whoever wins; what it finds is what the plan takes and keeps."""
    assert cpu_engines.seconds(lambda: time.sleep(0.01)) >= 0.01
    monkeypatch.setenv("RESFAST_TUNE", "first")
    monkeypatch.setenv("RESFAST_CACHE_DIR", str(tmp_path))
    _forget(monkeypatch)
    found = []
    fastest = cpu_engines.fastest
    monkeypatch.setattr(cpu_engines, "fastest", lambda *a: found.append(fastest(*a)) or found[-1])
    residual = torch.empty(1, 64, 12, 12)
    prepared = CpuEngines(2**40, measuring=True).prepare(_layer(residual=residual))
    assert prepared.kernel == (found[0] or "winograd4")
    assert len(tuning.cpu_tiles().known) == (found[0] is not None)


# ---- what may run


def _layer(x=(1, 64, 12, 12), weight=(64, 64, 3, 3), g=PLAIN, dtype=torch.float32, **options):
    """A layer with random parameters; options: fields of Layer."""
    k = weight[0]
    norm = NormVectors(torch.rand(k) + 0.5, torch.randn(k), torch.randn(k), torch.rand(k) + 0.5, 0)
    layer = Layer(
        torch.empty(x, dtype=dtype),
        (torch.randn(weight) / (weight[1] * weight[2] * weight[3]) ** 0.5).to(dtype),
        None,
        g,
        norm,
        None,
        True,
        False,
        None,
    )
    return layer._replace(**options)


@pytest.mark.parametrize(
    ("layer", "kernels"),
    [
        ({}, ["winograd4", "winograd2", "onednn"]),
        ({"x": (1, 64, 5, 5)}, ["onednn", "winograd4", "winograd2"]),  # too few tiles
        ({"x": (32, 64, 2, 2)}, ["winograd2", "winograd4", "onednn"]),
        ({"weight": (64, 64, 1, 1), "g": POINTWISE}, ["pointwise", "onednn"]),
        ({"g": STRIDED}, ["direct", "winograd2", "onednn"]),  # too few tiles
        ({"x": (1, 64, 28, 28), "g": STRIDED}, ["winograd2", "direct", "onednn"]),
        ({"x": (1, 64, 28, 28), "g": STRIDED._replace(padding=(0, 0))}, ["direct", "onednn"]),
        ({"weight": (64, 32, 3, 3), "g": PLAIN._replace(groups=2)}, ["onednn"]),
        ({"dtype": torch.bfloat16}, ["bf16"]),
    ],
    ids=str,
)
def test_the_kernels_that_run_a_layer_begin_with_the_rules(layer, kernels):
    assert _layer(**layer).kernels() == kernels


@pytest.mark.parametrize("kernel", ["winograd4", "winograd2", "onednn"])
@pytest.mark.parametrize("overwrites", [False, True])
def test_every_kernel_computes_the_layer(kernel, overwrites):
    layer, x = _layer(), nhwc(torch.randn(1, 64, 12, 12))
    residual = nhwc(torch.randn(1, 64, 12, 12))
    exact = nn.functional.conv2d(x.double(), layer.weight.double(), padding=1)
    scale, shift = layer.norm.scale_and_shift(None, x.dtype)
    exact = (exact * scale.view(-1, 1, 1) + shift.view(-1, 1, 1) + residual).relu()
    out = residual if overwrites else None
    y = layer.prepare(kernel)(x, residual, True, out)
    torch.testing.assert_close(y, exact.float(), rtol=1e-4, atol=1e-4)


# ---- the error a kernel makes on what arrives


def _cancelling(mean, n=1, side=16, c=16):
    """Activations around ``mean``, whose average the norm takes away: what is left is exact only
    where sums of the activations are never formed. With the filter that changes nothing.
    """
    layer = _layer((n, c, side, side), (c, c, 3, 3))
    weight = torch.zeros_like(layer.weight)
    weight[range(c), range(c), 1, 1] = 1
    one, zero = torch.ones(c), torch.zeros(c)
    norm = NormVectors(one, zero, torch.full((c,), float(mean)), one, 0.0)
    x = nhwc(mean + torch.randn(n, c, side, side))
    return layer._replace(weight=weight, norm=norm, sample=x)


def _judged(layer):
    """(excess of each Winograd kernel, the kernel that is chosen, why others are not)."""
    judge = Judge(layer.sample, layer.weight, layer.bias, layer.g, layer.norm)
    excess = {tile: judge.excess(layer.prepare(f"winograd{tile}")) for tile in (4, 2)}
    return excess, CpuEngines(0, measuring=True).prepare(layer)


def test_a_kernel_that_errs_too_much_here_gives_way_to_the_next():
    excess, prepared = _judged(_cancelling(0))
    assert max(excess.values()) <= 1
    assert (prepared.kernel, prepared.declined) == (
        "winograd4",
        {"winograd2, onednn": "winograd4 is faster here, or expected to be"},
    )
    excess, prepared = _judged(_cancelling(7))
    assert excess[2] <= 1 < excess[4]
    assert prepared.kernel == "winograd2"
    assert (
        prepared.declined["winograd4"] == f"its error here is {excess[4]:.2g} times the allowed one"
    )
    excess, prepared = _judged(_cancelling(100))
    assert min(excess.values()) > 1
    assert prepared.kernel == "onednn"
    assert list(prepared.declined) == ["winograd4", "winograd2"]


def test_the_layers_error_is_what_the_verdict_says():
    """Against float64, in units of the criterion's allowance, which stock's four paths set."""
    layer = _cancelling(100, side=12)
    x = layer.sample
    judge = Judge(x, layer.weight, None, PLAIN, layer.norm)
    exact = x.double() - 100
    assert torch.equal(judge.exact, exact)
    error = layer.prepare("winograd4")(x, None, False) - exact
    # stock's paths are exact here up to the norm, as is the criterion's floor of eight roundings
    floor = 8 * 2**-24
    ratios = (
        error.square().mean().sqrt() / (floor * exact.square().mean().sqrt()),
        error.abs().max() / (floor * exact.abs().max()),
    )
    assert judge.limit >= floor * exact.square().mean().sqrt()
    assert judge.excess(layer.prepare("winograd4")) == pytest.approx(float(max(ratios)), rel=1e-6)


@pytest.mark.parametrize("spoiled", ["one value", "one channel", "nan"])
def test_one_bad_value_or_channel_is_too_much(spoiled):
    layer = _layer(sample=nhwc(torch.randn(1, 64, 12, 12).relu()))
    judge = Judge(layer.sample, layer.weight, layer.bias, layer.g, layer.norm)
    good = layer.prepare("winograd4")
    assert judge.excess(good) <= 1

    def bad(x, residual, relu, out=None):
        y = good(x, residual, relu)
        if spoiled == "one channel":
            y[:, 3] *= 1.001
        else:  # an RMSE over so many would not show it
            y[0, 3, 5, 5] += float("nan") if spoiled == "nan" else 2 * judge.largest_limit
        return y

    assert judge.excess(bad) > 1


def test_bias_and_missing_vectors_count():
    """The reference has them as the kernels have."""
    for gamma, bias in ((None, torch.randn(64).half().double()), (torch.rand(64), None)):
        given = None if bias is None else bias.float()
        layer = _layer(bias=given, sample=nhwc(torch.randn(1, 64, 12, 12)))
        layer = layer._replace(norm=layer.norm._replace(weight=gamma, bias=gamma, eps=1e-3))
        judge = Judge(layer.sample, layer.weight, layer.bias, layer.g, layer.norm)
        assert judge.excess(layer.prepare("winograd2")) <= 1
        z = nn.functional.conv2d(layer.sample.double(), layer.weight.double(), bias, padding=1)
        scale, shift = layer.norm.scale_and_shift(None, torch.float64)
        exact = z * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        torch.testing.assert_close(judge.exact, exact)


def test_activations_that_are_not_finite_say_nothing():
    layer = _cancelling(100)
    layer.sample[0, 0, 3, 3] = float("inf")
    excess, prepared = _judged(layer)
    assert excess == {4: 0, 2: 0}
    assert prepared.kernel == "winograd4"


def test_the_sample_holds_the_largest_activations():
    x = torch.rand(5, 16, 40, 30)
    x[3, 7, 39, 2] = -50
    x[1, 2, 5, 5] = 20
    cut = window(x, 64)
    assert torch.equal(cut, x[3:4, :, 24:, :16])
    assert cut.is_contiguous(memory_format=torch.channels_last)
    assert window(x, 4).shape == (2, 16, 16, 16)  # 2048 values of an output
    assert torch.equal(window(x, 4)[1], x[1, :, 24:, :16])
    small = x[:, :, :3, :5]
    assert torch.equal(window(small, 64)[0], small[small.amax((1, 2, 3)).argmax()])
    x.zero_()
    assert cut.min() == -50


# ---- plans


class Race:
    """``fastest`` that favours ``winner``; ``raced``: who took part, race by race."""

    def __init__(self, monkeypatch):
        self.winner, self.raced = None, []
        monkeypatch.setattr(cpu_engines, "fastest", self)

    def __call__(self, calls, before_round, before_call):
        before_round()
        for call in calls.values():
            before_call()
            y = call()
            assert y.isfinite().all()
        self.raced.append(list(calls))
        return self.winner if self.winner in calls else next(iter(calls))


@pytest.fixture
def race(monkeypatch, tmp_path):
    monkeypatch.setenv("RESFAST_TUNE", "first")
    monkeypatch.setenv("RESFAST_CACHE_DIR", str(tmp_path))
    _forget(monkeypatch)
    return Race(monkeypatch)


def _forget(monkeypatch):
    """What a new process does not know: all but the file."""
    monkeypatch.setattr(tuning, "cpu_tiles", functools.cache(tuning.cpu_tiles.__wrapped__))
    monkeypatch.setattr(tuning, "_measured", set())


def _network():
    """Convolutions 7×7, 3×3 and 1×1, with residuals that are overwritten and one that is not."""
    torch.manual_seed(0)
    net = resfast.ResNet(resfast.Bottleneck, [2, 1, 1, 1], num_classes=5).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return net


def _images(n=1):
    return nhwc(torch.randn(n, 3, 96, 96))


def _kernels(optimized, x):
    """Of the plan's convolutions in turn, as ``explain`` has them."""
    rows = resfast.explain(optimized, x).rows
    return [r.backends["conv_fprop"].removesuffix("+epilogue") for r in rows]


# of its 20 convolutions 2 are 3×3 of stride 1 and 3 of stride 2, the first of those large enough
@pytest.mark.parametrize(
    ("winner", "counts"),
    [
        (None, {"winograd4": 2, "winograd2": 1, "direct": 3, "pointwise": 14}),
        ("winograd4", {"winograd4": 2, "winograd2": 1, "direct": 3, "pointwise": 14}),
        ("winograd2", {"winograd2": 5, "direct": 1, "pointwise": 14}),
        ("direct", {"winograd4": 2, "direct": 4, "pointwise": 14}),
        ("onednn", {"onednn": 20}),
    ],
)
def test_the_winner_runs_and_computes_what_the_model_does(race, winner, counts):
    race.winner = winner
    model, x = _network(), _images()
    optimized = resfast.optimize_for_inference(model)
    y = optimized(x)
    with torch.no_grad():
        torch.testing.assert_close(y, model(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(optimized(x), y, rtol=0, atol=0)
    assert collections.Counter(_kernels(optimized, x)) == counts


def test_a_size_is_measured_once_and_remembered(race, monkeypatch, tmp_path):
    race.winner = "winograd2"
    model, x = _network(), _images()
    kernels = _kernels(resfast.optimize_for_inference(model), x)
    sizes = len(race.raced)
    assert 0 < sizes < 19  # layers of a size share a measurement
    resfast.optimize_for_inference(model)(x)
    assert len(race.raced) == sizes
    (path,) = tmp_path.glob("*.json")
    assert path.name == tuning.file_name(cpu_name())
    record = json.loads(path.read_text())
    assert record["versions"] == tuning.cpu_tiles().versions
    assert len(record["tiles"]) == sizes

    _forget(monkeypatch)
    monkeypatch.setenv("RESFAST_TUNE", "never")
    assert _kernels(resfast.optimize_for_inference(model), x) == kernels
    assert len(race.raced) == sizes
    with tuning.retuning():
        resfast.optimize_for_inference(model)(x)
    assert len(race.raced) == 2 * sizes


def test_never_keeps_the_rule(race, monkeypatch, tmp_path):
    race.winner = "onednn"
    monkeypatch.setenv("RESFAST_TUNE", "never")
    model, x = _network(), _images()
    assert "winograd4" in _kernels(resfast.optimize_for_inference(model), x)
    assert race.raced == []
    assert not list(tmp_path.iterdir())


def test_what_a_busy_machine_measures_is_not_remembered(race, monkeypatch, tmp_path):
    layer = _layer()
    monkeypatch.setattr(cpu_engines, "fastest", lambda *args: race.raced.append(args))
    for plan in (1, 2):
        engines = CpuEngines(0, measuring=True)
        for _ in range(3):
            assert engines.prepare(layer).kernel == "winograd4"
        assert len(race.raced) == plan
    assert not list(tmp_path.iterdir())


def test_what_tells_sizes_apart(race):
    """All that a time depends on; not the weights' values."""

    def raced(layer, traffic=0):
        before = len(race.raced)
        CpuEngines(traffic, measuring=True).prepare(layer)
        return len(race.raced) - before

    layer = _layer()
    residual = torch.empty(1, 64, 12, 12)
    assert raced(layer) == 1
    assert raced(_layer()) == 0
    assert raced(layer._replace(residual=residual)) == 1
    assert raced(layer._replace(residual=residual, overwrites=True)) == 1
    assert raced(layer, traffic=last_cache() + 1) == 1
    assert raced(_layer((2, 64, 12, 12))) == 1
    assert raced(_layer(weight=(32, 64, 3, 3))) == 1
    assert raced(_layer(weight=(64, 64, 1, 1), g=POINTWISE)) == 1
    assert raced(_layer(weight=(64, 64, 1, 1), g=POINTWISE._replace(stride=(2, 2)))) == 1
    assert raced(_layer(g=STRIDED)) == 1
    assert raced(_layer(weight=(64, 32, 3, 3), g=PLAIN._replace(groups=2))) == 0  # no choice
    assert raced(_cancelling(7, side=12)) == 1
    assert race.raced[-1] == ["winograd2", "onednn"]
    assert raced(_cancelling(0, side=12)) == 1  # the same size, where all may run
    torch.set_num_threads(2)
    assert raced(layer) == 1
    torch.set_num_threads(1)


def test_each_instruction_set_is_measured(race, isa):
    CpuEngines(0, measuring=True).prepare(_layer())
    (key,) = tuning.cpu_tiles().known
    assert f" {isa} " in key


def test_weights_are_out_of_the_caches_where_a_call_moves_more(race, monkeypatch):
    reads = []
    total = torch.Tensor.sum
    monkeypatch.setattr(
        torch.Tensor, "sum", lambda t, *args: reads.append(t.nbytes) or total(t, *args)
    )
    monkeypatch.setattr(cpu_engines, "last_cache", lambda: 2**20)
    CpuEngines(2**20, measuring=True).prepare(_layer())
    assert reads == []
    engines = CpuEngines(2**20 + 1, measuring=True)
    engines.prepare(_layer())
    engines.prepare(_layer((2, 64, 12, 12)))
    assert reads == [2**21, 2**21]


def test_copies_of_the_weights_take_turns(race, monkeypatch):
    """The one of the plan is none of them: its weights stay where they are."""
    made, ran = [], []
    prepare = cpu_engines.prepare_convolution

    def noted(*args):
        run, number = prepare(*args), len(made)
        made.append(args[-1])

        def numbered(*args):
            ran.append(number)
            return run(*args)

        return numbered

    monkeypatch.setattr(cpu_engines, "prepare_convolution", noted)
    monkeypatch.setattr(
        cpu_engines, "fastest", lambda calls, *_: [calls["pointwise"]() for _ in range(4)] and None
    )
    layer = _layer(weight=(64, 64, 1, 1), g=POINTWISE)
    prepared = CpuEngines(0, measuring=True).prepare(layer)
    assert made == ["pointwise"] * 3 + [None] * 3 + ["pointwise"]
    assert ran == [0, 3, 0, 1, 2, 0]  # the first runs once ahead
    prepared.run(nhwc(torch.ones(1, 64, 2, 2)), None, True)
    assert ran[-1] == 6


def test_a_plan_knows_what_its_calls_move(race):
    """At least the parameters and every result of a convolution."""
    model, x = _network(), _images()
    seen = []
    init = CpuEngines.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            CpuEngines,
            "__init__",
            lambda self, traffic, measuring: seen.append(traffic) or init(self, traffic, measuring),
        )
        resfast.optimize_for_inference(model)(x)
    parameters = sum(p.nbytes for p in model.parameters())
    stem = 64 * 48 * 48 * 4
    assert parameters + stem < seen[0] < parameters + 30 * stem


def test_what_arrives_in_the_plans_first_call_is_judged(race):
    """Not what a random input would give: the norm takes away a mean that only this input has."""
    layer = _cancelling(100)
    block = ConvBNAct.make(16, 16).eval()
    with torch.no_grad():
        block.conv.weight.copy_(layer.weight)
        block.bn.running_mean.fill_(100)
    for x, kernel in ((layer.sample, "onednn"), (layer.sample - 100, "winograd4")):
        optimized = resfast.optimize_for_inference(block)
        y = optimized(x)
        assert _kernels(optimized, x) == [kernel]
        exact = (x.double() - 100) / (1 + block.bn.eps) ** 0.5
        assert (y - exact.relu()).abs().max() <= 1e-4
    report = str(resfast.explain(resfast.optimize_for_inference(block), layer.sample))
    assert "winograd4: its error here is " in report
    assert "times the allowed one" in report


def test_a_pooled_convolution_is_chosen_for_its_piece(race, monkeypatch):
    from resfast.backends import packed_pool

    monkeypatch.setattr(packed_pool, "_PIECE_BYTES", 16 * 24 * 24 * 4 * 2)
    race.winner = "winograd2"
    model = nn.Sequential(ConvBNAct.make(16, 16), nn.MaxPool2d(3, 2, 1)).eval()
    x = nhwc(torch.randn(5, 16, 24, 24))
    optimized = resfast.optimize_for_inference(model)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-4)
    (key,) = tuning.cpu_tiles().known
    assert "2x16x24x24" in key
    assert _kernels(optimized, x) == ["winograd2"]  # once a call, not once a piece


def test_modules_and_training_keep_the_rule(race):
    """Whatever was measured for plans."""
    model, x = _network(), _images()
    with torch.no_grad():
        before = model(x)
        race.winner = "onednn"
        optimized = resfast.optimize_for_inference(model)
        assert not torch.equal(optimized(x), before)
        assert torch.equal(model(x), before)


def test_traced_and_fake_inputs_measure_and_judge_nothing(race, monkeypatch):
    def judged(*args):
        raise AssertionError("judged")

    monkeypatch.setattr(cpu_engines, "Judge", judged)
    block, x = ConvBNAct.make(16, 16).eval(), nhwc(torch.randn(1, 16, 24, 24))
    exported = torch.export.export(resfast.optimize_for_inference(block), (x,)).module()
    assert race.raced == []
    with pytest.raises(AssertionError, match="judged"):
        resfast.optimize_for_inference(block)(x)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), block(x), rtol=1e-4, atol=1e-4)


def test_threads_that_plan_at_once_measure_a_size_once(race, monkeypatch):
    """One after the other, since they would disturb each other."""
    together, measuring, chosen = threading.Barrier(4), threading.Lock(), []
    measure = CpuEngines._race

    def alone(*args):
        assert measuring.acquire(blocking=False)
        time.sleep(0.01)
        result = measure(*args)
        measuring.release()
        return result

    monkeypatch.setattr(CpuEngines, "_race", alone)
    race.winner = "winograd2"
    sizes = [(1, 64, 12, 12), (1, 64, 16, 16)]

    def work(size):
        torch.set_num_threads(1)
        layer = _layer(size)
        together.wait()
        chosen.append(CpuEngines(0, measuring=True).prepare(layer).kernel)

    threads = [threading.Thread(target=work, args=(size,)) for size in sizes * 2]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert chosen == ["winograd2"] * 4
    assert len(race.raced) == 2

"""Whose norms run, where two backends can: the faster one, once it was measured.

On a CPU that stands in for a device, with PyTorch's own norms under both names.
"""

from __future__ import annotations

import needs
import pretended
import pytest
import torch

import resfast
from resfast.backends import norm_race, select, tuning
from resfast.backends.eager import EagerBackend
from resfast.backends.interface import nhwc
from resfast.backends.triton import TritonBackend
from resfast.ops import NormParams, bn_act, bn_act_max_pool

FORWARD = ("norm_stats", "norm_apply")
BACKWARD = ("norm_backward_reduce", "norm_backward_apply")


class Timed(EagerBackend):
    """Norms whose time is told: of each function, and of both at once where ``once``."""

    def __init__(self, name, watch):
        self.name, self.watch, self.once, self.refusal = name, watch, False, None

    def unavailable_reason(self):
        return self.refusal

    def reads_once(self, z):
        return self.once

    def norm_forward(self, z, weight, bias, eps, residual, relu, add_after_act, mask):
        self.watch.tell(f"{self.name} forward once")
        mean, m2 = super().norm_stats(z)
        var = m2 / (z.numel() // z.shape[1])
        affine, _ = self.norm_prepare(mean, var, weight, bias, eps)
        y = super().norm_apply(z, affine, residual, None, relu, add_after_act, None, mask)
        return y, mean, var


def told(function):
    def run(self, z, *args):
        self.watch.tell(f"{self.name} {function}")
        return getattr(EagerBackend, function)(self, z, *args)

    return run


POOL = ("norm_apply_max_pool", "norm_max_pool_backward_reduce", "norm_max_pool_backward_apply")
for name in (*FORWARD, *BACKWARD, *POOL):
    setattr(Timed, name, told(name))


class Race(dict):
    """The two backends by name; ``watch`` has the time of each function, equal at first."""

    watch: pretended.Stopwatch

    def faster(self, name, *functions):
        for function in functions:
            self.watch.milliseconds[f"{name} {function}"] = 0.1

    def measured(self):
        """What was measured since the last call."""
        seen, self.watch.told = self.watch.told, []
        return {entry.split(" ", 1)[1] for entry in seen}


@pytest.fixture
def race(monkeypatch, tmp_path):
    monkeypatch.delenv("RESFAST_TUNE", raising=False)
    watch = pretended.Stopwatch(monkeypatch, {})
    race = Race((name, Timed(name, watch)) for name in ("triton", "cuda"))
    race.watch = watch
    functions = (*FORWARD, *BACKWARD, *POOL, "forward once")
    watch.milliseconds.update((f"{n} {f}", 1.0) for n in race for f in functions)
    pretended.device(monkeypatch, tmp_path, *race.values())
    return race


def found(function, shape=(2, 8, 4, 4), dtype=torch.float32, window=None):
    return select.find(function, torch.zeros(shape, dtype=dtype), window)[0].name


@pytest.mark.parametrize("passes", [FORWARD, BACKWARD])
def test_the_faster_backend_runs_the_whole_pass(race, passes):
    """Also what it is slower at, if it is faster in sum; the other pass stays where it was."""
    race.faster("cuda", passes[1])
    race.watch.milliseconds[f"cuda {passes[0]}"] = 1.5
    for function in (*FORWARD, *BACKWARD):
        assert found(function) == ("cuda" if function in passes else "triton")
    assert race.measured() == {*FORWARD, *BACKWARD}


def test_a_size_is_measured_once_and_remembered(race, monkeypatch):
    race.faster("cuda", *FORWARD)
    assert found("norm_apply") == "cuda"
    assert race.measured() == set(FORWARD)
    for _ in range(3):
        assert found("norm_stats") == found("norm_apply") == "cuda"
    assert not race.measured()
    for other in ({"shape": (2, 8, 4, 5)}, {"dtype": torch.bfloat16}):
        assert found("norm_apply", **other) == "cuda"
        assert race.measured() == set(FORWARD)
    # a new process reads the file
    pretended.forget(monkeypatch)
    assert found("norm_apply") == "cuda"
    assert not race.measured()
    assert tuning.tiles_of("").known["norm_forward bfloat16 2x8x4x4 cuda/triton"] == [0]


def test_what_is_known_costs_one_lookup(race, monkeypatch):
    found("norm_apply")

    def fail(*args):
        raise AssertionError("asked again")

    for name in ("choose_name", "choose", "tiles_of", "mode", "measures", "_name"):
        monkeypatch.setattr(tuning, name, fail)
    monkeypatch.setattr(race["cuda"], "declines", fail)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", fail)
    found("norm_apply")


@pytest.mark.parametrize("once", [("triton", "cuda"), ("cuda",), ()])
def test_a_pass_in_one_read_is_measured_as_it_runs(race, once):
    for name in once:
        race[name].once = True
    race.faster("cuda", "forward once")
    race.faster("triton", "norm_apply")
    assert found("norm_apply") == ("cuda" if once else "triton")
    expected = set(FORWARD) if len(once) < 2 else set()
    assert race.measured() == expected | ({"forward once"} if once else set())


def test_a_max_pool_behind_is_measured_by_itself(race):
    window = (3, 2, 1)
    race.faster("cuda", *FORWARD, *BACKWARD)
    race.faster("triton", *POOL)
    for function in ("norm_apply", "norm_backward_reduce", "norm_backward_apply"):
        assert found(function) == "cuda"
        assert found(function, window=window) == "triton"
    race.faster("triton", *FORWARD, *BACKWARD)
    for name in POOL:
        race.watch.milliseconds[f"cuda {name}"] = 0.01
    assert found("norm_apply", window=(2, 2, 0)) == "cuda"


def test_retuning_measures_anew_also_what_is_known(race, monkeypatch):
    assert found("norm_apply") == "triton"
    race.faster("cuda", *FORWARD)
    pretended.forget(monkeypatch)
    assert found("norm_apply") == "triton"
    with tuning.retuning():
        assert found("norm_apply") == "cuda"
        race.measured()
        assert found("norm_apply") == "cuda"
        assert not race.measured(), "once is enough"
    assert found("norm_apply") == "cuda"


def test_never_takes_what_is_remembered_alone(race, monkeypatch):
    race.faster("cuda", *FORWARD)
    assert found("norm_apply") == "cuda"
    pretended.forget(monkeypatch)
    monkeypatch.setenv("RESFAST_TUNE", "never")
    race.measured()
    assert found("norm_apply") == "cuda"
    assert found("norm_apply", (2, 8, 5, 5)) == "triton"
    assert not race.measured()


def test_nothing_is_measured_while_a_graph_is_captured_and_later_it_is(race, monkeypatch):
    race.faster("cuda", *FORWARD)
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert found("norm_apply") == "triton"
        assert not race.measured()
    assert found("norm_apply") == "cuda"


def test_a_forced_backend_runs_and_measures_nothing(race):
    race.faster("cuda", *FORWARD)
    with resfast.backend("triton"):
        assert found("norm_apply") == "triton"
    race.faster("triton", *FORWARD)
    with resfast.backend("cuda"):
        assert found("norm_apply") == "cuda"
    assert not race.measured()


@pytest.mark.parametrize("why", ["unavailable", "declines", "absent"])
def test_without_a_rival_nothing_is_measured(race, monkeypatch, why):
    race.faster("cuda", *FORWARD)
    if why == "unavailable":
        race["cuda"].refusal = "not built"
    elif why == "declines":
        monkeypatch.setattr(race["cuda"], "declines", lambda function, z: "no kernel")
    else:
        del select._BACKENDS["cuda"]
    assert found("norm_apply") == "triton"
    assert not race.measured()


def test_vectors_empty_batches_and_convolutions_are_not_measured(race):
    race.faster("cuda", *FORWARD, *BACKWARD)
    assert found("norm_apply", (8,)) == "triton"
    assert found("norm_apply", (0, 8, 4, 4)) == "triton"
    assert found("conv_fprop") == "triton"
    assert race.watch.runs == 0


def test_one_that_fails_leaves_the_other_and_none_the_first(race, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(race["triton"], "norm_stats", fail)
    assert found("norm_apply") == "cuda"
    monkeypatch.setattr(race["cuda"], "norm_stats", fail)
    assert found("norm_apply", (2, 8, 5, 5)) == "triton"


def test_ops_run_by_the_winner_and_say_why(race):
    """Forward here and backward there; the gradients are those of one backend."""
    race.faster("cuda", *BACKWARD)
    z = torch.randn(2, 8, 6, 5)

    def run(op):
        x = z.clone().requires_grad_()
        y = op(x, NormParams(None, None, torch.zeros(8), torch.ones(8), None, True))
        y.square().sum().backward()
        return y, x.grad

    seen: list[select.Choice] = []
    with select.listen(seen.append):
        got = run(bn_act)
    assert [(c.function, c.backend) for c in seen] == [
        *((f, "triton") for f in FORWARD),
        *((f, "cuda") for f in BACKWARD),
    ]
    assert seen[-1].declined == {"triton": "cuda was measured to be faster"}
    with resfast.backend("eager"):
        for a, b in zip(got, run(bn_act), strict=True):
            assert torch.equal(a, b)

    race.faster("cuda", POOL[0])
    race.faster("triton", *BACKWARD)
    seen.clear()
    with select.listen(seen.append):
        run(bn_act_max_pool)
    assert [c.backend for c in seen] == ["triton", "cuda", "triton", "triton"]


@pytest.mark.parametrize("race", norm_race._SETUPS, ids=str)
@pytest.mark.parametrize("reads_once", [True, False])
def test_what_races_is_tritons_own_pass(monkeypatch, race, reads_once):
    pytest.importorskip("triton")
    backend = TritonBackend()
    monkeypatch.setattr(TritonBackend, "reads_once", lambda self, z: reads_once)
    z = torch.randn(2, 8, 5, 4, device="cuda" if torch.cuda.is_available() else "cpu")
    norm_race._SETUPS[race](nhwc(z), (3, 2, 1) if race[1] else (), backend)(backend)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@needs.cuda_library
def test_a_race_on_a_device(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setenv("RESFAST_CACHE_DIR", str(tmp_path))
    tiles = tuning.Tiles(pretended.GPU, {})
    monkeypatch.setattr(tuning, "tiles_of", lambda device: tiles)
    monkeypatch.setattr(norm_race, "_known", {})
    z = nhwc(torch.randn(8, 64, 28, 28, device="cuda"))
    for function in (*FORWARD, *BACKWARD):
        for window in (None, (3, 2, 1)):
            assert select.find(function, z, window)[0].name in ("triton", "cuda")
    assert len(tiles.known) == 4


def test_tune_lets_backends_race_and_counts(race, monkeypatch, capsys):
    from resfast.benchmark.tune import tune

    class Work:
        """A model that is one norm."""

        device = "cuda"

        def build(self):
            return None

        def batches(self):
            return None

        def contender(self, *args):
            return self

        def step(self):
            found("norm_apply"), found("norm_backward_apply")

    race.faster("cuda", *BACKWARD)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: pretended.GPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    tuning.tiles_of("").remember("conv_fprop own", [1])
    tuning.tiles_of("").remember("conv_fprop", [64, 64, 32, 4, 3])
    assert tune(Work(), ["b", "c"]) == 0
    printed = capsys.readouterr().out
    assert "1 tiles of Pretended GPU" in printed
    assert "faster: 1 of 1 passes" in printed
    assert "norms faster in CUDA C++ than in Triton: 1 of 2 passes" in printed

"""What `resfast train` does to a batch and a step beside the plain ones: options of the regime."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from interrupted import fit_in_two, losses_of
from torch import nn
from trainers import tiny_net, trainer_for

from resfast.training import loop
from resfast.training.checkpoint import BEST, CheckpointFolder, NonFiniteError, load
from resfast.training.config import OptionError, TrainConfig, UserError
from resfast.training.loop import Trainer, TrainStep, learning_rate
from resfast.training.mix import Mix

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
timm = pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="LARS is timm's")


def _net() -> nn.Module:
    return tiny_net(6, padding=1)


def _trainer(folder=None, **options) -> Trainer:
    config = TrainConfig(**{"epochs": 2, "seed": 3, "lr": 1e-2, "batch_size": 128, **options})
    return trainer_for(config, _net, folder)


def _linear_step(**options) -> tuple[TrainStep, nn.Module, torch.Tensor, torch.Tensor]:
    """In float64, without norms: a step's gradient is then that of the mean over all images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    step = TrainStep(model, TrainConfig(optimizer="sgd", lr=0.1, **options), CPU)
    step.forward = model
    return step, model, torch.randn(10, 1, 8, 8).double(), torch.arange(10)


def _first_gradient(**options) -> tuple[torch.Tensor, float]:
    """Read off the weight's change: SGD's first step is lr·(1 + momentum)·gradient."""
    step, model, inputs, labels = _linear_step(**options)
    before = model[1].weight.detach().clone()
    loss, _ = step(inputs, labels)
    return (before - model[1].weight.detach()) / (0.1 * 1.9), float(loss)


# ---- one step


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_accumulated_parts_have_the_whole_batchs_gradient(parts):
    (whole, loss), (sum_of_parts, summed) = _first_gradient(), _first_gradient(accumulate=parts)
    torch.testing.assert_close(sum_of_parts, whole)
    assert summed == pytest.approx(loss)


def test_no_part_is_a_single_image():
    """BatchNorm cannot train on one: 10 images in 4 parts are 3, 3, 2, 2."""
    step, _, inputs, labels = _linear_step(accumulate=4, batch_size=10)
    sizes = []
    step.forward = lambda x: (sizes.append(len(x)), step.model(x))[1]
    step(inputs, labels)
    assert sizes == [3, 3, 2, 2]


def test_l1_counts_once_however_many_parts():
    (whole, _), (in_parts, _) = _first_gradient(l1=0.1), _first_gradient(l1=0.1, accumulate=3)
    torch.testing.assert_close(in_parts, whole)


def test_clipping_bounds_the_norm_and_keeps_the_direction():
    _, model, inputs, labels = _linear_step()
    F.cross_entropy(model(inputs), labels).backward()
    norm = math.hypot(*(float(p.grad.norm()) for p in model.parameters()))
    free, _ = _first_gradient(clip=2 * norm)
    bare, _ = _first_gradient()
    torch.testing.assert_close(free, bare)
    clipped, _ = _first_gradient(clip=norm / 4)
    torch.testing.assert_close(clipped, bare / 4, rtol=1e-5, atol=1e-9)


def test_label_smoothing_spreads_the_target():
    step, model, inputs, labels = _linear_step(label_smoothing=0.3)
    target = 0.7 * F.one_hot(labels, 10) + 0.03
    expected = -(target * model(inputs).log_softmax(1)).sum(1).mean().detach()
    assert float(step(inputs, labels)[0]) == pytest.approx(float(expected))


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("name", ["AdamW", pytest.param("Lars", marks=timm)])
def test_weight_decay_spares_biases_and_norms_unless_asked(name, decay_all):
    trainer = _trainer(l2=0.5, decay_all=decay_all, optimizer=name.lower())
    optimizer = trainer.train_step.optimizer
    assert type(optimizer).__name__ == name
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    found = {name: decay[id(p)] for name, p in trainer.model.named_parameters()}
    rest = 0.5 if decay_all else 0.0
    assert found == {
        "0.weight": 0.5,
        "1.weight": rest,
        "1.bias": rest,
        "6.weight": 0.5,
        "6.bias": rest,
    }


@timm
@pytest.mark.parametrize(("l2", "decay_all"), [(0.0, False), (0.2, False), (0.2, True)])
def test_lars_adapts_the_step_of_each_weight_to_its_norm(l2, decay_all):
    """v ← 0.9·v + λ·(g + l2·w), w ← w − lr·v, λ = 0.001·‖w‖/(‖g‖ + l2·‖w‖) (arXiv:1708.03888).

    Of biases and norms λ is 1, as of SGD, unless they decay.
    """
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 4, 3, bias=False)
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10)).double()
    nn.init.uniform_(model[1].bias)
    step = TrainStep(model, TrainConfig(optimizer="lars", l2=l2, decay_all=decay_all), CPU)
    step.forward = model  # the step's own forward returns float32
    inputs, labels = torch.randn(8, 1, 8, 8).double(), torch.arange(8)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = dict.fromkeys(expected, 0.0)
    for lr in (3.0, 2.0):
        model.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        for name, parameter in model.named_parameters():
            w, g = expected[name], parameter.grad.clone()
            if decay_all or name in ("0.weight", "3.weight"):
                g = (g + l2 * w) * 0.001 * w.norm() / (g.norm() + l2 * w.norm())
            moved[name] = 0.9 * moved[name] + g
            expected[name] = w - lr * moved[name]
        step.set_lr(lr)
        step(inputs, labels)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-9)


def test_lars_without_timm_is_one_line_before_anything_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(UserError, match=r"^--optimizer lars needs timm: pip install timm \(.*\)$"):
        TrainConfig(optimizer="lars").validate()


def test_the_network_may_be_compiled(monkeypatch):
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m: plain(m, backend="aot_eager"))
    losses = []
    for options in ({}, {"compile": True}):
        trainer = _trainer(epochs=1, **options)
        trainer.progress = lambda step, loss: losses.append(loss)
        trainer.fit()
        assert (trainer.train_step.network is trainer.model) == (not options)
        assert "0.weight" in trainer.description()["model"]
    half = len(losses) // 2
    assert losses[:half] == pytest.approx(losses[half:], rel=1e-3)


def test_warm_up_takes_the_share_asked_for():
    rates = [learning_rate(step, 200, 1.0, 0.25) for step in range(200)]
    assert rates.index(max(rates)) == 49
    trainer, rows = _trainer(warmup=0.5, epochs=2), []
    trainer.record = rows.append
    trainer.fit()
    (rate,) = [row["lr"] for row in rows if row["kind"] == "step"]
    assert trainer.total_steps == 18
    assert rate == learning_rate(9, 18, 1e-2, 0.5)


# ---- non-finite values


def _poison(trainer: Trainer, steps: set[int]) -> None:
    original = trainer.batch

    def batch(indices):
        inputs, labels = original(indices)
        return (inputs * float("nan") if trainer.step in steps else inputs), labels

    trainer.batch = batch


def test_a_bad_step_is_skipped_counted_and_leaves_no_trace(tmp_path):
    trainer, rows = _trainer(tmp_path, epochs=2), []
    trainer.record = rows.append
    _poison(trainer, {2, 3, 11})
    trainer.fit()
    assert trainer.skipped == 3
    assert [row["step"] for row in rows if row["kind"] == "skip"] == [3, 4, 12]
    assert [row["skipped"] for row in rows if row["kind"] == "epoch"] == [2, 3]
    state, _ = CheckpointFolder(tmp_path).load_latest()
    resumed = _trainer(epochs=2)
    resumed.load_state_dict(state)
    assert resumed.skipped == 3
    assert all(torch.isfinite(v).all() for v in state["model"].values())


def test_more_bad_steps_in_a_row_than_allowed_stop_the_run():
    trainer = _trainer(max_skipped=2)
    _poison(trainer, {4, 5, 6})
    with pytest.raises(NonFiniteError, match="step 7, epoch 1"):
        trainer.fit()
    assert trainer.skipped == 2


def test_bad_steps_with_good_ones_between_do_not_add_up():
    trainer = _trainer(max_skipped=1)
    _poison(trainer, {4, 6, 8})
    trainer.fit()
    assert trainer.skipped == 3


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_step_leaves_weights_and_statistics_alone(where):
    model = _net()
    step = TrainStep(model, TrainConfig(optimizer="sgd"), CPU)
    inputs, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    if where == "loss":
        inputs[3, 0, 0, 0] = math.inf
    else:
        model[0].weight.register_hook(lambda g: g * math.inf)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match="loss" if where == "loss" else "gradient"):
        step(inputs, labels)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# ---- mixed batches


def _mixed(mixup, cutmix, batch=0):
    inputs = torch.arange(1, 9).float()[:, None, None, None].expand(8, 3, 12, 10).contiguous()
    labels, mix = torch.arange(8), Mix(mixup, cutmix, 8, seed=5)
    return inputs, labels, *mix(inputs, labels, mix.share(labels, 8, 0, batch), 0, batch)


def test_mixup_mixes_images_and_targets_alike():
    inputs, labels, mixed, targets = _mixed(0.4, 0)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    # each image has its label + 1 for a value, so the targets tell the mixture
    expected = targets @ torch.arange(1, 9).float()
    torch.testing.assert_close(mixed, expected[:, None, None, None].expand_as(mixed))
    assert not torch.equal(mixed, inputs)
    assert torch.equal(inputs[:, 0, 0, 0], labels + 1.0), "the batch itself is left alone"


def test_cutmix_pastes_a_box_of_the_share_in_the_targets():
    shares = set()
    for batch in range(20):
        inputs, labels, mixed, targets = _mixed(0, 1.0, batch)
        kept = (mixed == inputs).float().mean((1, 2, 3))
        own = targets[torch.arange(8), labels]
        torch.testing.assert_close(kept, own)
        changed = (mixed != inputs).any(1).any(0)
        rows, columns = changed.any(1).sum(), changed.any(0).sum()
        assert changed.sum() == rows * columns, "one box, the same for all"
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        shares.add(round(float(own.min()), 3))
    assert len(shares) > 10


def test_both_take_turns_and_repeat():
    kinds = set()
    for batch in range(12):
        _, _, mixed, targets = _mixed(0.4, 1.0, batch)
        again = _mixed(0.4, 1.0, batch)
        assert torch.equal(mixed, again[2])
        assert torch.equal(targets, again[3])
        kinds.add(bool((mixed == mixed.round()).all()))
    assert kinds == {True, False}


def test_without_either_nothing_changes():
    inputs, labels, mixed, targets = _mixed(0, 0)
    assert mixed is inputs
    assert targets is labels


# ---- averaged weights, growing images


def test_average_follows_the_weights_and_is_what_is_judged_and_kept(tmp_path):
    trainer = _trainer(tmp_path, epochs=1, ema=0.4)
    expected = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    step = trainer.train_step

    def stepped(*args):
        out = step(*args)
        n = trainer.step + 1
        decay = 0 if n == 1 else min(0.4, n / (n + 9))
        for name, value in trainer.model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value.clone()
        return out

    for name in ("set_lr", "forward", "optimizer", "scaler"):
        setattr(stepped, name, getattr(step, name))
    trainer.train_step = stepped
    trainer.fit()
    kept = load(tmp_path / BEST)["model"]
    for name, value in expected.items():
        torch.testing.assert_close(kept[name], value, msg=name)
    assert not torch.equal(kept["0.weight"], trainer.model[0].weight)
    other = _trainer(epochs=1)
    other.model.load_state_dict(kept)
    assert other.evaluate(trainer.data.test) == trainer.evaluate(trainer.data.test)


def test_the_average_soon_forgets_where_training_began():
    """Fresh statistics are far from a trained network's; a fixed decay would keep 63 % of them."""
    trainer = _trainer(epochs=5, ema=0.99)
    trainer.fit()
    averaged = trainer.evaluate(trainer.data.validation)
    trainer.average = None
    assert averaged.loss < 1.2 * trainer.evaluate(trainer.data.validation).loss


def test_images_grow_to_their_side_in_two_thirds_of_the_epochs():
    trainer = _trainer(start_size=0.5, epochs=6)
    sizes = []
    for _ in range(6):
        inputs, _ = trainer.batch(torch.arange(4))
        sizes.append(tuple(inputs.shape[2:]))
        trainer.sampler.next_epoch()
    assert sizes == [(4, 4), (5, 5), (6, 6), (7, 7), (8, 8), (8, 8)]


EVERYTHING = {
    "l2": 1e-3,
    "accumulate": 2,
    "clip": 1.0,
    "label_smoothing": 0.1,
    "mixup": 0.2,
    "cutmix": 1.0,
    "ema": 0.9,
    "start_size": 0.75,
}


@pytest.mark.parametrize(
    ("optimizer", "stop_after"),
    [("adamw", 3), ("adamw", 9), ("adamw", 12), pytest.param("lars", 9, marks=timm)],
)
def test_resumed_run_repeats_the_uninterrupted_one_with_every_option(
    tmp_path, optimizer, stop_after
):
    options = {**EVERYTHING, "optimizer": optimizer}
    expected: list = []
    whole = losses_of(_trainer(**options), expected)
    whole.fit()
    first = _trainer(tmp_path, **options)
    resumed, losses = fit_in_two(first, lambda: _trainer(**options), tmp_path, stop_after)
    assert losses == expected
    for part in ("model", "average"):
        ours, theirs = (getattr(t, part).state_dict() for t in (resumed, whole))
        assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_deterministic_mode_is_switched_on(tmp_path, monkeypatch):
    from resfast.training.run import train

    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(loop.Trainer, "fit", lambda self: self._finish_epoch())
    options = {"epochs": 1, "deterministic": True}
    with pytest.raises(NonFiniteError, match="no step of the epoch"):
        train(options, out=tmp_path / "run", comparison=False, quiet=True)
    assert asked == [True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "--accumulate must be at least 1"),
        ({"accumulate": 40}, "fewer than two of 64 images"),
        ({"clip": -1.0}, "--clip must be a finite number"),
        ({"mixup": math.inf}, "--mixup must be"),
        ({"cutmix": -0.1}, "--cutmix must be"),
        ({"label_smoothing": 1.0}, r"--label-smoothing must lie in \[0, 1\)"),
        ({"ema": 1.5}, "--ema must lie"),
        ({"warmup": -0.1}, "--warmup must lie"),
        ({"start_size": 0.0}, "--start-size must lie"),
        ({"max_skipped": -1}, "--max-skipped must be at least 0"),
        ({"optimizer": "lion"}, "--optimizer must be one of"),
    ],
)
def test_options_that_cannot_work_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        TrainConfig(**options).validate()

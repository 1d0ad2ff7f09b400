"""`resfast train` in two processes: one run, whoever computes it, and whoever dies."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from interrupted import StopAfter
from needs import gloo
from ranks import (
    Checks,
    every,
    latest_checkpoint,
    ranks_here,
    run_checks,
    shared_folder,
    train_on_two,
)
from torch import nn
from trainers import trainer_for

import resfast
from resfast import cli
from resfast.nn import ConvBNAct
from resfast.testing import FLOOR_ULPS, SINGLE_FACTOR
from resfast.training import run
from resfast.training.checkpoint import CheckpointFolder, NonFiniteError
from resfast.training.config import OptionError, TrainConfig, UserError
from resfast.training.distributed import Ranks, job, join
from resfast.training.loop import Stopped, Trainer, TrainStep
from resfast.training.model import create_for

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="`resfast train` draws curves")
pytestmark = [gloo, pytest.mark.usefixtures("one_thread")]

CPU = torch.device("cpu")
on_ranks = Checks()


def equal_on_all(state: dict) -> bool:
    states = every(state)
    return all(torch.equal(v, other[k]) for other in states for k, v in states[0].items())


def make_net() -> nn.Module:
    return nn.Sequential(
        ConvBNAct.make(1, 6),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


def make_trainer(folder: Path | None = None, ranks: Ranks | None = None, **options) -> Trainer:
    config = TrainConfig(**{"epochs": 1, "seed": 3, "lr": 1e-2, "batch_size": 128, **options})
    return trainer_for(config, make_net, folder, ranks or ranks_here())


def recorded(trainer: Trainer) -> list:
    rows: list = []
    trainer.record = rows.append
    return rows


# ---- one step, in float64: there a wrong share of anything stands out from rounding


def own_step(step: TrainStep, *batch: torch.Tensor) -> torch.Tensor:
    """The loss of a step on this rank's rows of the batch."""
    own = [torch.cat(step.ranks.rows(each, step.parts)) for each in batch]
    return step(*own, len(batch[0]))[0]


def check_equals_one_process(**options) -> None:
    """Weights and statistics after 4 steps on batches of 22, against the same on this rank alone.

    Each part has 7 or 8 images, so that ranks and parts are uneven.
    """
    config = TrainConfig(batch_size=22, optimizer="sgd", lr=0.05, sync_bn=True, **options)
    torch.manual_seed(0)
    one = create_for("resnet8", (1, 8, 8), 10).double()
    steps = [
        TrainStep(model, config, CPU, ranks)
        for model, ranks in ((one, Ranks()), (copy.deepcopy(one), ranks_here()))
    ]
    for step in steps:
        step.forward = step.network  # the step's own returns float32
    for _ in range(4):
        inputs, targets = torch.randn(22, 1, 8, 8).double(), torch.rand(22, 10).double().softmax(1)
        losses = [float(own_step(step, inputs, targets)) for step in steps]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(
            steps[1].model.state_dict()[name], value, rtol=1e-9, atol=1e-12, msg=name
        )


@on_ranks
def a_step_is_that_of_one_process():
    check_equals_one_process()


@on_ranks
def a_step_with_every_option_is_that_of_one_process():
    check_equals_one_process(accumulate=3, clip=0.5, l1=1e-3, l2=1e-2, label_smoothing=0.1)


@on_ranks
def gradients_travel_once_however_many_parts():
    config = TrainConfig(batch_size=16, accumulate=4)
    step = TrainStep(make_net(), config, CPU, ranks_here())
    sent = []

    def hook(state, bucket):
        sent.append(bucket.index())
        summed = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return summed.then(lambda future: future.value()[0])

    step.parallel.register_comm_hook(None, hook)
    own_step(step, torch.randn(16, 1, 8, 8), torch.arange(16) % 10)
    assert sent == [0]


# ---- a run


@on_ranks
def ranks_end_alike_without_synchronised_norms():
    """Each has statistics of its own on the way, averaged ones too."""
    trainer = make_trainer(ema=0.9, mixup=0.2, epochs=2)
    rows = recorded(trainer)
    trainer.fit()
    assert equal_on_all(trainer.model.state_dict())
    assert equal_on_all(trainer.average.state_dict())
    shared = trainer.evaluate(trainer.data.validation)
    trainer.ranks = Ranks()
    alone = trainer.evaluate(trainer.data.validation)
    assert (shared.correct, shared.images) == (alone.correct, alone.images)
    assert shared.loss == pytest.approx(alone.loss)
    times = ("seconds", "images_per_second", "waiting_share")
    timeless = [{k: v for k, v in row.items() if k not in times} for row in rows]
    assert all(other == timeless for other in every(timeless))


@on_ranks
def lower_precision_and_compiled_networks_train():
    plain, losses = torch.compile, {}
    torch.compile = lambda m: plain(m, backend="aot_eager")
    try:
        for name, options in {
            "float32": {},
            "compiled": {"compile": True, "sync_bn": True, "accumulate": 2},
            "bfloat16": {"dtype": "bfloat16"},
            "float16": {"dtype": "float16", "clip": 1.0},
        }.items():
            trainer = make_trainer(**options)
            rows = recorded(trainer)
            trainer.fit()
            assert equal_on_all(trainer.model.state_dict()), name
            losses[name] = rows[-1]["train_loss"]
    finally:
        torch.compile = plain
    assert losses == pytest.approx(dict.fromkeys(losses, losses["float32"]), rel=0.1)


@on_ranks
def a_bad_part_of_one_rank_is_skipped_by_all():
    """In the second of two parts: the first's gradients then wait for a sum that does not come."""
    trainer = make_trainer(accumulate=2, max_skipped=2)
    rows, original = recorded(trainer), trainer.batch

    def batch(indices):
        inputs, labels = original(indices)
        if dist.get_rank() == 1 and trainer.step in (2, 3, 6):
            inputs[-1] = math.nan
        return inputs, labels

    trainer.batch = batch
    trainer.fit()
    assert [row["step"] for row in rows if row["kind"] == "skip"] == [3, 4, 7]
    assert trainer.skipped == 3
    assert equal_on_all(trainer.model.state_dict())


@on_ranks
def a_bad_gradient_of_one_rank_is_skipped_by_all():
    trainer = make_trainer()
    rows = recorded(trainer)
    if dist.get_rank() == 1:
        trainer.model[-1].weight.register_hook(
            lambda g: g * (math.inf if trainer.step == 4 else 1.0)
        )
    trainer.fit()
    assert [row["step"] for row in rows if row["kind"] == "skip"] == [5]
    assert equal_on_all(trainer.model.state_dict())


@on_ranks
def too_many_bad_steps_end_the_run_on_all():
    trainer = make_trainer(max_skipped=0)
    if dist.get_rank() == 1:
        trainer.batch = lambda indices, original=trainer.batch: (
            original(indices)[0] * math.nan,
            original(indices)[1],
        )
    with pytest.raises(NonFiniteError, match="step 1, epoch 1"):
        trainer.fit()


@on_ranks
def a_signal_to_one_rank_stops_all_and_the_run_goes_on_bit_for_bit():
    """Dropout too: its random numbers are others on each rank, and the same after a resume."""
    whole = make_trainer(epochs=2)
    whole.fit()
    folder = shared_folder()
    first = make_trainer(folder, epochs=2)
    if dist.get_rank() == 1:
        first.stop = StopAfter(first, 5)
    with pytest.raises(Stopped, match="SIGTERM"):
        first.fit()
    assert every(first.step) == [5, 5]
    assert every(first.last_checkpoint) == [folder / "checkpoint-00000005.pt", None]
    assert len(set(every(float(torch.rand(()))))) == 2
    state = latest_checkpoint(folder)
    torch.manual_seed(99)
    second = make_trainer(epochs=2)
    second.load_state_dict(state)
    second.fit()
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


@on_ranks
def what_fails_on_one_rank_fails_on_all_and_is_told_once():
    ranks = ranks_here()

    def fail(ranks_that_do: set[int], error: Exception) -> None:
        with ranks.together():
            if ranks.rank in ranks_that_do:
                raise error

    with pytest.raises(OptionError if ranks.rank == 1 else SystemExit) as one:
        fail({1}, OptionError("--data is missing"))
    with pytest.raises(UserError if ranks.rank == 0 else SystemExit) as both:
        fail({0, 1}, UserError("the same for all"))
    expected = ["2", "the same for all"], ["rank 1: --data is missing", "1"]
    assert [str(one.value), str(both.value)] == expected[ranks.rank]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_checks(on_ranks, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [check.__name__ for check in on_ranks])
def test_on_two_ranks(outcomes, name):
    assert outcomes[name] == ["", ""], "\n".join(outcomes[name])


# ---- the command

SHORT = ["--epochs", "2", "--image-size", "4", "--optimizer", "sgd", "--lr", "0.02", "--seed", "1"]


def torchrun(folder: Path, *options: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    return train_on_two(*SHORT, "--sync-bn", *options, "--out", str(folder), fault=fault)


def read_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def accuracy(folder: Path) -> list[float]:
    rows = [row for row in read_rows(folder) if row["kind"] == "epoch"]
    return [row[name] for row in rows for name in ("train_accuracy", "validation_accuracy")]


def curve(folder: Path) -> list[float]:
    """Losses of single steps and of epochs, in training and validation, in the order written."""
    rows = [row for row in read_rows(folder) if row["kind"] in ("step", "epoch")]
    names = ("loss", "train_loss", "validation_loss")
    return [row[name] for row in rows for name in names if name in row]


def final_state(folder: Path) -> dict:
    return CheckpointFolder(folder).load_latest()[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun") / "run"
    return folder, torchrun(folder)


def nudged(seed: int):
    """Like `create_for`, with weights that are rounded otherwise: by up to 2⁻²³ of their size."""

    def create(*arguments) -> nn.Module:
        model = create_for(*arguments)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + 2.0**-23 * (2 * torch.rand(weight.shape, generator=generator) - 1))
        return model

    return create


def test_two_ranks_give_the_curve_of_one_process(whole, tmp_path, monkeypatch):
    """As near as one process is to itself when it rounds otherwise, in its kernels or at first."""
    folder, done = whole
    assert done.returncode == 0, done.stderr
    curves = []
    for name, backend, create in (
        ("default", nullcontext(), create_for),
        ("eager", resfast.backend("eager"), create_for),
        # at a kink, runs part into a few branches: enough of them to meet each
        *((f"nudged {seed}", nullcontext(), nudged(seed)) for seed in range(1, 17)),
    ):
        monkeypatch.setattr(run, "create_for", create)
        out = tmp_path / name
        with backend:
            command = ["train", *SHORT, "--quiet", "--no-compare", "--out", str(out)]
            assert cli.main(command) == 0
        curves.append(torch.tensor(curve(out), dtype=torch.float64))
    alone, ours = torch.stack(curves), torch.tensor(curve(folder), dtype=torch.float64)
    # differences grow from step to step, so the band never narrows
    band = (alone.amax(0) - alone.amin(0)).cummax(0).values
    allowed = SINGLE_FACTOR * band + FLOOR_ULPS * 2.0**-24 * alone[0]
    distance = (alone - ours).abs().amin(0)
    assert ours[-1] < 0.5 * ours[0], "it does not learn"
    assert (distance <= allowed).all(), f"distance {distance}\nallowed {allowed}"
    assert allowed.max() < 0.05, f"a band so wide proves nothing: {allowed}"
    # an image or two of 179 may change sides
    assert accuracy(folder) == pytest.approx(accuracy(tmp_path / "default"), abs=2.5 / 179)


def test_one_rank_alone_writes_and_prints(whole):
    folder, done = whole
    assert done.stdout.count("test accuracy") == 1
    for line in ("resnet8 on digits", "epoch 2/2"):
        assert done.stderr.count(line) == 1
    names = {p.name for p in folder.iterdir()}
    assert {"metrics.json", "metrics.jsonl", "curve.png", "best.pt"} <= names
    rows = read_rows(folder)
    assert [row["ranks"] for row in rows if row["kind"] == "start"] == [2]
    assert [row["step"] for row in rows if row["kind"] == "step"] == [10, 20, 30]
    assert json.loads((folder / "metrics.json").read_text())["comparison"] is None


def test_a_killed_rank_costs_the_steps_since_the_checkpoint_only(whole, tmp_path):
    folder = tmp_path / "run"
    done = torchrun(folder, "--save-every", "6", fault="SIGKILL 1 15")
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    assert [row["step"] for row in read_rows(folder) if row["kind"] == "resume"] == [12]
    assert curve(folder) == curve(whole[0])
    ours, expected = final_state(folder), final_state(whole[0])
    assert ours["step"] == expected["step"] == 38
    assert all(torch.equal(v, expected["model"][k]) for k, v in ours["model"].items())


def test_a_signal_to_one_process_stops_the_run_which_one_alone_can_end(whole, tmp_path):
    folder = tmp_path / "run"
    done = torchrun(folder, fault="SIGTERM 1 15")
    assert done.returncode == 1
    assert re.search(r"exitcode\s*: 143", done.stderr), done.stderr
    assert done.stderr.count(f"go on with: resfast train --resume {folder}") == 1
    assert final_state(folder)["step"] == 15
    assert cli.main(["train", "--resume", str(folder), "--quiet", "--no-compare"]) == 0
    assert [row["ranks"] for row in read_rows(folder) if "ranks" in row] == [2, 1]
    # rounding apart, whose size the test of the whole curve knows
    assert curve(folder) == pytest.approx(curve(whole[0]), rel=0.02)


def test_an_option_that_cannot_work_is_told_once(tmp_path):
    done = torchrun(tmp_path / "run", "--batch-size", "5000")
    assert done.returncode == 1
    assert done.stderr.count("resfast train: error:") == 1
    assert "--batch-size 5000 is more than the 1259 training images" in done.stderr
    assert re.search(r"exitcode\s*: 2", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


# ---- whose run it is


@pytest.fixture
def launched(monkeypatch):
    """As in the only worker of a torchrun, started again once."""
    for name, value in {
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "1",
        "WORLD_SIZE": "1",
        "RANK": "0",
    }.items():
        monkeypatch.setenv(name, value)


def test_a_folder_of_another_job_is_refused_after_a_restart_too(launched, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    for row in ({"kind": "start", "job": f"{job()}0"}, {"kind": "start"}, ["no row"]):
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        assert cli.main(["train", "--out", str(folder)]) == 2
        assert "is there and not empty" in capsys.readouterr().err


def test_a_job_killed_before_its_first_checkpoint_begins_anew(launched, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    begun = {"kind": "start", "job": job(), "date": "2026-01-01"}
    rows = [begun, {"kind": "step", "step": 10, "loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / ".checkpoint-00000019.pt.77.tmp").write_bytes(b"half")
    command = ["train", "--epochs", "1", "--image-size", "4", "--quiet", "--no-compare"]
    assert cli.main([*command, "--out", str(folder)]) == 0
    kinds = [row["kind"] for row in read_rows(folder)]
    assert kinds == ["start", "start", "step", "epoch"]
    assert not list(folder.glob(".*"))


def test_one_process_of_torchrun_is_no_group(launched):
    assert join() == Ranks(0, 1)
    assert job() is not None


def test_there_is_no_job_without_torchrun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert job() is None
    assert not run._is_of_this_job(Path("anywhere"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 7}, "--batch-size 7 leaves 1 image.* 4 ranks.* need 2, or --sync-bn"),
        ({"batch_size": 20, "accumulate": 3}, "--batch-size 20 in 3 parts leaves 1 image"),
        ({"batch_size": 3, "sync_bn": True}, r"leaves 0 image\(s\) to one of 4 ranks"),
    ],
)
def test_too_few_images_for_the_ranks(options, message):
    Ranks().check(TrainConfig(**options))
    Ranks(0, 4).check(TrainConfig(batch_size=4, sync_bn=True))
    Ranks(0, 4).check(TrainConfig(batch_size=24, accumulate=3))
    with pytest.raises(OptionError, match=message):
        Ranks(0, 4).check(TrainConfig(**options))


def test_a_single_gpu_for_all_ranks_is_refused(monkeypatch):
    from resfast.training import distributed

    monkeypatch.setattr(distributed, "resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Ranks(1, 2).device("cuda") == torch.device("cuda", 1)
    assert Ranks(1, 2).device("cpu") == CPU
    with pytest.raises(OptionError, match="--device cuda:0 is one GPU for 2 ranks"):
        Ranks(1, 2).device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(OptionError, match="more ranks on this machine than its 2 GPUs"):
        Ranks(2, 3).device("cuda")

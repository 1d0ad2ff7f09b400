"""resfast.training: data, loop, checkpoints. On the CPU, in one thread."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from interrupted import COMMAND, StopAfter, running
from torch import nn
from trainers import tiny_net, trainer_for

from resfast.training import checkpoint as ckpt
from resfast.training import data as data_module
from resfast.training.checkpoint import CheckpointError, CheckpointFolder, NonFiniteError
from resfast.training.config import OptionError, TrainConfig, UserError
from resfast.training.data import Augment, SeededSampler, load_dataset, stratified_split
from resfast.training.loop import Stopped, StopSignals, Trainer, TrainStep, learning_rate
from resfast.training.report import Recorder, binomial_interval

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def make_trainer(folder: Path | None = None, *, losses: list | None = None, **options) -> Trainer:
    config = TrainConfig(**{"epochs": 2, "seed": 3, "lr": 1e-2, **options})
    trainer = trainer_for(config, lambda: tiny_net(8, padding=1), folder)
    if losses is not None:
        trainer.progress = lambda step, loss: losses.append((step, loss))
    return trainer


# Data


def test_split_is_disjoint_complete_stratified_and_seeded():
    labels = torch.arange(1000) % 7
    parts = stratified_split(labels, [0.2, 0.1], seed=1)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1000))
    for part, share in zip(parts, (0.2, 0.1, 0.7), strict=True):
        counts = labels[part].bincount(minlength=7)
        assert (counts - share * 1000 / 7).abs().max() <= 1.5
    again = stratified_split(labels, [0.2, 0.1], seed=1)
    other = stratified_split(labels, [0.2, 0.1], seed=2)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not torch.equal(parts[0], other[0])


def test_digits_are_all_there_once_and_normalised_by_the_training_part():
    data = load_dataset(TrainConfig())
    assert sum(data.sizes().values()) == 1797
    assert data.sizes()["test"] >= 350
    everything = torch.cat([p.pixels.flatten(1) for p in (data.train, data.validation, data.test)])
    assert len(everything.unique(dim=0)) == 1797
    inputs = data.normalise(data.train.pixels)
    assert abs(inputs.mean()) < 1e-4
    assert abs(inputs.std() - 1) < 1e-3


def test_fingerprint_changes_with_the_split_and_with_one_label():
    data = load_dataset(TrainConfig(seed=0))
    before = data.fingerprint()
    assert before == load_dataset(TrainConfig(seed=0)).fingerprint()
    assert before != load_dataset(TrainConfig(seed=1)).fingerprint()
    data.test.labels[0] = (data.test.labels[0] + 1) % 10
    assert before != data.fingerprint()


def test_sampler_hands_out_each_index_at_most_once_and_continues_where_it_was():
    whole = SeededSampler(103, 10, seed=5)
    batches = list(whole)
    assert len(batches) == 10
    assert len(torch.cat(batches).unique()) == 100
    first = SeededSampler(103, 10, seed=5)
    for _ in range(4):
        next(iter(first))
    second = SeededSampler(103, 10, seed=5)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(second, batches[4:], strict=True))
    whole.next_epoch()
    assert not torch.equal(torch.cat(list(whole)), torch.cat(batches))


def test_sampler_refuses_a_batch_larger_than_the_set_and_another_sets_state():
    with pytest.raises(OptionError, match=r"--batch-size 20 .* 10 training images"):
        SeededSampler(10, 20, seed=0)
    sampler = SeededSampler(10, 2, seed=0)
    with pytest.raises(UserError, match="another number of images"):
        sampler.load_state_dict(SeededSampler(12, 2, seed=0).state_dict())


def test_augment_shifts_by_whole_pixels_within_bounds_and_repeats():
    image = torch.zeros(64, 1, 8, 8)
    image[:, :, 4, 4] = 1
    out = Augment(2, False, seed=0)(image, 0, 0, torch.arange(64), 64)
    assert out.shape == image.shape
    assert torch.equal(out.sum((1, 2, 3)), torch.ones(64))
    rows, columns = out.nonzero()[:, 2:].T
    assert set(rows.tolist()) == set(columns.tolist()) == {2, 3, 4, 5, 6}
    assert torch.equal(out, Augment(2, False, seed=0)(image, 0, 0, torch.arange(64), 64))
    assert not torch.equal(out, Augment(2, False, seed=0)(image, 0, 1, torch.arange(64), 64))


def test_augment_mirrors_some_images_only():
    image = torch.rand(64, 3, 4, 4)
    out = Augment(0, True, seed=0)(image, 0, 0, torch.arange(64), 64)
    same = (out == image).flatten(1).all(1)
    mirrored = (out == image.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 16 <= mirrored.sum() <= 48


def test_some_rows_are_augmented_as_in_the_whole_batch():
    """What a rank of several asks for."""
    trainer = make_trainer(shift=2, flip=True)
    indices, rows = trainer.sampler.rest()[0], torch.tensor([40, 3, 17, 18])
    pixels, labels = trainer.feed.batch(indices, 0, 1)
    some, few = trainer.feed.batch(indices, 0, 1, rows)
    assert torch.equal(some, pixels[rows])
    assert torch.equal(few, labels[rows])


def write_image_tree(root: Path, count: int = 6, split: tuple[str, ...] = ("train", "test")):
    image_module = pytest.importorskip("PIL.Image")
    for number, part in enumerate(split):
        for label, name in enumerate(("cat", "dog", "owl")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                colour = (80 * label, 10 * i, 100 * number)
                image_module.new("RGB", (12, 10), colour).save(root / part / name / f"{i}.png")


def test_folder_with_train_and_test_keeps_them_apart(tmp_path):
    write_image_tree(tmp_path)
    data = load_dataset(TrainConfig(data=str(tmp_path)))
    assert data.classes == ["cat", "dog", "owl"]
    assert data.image_shape == (3, 10, 12)
    assert data.sizes() == {"train": 15, "validation": 3, "test": 18}
    assert data.train.pixels[:, 2].unique().tolist() == [0]
    assert data.test.pixels[:, 2].unique().tolist() == [100]
    assert torch.equal(data.test.pixels[:, 0, 0, 0].long(), 80 * data.test.labels)
    resized = load_dataset(TrainConfig(data=str(tmp_path), image_size=6))
    assert resized.image_shape == (3, 6, 6)


@pytest.mark.parametrize("side", [12, 64])
def test_small_files_are_read_by_one_thread_and_large_ones_by_several(tmp_path, monkeypatch, side):
    image_module = pytest.importorskip("PIL.Image")
    noise = torch.randint(0, 256, (30, side, side, 3), dtype=torch.uint8)
    for i, pixels in enumerate(noise):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        image = image_module.frombytes("RGB", (side, side), pixels.numpy().tobytes())
        image.save(tmp_path / "ab"[i % 2] / f"{i:02}.png")
    threads, read = set(), data_module.read_image

    def noted(path, channels, size):
        if size is not None:
            threads.add(threading.get_ident())
        return read(path, channels, size)

    monkeypatch.setattr(data_module, "read_image", noted)
    data = load_dataset(TrainConfig(data=str(tmp_path)))
    assert (threads == {threading.get_ident()}) is (side == 12)
    parts = (data.train, data.validation, data.test)
    found = {image.numpy().tobytes() for part in parts for image in part.pixels}
    assert found == {image.permute(2, 0, 1).contiguous().numpy().tobytes() for image in noise}


@pytest.mark.parametrize("break_it", ["missing class", "not an image", "no classes"])
def test_folder_that_cannot_be_used_says_why(tmp_path, break_it):
    write_image_tree(tmp_path)
    if break_it == "missing class":
        for file in (tmp_path / "test" / "owl").iterdir():
            file.unlink()
        (tmp_path / "test" / "owl").rmdir()
        expected = "different classes.*owl"
    elif break_it == "not an image":
        (tmp_path / "train" / "cat" / "0.png").write_bytes(b"no image")
        expected = "cannot read image .*0.png"
    else:
        tmp_path = tmp_path / "train" / "cat"
        expected = "find any class folder"
    with pytest.raises(UserError, match=expected):
        load_dataset(TrainConfig(data=str(tmp_path)))


@pytest.mark.parametrize("whole", [True, False])
def test_bad_images_fail_or_are_skipped_by_name(tmp_path, whole):
    """The first of all, which gives the size, among them."""
    write_image_tree(tmp_path, split=("train", "test") if whole else ("",))
    root = tmp_path / "train" if whole else tmp_path
    (root / "cat" / "0.png").write_bytes(b"no image")
    (root / "dog" / "3.png").write_bytes((root / "dog" / "4.png").read_bytes()[:50])
    with pytest.raises(UserError, match="cannot read image"):
        load_dataset(TrainConfig(data=str(tmp_path)))
    with pytest.warns(UserWarning, match=r"left out: .*3\.png"):
        data = load_dataset(TrainConfig(data=str(tmp_path), bad_files="skip"))
    assert data.skipped == 2
    assert sum(data.sizes().values()) == (34 if whole else 16)
    assert data.image_shape == (3, 10, 12)


def test_a_decompression_bomb_is_refused(tmp_path):
    """A file of few bytes whose header promises more pixels than anybody's photograph has."""
    import zlib

    write_image_tree(tmp_path)
    header = (30000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + check

    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    png += chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    for side in (30000, 10000):  # more than Pillow refuses by itself, more than it warns of
        size = side.to_bytes(4, "big") * 2
        (tmp_path / "train" / "cat" / "1.png").write_bytes(
            png.replace(chunk(b"IHDR", header), chunk(b"IHDR", size + header[8:]))
        )
        with pytest.raises(UserError, match=r"cannot read image .*1\.png.*bomb"):
            load_dataset(TrainConfig(data=str(tmp_path)))


def test_images_beside_sounds_are_refused(tmp_path):
    write_image_tree(tmp_path, split=("",))
    (tmp_path / "owl" / "hoot.wav").write_bytes(b"")
    with pytest.raises(UserError, match="both images and sounds"):
        load_dataset(TrainConfig(data=str(tmp_path)))


# Loop


def test_one_epoch_lowers_the_loss():
    trainer = make_trainer(epochs=1)
    before = trainer.evaluate(trainer.data.validation).loss
    trainer.fit()
    assert trainer.evaluate(trainer.data.validation).loss < 0.8 * before


def test_short_run_reaches_the_threshold_on_images_never_seen():
    from resfast.training.model import create_for

    config = TrainConfig(epochs=8, lr=3e-3, seed=0)
    data = load_dataset(config)
    torch.manual_seed(0)
    trainer = Trainer(create_for("resnet8", data.image_shape, 10), data, config)
    trainer.fit()
    assert trainer.evaluate(data.test).accuracy >= 0.96


def test_learning_rate_warms_up_and_ends_near_zero():
    rates = [learning_rate(step, 200, 1.0) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 1e-3


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (0.03, 0.0), (0.0, 0.2), (0.03, 0.2)])
def test_penalties_change_the_gradient_as_computed_by_hand(l1, l2):
    """SGD's first step is lr·(1 + momentum)·gradient, Nesterov's momentum starting from zero."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10)
    ).double()
    inputs, labels = torch.randn(8, 1, 8, 8).double(), torch.arange(8)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    nn.functional.cross_entropy(model(inputs), labels).backward()
    bare = {k: p.grad.clone() for k, p in model.named_parameters()}

    config = TrainConfig(optimizer="sgd", lr=0.1, l1=l1, l2=l2)
    step = TrainStep(model, config, CPU)
    step.forward = model  # the step's own forward returns float32
    step(inputs, labels)
    for name, parameter in model.named_parameters():
        expected = bare[name]
        if name in ("0.weight", "3.weight"):
            expected = expected + l1 * before[name].sign() + l2 * before[name]
        change = (before[name] - parameter.detach()) / (0.1 * 1.9)
        torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_trains(dtype):
    trainer = make_trainer(epochs=1, dtype=dtype)
    assert trainer.train_step.scaler.is_enabled() == (dtype == "float16")
    before = trainer.evaluate(trainer.data.validation).loss
    trainer.fit()
    assert trainer.evaluate(trainer.data.validation).loss < 0.9 * before


@pytest.mark.parametrize("stop_after", [1, 7, 19, 25, 37])
def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(tmp_path, stop_after):
    """19 steps an epoch: stops inside both epochs, and after the first's last step."""
    expected: list = []
    whole = make_trainer(losses=expected)
    rows: list = []
    whole.record = rows.append
    whole.fit()
    assert len(expected) == 38

    losses: list = []
    first = make_trainer(tmp_path, losses=losses)
    first_rows: list = []
    first.record = first_rows.append
    first.stop = StopAfter(first, stop_after)
    with pytest.raises(Stopped):
        first.fit()
    assert len(losses) == stop_after
    state, _ = CheckpointFolder(tmp_path).load_latest()
    torch.manual_seed(99)
    second = make_trainer(tmp_path, losses=losses)
    second.record = first_rows.append
    second.load_state_dict(state)
    second.fit()
    assert losses == expected
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.model.buffers(), second.model.buffers(), strict=True):
        assert torch.equal(a, b)
    timed = ("seconds", "images_per_second", "waiting_share")
    timeless = [
        [{k: v for k, v in row.items() if k not in timed} for row in part]
        for part in (rows, first_rows)
    ]
    assert timeless[0] == timeless[1]


def test_resume_refuses_other_data(tmp_path):
    trainer = make_trainer(tmp_path, epochs=1)
    trainer.fit()
    state, _ = CheckpointFolder(tmp_path).load_latest()
    other = make_trainer(epochs=1, seed=4)
    with pytest.raises(UserError, match="is not what this run was trained on"):
        other.load_state_dict(state)


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, epochs=3)
    original = trainer.batch

    def poisoned(indices):
        inputs, labels = original(indices)
        return (inputs * float("nan") if trainer.step >= 30 else inputs), labels

    trainer.batch = poisoned
    with pytest.raises(NonFiniteError, match=r"loss became nan .*step 34, epoch 2.*00000019"):
        trainer.fit()
    assert trainer.skipped == 3
    state, path = CheckpointFolder(tmp_path).load_latest()
    assert path.name == "checkpoint-00000019.pt"
    assert all(torch.isfinite(v).all() for v in state["model"].values())


def test_non_finite_statistics_are_never_saved(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model[1].running_var[3] = float("inf")
    with pytest.raises(NonFiniteError, match="running_var holds 1 non-finite"):
        trainer.save()
    assert not list(tmp_path.iterdir())


def test_signals_are_turned_into_a_flag_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


# Checkpoints


@pytest.fixture
def state():
    return {"step": 7, "name": "x", "model": {"w": torch.arange(300.0)}, "rng": (1, [2, None])}


def test_checkpoint_round_trip_is_also_a_plain_torch_file(tmp_path, state):
    path = tmp_path / "a.pt"
    ckpt.save(path, state)
    for loaded in (ckpt.load(path), torch.load(path, weights_only=True)):
        assert torch.equal(loaded["model"]["w"], state["model"]["w"])
        assert {k: v for k, v in loaded.items() if k != "model"} == {
            k: v for k, v in state.items() if k != "model"
        }
    assert zipfile.ZipFile(path).testzip() is None
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_foreign_files_and_missing_files_are_named(tmp_path):
    torch.save({"a": 1}, tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match=r"plain\.pt is damaged: its checksum is missing"):
        ckpt.load(tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*none\.pt"):
        ckpt.load(tmp_path / "none.pt")


def test_code_in_a_checkpoint_is_neither_written_nor_run(tmp_path):
    with pytest.raises(TypeError, match=r"state\['hook'\] is a"):
        ckpt.save(tmp_path / "a.pt", {"hook": nn.Linear(1, 1)})
    ckpt.write_atomically(tmp_path / "b.pt", ckpt._with_checksum(pickled_module()))
    with pytest.raises(CheckpointError, match=r"b\.pt cannot be read"):
        ckpt.load(tmp_path / "b.pt")


def pickled_module() -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save(nn.Linear(1, 1), buffer)
    return buffer.getvalue()


def test_folder_keeps_two_and_the_best(tmp_path, state):
    folder = CheckpointFolder(tmp_path)
    folder.save_best(state)
    for step in (9, 10, 100_000_000, 11):
        folder.save(step, state | {"step": step})
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["best.pt", "checkpoint-00000011.pt", "checkpoint-100000000.pt"]
    assert folder.load_latest()[0]["step"] == 100_000_000


def test_trainer_writes_plain_finite_checkpoints(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.fit()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["best.pt", "checkpoint-00000019.pt", "checkpoint-00000038.pt"]
    best = ckpt.load(tmp_path / "best.pt")
    assert "optimizer" not in best
    assert best["best"]["validation_accuracy"] > 0.3


# Metrics


def test_rewind_drops_what_will_be_written_again(tmp_path):
    recorder = Recorder(tmp_path / "metrics.jsonl")
    for row in (
        {"kind": "start"},
        {"kind": "step", "step": 10},
        {"kind": "epoch", "step": 19, "epoch": 1},
        {"kind": "step", "step": 20},
        {"kind": "epoch", "step": 38, "epoch": 2},
    ):
        recorder(row)
    with recorder.path.open("a") as file:
        file.write('{"kind": "st')
    recorder.rewind(step=19, epochs=0)
    rows = [json.loads(line) for line in recorder.path.read_text().splitlines()]
    assert rows == [{"kind": "start"}, {"kind": "step", "step": 10}]


def test_interval_of_a_proportion():
    """Wilson's interval for 8 of 10 by hand: centre (0.8 + 0.19208) / 1.38416."""
    low, high = binomial_interval(8, 10)
    assert (low + high) / 2 == pytest.approx((0.8 + 3.8416 / 20) / 1.38416)
    assert binomial_interval(10, 10)[1] == pytest.approx(1.0)
    assert binomial_interval(10, 10)[0] == pytest.approx(10 / 13.8416)


def test_interrupted_process_leaves_a_usable_checkpoint(tmp_path):
    """SIGINT in the middle of an epoch of a real process: status 130, then a resumed run ends."""
    run = tmp_path / "run"
    with running(run) as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"resfast train --resume {run}" in errors
    assert "Traceback" not in errors
    state, _ = CheckpointFolder(run).load_latest()
    done = state["sampler"]["epoch"]
    resumed = subprocess.run(
        [*COMMAND, "--resume", str(run), "--epochs", str(done + 1)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert resumed.returncode == 0, resumed.stderr
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["training"]["epochs"] == done + 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epochs = [row["epoch"] for row in rows if row["kind"] == "epoch"]
    assert epochs == list(range(1, done + 2))

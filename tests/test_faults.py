"""Nothing is lost: processes killed while they save, full disks, damaged files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import KEEP, state

from resfast import cli
from resfast.training import checkpoint as ckpt
from resfast.training.checkpoint import BEST, CheckpointError, CheckpointFolder, WriteError
from resfast.training.loop import Trainer
from resfast.training.report import Recorder

SEED = 20
KILLS = 50
EPOCHS = 3
STEPS_AN_EPOCH = 14  # 1,400 images
OPTIONS = ["--data", "synthetic", "--image-size", "4", "--shift", "1", "--batch-size", "100"]
OPTIONS += ["--epochs", str(EPOCHS), "--threads", "1"]
FULL = "No space left on device"
pytestmark = pytest.mark.usefixtures("one_thread")


def helper(*arguments: object) -> Any:
    """What tests/killed.py prints, from one process that loads torch once."""
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def steps(folder: Path) -> list[int]:
    """Of all checkpoints kept; each has to be sound and whole."""
    found = []
    for path in CheckpointFolder(folder).paths():
        loaded = ckpt.load(path)
        assert torch.equal(loaded["weights"], state(loaded["step"])["weights"])
        found.append(loaded["step"])
    return found


# Killed


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    return helper("saves", tmp_path_factory.mktemp("saves"), KILLS, SEED)


@pytest.mark.parametrize("where", ["random", "lines", "sizes"])
def test_a_process_killed_while_it_saves_loses_nothing(killed, where):
    """Each had reported at least `KEEP` steps as saved, both as best and as checkpoint."""
    for death in killed[where]:
        folder = CheckpointFolder(Path(death["folder"]), KEEP)
        said = f"seed {SEED}: {death}"
        assert death["signal"] in (signal.SIGKILL, signal.SIGXFSZ), said
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # there is nothing damaged
            loaded, _ = folder.load_latest()
        assert loaded["step"] >= death["reported"] >= KEEP, said
        kept = steps(folder.folder)
        assert len(kept) >= KEEP, said
        assert ckpt.load(folder.folder / BEST)["step"] >= death["reported"], said
        folder.remove_leftovers()
        sound = {f"checkpoint-{step:08d}.pt" for step in kept}
        assert names(folder.folder) == sound | {BEST}, said
        folder.save(loaded["step"] + 1, state(loaded["step"] + 1))
        assert len(steps(folder.folder)) == KEEP, said


def test_the_kills_were_where_they_were_meant_to_be(killed):
    """Else the test above could pass because nobody was killed in the middle of anything."""
    lines = {death["line"] for death in killed["lines"]}
    assert lines >= {
        'with temporary.open("wb") as file:',
        "file.write(data)",
        "file.flush()",
        "os.fsync(file.fileno())",
        "os.replace(temporary, path)",
        "folder = os.open(path.parent, os.O_RDONLY)",
        "os.fsync(folder)",
        "path.unlink(missing_ok=True)",
    }
    assert [death["signal"] for death in killed["sizes"]] == [signal.SIGXFSZ] * 4
    assert len(killed["random"]) == KILLS
    assert len({death["reported"] for death in killed["random"]}) > 1


def test_content_is_on_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    """What a kill cannot show, a power cut would."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        calls.append((source, target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    ckpt.save(tmp_path / "a.pt", state(1))
    temporary = calls[0]
    assert calls == [temporary, (temporary, tmp_path / "a.pt"), tmp_path]


def rows(folder: Path) -> list[dict[str, Any]]:
    """What was logged, without times; of runs, only that they are."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept = [row for row in map(json.loads, lines) if row["kind"] not in ("start", "resume")]
    times = ("seconds", "images_per_second", "waiting_share")
    return [{k: v for k, v in row.items() if k not in times} for row in kept]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(ours: Path, other: Path) -> None:
    """Losses, weights, optimizer, best, test accuracy: bit for bit; and no rubbish."""
    assert rows(ours) == rows(other)
    for file in (f"checkpoint-{EPOCHS * STEPS_AN_EPOCH:08d}.pt", BEST):
        left, right = (ckpt.load(folder / file) for folder in (ours, other))
        for loaded in (left, right):
            for times in (loaded, loaded.get("totals", {})):
                for name in ("seconds", "waited"):
                    times.pop(name, None)
            loaded.get("rng", {}).pop("python", None)  # nothing draws from it or seeds it
        assert same(left, right)
    tests = [json.loads((f / "metrics.json").read_text())["test"] for f in (ours, other)]
    assert tests[0] == tests[1]
    assert names(ours) == names(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[Path]]:
    """An uninterrupted run, and two that were killed at random steps and resumed."""
    pytest.importorskip("matplotlib", reason="`resfast train` draws curves")
    root = tmp_path_factory.mktemp("runs")
    last = EPOCHS * STEPS_AN_EPOCH - 1
    at = random.Random(SEED).sample(range(STEPS_AN_EPOCH, last), 2)
    runs = helper("train", root, *at, "--", *OPTIONS)
    assert [run["signal"] for run in runs] == [None, signal.SIGKILL, signal.SIGKILL]
    whole, *resumed = (Path(run["folder"]) for run in runs)
    return whole, resumed


def test_a_run_killed_at_any_step_and_resumed_is_the_uninterrupted_one(whole):
    for resumed in whole[1]:
        assert '"kind": "resume"' in (resumed / "metrics.jsonl").read_text()
        assert_same_run(resumed, whole[0])


# Full disks


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, FULL)


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Files of this process, pytest's too, may not grow beyond so many bytes: writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1, 40_000, "fsync", "replace"])
def test_a_checkpoint_that_does_not_fit_leaves_the_previous_ones_and_no_rubbish(
    tmp_path, monkeypatch, size
):
    folder = CheckpointFolder(tmp_path, KEEP)
    for step in range(1, KEEP + 2):
        folder.save(step, state(step))
    folder.save_best(state(1))
    before = names(tmp_path)
    reason = FULL if isinstance(size, str) else "File too large"
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        if isinstance(size, str):
            patch.setattr(os, size, full)
        else:
            stack.enter_context(file_limit(size))
        with pytest.raises(WriteError, match=rf"cannot write .*checkpoint-00000009\.pt: {reason}"):
            folder.save(9, state(9))
        with pytest.raises(WriteError, match=rf"cannot write .*best\.pt: {reason}"):
            folder.save_best(state(9))
    assert names(tmp_path) == before
    assert steps(tmp_path) == [KEEP + 1, KEEP]
    assert ckpt.load(tmp_path / BEST)["step"] == 1


full_device = pytest.mark.skipif(
    not Path("/dev/full").exists(),
    reason="no /dev/full, where every write finds a full disk: Linux",
)


@full_device
def test_a_row_that_does_not_fit_names_its_file():
    with pytest.raises(WriteError, match=rf"cannot write /dev/full: {FULL}"):
        Recorder(Path("/dev/full"))({"kind": "step"})


def disk_full_for(name: str, monkeypatch: pytest.MonkeyPatch, spared: int) -> None:
    """Files that begin with `name` cannot be written after `spared` times."""
    left = [spared]
    real = os.fsync

    def fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        if target.startswith(f".{name}"):
            left[0] -= 1
            if left[0] < 0:
                full()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.main(["train", "--no-compare", "--quiet", *arguments])
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "spared", "epochs"),
    # the last time the best is written, which then no later epoch makes good
    [(BEST, -1, None), ("checkpoint", 2, 2), ("metrics.json", 0, 3)],
)
def test_a_full_disk_ends_a_run_in_one_line_and_it_goes_on_from_what_is_kept(
    tmp_path, monkeypatch, capsys, whole, name, spared, epochs
):
    """A failure of the best leaves its epoch to be kept by a checkpoint all the same."""
    run = tmp_path / "run"
    if epochs is None:
        scores = [
            (row["validation_accuracy"], -row["validation_loss"])
            for row in rows(whole[0])
            if row["kind"] == "epoch"
        ]
        better = [n for n, score in enumerate(scores, 1) if all(score > s for s in scores[: n - 1])]
        spared, epochs = len(better) - 1, better[-1]
    kept = epochs * STEPS_AN_EPOCH
    with monkeypatch.context() as patch:
        disk_full_for(name, patch, spared)
        status, error = call(capsys, *OPTIONS, "--out", str(run))
    assert status == 1
    assert error.count("\n") == 1, error
    assert f"resfast train: error: cannot write {run}/{name}" in error
    assert f"{FULL}; kept: {run}/checkpoint-{kept:08d}.pt; " in error
    assert f"go on with: resfast train --resume {run}" in error
    assert not [n for n in names(run) if n.endswith(".tmp")]
    assert call(capsys, "--resume", str(run)) == (0, "")
    assert_same_run(run, whole[0])


@full_device
def test_a_log_that_does_not_fit_loses_no_step(tmp_path, monkeypatch, capsys, whole):
    """The log's disk is full from step 18 on, the checkpoints' is not."""
    run = tmp_path / "run"
    log, aside = run / "metrics.jsonl", tmp_path / "aside"
    real = Trainer._log_step

    def fill(trainer: Trainer, loss: torch.Tensor) -> None:
        if trainer.step == 18:
            log.rename(aside)
            log.symlink_to("/dev/full")
        real(trainer, loss)

    monkeypatch.setattr(Trainer, "_log_step", fill)
    status, error = call(capsys, *OPTIONS, "--out", str(run))
    assert (status, error.count("\n")) == (1, 1)
    assert f"cannot write {log}: {FULL}; kept: {run}/checkpoint-00000020.pt" in error
    epoch, kept = (ckpt.load(run / f"checkpoint-000000{step}.pt") for step in (14, 20))
    assert kept["seconds"] > epoch["seconds"]
    monkeypatch.undo()
    log.unlink()
    aside.write_text(aside.read_text() + '{"kind": "step", "st')  # a row that was cut short
    aside.rename(log)
    assert call(capsys, "--resume", str(run)) == (0, "")
    logged = rows(run)
    assert [row.get("step") for row in rows(whole[0]) if row.get("step") != 20] == [
        row.get("step") for row in logged
    ]
    (run / "metrics.jsonl").write_text((whole[0] / "metrics.jsonl").read_text())
    assert_same_run(run, whole[0])


def test_nothing_saved_yet_is_said(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="`resfast train` draws curves")
    monkeypatch.setattr(os, "fsync", full)
    run = tmp_path / "run"
    status, error = call(capsys, *OPTIONS, "--epochs", "1", "--out", str(run))
    assert (status, error.count("\n")) == (1, 1)
    assert f"cannot write {run}/{BEST}: {FULL}; no checkpoint was written yet" in error
    assert names(run) == {"metrics.jsonl"}


# No permission


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder this process, root or not, may read and not write."""
    folder = Path(tempfile.mkdtemp())  # not under tmp_path, which only its owner may enter
    root = os.geteuid() == 0
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o700)
    shutil.rmtree(folder)


def lock(folder: Path) -> None:
    folder.chmod(0o555)
    if os.geteuid() == 0:
        try:
            os.seteuid(65534)
        except OSError as error:
            pytest.skip(f"root writes anywhere, and may not become another user here: {error}")


def test_a_folder_without_permission_is_named_and_left_as_it_is(locked, capsys, whole):
    run = locked / "run"
    shutil.copytree(whole[0], run)
    # with permission first, so that all is imported that another user may not be able to read
    assert call(capsys, "--resume", str(run)) == (0, "")
    (run / ".left.pt.1.tmp").touch()
    before = names(run)
    run.chmod(0o555)
    lock(locked)
    status, error = call(capsys, *OPTIONS, "--out", str(locked / "new"))
    assert (status, error.count("\n")) == (1, 1)
    assert f"cannot write {locked}/new: Permission denied" in error
    status, error = call(capsys, "--resume", str(run), "--epochs", str(EPOCHS + 1))
    assert (status, error.count("\n")) == (1, 1)
    assert f"cannot write {run}/.left.pt.1.tmp: Permission denied; kept: {run}/check" in error
    assert names(run) == before


# Damaged files


@pytest.fixture
def two(tmp_path) -> tuple[CheckpointFolder, Path, bytes]:
    """A folder of two checkpoints, of steps 1 and 2, the newer one and its content."""
    folder = CheckpointFolder(tmp_path)
    small = {"name": "x", "model": {"w": torch.arange(300.0)}, "rng": (1, [2, None])}
    folder.save(1, small | {"step": 1})
    newest = folder.save(2, small | {"step": 2})
    return folder, newest, newest.read_bytes()


def assert_passed_over(folder: CheckpointFolder, damaged: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{damaged} is damaged"):
        ckpt.load(damaged)
    with pytest.warns(UserWarning, match=rf"{damaged} is damaged.*using checkpoint-00000001\.pt"):
        loaded, _ = folder.load_latest()
    assert loaded["step"] == 1


def test_every_flipped_bit_is_detected_and_the_previous_one_used(two):
    folder, newest, good = two
    chance = random.Random(SEED)
    flips = [(position, position % 8) for position in range(0, len(good), 37)]
    flips += [(len(good) - back, back % 8) for back in (1, 79, 80, 81)]
    flips += [(chance.randrange(len(good)), chance.randrange(8)) for _ in range(60)]
    for position, bit in flips:
        bad = bytearray(good)
        bad[position] ^= 1 << bit
        newest.write_bytes(bad)
        assert_passed_over(folder, newest)


def test_every_truncation_is_detected_and_the_previous_one_used(two):
    folder, newest, good = two
    lengths = [0, 1, 21, 22, 78, 79, 80, *range(100, len(good), 97)]
    for length in [*lengths, *(len(good) - back for back in (81, 80, 79, 78, 2, 1))]:
        newest.write_bytes(good[:length])
        assert_passed_over(folder, newest)
    newest.write_bytes(good + b"\0")
    assert_passed_over(folder, newest)


def test_a_damaged_one_is_set_aside_and_neither_comes_first_nor_counts(two):
    folder, newest, good = two
    newest.write_bytes(good[:-200])
    with pytest.warns(UserWarning, match="damaged"):
        _, sound = folder.load_latest()
    folder.set_aside_newer_than(sound)
    assert names(folder.folder) == {"checkpoint-00000001.pt", "checkpoint-00000002.pt.damaged"}
    folder.save(2, state(2))
    assert folder.load_latest()[0]["step"] == 2


def test_all_damaged_or_none_is_an_error(tmp_path):
    folder = CheckpointFolder(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        folder.load_latest()
    folder.save(1, state(1)).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"00000001\.pt is damaged.*no other checkpoint"):
        folder.load_latest()


def test_bad_options_change_nothing_of_a_damaged_run(tmp_path, capsys, whole):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    newest = CheckpointFolder(run).paths()[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    before = names(run)
    with pytest.warns(UserWarning, match="is damaged"):
        status, error = call(capsys, "--resume", str(run), "--lr", "7")
    assert (status, names(run)) == (2, before)
    assert "--lr cannot change" in error

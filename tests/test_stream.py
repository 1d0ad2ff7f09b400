"""Images read from disk at every use: the same batches however they are read, and bad files."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from interrupted import StopAfter, fit_in_two, losses_of, running
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
from trainers import tiny_net, trainer_for

from resfast.training import data as data_module
from resfast.training import stream
from resfast.training.checkpoint import CheckpointFolder
from resfast.training.config import OptionError, TrainConfig, UserError
from resfast.training.data import load_dataset, read_image
from resfast.training.distributed import Ranks
from resfast.training.loop import Score, Stopped, Trainer, UnreadableError
from resfast.training.stream import Crops, _begin_reading, _forking, default_workers

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ("cat", "dog", "owl")
PER_CLASS = 14


@pytest.fixture(scope="module")
def v2():
    return pytest.importorskip("torchvision.transforms.v2", reason="streams through torchvision")


@pytest.fixture
def tree(tmp_path, v2) -> Path:
    pytest.importorskip("PIL.Image", reason="images are read by Pillow")
    return write_tree(tmp_path / "tree")


def write_tree(root: Path) -> Path:
    """train/ and test/ of JPEG and PNG files of all kinds and sizes; each a constant of its own."""
    from PIL import Image as image_module

    modes = (("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"))
    number = 0
    for part, count in (("train", PER_CLASS), ("test", 4)):
        for name in CLASSES:
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                mode, suffix = modes[number % len(modes)]
                size = (20 + number % 7, 24 - number % 5)
                colour = (5 * number % 256, 3 * number % 256, 255 - number)
                image = image_module.new("RGB", size, colour)
                image.paste((255 - number, 0, number), (0, 0, size[0] // 2, size[1] // 2))
                image.convert(mode).save(folder / f"{i:02}.{suffix}")
                number += 1
    return root


def net() -> nn.Module:
    return tiny_net(4, 3, len(CLASSES), stride=2)


def configure(tree: Path, **options) -> TrainConfig:
    plain = {"stream": "on", "workers": 0, "image_size": 16, "batch_size": 8, "epochs": 2}
    return TrainConfig(data=str(tree), **{"seed": 3, "lr": 1e-2, **plain, **options}).validate()


def make_trainer(
    tree: Path, folder: Path | None = None, ranks: Ranks | None = None, **options
) -> Trainer:
    return trainer_for(configure(tree, **options), net, folder, ranks)


def all_batches(trainer: Trainer, epochs: int = 2) -> list[torch.Tensor]:
    found = []
    for _ in range(epochs):
        trainer.feed.expect(trainer.sampler.epoch, trainer.sampler.rest())
        for indices in trainer.sampler:
            found += trainer.batch(indices)
        trainer.sampler.next_epoch()
    return found


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


# ---- batches


def test_batches_are_the_same_with_any_number_of_workers_and_read_ahead_or_not(tree):
    trainer = make_trainer(tree)
    assert len(trainer.data.train) == 3 * (PER_CLASS - round(0.1 * PER_CLASS))
    expected = all_batches(trainer)
    assert len(expected) == 2 * 2 * 4
    for workers in (1, 2):
        assert same(all_batches(make_trainer(tree, workers=workers)), expected)
    trainer = make_trainer(tree, workers=2)
    trainer.feed.expect = lambda epoch, batches: None
    assert same(all_batches(trainer), expected)
    chosen = torch.arange(4)
    first, second = (trainer.feed.batch(chosen, epoch, 1)[0] for epoch in (0, 1))
    assert not torch.equal(first, second), "another epoch has other crops"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_was_not_expected_is_read_all_the_same(tree, workers):
    trainer, plain = make_trainer(tree, workers=workers), make_trainer(tree)
    batches = trainer.sampler.rest()
    trainer.feed.expect(0, batches)
    order = [(0, 0), (2, 0), (1, 1), (1, 0), (2, 0)]  # (batch, epoch)
    for number, epoch in order:
        got = trainer.feed.batch(batches[number], epoch, 1)
        assert same(list(got), list(plain.feed.batch(batches[number], epoch, 1)))
    trainer.feed.close()
    assert not multiprocessing.active_children()


def test_a_part_of_a_batch_is_that_part_of_the_whole(tree):
    """What a process of several asks for: its share of the indices."""
    whole, part = make_trainer(tree), make_trainer(tree)
    indices = whole.sampler.rest()[0]
    pixels, labels = whole.feed.batch(indices, 0, 1)
    part.feed.expect(0, [b[2::4] for b in part.sampler.rest()])
    some, few = part.feed.batch(indices[2::4], 0, 1)
    assert torch.equal(some, pixels[2::4])
    assert torch.equal(few, labels[2::4])


def test_reading_leaves_the_random_state_alone(tree):
    trainer = make_trainer(tree, workers=1)
    before = torch.get_rng_state()
    all_batches(trainer, 1)
    trainer.feed.batch(torch.arange(3), 0, 1)
    list(trainer.data.test.batches(5))
    assert torch.equal(torch.get_rng_state(), before)


def test_crops_are_mirrored_unless_asked_not_to(tree):
    image = torch.zeros(3, 24, 24, dtype=torch.uint8)
    image[:, :, :12] = 255
    from torchvision.transforms.v2.functional import to_pil_image

    for file in (tree / "train" / "cat").iterdir():
        file.unlink()
        to_pil_image(image).save(file.with_suffix(".png"))
    leftmost = {}
    for flip in (None, False):
        trainer = make_trainer(tree, flip=flip)
        pixels, labels = trainer.feed.batch(torch.arange(len(trainer.data.train)), 0, 1)
        cats = pixels[labels == 0].float().mean((1, 2))
        leftmost[flip] = (cats[:, 0] < cats[:, -1]).sum()
    assert leftmost[False] == 0
    assert leftmost[None] > 2


def test_files_of_all_kinds_are_read_as_into_memory(tree):
    """Constant images, so that a crop cannot differ: rotated, grey, palette, CMYK, 16 bits."""
    image_module = pytest.importorskip("PIL.Image")
    exif = image_module.Exif()
    exif[0x0112] = 6
    folder = tree / "test" / "cat"
    for file in folder.iterdir():
        file.unlink()
    plain = image_module.new("RGB", (20, 24), (200, 100, 50))
    plain.save(folder / "rotated.jpg", exif=exif)
    for mode in ("L", "CMYK"):
        plain.convert(mode).save(folder / f"{mode}.jpg")
    plain.convert("RGBA").save(folder / "RGBA.png")
    plain.quantize(4).save(folder / "palette.png")
    image_module.new("1", (20, 24), 1).save(folder / "1.png")
    image_module.new("I;16", (20, 24), 77).save(folder / "sixteen.png")
    data = load_dataset(configure(tree))
    pixels, labels = next(data.test.batches(100))
    files = sorted(folder.iterdir())
    assert (labels == 0).sum() == len(files) == 7
    for got, file in zip(pixels, files, strict=False):
        assert torch.equal(got, read_image(file, 3, (16, 16))), file.name


def test_evaluation_takes_the_centre_of_the_resized_image(tree, v2):
    shape = (3, 40, 30)
    noise = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()
    strip = torch.arange(3000).remainder(256).byte().expand(3, 5, 3000)
    to_image = v2.functional.to_pil_image
    for name, pixels in (("00", noise), ("01", strip)):
        to_image(pixels).save(tree / "test" / "cat" / f"{name}.png")
    (tree / "test" / "cat" / "00.jpg").unlink(missing_ok=True)
    (tree / "test" / "cat" / "01.jpg").unlink(missing_ok=True)
    got, _ = next(load_dataset(configure(tree)).test.batches(2))
    for pixels, found in zip((noise, strip), got, strict=True):
        image = v2.CenterCrop(16)(v2.Resize(18)(to_image(pixels)))
        assert torch.equal(found, v2.functional.pil_to_tensor(image))


def test_a_narrow_strip_is_cut_before_it_grows(v2, monkeypatch):
    """A line of 89 million pixels, which no limit refuses, would become 1.6 billion by 18."""
    image_module = pytest.importorskip("PIL.Image")
    crops, sizes = Crops(16), []
    resize = crops._centre
    monkeypatch.setattr(crops, "_centre", lambda im: (sizes.append(im.size), resize(im))[1])
    for size in ((1, 60_000), (60_000, 1), (4, 16)):
        assert crops.evaluation(image_module.new("RGB", size)).shape == (3, 16, 16)
    assert sizes == [(1, 4), (4, 1), (4, 16)]


# ---- runs


EVERYTHING = {"mixup": 0.2, "cutmix": 1.0, "ema": 0.9, "start_size": 0.75, "accumulate": 2}


@pytest.mark.parametrize("stop_after", [2, 4, 7])
def test_resumed_run_repeats_the_uninterrupted_one(tree, tmp_path, stop_after):
    """4 steps an epoch; with other numbers of workers before and after, and every option."""
    expected: list = []
    whole = losses_of(make_trainer(tree, **EVERYTHING), expected)
    whole.fit()
    assert len(expected) == 8

    first = make_trainer(tree, tmp_path, workers=2, **EVERYTHING)

    def second() -> Trainer:
        assert not multiprocessing.active_children()
        return make_trainer(tree, workers=1, **EVERYTHING)

    resumed, losses = fit_in_two(first, second, tmp_path, stop_after)
    assert losses == expected
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert resumed.evaluate(resumed.data.test) == whole.evaluate(whole.data.test)


def test_time_that_passes_in_reading_is_time_waited(tree, monkeypatch):
    trainer, rows = make_trainer(tree, epochs=1), []
    trainer.record = rows.append
    clock = [0.0]
    monkeypatch.setattr("resfast.training.loop.time.perf_counter", lambda: clock[0])
    read, step = trainer.feed.batch, trainer.train_step.__call__

    def slow(*args):
        clock[0] += 3.0
        return read(*args)

    class Step:
        def __call__(self, *args):
            clock[0] += 1.0
            return step(*args)

        def __getattr__(self, name):
            return getattr(step.__self__, name)

    trainer.feed.batch = slow
    trainer.train_step = Step()
    trainer.fit()
    assert rows[-1]["waiting_share"] == 0.75
    assert (trainer.waited, trainer.seconds) == (12.0, 16.0)
    assert trainer.state_dict()["waited"] == 12.0


# ---- which folders


def test_auto_streams_what_memory_does_not_hold(tree, monkeypatch):
    size = 3 * 16 * 16 * 3 * PER_CLASS
    monkeypatch.setattr(data_module, "MEMORY_LIMIT", size)
    assert load_dataset(configure(tree, stream="auto")).workers is None
    monkeypatch.setattr(data_module, "MEMORY_LIMIT", size - 1)
    data = load_dataset(configure(tree, stream="auto", workers=1))
    assert data.workers == 1
    assert load_dataset(configure(tree, stream="auto", image_size=15)).workers is None
    assert load_dataset(configure(tree, stream="auto", image_size=0)).image_shape[1] == 224
    with pytest.raises(UserError, match="smaller --image-size, or --stream on"):
        load_dataset(configure(tree, stream="off"))
    (tree / "test").rename(tree / "more")
    (tree / "train").rename(tree / "test")
    (tree / "more").rename(tree / "train")
    config = configure(tree, stream="auto")
    assert data_module._streams(tree, data_module._trees(tree), config), "one part is too large"


def test_both_sources_split_alike(tree):
    streamed, loaded = (load_dataset(configure(tree, stream=s)) for s in ("on", "off"))
    assert streamed.sizes() == loaded.sizes() == {"train": 39, "validation": 3, "test": 12}
    for part in ("train", "validation", "test"):
        _, labels = next(getattr(streamed, part).batches(100))
        assert torch.equal(labels, getattr(loaded, part).labels)


@pytest.mark.parametrize("stream", ["on", "off"])
def test_val_is_held_out_and_beside_test_for_validation(tree, stream):
    (tree / "test").rename(tree / "val")
    data = load_dataset(configure(tree, stream=stream))
    assert data.sizes() == {"train": 39, "validation": 3, "test": 12}
    (tree / "train").rename(tree / "test")
    (tree / "val").rename(tree / "train")
    for name in CLASSES:
        (tree / "val" / name).mkdir(parents=True)
        for file in sorted((tree / "test" / name).iterdir())[:2]:
            file.rename(tree / "val" / name / file.name)
    data = load_dataset(configure(tree, stream=stream))
    assert data.sizes() == {"train": 12, "validation": 6, "test": 36}


def test_without_a_held_out_folder_a_share_is_split_off(tree):
    data = load_dataset(configure(tree / "train"))
    assert data.sizes() == {"train": 30, "validation": 3, "test": 9}
    parts = [set(p.indices.tolist()) for p in (data.train, data.validation, data.test)]
    assert set.union(*parts) == set(range(42))


def test_fingerprint_sees_names_sizes_classes_and_the_split(tree):
    def fingerprint(**options) -> str:
        return load_dataset(configure(tree, **options)).fingerprint()

    found = [fingerprint()]
    assert fingerprint() == found[0]
    found.append(
        load_dataset(TrainConfig(**{**configure(tree).to_dict(), "seed": 4})).fingerprint()
    )
    file = sorted((tree / "test" / "owl").iterdir())[-1]
    with file.open("ab") as stream:
        stream.write(b"x")
    found.append(fingerprint())
    file.rename(file.with_stem("zzz"))
    found.append(fingerprint())
    (tree / "test" / "owl").rename(tree / "test" / "pig")
    (tree / "train" / "owl").rename(tree / "train" / "pig")
    found.append(fingerprint())
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"), [(1, 1, 1), (8, 1, 7), (64, 1, 16), (16, 2, 7), (4, 8, 1)]
)
def test_workers_leave_a_core_to_each_trainer(monkeypatch, cores, ranks, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert default_workers() == expected


def test_options_that_cannot_work_are_named(tree):
    with pytest.raises(OptionError, match="--shift 2 is for images in memory"):
        load_dataset(configure(tree, shift=2))
    with pytest.raises(OptionError, match="--workers must be at least 0, got -1"):
        configure(tree, workers=-1)
    with pytest.raises(OptionError, match="--stream must be one of"):
        configure(tree, stream="maybe")
    with pytest.raises(OptionError, match=r"--stream on is for folders of images, not .* digits"):
        TrainConfig(stream="on").validate()


def test_sounds_are_never_streamed(tmp_path):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.wav").write_bytes(b"")
    with pytest.raises(OptionError, match=r"--stream on: .* holds sounds"):
        load_dataset(configure(tmp_path))


def test_without_torchvision_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(b"")
    for module in ("torchvision", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="needs torchvision: pip install torchvision") as error:
        load_dataset(configure(tmp_path))
    assert "\n" not in str(error.value)


# ---- bad files


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_training_file_is_replaced_named_once_and_counted(tree, workers):
    good = make_trainer(tree)
    files, expected = good.data.train, all_batches(good)
    bad = files.indices[[4, 17]].tolist()
    names = [files.folder.names[index] for index in bad]
    for name in names:
        spoil(tree / name)
    trainer = make_trainer(tree, bad_files="skip", workers=workers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = all_batches(trainer)
    said = sorted(str(w.message) for w in caught if "left out" in str(w.message))
    assert len(said) == 2
    assert all(str(tree / name) in text for name, text in zip(names, said, strict=True))
    assert set(trainer.data.left_out) == set(names)
    assert trainer.data.skipped == 2
    for epoch in range(2):
        good.sampler.epoch, good.sampler.batch = epoch, 0
        for number, indices in enumerate(good.sampler.rest(), start=4 * epoch):
            for row, index in enumerate(files.indices[indices].tolist()):
                alike = torch.equal(found[2 * number][row], expected[2 * number][row])
                assert alike == (index not in bad)
    again = all_batches(make_trainer(tree, bad_files="skip"))
    assert same(found, again), "what takes their place is chosen by the seed"


def test_bad_test_file_is_left_out_of_the_count(tree):
    whole = make_trainer(tree)
    pixels, labels = next(whole.data.test.batches(12))
    name = whole.data.test.folder.names[int(whole.data.test.indices[5])]
    spoil(tree / name)
    trainer = make_trainer(tree, bad_files="skip")
    with pytest.warns(UserWarning, match=f"left out: .*{Path(name).name}"):
        score = trainer.evaluate(trainer.data.test)
    assert score.images == 11
    kept = torch.arange(12) != 5
    got, found = next(trainer.data.test.batches(12))
    assert torch.equal(got, pixels[kept])
    assert torch.equal(found, labels[kept])


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_file_stops_the_run_by_name_and_costs_no_step(tree, tmp_path, workers):
    expected: list = []
    whole = make_trainer(tree, epochs=1)
    whole.progress = lambda step, loss: expected.append(loss)
    whole.fit()
    whole.sampler.epoch = whole.sampler.batch = 0
    late = whole.data.train.indices[whole.sampler.rest()[2][3]]
    path = tree / whole.data.train.folder.names[int(late)]
    content = path.read_bytes()
    path.write_bytes(b"x" * len(content))  # of the same size: the fingerprint does not see it

    losses: list = []
    trainer = make_trainer(tree, tmp_path, epochs=1, workers=workers)
    trainer.progress = lambda step, loss: losses.append(loss)
    with pytest.raises(
        UserError, match=r"cannot read image .*--bad-files skip.*00000002\.pt"
    ) as info:
        trainer.fit()
    assert str(path) in str(info.value)
    assert "\n" not in str(info.value)
    path.write_bytes(content)
    state, _ = CheckpointFolder(tmp_path).load_latest()
    resumed = make_trainer(tree, epochs=1)
    resumed.progress = lambda step, loss: losses.append(loss)
    resumed.load_state_dict(state)
    resumed.fit()
    assert losses == expected


def test_left_out_files_are_remembered_by_the_checkpoint(tree, tmp_path):
    trainer = make_trainer(tree, bad_files="skip")
    trainer.data.left_out["train/cat/00.jpg"] = "cut short"
    other = make_trainer(tree, bad_files="skip")
    other.load_state_dict(trainer.state_dict())
    assert set(other.data.left_out) == {"train/cat/00.jpg"}


def test_where_nothing_can_be_read_the_run_ends(tree):
    for file in (tree / "train").rglob("*.*"):
        spoil(file)
    trainer = make_trainer(tree, bad_files="skip")
    with pytest.raises(UserError, match="10 other images before it were bad as well"):
        trainer.fit()
    for file in (tree / "test").rglob("*.*"):
        spoil(file)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(UserError, match="none of 12 images"),
    ):
        trainer.evaluate(trainer.data.test)


@pytest.mark.filterwarnings("ignore:Image size")
def test_decompression_bombs_and_broken_chunks_are_bad_files(tree, v2):
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + kind + body + check

    header = (10000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
    file = io.BytesIO()
    noise = torch.randint(0, 256, (3, 20, 20)).byte()
    v2.functional.to_pil_image(noise).save(file, "PNG")
    broken = bytearray(file.getvalue())
    broken[broken.index(b"IDAT") - 1] = 16  # a length, after which no chunk begins
    for content, message in ((bomb, "bomb"), (broken, "broken PNG")):
        path = sorted((tree / "test" / "cat").iterdir())[0]
        path.unlink()
        path = path.with_name("00.png")
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"cannot read image .*00.png: .*{message}"):
            next(load_dataset(configure(tree)).test.batches(12))


def test_a_killed_worker_is_one_clear_line(tree, monkeypatch):
    """As the kernel does when memory runs out."""
    trainer = make_trainer(tree, workers=1)
    main = os.getpid()

    def killed(path, channels):
        assert os.getpid() != main
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("resfast.training.stream.open_image", killed)
    with pytest.raises(
        UserError, match=r"a process that reads images died: .*fewer --workers"
    ) as e:
        trainer.fit()
    assert "\n" not in str(e.value)


# ---- several ranks

on_ranks = Checks()


def shared_tree() -> Path:
    """The same files for all ranks."""
    root = shared_folder()
    with ranks_here().together():
        if dist.get_rank() == 0:
            write_tree(root / "tree")
    return root / "tree"


def trained_on(trainer: Trainer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets of this rank's rows in each step to come."""
    seen: list = []
    step = trainer.train_step.__call__

    class Step:
        def __call__(self, inputs, targets, size):
            seen.append((inputs, targets))
            return step(inputs, targets, size)

        def __getattr__(self, name):
            return getattr(step.__self__, name)

    trainer.train_step = Step()
    return seen


@contextlib.contextmanager
def files_read() -> Iterator[list[str]]:
    """Names of the files this process opens, in their order."""
    names, read = [], stream.open_image

    def noted(path, channels):
        names.append(f"{path.parent.name}/{path.name}")
        return read(path, channels)

    stream.open_image = noted
    try:
        yield names
    finally:
        stream.open_image = read


def check_ranks_share_the_batches(**options) -> list[int]:
    """Returns how many files each rank read in an epoch of 4 batches of 9."""
    tree = shared_tree()
    options = {"epochs": 1, "batch_size": 9, **options}
    together = make_trainer(tree, ranks=ranks_here(), **options)
    ours, together.evaluate = trained_on(together), lambda images: Score(0.0, 1, 1)
    with files_read() as names:
        together.fit()
    alone = make_trainer(tree, **options)
    whole = trained_on(alone)
    alone.fit()
    assert len(ours) == len(whole) == 4
    for step, batch in zip(ours, whole, strict=True):
        for mine, all_rows in zip(step, batch, strict=True):
            rows = torch.cat(together.ranks.rows(all_rows, together.config.accumulate))
            torch.testing.assert_close(mine, rows, rtol=1e-6, atol=1e-6)
    read = every(names)
    assert len(set(read[0] + read[1])) == 36
    assert all(len(set(each)) == len(each) for each in read), "no file twice"
    return [len(each) for each in read]


@on_ranks
def each_rank_reads_the_images_it_trains_on_and_no_others():
    assert check_ranks_share_the_batches() == [20, 16]
    assert check_ranks_share_the_batches(accumulate=2) == [20, 16]


@on_ranks
def each_rank_reads_what_is_mixed_into_its_images_too():
    counts = check_ranks_share_the_batches(mixup=0.4, cutmix=1.0, accumulate=2)
    assert all(20 < count < 36 for count in counts)


@on_ranks
def a_run_of_two_ranks_goes_on_bit_for_bit_or_alone_with_the_same_images():
    tree, folder = shared_tree(), shared_folder()
    options = EVERYTHING | {"workers": 1}
    whole = make_trainer(tree, ranks=ranks_here(), **options)
    whole.fit()
    first = make_trainer(tree, folder, ranks_here(), **options)
    first.stop = StopAfter(first, 3)
    with pytest.raises(Stopped):
        first.fit()
    state = latest_checkpoint(folder)
    second = make_trainer(tree, ranks=ranks_here(), **options)
    second.load_state_dict(state)
    second.fit()
    expected = whole.model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in second.model.state_dict().items())
    if dist.get_rank() == 0:
        alone, resumed = make_trainer(tree, **options), make_trainer(tree, **options)
        resumed.load_state_dict(state)
        seen = [trained_on(trainer) for trainer in (alone, resumed)]
        alone.fit()
        resumed.fit()
        assert [len(each) for each in seen] == [8, 5]
        for a, b in zip(seen[0][3:], seen[1], strict=True):
            assert same(list(a), list(b))


def spoiled_rows(tree: Path, batch: int, rows: list[int]) -> list[str]:
    """Names of the images in these rows of a batch of the first epoch, which cannot be read now."""
    trainer = make_trainer(tree)
    files = trainer.data.train
    indices = files.indices[trainer.sampler.rest()[batch][rows]]
    names = [files.folder.names[index] for index in indices.tolist()]
    with ranks_here().together():
        if dist.get_rank() == 0:
            for name in names:
                spoil(tree / name)
    return names


@on_ranks
def a_bad_file_of_one_rank_ends_the_run_on_all_and_costs_no_step():
    tree, folder = shared_tree(), shared_folder()
    (name,) = spoiled_rows(tree, 2, [6])  # of 8 rows rank 1 has the last four
    trainer = make_trainer(tree, folder, ranks_here())
    with pytest.raises(
        UnreadableError, match=rf"^rank 1: cannot read image .*{name}.*skip"
    ) as info:
        trainer.fit()
    assert every("00000002.pt; --resume" in str(info.value)) == [True, False]
    state = latest_checkpoint(folder)
    assert (state["step"], state["sampler"]["batch"]) == (2, 2)


@on_ranks
def bad_files_of_all_ranks_are_named_and_counted_by_rank_0():
    tree = shared_tree()
    names = spoiled_rows(tree, 1, [0, 7])
    test = make_trainer(tree).data.validation
    names.append(test.folder.names[int(test.indices[-1])])
    if dist.get_rank() == 0:
        spoil(tree / names[-1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(tree, ranks=ranks_here(), bad_files="skip")
        trainer.fit()
    told = [str(w.message) for w in caught if "left out" in str(w.message)]
    assert sorted(trainer.data.left_out) == sorted(names)
    assert len(told) == 3
    assert all(any(name in text for text in told) for name in names)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, v2):
    return run_checks(on_ranks, tmp_path_factory.mktemp("ranks"))


@gloo
@pytest.mark.parametrize("name", [check.__name__ for check in on_ranks])
def test_on_two_ranks(outcomes, name):
    assert outcomes[name] == ["", ""], "\n".join(outcomes[name])


@gloo
def test_a_bad_file_of_one_process_of_torchrun_is_told_once(tree, tmp_path):
    pytest.importorskip("matplotlib", reason="`resfast train` draws curves")
    trainer = make_trainer(tree, seed=0)
    files = trainer.data.train
    late = files.indices[trainer.sampler.rest()[1][-1]]
    spoil(tree / files.folder.names[int(late)])
    options = f"--data {tree} --stream on --image-size 16 --workers 0 --batch-size 8 --sync-bn"
    done = train_on_two(*options.split(), "--quiet", "--out", str(tmp_path / "run"))
    assert done.returncode == 1
    assert done.stderr.count("resfast train: error:") == 1, done.stderr
    assert "error: rank 1: cannot read image" in done.stderr
    assert CheckpointFolder(tmp_path / "run").load_latest()[0]["step"] == 1


# ---- the commands


def test_a_run_writes_down_what_the_data_decided():
    assert TrainConfig().resolved(True) == TrainConfig(stream="on", flip=True)
    assert TrainConfig().resolved(False) == TrainConfig(stream="off", flip=False)
    assert TrainConfig(flip=False).resolved(True).flip is False


def _reader(pipe) -> None:
    _begin_reading(0)
    pipe.send("ready")
    pipe.recv()
    pipe.send(signal.alarm(0))
    time.sleep(100)


def test_a_reader_leaves_the_garbage_it_inherits_alone(tree, tmp_path):
    """Which may be a dead trainer's process group, whose end waits for threads no fork has."""

    class Cycle:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            (tmp_path / f"collected-by-{os.getpid()}").touch()

    making, thresholds = [True], gc.get_threshold()
    os.register_at_fork(before=lambda: making and Cycle() and None)
    trainer = make_trainer(tree, workers=2)
    gc.set_threshold(1)
    try:
        all_batches(trainer, 1)
    finally:
        making.clear()
        gc.set_threshold(*thresholds)
    gc.collect()
    assert [p.name for p in tmp_path.glob("collected-by-*")] == [f"collected-by-{os.getpid()}"]


def test_a_reader_outlives_the_first_signals_for_a_while():
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with _forking():
        process = context.Process(target=_reader, args=(theirs,), daemon=True)
        process.start()
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
    theirs.close()  # so that a reader that died is an error here
    assert ours.recv() == "ready"
    os.kill(process.pid, signal.SIGINT)
    ours.send("still there?")
    assert 0 < ours.recv() <= 30, "ends by itself"
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == -signal.SIGTERM


def test_signals_to_the_whole_group_stop_the_run_in_order(tree, tmp_path):
    """As a scheduler sends SIGTERM, and a terminal Ctrl-C, to the workers too."""
    pytest.importorskip("matplotlib", reason="`resfast train` draws curves")
    run = tmp_path / "run"
    options = f"--data {tree} --stream on --image-size 16 --workers 2 --batch-size 8"
    with running(run, *options.split(), start_new_session=True) as process:
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert f"resfast train --resume {run}" in errors
    assert errors.count("\n") == 1, errors
    state, _ = CheckpointFolder(run).load_latest()
    assert (state["config"]["stream"], state["config"]["flip"]) == ("on", True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["waiting_share"] < 1 for row in rows if row["kind"] == "epoch")


def test_train_resume_and_predict_agree(tree, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="`resfast train` draws curves")
    from resfast.training.predict import predict
    from resfast.training.run import train

    run = tmp_path / "run"
    options = {"data": str(tree), "stream": "on", "image_size": 16, "batch_size": 8, "workers": 1}
    assert train(options | {"epochs": 1}, out=run, comparison=True) == 0
    assert "waiting for data" in capsys.readouterr().out
    more = {"epochs": 2, "workers": 0, "bad_files": "skip"}
    assert train(more, resume=run, comparison=False, quiet=True) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["data"]["workers"] == 0
    assert 0 < metrics["training"]["waiting_share"] < 1
    assert predict(run, [], as_json=True, show=3) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["correct"] == metrics["test"]["correct"]
    first = sorted((tree / "test" / "cat").iterdir())[0]
    assert predict(run, [first], as_json=True) == 0
    (given,) = json.loads(capsys.readouterr().out)["predictions"]
    assert given["probability"] == pytest.approx(result["predictions"][0]["probability"], rel=1e-5)
    spoil(first)
    with pytest.raises(UserError, match="is not what this checkpoint was trained on"):
        predict(run, [])

"""Folders of images too many for memory: read, cropped and handed over by processes.

An image's crop and mirroring are a function of (seed, epoch, image), and batches are asked for by
their indices, so neither the number of processes nor what they have read ahead shows in a batch.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from resfast.training.config import OptionError, TrainConfig, UserError
from resfast.training.data import (
    Dataset,
    Feed,
    Trees,
    leave_out,
    open_image,
    require_images,
    seeded,
    split_parts,
)

SIDE = 224
# Of ImageNet, as its pretrained weights expect: the folder's own would cost a pass over the files.
MEAN = [0.485, 0.456, 0.406]
STD = [0.229, 0.224, 0.225]
EVALUATED_SHARE = 224 / 256  # of the shorter side
SUBSTITUTES = 10  # tried for an image that cannot be read
EVALUATION = -1  # in an epoch's place
GRACE = 30  # seconds that a reader outlives SIGTERM by
_STOP = (signal.SIGINT, signal.SIGTERM)
_CROP, _SUBSTITUTE = 5, 6  # after mix.py's key


def open_folder(root: Path, trees: Trees, config: TrainConfig) -> Dataset:
    """Reads no image: names, sizes and labels only.

    Raises:
        UserError: torchvision is missing, or a part is empty.
    """
    if config.shift > 0:
        raise OptionError(
            f"--shift {config.shift} is for images in memory; streamed ones are cropped at random"
        )
    side = config.image_size or SIDE
    crops = Crops(side)
    files = [file for tree in trees if tree is not None for file in tree.files]
    labels = torch.tensor([label for _, label in files])
    folder = _Folder(
        root,
        _Names([str(path.relative_to(root)) for path, _ in files]),
        torch.tensor([path.stat().st_size for path, _ in files]),
        labels,
        crops,
        config.bad_files == "fail",
        default_workers() if config.workers is None else config.workers,
    )
    counts = [0 if tree is None else len(tree.files) for tree in trees]
    own = torch.arange(len(files)).split(counts)
    has_validation, has_test = (tree is not None for tree in trees[1:])
    cut = split_parts(labels[: counts[0]], has_validation, has_test, config.seed)
    train, validation, test = (
        Files(folder, part if given else rest)
        for given, part, rest in zip((False, has_validation, has_test), own, cut, strict=True)
    )
    require_images(str(root), train, validation, test)
    return Dataset(
        str(root),
        trees.train.classes,
        train,
        validation,
        test,
        list(MEAN),
        list(STD),
        folder.left_out,
        folder.workers,
    )


def default_workers() -> int:
    """A core stays free for the trainer; the processes of one machine share the cores."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(16, max(1, cores - 1))


class Crops:
    """A Pillow image → uint8 C×side×side, at random for training and from the centre otherwise."""

    def __init__(self, side: int) -> None:
        try:
            from torchvision.transforms import v2
        except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
            raise UserError(
                "reading images from disk needs torchvision: pip install torchvision, or a smaller "
                f"--image-size and --stream off ({str(error).splitlines()[0]})"
            ) from None
        self.side = side
        self._v2 = v2
        self._random = v2.RandomResizedCrop(side, antialias=True)
        self._mirror = v2.RandomHorizontalFlip()
        self._centre = v2.Compose(
            [v2.Resize(round(side / EVALUATED_SHARE), antialias=True), v2.CenterCrop(side)]
        )

    def training(self, image: Any, flip: bool, *key: int) -> Tensor:
        """Everything random depends on `key` alone; torch's own random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed, which would seed the GPU's generator as well
            torch.default_generator.manual_seed(seeded(_CROP, *key).initial_seed())
            image = self._random(image)
            if flip:
                image = self._mirror(image)
        return self._v2.functional.pil_to_tensor(image)

    def evaluation(self, image: Any) -> Tensor:
        # a strip of a few pixels' width would become gigabytes when its shorter side grows
        height, width = image.height, image.width
        if max(height, width) > 4 * min(height, width):
            limit = 4 * min(height, width)
            image = self._v2.functional.center_crop(image, [min(height, limit), min(width, limit)])
        return self._v2.functional.pil_to_tensor(self._centre(image))


class _Names:
    """A million strings as one: counting references to each would copy them into every process."""

    def __init__(self, names: list[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._text = b"".join(encoded)
        self._ends = torch.tensor([0, *(len(name) for name in encoded)]).cumsum(0)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._text[int(self._ends[index]) : int(self._ends[index + 1])])


@dataclass(frozen=True)
class _Folder:
    root: Path
    names: _Names
    sizes: Tensor  # bytes
    labels: Tensor
    crops: Crops
    strict: bool
    workers: int
    left_out: dict[str, str] = field(default_factory=dict)  # bad file → what is wrong with it

    def load(
        self, reader: _Reader, epoch: int, batches: list[Tensor], device: torch.device
    ) -> Generator[_Loaded]:
        """The batches in order, read ahead by processes that start with the first."""
        workers = min(self.workers, len(batches))
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=(_Key(epoch, indices.tolist()) for indices in batches),
            num_workers=workers,
            # not Python 3.14's default, which would import torch anew in each, in every epoch
            multiprocessing_context="fork" if workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=_begin_reading,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from the one that dropout uses
        )
        with clear_worker_errors():
            with _forking():
                processes = iter(loader)
            yield from processes

    def accept(self, loaded: _Loaded, device: torch.device) -> tuple[Tensor, Tensor]:
        """In the trainer's process."""
        if loaded.fatal:
            raise UserError(loaded.fatal)
        for name, problem in loaded.problems:
            leave_out(self.left_out, name, problem)
        pixels = loaded.pixels.to(device, non_blocking=True)
        return pixels, loaded.labels.to(device, non_blocking=True)


class _Key(NamedTuple):
    epoch: int  # of training, or EVALUATION
    indices: list[int]  # into the part


class _Loaded(NamedTuple):
    pixels: Tensor
    labels: Tensor
    problems: list[tuple[str, str]]  # (file, what is wrong with it)
    fatal: str


@dataclass(frozen=True)
class _Reader(TorchDataset):
    """Batches of a part from its files; this is what runs in the processes."""

    folder: _Folder
    part: Tensor  # indices into the folder
    flip: bool = False
    seed: int = 0

    def __getitem__(self, key: _Key) -> _Loaded:
        images: list[Tensor] = []
        indices: list[int] = []
        problems: list[tuple[str, str]] = []
        for wanted in self.part[key.indices].tolist():
            for index in self._candidates(key.epoch, wanted):
                try:
                    images.append(self._image(key.epoch, index))
                except UserError as error:
                    if self.folder.strict:
                        return self._failed(f"{error}; --bad-files skip leaves such files out")
                    problems.append((self.folder.names[index], str(error)))
                    continue
                indices.append(index)
                break
            else:
                if key.epoch != EVALUATION:
                    return self._failed(
                        f"{problems[-1][1]}; {SUBSTITUTES} other images before it were bad as well"
                    )
        pixels = torch.stack(images) if images else self._none
        return _Loaded(pixels, self.folder.labels[indices], problems, "")

    def _candidates(self, epoch: int, wanted: int) -> Iterator[int]:
        """The image, then those that take its place, in training only: no test image counts twice.

        They are a function of (seed, epoch, image), as its crop is.
        """
        yield wanted
        if epoch != EVALUATION:
            draw = seeded(self.seed, _SUBSTITUTE, epoch, wanted)
            for _ in range(SUBSTITUTES):
                yield int(self.part[torch.randint(len(self.part), (), generator=draw)])

    def _image(self, epoch: int, index: int) -> Tensor:
        image = open_image(self.folder.root / self.folder.names[index], 3)
        if epoch == EVALUATION:
            return self.folder.crops.evaluation(image)
        return self.folder.crops.training(image, self.flip, self.seed, epoch, index)

    def _failed(self, reason: str) -> _Loaded:
        # not raised: the loader would put a traceback into the message
        return _Loaded(self._none, torch.empty(0).long(), [], reason)

    @property
    def _none(self) -> Tensor:
        side = self.folder.crops.side
        return torch.empty(0, 3, side, side, dtype=torch.uint8)


@dataclass(frozen=True)
class Files:
    """A part of a folder, read at every use: what `Images` is in memory."""

    folder: _Folder
    indices: Tensor
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.folder.crops.side, self.folder.crops.side

    def to(self, device: torch.device) -> Files:
        return replace(self, device=device)

    def select(self, indices: Tensor) -> Files:
        return replace(self, indices=self.indices[indices])

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Files that cannot be read are left out, and their batches are smaller for it."""
        reader = _Reader(self.folder, self.indices)
        split = list(torch.arange(len(self)).split(size))
        for loaded in self.folder.load(reader, EVALUATION, split, self.device):
            pixels, labels = self.folder.accept(loaded, self.device)
            if len(labels):
                yield pixels, labels

    def feed(self, config: TrainConfig) -> Feed:
        return _StreamFeed(self, config.flip is not False, config.seed)

    def identify(self, digest: Any) -> None:
        folder = self.folder
        for i in self.indices.tolist():
            name, label, size = folder.names[i], int(folder.labels[i]), int(folder.sizes[i])
            digest.update(repr((name, label, size)).encode())
        digest.update(b";")  # ends the part


class _StreamFeed:
    def __init__(self, files: Files, flip: bool, seed: int) -> None:
        self.files = files
        self.reader = _Reader(files.folder, files.indices, flip, seed)
        self._expected: deque[tuple[int, Tensor]] = deque()
        self._loaded: Generator[_Loaded] | None = None

    def expect(self, epoch: int, batches: list[Tensor]) -> None:
        self.close()
        self._expected = deque((epoch, indices) for indices in batches)
        self._loaded = self.files.folder.load(self.reader, epoch, batches, self.files.device)

    def batch(
        self, indices: Tensor, epoch: int, batch: int, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if rows is not None:
            indices = indices[rows]
        if self._loaded is not None and self._is_next(epoch, indices):
            self._expected.popleft()
            loaded = next(self._loaded)
            if not self._expected:
                self.close()
        else:
            loaded = self.reader[_Key(epoch, indices.tolist())]
        return self.files.folder.accept(loaded, self.files.device)

    def close(self) -> None:
        # now, not when garbage is collected: that may be in a process that was forked meanwhile
        self._expected.clear()
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None

    def _is_next(self, epoch: int, indices: Tensor) -> bool:
        if not self._expected:
            return False
        expected_epoch, expected = self._expected[0]
        return expected_epoch == epoch and torch.equal(expected, indices)


@contextlib.contextmanager
def clear_worker_errors() -> Iterator[None]:
    """A reader's death becomes one line: PyTorch raises it from a signal handler, anywhere."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = " ".join(str(error).removeprefix("DataLoader worker ").split())
        raise UserError(
            f"a process that reads images died: {reason} Often memory ran out: fewer --workers or "
            "a smaller --batch-size need less"
        ) from None


def _as_it_is(loaded: Any) -> Any:
    return loaded


@contextlib.contextmanager
def _forking() -> Iterator[None]:
    """Until `_begin_reading` a new process would answer signals with the trainer's handlers or die.

    And it might collect inherited garbage: the end of a process group waits for threads it has not.
    """
    before, collecting = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_reading(_worker: int) -> None:
    """In a new process: Ctrl-C and SIGTERM may reach it too, when the trainer is to stop in order.

    The trainer ends its readers. One that is told to stop and left alone ends by itself, so that
    nothing waits for it for ever.
    """

    def told_to_stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(GRACE)

    gc.freeze()  # what was inherited is not this process's to tidy up, nor to copy
    gc.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, told_to_stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)

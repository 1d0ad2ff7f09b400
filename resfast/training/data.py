"""Sets of images, or of sounds as images, their seeded splits, and an order that can be saved.

Every random choice is a function of (seed, epoch, batch), so a run resumed in the middle of an
epoch sees the batches an uninterrupted one would have seen. What is here lies in memory; folders
too large for that are read by stream.py, behind the same `Part` and `Feed`.
"""

from __future__ import annotations

import hashlib
import re
import statistics
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from resfast.training.audio import SIDE, log_mel, read_wav
from resfast.training.cifar import CLASSES, is_cifar, read_cifar
from resfast.training.config import INSTALL_HINT, OptionError, TrainConfig, UserError

VALIDATION_SHARE = 0.1
TEST_SHARE = 0.2
MEMORY_LIMIT = 8 * 2**30
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp")
SOUND_SUFFIXES = (".wav",)
# Pixels of a file that is refused as a decompression bomb: what Pillow warns of.
LARGEST_IMAGE = 2**30 // 4 // 3
# Bytes of a file up to which a folder is read by one thread. Most of that work is Pillow's Python,
# at which threads only wait for each other: on two cores six took twice as long over CIFAR-10's
# JPEGs as one, and three times the processor time.
SMALL_FILE = 4096
_ORDER, _AUGMENT, _SPLIT, _SYNTHETIC = range(4)


class Feed(Protocol):
    """Training batches, augmented, on the device."""

    def expect(self, epoch: int, batches: list[Tensor]) -> None:
        """The images that will be asked for, in this order: what may be read ahead."""

    def batch(
        self, indices: Tensor, epoch: int, batch: int, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(pixels N×C×H×W as in `Images`, labels N) of these images of the part, expected or not.

        With `rows` those of the batch only, and the same as in the whole batch.

        Raises:
            UserError: a file that cannot be read, and may not be left out.
        """

    def close(self) -> None:
        """Ends what reads ahead; another `expect` begins anew."""


class Part(Protocol):
    """Images with labels: in memory (`Images`) or in files (`stream.Files`)."""

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""

    def to(self, device: torch.device) -> Part: ...

    def select(self, indices: Tensor) -> Part: ...

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(pixels, labels) in order, not augmented, as `evaluate` wants them."""

    def feed(self, config: TrainConfig) -> Feed: ...

    def identify(self, digest: Any) -> None:
        """Adds to a hash what tells this part from another."""


@dataclass
class Images:
    """`pixels`: uint8 or float32 in [0, 1], N×C×H×W; `labels`: int64, N."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        c, h, w = self.pixels.shape[1:]
        return c, h, w

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))

    def select(self, indices: Tensor) -> Images:
        return Images(self.pixels[indices], self.labels[indices])

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self), size):
            yield self.pixels[start : start + size], self.labels[start : start + size]

    def feed(self, config: TrainConfig) -> Feed:
        shift = config.shift if config.shift >= 0 else self.shape[2] // 8
        return _MemoryFeed(self, Augment(shift, bool(config.flip), config.seed))

    def identify(self, digest: Any) -> None:
        for tensor in (self.pixels, self.labels):
            digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.contiguous().numpy().data)


class _MemoryFeed:
    def __init__(self, images: Images, augment: Augment) -> None:
        self.images = images
        self.augment = augment

    def expect(self, epoch: int, batches: list[Tensor]) -> None:
        pass  # nothing is faster than memory

    def batch(
        self, indices: Tensor, epoch: int, batch: int, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(indices)) if rows is None else rows
        chosen = self.images.select(indices[rows].to(self.images.labels.device))
        return self.augment(chosen.pixels, epoch, batch, rows, len(indices)), chosen.labels

    def close(self) -> None:
        pass


@dataclass
class Dataset:
    name: str
    classes: list[str]
    train: Part
    validation: Part
    test: Part
    mean: list[float]
    std: list[float]
    left_out: dict[str, str] = field(default_factory=dict)  # bad file → what is wrong with it
    workers: int | None = None  # processes that read the files; None: all is in memory

    @property
    def skipped(self) -> int:
        return len(self.left_out)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.train.shape

    def normalise(self, pixels: Tensor) -> Tensor:
        return normalise(pixels, self.mean, self.std)

    def sizes(self) -> dict[str, int]:
        return {k: len(getattr(self, k)) for k in ("train", "validation", "test")}

    def fingerprint(self) -> str:
        """Changes with any image, label or split: guards against testing on trained images.

        Of files that are read from disk it sees paths and sizes, not the images in them.
        """
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for part in (self.train, self.validation, self.test):
            part.identify(digest)
        return digest.hexdigest()


class SeededSampler:
    """Shuffled batches of indices, the last incomplete one dropped; `epoch`, `batch` = position."""

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        if batch_size > size:
            raise OptionError(f"--batch-size {batch_size} is more than the {size} training images")
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.batch = 0
        self._order: tuple[int, Tensor] | None = None

    @property
    def batches(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        """The rest of the current epoch; `batch` counts what was handed out."""
        for indices in self.rest():
            self.batch += 1
            yield indices

    def rest(self) -> list[Tensor]:
        """What iterating would hand out."""
        order, size = self._permutation(), self.batch_size
        return [order[i * size : (i + 1) * size] for i in range(self.batch, self.batches)]

    def next_epoch(self) -> None:
        self.epoch += 1
        self.batch = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch, "size": self.size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if (state["size"], state["seed"]) != (self.size, self.seed):
            raise UserError("the checkpoint's data order is for another number of images or seed")
        self.epoch, self.batch = state["epoch"], state["batch"]

    def _permutation(self) -> Tensor:
        if self._order is None or self._order[0] != self.epoch:
            generator = seeded(self.seed, _ORDER, self.epoch)
            self._order = (self.epoch, torch.randperm(self.size, generator=generator))
        return self._order[1]


class Augment:
    """Random shift by up to `shift` pixels (black comes in) and, if asked, mirroring.

    Of these rows of a batch of `size` images, in which an image's fate is its row's.
    """

    def __init__(self, shift: int, flip: bool, seed: int) -> None:
        self.shift = shift
        self.flip = flip
        self.seed = seed

    def __call__(self, pixels: Tensor, epoch: int, batch: int, rows: Tensor, size: int) -> Tensor:
        generator = seeded(self.seed, _AUGMENT, epoch, batch)
        n, _, height, width = pixels.shape
        device = pixels.device
        if self.shift:
            corners = torch.randint(0, 2 * self.shift + 1, (2, size, 1), generator=generator)
            top, left = corners[:, rows].to(device)
            down = top + torch.arange(height, device=device)
            across = left + torch.arange(width, device=device)
            padded = torch.nn.functional.pad(pixels, (self.shift,) * 4)
            image = torch.arange(n, device=device)[:, None, None]
            pixels = padded[image, :, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)
        if self.flip:
            mirrored = (torch.rand(size, generator=generator) < 0.5)[rows].to(device)
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        return pixels


def seeded(*keys: int) -> torch.Generator:
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normalise(pixels: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """float32, zero mean and unit variance per channel over the training images, NHWC in memory."""
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    shape = (1, -1, 1, 1)
    centre = torch.tensor(mean, device=pixels.device).view(shape)
    spread = torch.tensor(std, device=pixels.device).view(shape)
    return ((pixels - centre) / spread).contiguous(memory_format=torch.channels_last)


def load_dataset(config: TrainConfig) -> Dataset:
    if config.data == "digits":
        return _digits(config)
    if config.data == "synthetic":
        return _synthetic(config)
    if is_cifar(Path(config.data)):
        return _cifar(config)
    return _folder(config)


def stratified_split(labels: Tensor, shares: list[float], seed: int) -> list[Tensor]:
    """Disjoint index sets: one per share, then the rest; each class is divided by the shares."""
    parts: list[list[Tensor]] = [[] for _ in range(len(shares) + 1)]
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=seeded(seed, _SPLIT, label))]
        counts = [round(share * len(members)) for share in shares]
        counts.append(len(members) - sum(counts))
        for part, piece in zip(parts, members.split(counts), strict=True):
            part.append(piece)
    return [torch.cat(part).sort().values for part in parts]


def open_image(path: Path, channels: int) -> Any:
    """A Pillow image in RGB, or in grey for one channel, as large as the file's.

    Raises:
        UserError: it cannot be read, or may be a decompression bomb.
    """
    image_module = _pillow()
    try:
        with image_module.open(path) as opened:
            if opened.width * opened.height > LARGEST_IMAGE:
                raise ValueError(
                    f"its {opened.width}×{opened.height} pixels may be a decompression bomb"
                )
            return opened.convert("L" if channels == 1 else "RGB")
    except FileNotFoundError:
        raise UserError(f"no image at {path}") from None
    # SyntaxError is Pillow's for some broken PNG files
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise UserError(f"cannot read image {path}: {error}") from None


def read_image(path: Path, channels: int, size: tuple[int, int] | None) -> Tensor:
    """uint8 C×H×W, resized to `size` (height, width) when that is given."""
    image = open_image(path, channels)
    if size is not None and (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), _pillow().Resampling.BILINEAR)
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, channels).permute(2, 0, 1).contiguous()


def read_sound(path: Path, size: tuple[int, int]) -> Tensor:
    """float32 1×bands×frames in [0, 1]: the log-mel spectrogram of a wav file."""
    samples, rate = read_wav(path)
    try:
        return log_mel(samples, rate, *size)
    except UserError as error:
        raise UserError(f"cannot use sound {path}: {error}") from None


def leave_out(left_out: dict[str, str], name: str, problem: str) -> None:
    """Each bad file is named once."""
    if name not in left_out:
        left_out[name] = problem
        warnings.warn(f"left out: {problem}", stacklevel=3)


def require_images(name: str, train: Part, validation: Part, test: Part) -> None:
    for what, part in (("training", train), ("validation", validation), ("test", test)):
        if len(part) == 0:
            raise UserError(f"--data {name}: no {what} images; there are too few images per class")


def _build(
    name: str, classes: list[str], train: Images, validation: Images, test: Images
) -> Dataset:
    require_images(name, train, validation, test)
    pixels = train.pixels
    scale = 255 if pixels.dtype == torch.uint8 else 1
    # Channel by channel, in float64: a float copy of the whole set would be four times its size.
    moments = []
    for channel in range(pixels.shape[1]):
        plane = pixels[:, channel].double()
        moments.append((plane.mean().item() / scale, max(plane.std().item() / scale, 1e-3)))
    mean, std = ([m[i] for m in moments] for i in (0, 1))
    return Dataset(name, classes, train, validation, test, mean, std)


def _split_all(name: str, classes: list[str], images: Images, seed: int) -> Dataset:
    test, validation, train = stratified_split(images.labels, [TEST_SHARE, VALIDATION_SHARE], seed)
    return _build(
        name, classes, images.select(train), images.select(validation), images.select(test)
    )


def _digits(config: TrainConfig) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(f"--data digits needs scikit-learn: {INSTALL_HINT}") from None
    raw = load_digits()
    pixels = torch.from_numpy(raw.images).float()[:, None] / 16
    if config.image_size not in (0, 8):
        side = (config.image_size, config.image_size)
        pixels = torch.nn.functional.interpolate(pixels, side, mode="bilinear").contiguous()
    images = Images(pixels, torch.from_numpy(raw.target).long())
    return _split_all("digits", [str(name) for name in raw.target_names], images, config.seed)


def _synthetic(config: TrainConfig, classes: int = 10, count: int = 2000) -> Dataset:
    """A smooth random pattern per class, at random strength, under noise: easy but not trivial."""
    side = config.image_size or 32
    generator = seeded(config.seed, _SYNTHETIC)
    coarse = torch.rand(classes, 3, 4, 4, generator=generator)
    patterns = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    labels = torch.arange(count) % classes
    strength = 0.25 + 0.5 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = 0.2 * torch.randn(count, 3, side, side, generator=generator)
    pixels = (strength * patterns[labels] + 0.25 + noise).clamp(0, 1)
    images = Images(pixels, labels)
    return _split_all("synthetic", [f"pattern {i}" for i in range(classes)], images, config.seed)


def _cifar(config: TrainConfig) -> Dataset:
    train, test = (Images(*part) for part in read_cifar(Path(config.data)))
    held, rest = stratified_split(train.labels, [VALIDATION_SHARE], config.seed)
    return _build("cifar10", CLASSES, train.select(rest), train.select(held), test)


class Tree(NamedTuple):
    """Files with their labels: all images, or all sounds."""

    files: list[tuple[Path, int]]
    classes: list[str]
    sound: bool


class Trees(NamedTuple):
    """The parts that a folder holds; what is None is split off the first."""

    train: Tree
    validation: Tree | None = None
    test: Tree | None = None


def _folder(config: TrainConfig) -> Dataset:
    root = Path(config.data)
    trees = _trees(root)
    if _streams(root, trees, config):
        from resfast.training.stream import open_folder

        return open_folder(root, trees, config)
    left_out: dict[str, str] = {}
    train = _read_files(root, trees.train, config, None, left_out)
    height, width = train.pixels.shape[2:]
    parts = [
        None if tree is None else _read_files(root, tree, config, (height, width), left_out)
        for tree in (trees.validation, trees.test)
    ]
    given = [part is not None for part in parts]
    cut = split_parts(train.labels, given[0], given[1], config.seed)
    rest, validation, test = (
        part or train.select(indices) for part, indices in zip((None, *parts), cut, strict=True)
    )
    dataset = _build(str(root), trees.train.classes, rest, validation, test)
    dataset.left_out = left_out
    return dataset


def split_parts(
    labels: Tensor, has_validation: bool, has_test: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the training, validation and test part; those that a folder has are empty."""
    shares = [0.0 if has_test else TEST_SHARE, 0.0 if has_validation else VALIDATION_SHARE]
    test, validation, train = stratified_split(labels, shares, seed)
    return train, validation, test


def _trees(root: Path) -> Trees:
    """train/, val/ and test/ beside each other, of which the last that is there is for testing."""
    held = [name for name in ("val", "test") if (root / name).is_dir()]
    if not ((root / "train").is_dir() and held):
        return _recordings(root) or Trees(_tree(root))
    train, *others = (_tree(root / name) for name in ("train", *held))
    for name, tree in zip(held, others, strict=True):
        if tree.classes != train.classes:
            odd = ", ".join(sorted(set(tree.classes) ^ set(train.classes)))
            raise UserError(f"{root}: train and {name} hold different classes ({odd})")
        if tree.sound != train.sound:
            raise UserError(f"{root}: one of train and {name} holds images, the other sounds")
    return Trees(train, others[0] if len(others) == 2 else None, others[-1])


def _streams(root: Path, trees: Trees, config: TrainConfig) -> bool:
    """Whether the files are read again and again: images too many for memory, or by option."""
    if trees.train.sound:
        if config.stream == "on":
            raise OptionError(f"--stream on: {root} holds sounds, which are read into memory")
        return False
    if config.stream == "auto":
        size = _size(trees.train, config)
        return any(t is not None and _bytes(t, size) > MEMORY_LIMIT for t in trees)
    return config.stream == "on"


def _tree(root: Path) -> Tree:
    """CLASS/**/*.jpg, or .wav; classes and files in the order of their names."""
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise UserError(f"--data {root}: couldn't find any class folder in it")
    found: dict[bool, list[tuple[Path, int]]] = {False: [], True: []}
    for label, name in enumerate(classes):
        count = 0
        for path in sorted((root / name).rglob("*")):
            sound = path.suffix.lower() in SOUND_SUFFIXES
            if (sound or path.suffix.lower() in IMAGE_SUFFIXES) and path.is_file():
                found[sound].append((path, label))
                count += 1
        if not count:
            raise UserError(f"--data {root}: no images or sounds for class {name}")
    if len(classes) < 2:
        raise UserError(f"--data {root}: one class only ({classes[0]}); need CLASS/*.jpg")
    if found[False] and found[True]:
        raise UserError(f"--data {root} holds both images and sounds")
    return Tree(found[False] or found[True], classes, bool(found[True]))


_RECORDING = re.compile(r"([^_]+)_[^_]+_(\d+)")
_TEST_TAKES = 5


def _recordings(root: Path) -> Trees | None:
    """{class}_{speaker}_{take}.wav in one folder, takes 0–4 for testing, as spoken digits come."""
    files = sorted(p for p in root.iterdir() if p.suffix.lower() in SOUND_SUFFIXES)
    named = [(path, _RECORDING.fullmatch(path.stem)) for path in files]
    if not files or any(match is None for _, match in named):
        return None
    classes = sorted({match[1] for _, match in named if match})
    parts: tuple[list, list] = ([], [])
    for path, match in named:
        if match:
            parts[int(match[2]) < _TEST_TAKES].append((path, classes.index(match[1])))
    train, test = (Tree(part, classes, True) for part in parts)
    return Trees(train, test=test)


def _size(tree: Tree, config: TrainConfig) -> tuple[int, int]:
    if side := config.image_size:
        return side, side
    return (SIDE, SIDE) if tree.sound else _first_size(tree.files, config.bad_files)


def _bytes(tree: Tree, size: tuple[int, int]) -> int:
    channels, itemsize = (1, 4) if tree.sound else (3, 1)
    return len(tree.files) * channels * size[0] * size[1] * itemsize


def _read_files(
    root: Path,
    tree: Tree,
    config: TrainConfig,
    size: tuple[int, int] | None,
    left_out: dict[str, str],
) -> Images:
    """The images, all of one size; files that cannot be read are added to those left out."""
    size = size or _size(tree, config)
    needed = _bytes(tree, size)
    if needed > MEMORY_LIMIT:
        other = "" if tree.sound else ", or --stream on"
        raise UserError(
            f"{root}: {len(tree.files):,} images of {size[0]}×{size[1]} need "
            f"{needed / 2**30:.1f} GiB of memory, the limit is {MEMORY_LIMIT / 2**30:.0f}; choose "
            f"a smaller --image-size{other}"
        )
    channels, dtype = (1, torch.float32) if tree.sound else (3, torch.uint8)
    pixels = torch.empty(len(tree.files), channels, *size, dtype=dtype)

    def read(index: int) -> str | None:
        path = tree.files[index][0]
        try:
            pixels[index] = read_sound(path, size) if tree.sound else read_image(path, 3, size)
        except UserError as error:
            return str(error)
        return None

    count = len(tree.files)
    if _typical_bytes(tree) <= SMALL_FILE:
        problems = [read(index) for index in range(count)]
    else:
        with ThreadPoolExecutor() as pool:
            problems = list(pool.map(read, range(count)))
    bad = [problem for problem in problems if problem is not None]
    if bad and config.bad_files == "fail":
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}; --bad-files skip leaves such files out")
    for (path, _), problem in zip(tree.files, problems, strict=True):
        if problem is not None:
            leave_out(left_out, str(path.relative_to(root)), problem)
    kept = torch.tensor([problem is None for problem in problems])
    labels = torch.tensor([label for _, label in tree.files])
    images = Images(pixels, labels)
    return images.select(kept.nonzero().flatten()) if bad else images


def _typical_bytes(tree: Tree) -> float:
    """Of a file: the median of a few."""
    some = tree.files[:: len(tree.files) // 16 + 1]
    return statistics.median(path.stat().st_size for path, _ in some)


def _first_size(files: list[tuple[Path, int]], bad_files: str) -> tuple[int, int]:
    """Height and width of the first image that can be read."""
    problem = None
    for path, _ in files:
        try:
            first = read_image(path, 3, None)
        except UserError as error:
            if bad_files == "fail":
                raise
            problem = problem or error
            continue
        return first.shape[1], first.shape[2]
    raise UserError(f"no image can be read: {problem}")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise UserError("reading images needs Pillow: pip install pillow") from None
    return Image

"""The options of `resfast train`: names, defaults, help texts and checks in one place.

The command line is generated from the fields of `TrainConfig`, and a checkpoint stores
`asdict(config)`, so an option is written down once.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
# files `resfast export` writes, by suffix, and the packages each needs
EXPORTS: dict[str, tuple[str, ...]] = {
    "pt2": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "safetensors": ("safetensors",),
}
BAD_FILES = ("fail", "skip")
STREAM = ("auto", "on", "off")
BUILT_IN = ("digits", "synthetic")
OPTIMIZERS = ("adam", "adamw", "sgd", "lars")
DEFAULT_LR = {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.05, "lars": 2.0}
INSTALL_HINT = 'pip install "resfast[train]"'


class UserError(Exception):
    """Something the user can put right; the command line prints it in one line."""

    exit_code = 1


class OptionError(UserError):
    """An option that cannot work."""

    exit_code = 2


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class TrainConfig:
    model: str = _option("resnet8", "network; `resfast info` lists the names")
    data: str = _option(
        "digits",
        "digits (scikit-learn's 1,797 real 8×8 images), synthetic, or a folder: CLASS/*.jpg, or "
        "train/CLASS/*.jpg beside test/CLASS/*.jpg or val/; *.wav likewise, or "
        "CLASS_SPEAKER_TAKE.wav; "
        "CIFAR-10's binary or Python batches",
    )
    bad_files: str = _option(
        "fail", "files that cannot be read: fail, or skip (named and counted)", choices=BAD_FILES
    )
    stream: str = _option(
        "auto",
        "read images from disk at every use, cropped at random in training; auto: those too many "
        "for memory",
        choices=STREAM,
    )
    workers: int | None = _option(
        None, "processes that read streamed images; 0: none", shown="one fewer than the cores, ≤ 16"
    )
    batch_size: int = _option(64, "images per step, over all processes")
    epochs: int = _option(30, "passes over the training images")
    accumulate: int = _option(
        1, "parts a step's images go through the network in, one after the other"
    )
    optimizer: str = _option(
        "adam",
        "adam, adamw, sgd (momentum 0.9, Nesterov), or lars (momentum 0.9, for large batches, "
        "arXiv:1708.03888; needs timm)",
        choices=OPTIMIZERS,
    )
    lr: float | None = _option(
        None,
        "peak learning rate, after warm-up and before cosine decay",
        shown="adam and adamw 1e-3, sgd 0.05, lars 2",
    )
    warmup: float = _option(0.05, "share of the steps in which the learning rate rises")
    l1: float = _option(0.0, "L1 penalty: adds l1·Σ|w| over convolution and linear weights")
    l2: float = _option(0.0, "L2 penalty, as weight decay of convolution and linear weights")
    decay_all: bool = _option(False, "weight decay of biases and norms too")
    clip: float = _option(0.0, "scale gradients down to this norm where theirs is larger; 0: never")
    label_smoothing: float = _option(0.0, "share of the target spread over all classes")
    mixup: float = _option(
        0.0, "mix pairs of images at a ratio from Beta(mixup, mixup) (arXiv:1710.09412)"
    )
    cutmix: float = _option(
        0.0,
        "paste a box of another image, of a share from Beta(cutmix, cutmix) (arXiv:1905.04899); "
        "with mixup, either by turns at random",
    )
    ema: float = _option(
        0.0,
        "decay of an average of weights and statistics, which is then evaluated and kept; lower in "
        "the first steps",
    )
    start_size: float = _option(
        1.0, "share of the side to begin with; it grows over the first two thirds of the epochs"
    )
    max_skipped: int = _option(
        3, "steps in a row with non-finite loss or gradients that are skipped (on CPU)"
    )
    fused: bool = _option(
        True, "fused layers; without: the unfused twin, stock convolution, norm and ReLU"
    )
    compile: bool = _option(False, "run the network through torch.compile")
    deterministic: bool = _option(False, "deterministic algorithms only, or an error")
    sync_bn: bool = _option(
        False, "under torchrun: statistics of norms over all processes' images, not each its own"
    )
    save_every: int = _option(0, "steps between checkpoints, beside those of epochs; 0: none")
    dtype: str = _option(
        "float32",
        "precision of activations (autocast); float16 also scales the loss",
        choices=DTYPES,
    )
    device: str = _option("auto", "cpu, cuda, cuda:N, or auto: cuda where there is one")
    threads: int = _option(0, "CPU threads; 0: one for images up to 16×16, else PyTorch's choice")
    seed: int = _option(0, "seeds the split, the weights, the order and the augmentation")
    image_size: int = _option(
        0,
        "side images are resized to; 0: the data's own (synthetic: 32, mel bands and frames: 40, "
        "streamed: 224)",
    )
    shift: int = _option(
        -1,
        "augmentation: random shift by up to this many pixels; -1 means an eighth of the side, "
        "none where images are streamed",
    )
    flip: bool | None = _option(
        None, "augmentation: mirror half of the images; unless told, only where they are streamed"
    )

    def validate(self) -> TrainConfig:
        """Returns self; raises OptionError naming the option and the value it got."""
        _at_least("--batch-size", self.batch_size, 2, "BatchNorm needs more than one image")
        _at_least("--epochs", self.epochs, 1)
        _at_least("--threads", self.threads, 0)
        _at_least("--seed", self.seed, 0)
        _at_least("--image-size", self.image_size, 0)
        _at_least("--shift", self.shift, -1)
        if self.workers is not None:
            _at_least("--workers", self.workers, 0)
        if self.seed >= 2**63:
            raise OptionError(f"--seed must be below 2**63, got {self.seed}")
        _at_least("--accumulate", self.accumulate, 1)
        if self.batch_size < 2 * self.accumulate:
            raise OptionError(
                f"--accumulate {self.accumulate} leaves fewer than two of {self.batch_size} images "
                "a part, and BatchNorm needs more than one"
            )
        _at_least("--max-skipped", self.max_skipped, 0)
        _at_least("--save-every", self.save_every, 0)
        for name in ("l1", "l2", "clip", "mixup", "cutmix"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise OptionError(f"--{name} must be a finite number of at least 0, got {value}")
        for name in ("warmup", "label_smoothing", "ema"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise OptionError(f"--{name.replace('_', '-')} must lie in [0, 1), got {value}")
        if not 0 < self.start_size <= 1:
            raise OptionError(f"--start-size must lie in (0, 1], got {self.start_size}")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise OptionError(f"--lr must be a finite number above 0, got {self.lr}")
        _one_of("--optimizer", self.optimizer, OPTIMIZERS)
        if self.optimizer == "lars":
            lars()
        _one_of("--bad-files", self.bad_files, BAD_FILES)
        _one_of("--stream", self.stream, STREAM)
        _one_of("--dtype", self.dtype, DTYPES)
        _check_data(self.data)
        if self.stream == "on" and self.data in BUILT_IN:
            raise OptionError(f"--stream on is for folders of images, not for --data {self.data}")
        check_device(self.device)
        return self

    @property
    def peak_lr(self) -> float:
        return DEFAULT_LR[self.optimizer] if self.lr is None else self.lr

    def resolved(self, streamed: bool) -> TrainConfig:
        """With what was left to the data, now that it is known."""
        flip = streamed if self.flip is None else self.flip
        return replace(self, stream="on" if streamed else "off", flip=flip)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Fields this version does not know are dropped; fields it lacks take their default."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in known})


def check_model(name: str, known: list[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise OptionError(f"--model {name!r} is not one of {', '.join(known)}{hint}")


def check_device(name: str) -> None:
    import torch

    if name == "auto":
        return
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise OptionError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if not torch.cuda.is_available():
        built = "no GPU is visible" if torch.version.cuda else "this PyTorch is built without CUDA"
        raise OptionError(f"--device {name}: {built}; use --device cpu, or see `resfast info`")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise OptionError(f"--device {name}: only {torch.cuda.device_count()} GPU(s) are visible")


def lars() -> Any:
    """timm's class.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        from timm.optim import Lars
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another torch
        raise UserError(
            f"--optimizer lars needs timm: pip install timm ({str(error).splitlines()[0]})"
        ) from None
    return Lars


def resolve_device(name: str) -> Any:
    import torch

    check_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _check_data(name: str) -> None:
    if name in BUILT_IN:
        return
    path = Path(name)
    if not path.exists():
        raise OptionError(f"--data {name!r} is neither digits, synthetic nor an existing folder")
    if not path.is_dir():
        raise OptionError(f"--data {name!r} is a file; give the folder that holds CLASS/*.jpg")


def _at_least(option: str, value: int, low: int, why: str = "") -> None:
    if value < low:
        raise OptionError(
            f"{option} must be at least {low}{f' ({why})' if why else ''}, got {value}"
        )


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")

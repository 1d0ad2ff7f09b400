"""CIFAR-10 in the two forms its authors publish: binary batches, and pickled ones."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resfast.training.config import UserError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PLANE = 3 * 32 * 32
_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
# what a pickled batch of bytes and lists needs, and nothing that can run code
_HARMLESS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


def is_cifar(root: Path) -> bool:
    return any((root / f"test_batch{suffix}").is_file() for suffix in ("", ".bin"))


def read_cifar(root: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((pixels uint8 ``[N, 3, 32, 32]``, labels int64) of the training part, the same of the test).

    Raises:
        UserError: a batch is missing or damaged.
    """
    binary = (root / "test_batch.bin").is_file()
    read = _binary if binary else _pickled
    suffix = ".bin" if binary else ""
    parts = [read(root / f"{name}{suffix}") for name in _BATCHES]
    pixels, labels = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    return (pixels, labels), read(root / f"test_batch{suffix}")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _checked(path: Path, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if len(pixels) != len(labels) or not len(labels) or int(labels.max()) >= len(CLASSES):
        raise UserError(f"{path} is damaged: it holds something else than labelled images")
    return pixels.view(-1, 3, 32, 32), labels


def _binary(path: Path) -> tuple[Tensor, Tensor]:
    data = _bytes(path)
    if not data or len(data) % (1 + PLANE):
        raise UserError(f"{path} is damaged: {len(data):,} bytes are not whole images")
    rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, 1 + PLANE)
    return _checked(path, rows[:, 1:].contiguous(), rows[:, 0].long())


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _pickled(path: Path) -> tuple[Tensor, Tensor]:
    try:
        batch = _Unpickler(io.BytesIO(_bytes(path)), encoding="bytes").load()
        pixels, labels = torch.from_numpy(batch[b"data"]), torch.tensor(batch[b"labels"])
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (PLANE,):
            raise ValueError(f"images of {pixels.dtype} {tuple(pixels.shape[1:])}")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    return _checked(path, pixels.clone(), labels.long())

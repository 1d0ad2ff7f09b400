"""Checkpoints that a killed process cannot spoil and that do not load when damaged.

A file is what `torch.save` writes, a zip archive, with the SHA-256 of everything before it as
the archive's comment; plain `torch.load(path, weights_only=True)` reads it too. Files are
written under a temporary name in the same folder and renamed, and hold tensors and primitives
only.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from resfast.training.config import UserError

BEST = "best.pt"
_NAME = re.compile(r"checkpoint-(\d{8,})\.pt")
_MARK = b"resfast-sha256:"
_COMMENT_BYTES = len(_MARK) + 64
_END_OF_ZIP = b"PK\x05\x06"
_PLAIN = (torch.Tensor, type(None), bool, int, float, str)


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or not one of ours."""


class NonFiniteError(UserError):
    """NaN or infinity where training cannot go on."""


class WriteError(UserError):
    """A file that could not be written: the disk is full, a quota, no permission."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError inside becomes a WriteError that names `path` and the reason."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` so that `path` holds either its old content or the whole new one."""
    require_plain(state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, _with_checksum(buffer.getvalue()))


def load(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}") from None
    body, comment = data[:-_COMMENT_BYTES], data[-_COMMENT_BYTES:]
    if not comment.startswith(_MARK):
        raise CheckpointError(
            f"checkpoint {path} is damaged: its checksum is missing "
            f"({len(data):,} bytes; cut short, or not a resfast checkpoint)"
        )
    if comment[len(_MARK) :] != hashlib.sha256(body).hexdigest().encode():
        raise CheckpointError(f"checkpoint {path} is damaged: its content fails its checksum")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {path} cannot be read: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(state).__name__}, not a dict")
    return state


def write_atomically(path: Path, data: bytes) -> None:
    """Temporary file beside `path`, flush, fsync, rename, fsync of the folder.

    Raises:
        WriteError: naming `path`, which holds its old content or the whole new one; no temporary
            file is left.
    """
    with writing(path):
        _replace(path, data)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove(path: Path) -> None:
    with writing(path):
        path.unlink(missing_ok=True)


def require_plain(value: Any, where: str = "state") -> None:
    """TypeError unless `value` is built of tensors, primitives, dicts, lists and tuples."""
    if type(value) in _PLAIN:
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, (str, int)):
                raise TypeError(f"{where}: key {key!r} is neither str nor int")
            require_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            require_plain(item, f"{where}[{index}]")
    else:
        raise TypeError(f"{where} is a {type(value).__name__}: tensors and primitives only")


def require_finite(tensors: dict[str, Any]) -> None:
    """Weights and running statistics are saved only when every value is finite."""
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            if bad:
                raise NonFiniteError(f"{name} holds {bad} non-finite value(s); not saved")


class CheckpointFolder:
    """The last `keep` checkpoints of a run, named by step, and the best one."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def paths(self) -> list[Path]:
        """Newest first."""
        found = [(int(m[1]), p) for p in self._entries() if (m := _NAME.fullmatch(p.name))]
        return [p for _, p in sorted(found, reverse=True)]

    def save(self, step: int, state: dict[str, Any]) -> Path:
        path = self.folder / f"checkpoint-{step:08d}.pt"
        save(path, state)
        for old in self.paths()[self.keep :]:
            _remove(old)
        return path

    def save_best(self, state: dict[str, Any]) -> Path:
        save(self.folder / BEST, state)
        return self.folder / BEST

    def load_latest(self) -> tuple[dict[str, Any], Path]:
        """The newest sound checkpoint; warns about each damaged one it passes over."""
        damaged: list[str] = []
        for path in self.paths():
            try:
                state = load(path)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            for text in damaged:
                warnings.warn(f"{text}; using {path.name} instead", stacklevel=2)
            return state, path
        if damaged:
            raise CheckpointError(
                f"{damaged[0]}; no other checkpoint in {self.folder} can be used to resume"
            )
        raise CheckpointError(f"no checkpoint in {self.folder}")

    def remove_leftovers(self) -> None:
        """Temporary files of a process that was killed while it wrote."""
        for path in self._entries():
            if path.name.startswith(".") and path.name.endswith(".tmp"):
                _remove(path)

    def set_aside_newer_than(self, sound: Path) -> None:
        """Renames the damaged ones, so that they neither come first again nor count as kept."""
        for path in self.paths():
            if path == sound:
                return
            with writing(path):
                path.rename(path.with_name(path.name + ".damaged"))

    def _entries(self) -> Iterator[Path]:
        return self.folder.iterdir() if self.folder.is_dir() else iter(())


def _with_checksum(archive: bytes) -> bytes:
    """The zip archive with its SHA-256 as comment; the comment's length is part of the sum."""
    if archive[-22:-18] != _END_OF_ZIP:
        raise RuntimeError("torch.save wrote something other than a plain zip archive")
    body = archive[:-2] + struct.pack("<H", _COMMENT_BYTES)
    return body + _MARK + hashlib.sha256(body).hexdigest().encode()

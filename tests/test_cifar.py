"""CIFAR-10's binary and pickled batches."""

from __future__ import annotations

import pickle

import pytest
import torch

from resfast.training.cifar import CLASSES
from resfast.training.config import TrainConfig, UserError
from resfast.training.data import load_dataset

np = pytest.importorskip("numpy")
NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def _write(root, binary: bool) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    written = {}
    for i, name in enumerate(NAMES):
        pixels = torch.randint(256, (40, 3072), dtype=torch.uint8)
        labels = (torch.arange(40) + i) % 10
        if binary:
            rows = torch.cat([labels[:, None].to(torch.uint8), pixels], 1)
            (root / f"{name}.bin").write_bytes(rows.numpy().tobytes())
        else:
            batch = {b"data": pixels.numpy(), b"labels": labels.tolist(), b"batch_label": b"one"}
            (root / name).write_bytes(pickle.dumps(batch, protocol=2))
        written[name] = (pixels.view(-1, 3, 32, 32), labels)
    return written


@pytest.mark.parametrize("binary", [True, False])
def test_every_image_and_label_is_there(tmp_path, binary):
    written = _write(tmp_path, binary)
    data = load_dataset(TrainConfig(data=str(tmp_path)))
    assert data.classes == CLASSES
    assert data.sizes() == {"train": 180, "validation": 20, "test": 40}
    assert torch.equal(data.test.pixels, written["test_batch"][0])
    assert torch.equal(data.test.labels, written["test_batch"][1])
    key = {
        p.numpy().tobytes(): int(label)
        for pixels, labels in list(written.values())[:5]
        for p, label in zip(pixels, labels, strict=True)
    }
    for part in (data.train, data.validation):
        for p, label in zip(part.pixels, part.labels, strict=True):
            assert key.pop(p.numpy().tobytes()) == int(label)
    assert not key


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("damage", ["missing", "short", "wrong label"])
def test_damaged_batches_are_named(tmp_path, binary, damage):
    _write(tmp_path, binary)
    path = tmp_path / ("data_batch_3" + (".bin" if binary else ""))
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-5])
    elif binary:
        path.write_bytes(b"\xff" + path.read_bytes()[1:])
    else:
        batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [3, 10]}
        path.write_bytes(pickle.dumps(batch, protocol=2))
    expected = "cannot read .*data_batch_3" if damage == "missing" else "data_batch_3.* is damaged"
    with pytest.raises(UserError, match=expected):
        load_dataset(TrainConfig(data=str(tmp_path)))


class _Harmful:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_code_in_a_batch_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, False)
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps(_Harmful()))
    with pytest.raises(UserError, match="it asks for"):
        load_dataset(TrainConfig(data=str(tmp_path)))
    assert not (tmp_path / "ran").exists()

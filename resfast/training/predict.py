"""`resfast predict`: a trained checkpoint on its held-out images or on given ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resfast.training.checkpoint import BEST, CheckpointError, CheckpointFolder, load
from resfast.training.config import OptionError, TrainConfig, UserError, resolve_device
from resfast.training.data import (
    SOUND_SUFFIXES,
    Dataset,
    load_dataset,
    normalise,
    open_image,
    read_image,
    read_sound,
)
from resfast.training.loop import EVAL_BATCH, evaluate, place
from resfast.training.model import create_for
from resfast.training.report import binomial_interval, table
from resfast.training.stream import Crops


def predict(
    source: Path,
    images: list[Path],
    *,
    data: str | None = None,
    device: str = "auto",
    invert: bool = False,
    as_json: bool = False,
    show: int = 5,
    top: int = 1,
) -> int:
    """`source` is a run folder (its best checkpoint) or a checkpoint. Returns the exit status.

    `top` classes are named for each image, the likeliest first.
    """
    state, path = find_checkpoint(source)
    where = resolve_device(device)
    model = place(restore_model(state, path), where).eval()
    if images:
        result = _given_images(model, state, images, where, invert, top)
    else:
        result = _held_out(model, state, data, where, show, top)
    result = {"checkpoint": str(path), "step": state["step"]} | result
    print(json.dumps(result, indent=2) if as_json else _text(result))
    return 0


def find_checkpoint(source: Path) -> tuple[dict[str, Any], Path]:
    """The best checkpoint of a folder, else its newest sound one; or the file itself."""
    if not source.exists():
        raise OptionError(f"{source}: no such run folder or checkpoint")
    if not source.is_dir():
        return load(source), source
    try:
        return load(source / BEST), source / BEST
    except CheckpointError as error:
        state, path = CheckpointFolder(source).load_latest()
        if (source / BEST).exists():
            import warnings

            warnings.warn(f"{error}; using {path.name} instead", stacklevel=2)
        return state, path


def restore_model(state: dict[str, Any], path: Path) -> nn.Module:
    try:
        config = TrainConfig.from_dict(state["config"])
        model = create_for(config.model, state["image_shape"], len(state["classes"]), config.fused)
        model.load_state_dict(state["model"])
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} does not hold a model of this version: {reason}") from error
    return model


def _held_out(
    model: nn.Module,
    state: dict[str, Any],
    source: str | None,
    device: torch.device,
    show: int,
    top: int,
) -> dict[str, Any]:
    config = TrainConfig.from_dict(state["config"])
    if source is not None:
        config = dataclasses.replace(config, data=source)
    dataset: Dataset = load_dataset(dataclasses.replace(config, device="cpu").validate())
    if dataset.fingerprint() != state["fingerprint"]:
        raise UserError(
            f"--data {config.data} is not what this checkpoint was trained on (images, labels or "
            "split differ), so its test images may have been trained on"
        )

    def prepare(pixels: Tensor) -> Tensor:
        return normalise(pixels, state["mean"], state["std"])

    score = evaluate(model, dataset.test.to(device), prepare)
    chosen = dataset.test.select(torch.arange(min(show, len(dataset.test)))).to(device)
    rows = []
    for pixels, labels in chosen.batches(EVAL_BATCH):
        found = _classify(model, prepare(pixels), state["classes"], top)
        for row, label in zip(found, labels.tolist(), strict=True):
            rows.append(row | {"actual": dataset.classes[label]})
    low, high = binomial_interval(score.correct, score.images)
    return {
        "data": dataset.name,
        "accuracy": score.accuracy,
        "correct": score.correct,
        "images": score.images,
        "interval_95": [low, high],
        "predictions": rows,
    }


def _given_images(
    model: nn.Module,
    state: dict[str, Any],
    paths: list[Path],
    device: torch.device,
    invert: bool,
    top: int,
) -> dict[str, Any]:
    channels, height, width = state["image_shape"]
    rows: list[dict[str, Any]] = []
    for path in paths:
        if path.suffix.lower() in SOUND_SUFFIXES:
            if channels != 1:
                raise UserError(f"{path} is sound, and the checkpoint is of colour images")
            pixels = read_sound(path, (height, width))[None]
        else:
            pixels = _read(path, state)[None]
            if invert:
                pixels = 255 - pixels
        inputs = normalise(pixels.to(device), state["mean"], state["std"])
        found = _classify(model, inputs, state["classes"], top)
        rows += [{"image": str(path)} | row for row in found]
    return {"predictions": rows}


def _read(path: Path, state: dict[str, Any]) -> Tensor:
    """uint8 C×H×W, as the run's own images came to be evaluated."""
    channels, height, width = state["image_shape"]
    if TrainConfig.from_dict(state["config"]).stream == "on":
        return Crops(height).evaluation(open_image(path, channels))
    return read_image(path, channels, (height, width))


def _classify(
    model: nn.Module, inputs: Tensor, classes: list[str], top: int
) -> list[dict[str, Any]]:
    with torch.no_grad():
        likely = model(inputs).float().softmax(1).topk(min(top, len(classes)), 1)
    rows = []
    for probabilities, indices in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
        named = [
            {"class": classes[i], "probability": p}
            for i, p in zip(indices, probabilities, strict=True)
        ]
        row = {"predicted": named[0]["class"], "probability": named[0]["probability"]}
        rows.append(row | ({"top": named} if top > 1 else {}))
    return rows


def _text(result: dict[str, Any]) -> str:
    rows = [("checkpoint", f"{result['checkpoint']} (step {result['step']:,})")]
    if "accuracy" in result:
        low, high = result["interval_95"]
        rows.append(
            (
                "accuracy",
                f"{result['accuracy']:.2%} of {result['images']:,} held-out images of "
                f"{result['data']} ({result['correct']:,} right; "
                f"95 % interval {low:.1%}–{high:.1%})",
            )
        )
    for number, row in enumerate(result["predictions"]):
        name = row.get("image", f"test image {number}")
        best = row.get("top", [{"class": row["predicted"], "probability": row["probability"]}])
        text = ", ".join(f"{each['class']} ({each['probability']:.1%})" for each in best)
        if "actual" in row:
            text += "" if row["actual"] == row["predicted"] else f", wrong: is {row['actual']}"
        rows.append((name, text))
    return table(rows)

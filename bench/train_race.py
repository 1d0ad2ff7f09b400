"""Train one network fused and on stock layers, an epoch of each by turns, in one process.

    python bench/train_race.py --data build/cifar10 --model resnet8 --epochs 5 --save race.json

Options are those of `resfast train`. Both start from the same weights, see the same batches and
are channels_last. Who goes first alternates, and an epoch's two times make one ratio. Validation
is not timed; the weights after the last epoch are tested once. One epoch has no interval.
"""

from __future__ import annotations

import copy
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from resfast import native
from resfast.benchmark.run import save
from resfast.benchmark.timing import Race
from resfast.cli import Parser, add_config_options, given_options
from resfast.diagnostics.environment import device_info, now, versions
from resfast.training.config import TrainConfig, UserError, check_model, resolve_device
from resfast.training.data import load_dataset
from resfast.training.loop import Trainer, TrainStep
from resfast.training.model import create_for, model_names
from resfast.training.report import judged
from resfast.training.run import set_threads

CONTENDERS = {"resfast": True, "eager": False}  # name: fused
CURVES = ("epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy")


def train_by_turns(config: TrainConfig, command: str) -> dict[str, Any]:
    """The record: both curves, both times, the ratio. Seconds are of training alone."""
    started = now()
    check_model(config.model, model_names())
    device = resolve_device(config.device)
    data = load_dataset(config)
    set_threads(config, data)
    trainers: dict[str, Trainer] = {}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for name, fused in CONTENDERS.items():
        torch.manual_seed(config.seed)
        model = create_for(config.model, data.image_shape, len(data.classes), fused)
        own = dataclasses.replace(config, fused=fused)
        trainers[name] = Trainer(model, data, own, device, record=rows[name].append)
        _warm_up(trainers[name])
    race = Race(dict.fromkeys(CONTENDERS, 1), {name: [] for name in CONTENDERS})
    orders = []
    for epoch in range(config.epochs):
        order = list(CONTENDERS) if epoch % 2 == 0 else list(CONTENDERS)[::-1]
        orders.append(order)
        for name in order:
            before = trainers[name].seconds
            trainers[name].fit(until=epoch + 1)
            race.seconds[name].append(trainers[name].seconds - before)
            _say(name, rows[name][-1], race.seconds[name][-1])
    ratio = race.ratio("resfast", "eager") if race.rounds > 1 else None
    totals = {name: sum(race.seconds[name]) for name in CONTENDERS}
    record = {
        "kind": "resfast train race",
        "schema": 1,
        "date": started,
        "finished": now(),
        "command": command,
        "options": {k: v for k, v in config.to_dict().items() if k != "fused"},
        "versions": versions(),
        "device": device_info(device),
        "isa": native.cpu_isa() if native.is_available() else None,
        "parameters": sum(p.numel() for p in trainers["resfast"].model.parameters()),
        "sizes": data.sizes(),
        "image_shape": list(data.image_shape),
        "skipped_files": data.skipped,
        "order": orders,
        "ratio": None if ratio is None else ratio.to_dict(),
        "total_ratio": totals["eager"] / totals["resfast"],
        "contenders": {
            name: _contender(trainers[name], rows[name], race.seconds[name]) for name in CONTENDERS
        },
    }
    if ratio is not None:
        print(f"eager / resfast, epoch by epoch: {ratio.verdict()}", file=sys.stderr)
    return record


def _warm_up(trainer: Trainer) -> None:
    """One step of a copy: what is built or allocated once counts for no epoch."""
    inputs, labels = trainer.batch(next(iter(trainer.sampler)))
    trainer.sampler.batch = 0
    TrainStep(copy.deepcopy(trainer.model).train(), trainer.config, trainer.device)(inputs, labels)


def _contender(
    trainer: Trainer, rows: list[dict[str, Any]], seconds: list[float]
) -> dict[str, Any]:
    score = trainer.evaluate(trainer.data.test)
    epochs = [row for row in rows if row["kind"] == "epoch"]
    return {
        "seconds": sum(seconds),
        "images_per_second": trainer.step * trainer.config.batch_size / sum(seconds),
        "skipped_steps": trainer.skipped,
        "test": judged(score),
        "epochs": [
            {key: row[key] for key in CURVES} | {"seconds": spent}
            for row, spent in zip(epochs, seconds, strict=True)
        ],
    }


def _say(name: str, row: dict[str, Any], seconds: float) -> None:
    print(
        f"epoch {row['epoch']}  {name:<7}  {seconds:7.1f} s  loss {row['train_loss']:.4f}  "
        f"validation {row['validation_accuracy']:6.2%}",
        file=sys.stderr,
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="train_race.py", description=__doc__)
    add_config_options(parser, without=("fused",))
    parser.add_argument("--save", type=Path, metavar="FILE", required=True, help="the record, JSON")
    given = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(given)
    try:
        config = TrainConfig(**given_options(arguments)).validate()
        command = shlex.join(["python", "bench/train_race.py", *given])
        save(train_by_turns(config, command), arguments.save)
    except UserError as error:
        print(f"train_race.py: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

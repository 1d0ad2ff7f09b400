"""`resfast train`: a run folder from options to metrics, checkpoints and picture."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from resfast.benchmark.timing import Race, race, timer_for
from resfast.diagnostics.curves import draw_curves, read_metrics
from resfast.diagnostics.environment import device_info, now, versions
from resfast.nn import unfused
from resfast.training.checkpoint import BEST, CheckpointFolder, write_atomically
from resfast.training.config import (
    INSTALL_HINT,
    OptionError,
    TrainConfig,
    UserError,
    check_model,
    resolve_device,
)
from resfast.training.data import load_dataset
from resfast.training.loop import Score, Stopped, StopSignals, Trainer, TrainStep, place
from resfast.training.model import create_for, model_names
from resfast.training.predict import find_checkpoint
from resfast.training.report import Progress, Recorder, binomial_interval, on_row, table

# Images up to this side train in one thread unless told otherwise: their steps are short, and
# OpenMP's threads spin while they wait for each other. On a busy two-core machine two threads
# trained at 29 and 109 images/s, one at 1,450 and 937.
SMALL_SIDE = 16
RESUMABLE = ("epochs", "device", "threads", "data", "workers", "bad_files")


def train(
    options: dict[str, Any],
    *,
    out: Path | None = None,
    resume: Path | None = None,
    comparison: bool = True,
    quiet: bool = False,
) -> int:
    """`options` are the fields of TrainConfig the user gave. Returns the exit status."""
    _require_modules(quiet)
    state: dict[str, Any] | None = None
    if resume is not None:
        state, source = _open_run(resume)
        config = _resumed_config(TrainConfig.from_dict(state["config"]), options)
    else:
        config = TrainConfig(**options).validate()
    check_model(config.model, model_names())
    device = resolve_device(config.device)
    data = load_dataset(config)
    # what is written down is what happened, wherever the limit lies later
    config = config.resolved(streamed=data.workers is not None)
    if threads := config.threads or (max(data.image_shape[1:]) <= SMALL_SIDE):
        torch.set_num_threads(int(threads))
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.seed)
    model = create_for(config.model, data.image_shape, len(data.classes))
    trainer = Trainer(model, data, config, device)
    folder = resume if resume is not None else _new_folder(out, config)
    recorder = Recorder(folder / "metrics.jsonl")
    trainer.folder = checkpoints = CheckpointFolder(folder)
    with StopSignals() as stop:
        trainer.stop = stop
        header = {"options": config.to_dict(), "versions": versions(), "date": now()}
        header["device"] = device_info(device)
        if state is not None:
            trainer.load_state_dict(state)
            trainer.last_checkpoint = source
            checkpoints.remove_leftovers()
            recorder.rewind(trainer.step, trainer.sampler.epoch)
            recorder({"kind": "resume", "step": trainer.step, **header})
        else:
            recorder({"kind": "start", **header})
        progress = Progress(trainer.total_steps, trainer.step, config.epochs, quiet)
        trainer.record = on_row(recorder, progress)
        trainer.progress = progress.step
        sizes = data.sizes()
        progress.say(
            f"{config.model} on {data.name}: {sizes['train']:,} training, "
            f"{sizes['validation']:,} validation, {sizes['test']:,} test images"
            f"{'' if data.workers is None else f', streamed by --workers {data.workers}'}; {folder}"
        )
        try:
            trainer.fit()
        except Stopped as stopped:
            progress.close()
            print(
                f"resfast train: {stopped} at step {trainer.step:,} of {trainer.total_steps:,}; "
                f"saved {trainer.last_checkpoint}; go on with: resfast train --resume {folder}",
                file=sys.stderr,
            )
            return 128 + stopped.signum
        finally:
            progress.close()
        return _finish(trainer, folder, header, comparison, stop, quiet)


def race_with_eager(
    trainer: Trainer, stop: StopSignals | None = None, budget: float = 10.0
) -> Race | None:
    """Training steps of copies of the model, "resfast" and "eager" (unfused), on one batch."""
    config, device = trainer.config, trainer.device
    trainer.sampler.batch = 0
    inputs, labels = trainer.batch(next(iter(trainer.sampler)))
    steps: dict[str, Callable[[], object]] = {}
    for name, twin in (
        ("resfast", copy.deepcopy(trainer.model)),
        ("eager", unfused(trainer.model)),
    ):
        step = TrainStep(place(twin, device).train(), config, device)
        step.set_lr(config.peak_lr / 100)
        steps[name] = functools.partial(step, inputs, labels)
    return race(
        steps,
        budget=budget,
        timer=timer_for(device),
        stopped=lambda: stop is not None and stop.signum is not None,
    )


def _finish(
    trainer: Trainer,
    folder: Path,
    header: dict[str, Any],
    comparison: bool,
    stop: StopSignals,
    quiet: bool,
) -> int:
    best, chosen = find_checkpoint(folder)
    trainer.evaluated.load_state_dict(best["model"])
    score = trainer.evaluate(trainer.data.test)
    steps = None
    if comparison and stop.signum is None:
        if not quiet:
            print("comparing with the unfused twin …", file=sys.stderr, flush=True)
        steps = race_with_eager(trainer, stop)
    metrics = _metrics(trainer, header, score, steps)
    metrics["test"]["checkpoint"] = chosen.name
    write_atomically(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    title = f"{trainer.config.model} on {trainer.data.name}: test accuracy {score.accuracy:.2%}"
    draw_curves(read_metrics(folder / "metrics.jsonl"), folder / "curve.png", title)
    if not quiet:
        print(_summary(metrics, folder))
    return 0 if stop.signum is None else 128 + stop.signum


def _metrics(
    trainer: Trainer, header: dict[str, Any], score: Score, steps: Race | None
) -> dict[str, Any]:
    config, data = trainer.config, trainer.data
    low, high = binomial_interval(score.correct, score.images)
    return header | {
        "finished": now(),
        "model": {
            "name": config.model,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
        },
        "data": {
            "name": data.name,
            "classes": len(data.classes),
            "image_shape": list(data.image_shape),
            "sizes": data.sizes(),
            "skipped_files": data.skipped,
            "workers": data.workers,
            "fingerprint": trainer.fingerprint,
        },
        "test": {
            "accuracy": score.accuracy,
            "correct": score.correct,
            "images": score.images,
            "loss": score.loss,
            "interval_95": [low, high],
        },
        "best": trainer.best,
        "training": {
            "epochs": trainer.sampler.epoch,
            "steps": trainer.step,
            "seconds": trainer.seconds,
            "waiting_share": trainer.waited / trainer.seconds,
            "images_per_second": trainer.step * config.batch_size / trainer.seconds,
        },
        "comparison": None if steps is None else _comparison(steps, config.batch_size),
    }


def _comparison(steps: Race, batch: int) -> dict[str, Any]:
    ratio = steps.ratio("resfast", "eager")
    return {
        "what": "training step on one batch, resfast over its unfused channels_last twin",
        "resfast_images_per_second": batch / steps.median("resfast"),
        "eager_images_per_second": batch / steps.median("eager"),
        "verdict": ratio.verdict(),
        **ratio.to_dict(),
    }


def _summary(metrics: dict[str, Any], folder: Path) -> str:
    test, training, model = metrics["test"], metrics["training"], metrics["model"]
    low, high = test["interval_95"]
    sizes, device, options = metrics["data"]["sizes"], metrics["device"], metrics["options"]
    split = " / ".join(f"{count:,} {name}" for name, count in sizes.items())
    weights = f"weights of {test['checkpoint']}"
    if test["checkpoint"] == BEST:
        weights = f"weights of epoch {metrics['best']['epoch']}, chosen on validation"
    where = device["name"] + (f", {device['threads']} thread(s)" if "threads" in device else "")
    rows = [
        ("model", f"{model['name']}, {model['parameters']:,} parameters, {options['dtype']}"),
        ("device", where),
        ("data", f"{metrics['data']['name']}, {split}"),
        (
            "test accuracy",
            f"{test['accuracy']:.2%} ({test['correct']:,} of {test['images']:,}; 95 % interval "
            f"{low:.1%}–{high:.1%}), {weights}",
        ),
        (
            "training",
            f"{training['images_per_second']:,.0f} images/s over {training['seconds']:.1f} s "
            f"({training['epochs']} epochs, augmentation included)",
        ),
        ("waiting for data", f"{100 * training['waiting_share']:.0f} % of the training's time"),
    ]
    if (compared := metrics["comparison"]) is not None:
        eager = f"{compared['eager_images_per_second']:,.0f} images/s"
        rows += [
            ("step, resfast", f"{compared['resfast_images_per_second']:,.0f} images/s"),
            ("step, eager", f"{eager} (unfused twin, channels_last)"),
            ("resfast / eager", compared["verdict"]),
        ]
    rows.append(("run folder", f"{folder} (metrics.json, metrics.jsonl, curve.png, {BEST})"))
    return table(rows)


def _require_modules(quiet: bool) -> None:
    needed = ["matplotlib"]
    if not quiet and sys.stderr.isatty():
        needed.append("tqdm")
    for name in needed:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"`resfast train` needs {name}: {INSTALL_HINT}")


def _open_run(folder: Path) -> tuple[dict[str, Any], Path]:
    if not folder.is_dir():
        raise OptionError(f"--resume {folder}: no such folder")
    state, path = CheckpointFolder(folder).load_latest(set_aside=True)
    if "optimizer" not in state:
        raise UserError(f"{path} holds weights only, not a run to resume")
    return state, path


def _resumed_config(config: TrainConfig, options: dict[str, Any]) -> TrainConfig:
    for name, value in options.items():
        if name not in RESUMABLE and value != getattr(config, name):
            option = "--" + name.replace("_", "-")
            may = ", ".join("--" + n.replace("_", "-") for n in RESUMABLE)
            raise OptionError(
                f"{option} cannot change in a resumed run (it has {getattr(config, name)}); "
                f"only {may} can"
            )
    changed = {name: value for name, value in options.items() if name in RESUMABLE}
    return dataclasses.replace(config, **changed).validate()


def _new_folder(out: Path | None, config: TrainConfig) -> Path:
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise OptionError(f"--out {out} is there and not empty; --resume {out} continues it")
        out.mkdir(parents=True, exist_ok=True)
        return out
    name = f"{config.model}-{Path(config.data).resolve().name}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1, 1000):
        folder = Path("runs") / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise UserError(f"cannot find a free name like runs/{name}")

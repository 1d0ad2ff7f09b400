"""`resfast train`: a run folder from options to metrics, checkpoints and picture."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from resfast.benchmark.timing import Race, race, timer_for
from resfast.diagnostics.curves import draw_curves, read_metrics
from resfast.diagnostics.environment import device_info, now, versions
from resfast.nn import unfused
from resfast.training.checkpoint import (
    BEST,
    CheckpointFolder,
    NonFiniteError,
    WriteError,
    write_atomically,
    writing,
)
from resfast.training.config import (
    INSTALL_HINT,
    OptionError,
    TrainConfig,
    UserError,
    check_model,
)
from resfast.training.data import Dataset, load_dataset
from resfast.training.distributed import Ranks, job, join
from resfast.training.loop import (
    Score,
    Stopped,
    StopSignals,
    Trainer,
    TrainStep,
    UnreadableError,
    place,
)
from resfast.training.model import create_for, model_names
from resfast.training.page import PAGE, Answers, Predictions, render
from resfast.training.predict import find_checkpoint
from resfast.training.report import Progress, Recorder, judged, on_row, table
from resfast.training.scalars import Scalars

# Images up to this side train in one thread unless told otherwise: their steps are short, and
# OpenMP's threads spin while they wait for each other. On a busy two-core machine two threads
# trained at 29 and 109 images/s, one at 1,450 and 937.
SMALL_SIDE = 16
RESUMABLE = ("epochs", "device", "threads", "data", "save_every", "workers", "bad_files")


def train(
    options: dict[str, Any],
    *,
    out: Path | None = None,
    resume: Path | None = None,
    comparison: bool = True,
    quiet: bool = False,
    tensorboard: bool = False,
) -> int:
    """`options` are the fields of TrainConfig the user gave. Returns the exit status.

    Under torchrun every process calls it; rank 0 alone writes and prints.
    """
    ranks = join()
    if ranks.rank:
        quiet = True
        warnings.simplefilter("ignore")  # rank 0 gives the same, or gathers them
    try:
        with ranks.contact():
            alone = ranks.size == 1
            return _train(ranks, options, out, resume, comparison and alone, quiet, tensorboard)
    except BaseException:
        ranks.drop()
        raise


def _train(
    ranks: Ranks,
    options: dict[str, Any],
    out: Path | None,
    resume: Path | None,
    comparison: bool,
    quiet: bool,
    tensorboard: bool,
) -> int:
    first = ranks.rank == 0
    state: dict[str, Any] | None = None
    source: Path | None = None
    with ranks.together():
        _require_modules(quiet, tensorboard)
        if first and out is not None and _is_of_this_job(out) and CheckpointFolder(out).paths():
            resume = out
        if first and resume is not None:
            state, source = _open_run(resume)
    resume, state, source = ranks.share((resume, state, source))
    with ranks.together():
        if state is not None:
            config = _resumed_config(TrainConfig.from_dict(state["config"]), options)
        else:
            config = TrainConfig(**options).validate()
        check_model(config.model, model_names())
        ranks.check(config)
        device = ranks.device(config.device)
        data = load_dataset(config)
    # what is written down is what happened, wherever the limit lies later
    config = config.resolved(streamed=data.workers is not None)
    set_threads(config, data)
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.seed)
    with ranks.together():  # what can fail here fails on every rank
        model = create_for(config.model, data.image_shape, len(data.classes), config.fused)
        trainer = Trainer(model, data, config, device, ranks=ranks)
    fingerprint = ranks.share(trainer.fingerprint)
    folder = resume
    with ranks.together():
        if trainer.fingerprint != fingerprint:
            raise UserError(f"the data ({data.name}) is not what rank 0 has")
        if first and folder is None:
            folder = _new_folder(out, config)
    folder = ranks.share(folder)
    scalars: list[Scalars] = []
    with _telling_how_to_resume(trainer, folder), StopSignals() as stop:
        trainer.stop = stop
        header: dict[str, Any] = {"options": config.to_dict(), "versions": versions()}
        header |= {"date": now(), "device": device_info(device), "ranks": ranks.size, "job": job()}
        if state is not None:
            with ranks.together():
                trainer.load_state_dict(state)
            trainer.last_checkpoint = source
        progress = Progress(trainer.total_steps, trainer.step, config.epochs, quiet)
        if first:
            recorder = Recorder(folder / "metrics.jsonl")
            trainer.folder = checkpoints = CheckpointFolder(folder)
            if source is not None:
                checkpoints.set_aside_newer_than(source)
            checkpoints.remove_leftovers()
            recorder.rewind(trainer.step, trainer.sampler.epoch)
            if state is None:
                recorder({"kind": "start", **header})
            else:
                recorder({"kind": "resume", "step": trainer.step, **header})
            if tensorboard:
                scalars.append(Scalars(folder, trainer.step))
            trainer.record = on_row(progress, recorder, *scalars)
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
            if first:
                print(
                    f"resfast train: {stopped} at step {trainer.step:,} of "
                    f"{trainer.total_steps:,}; saved {trainer.last_checkpoint}; go on with: "
                    f"resfast train --resume {folder}",
                    file=sys.stderr,
                    flush=True,
                )
            ranks.leave()
            return 128 + stopped.signum
        except (NonFiniteError, UnreadableError) as error:
            ranks.leave()  # all have the same error
            if first:
                raise
            return error.exit_code
        finally:
            progress.close()
            for each in scalars:
                each.close()
        ranks.leave()
        if not first:
            return 0
        trainer.ranks = Ranks()
        return _finish(trainer, folder, header, comparison, stop, quiet)


def set_threads(config: TrainConfig, data: Dataset) -> None:
    if threads := config.threads or (max(data.image_shape[1:]) <= SMALL_SIDE):
        torch.set_num_threads(int(threads))


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
    answers = Answers()
    score = trainer.evaluate(trainer.data.test, answers)
    steps = None
    if comparison and trainer.config.fused and stop.signum is None:
        if not quiet:
            print("comparing with the unfused twin …", file=sys.stderr, flush=True)
        steps = race_with_eager(trainer, stop)
    metrics = _metrics(trainer, header, score, steps)
    metrics["test"]["checkpoint"] = chosen.name
    write_atomically(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    title = f"{trainer.config.model} on {trainer.data.name}: test accuracy {score.accuracy:.2%}"
    rows = read_metrics(folder / "metrics.jsonl")
    with writing(folder / "curve.png"):
        draw_curves(rows, folder / "curve.png", title)
    predictions = Predictions.of(answers, trainer.data)
    write_atomically(folder / PAGE, render(metrics, rows, predictions).encode())
    if not quiet:
        print(_summary(metrics, folder))
    return 0 if stop.signum is None else 128 + stop.signum


def _metrics(
    trainer: Trainer, header: dict[str, Any], score: Score, steps: Race | None
) -> dict[str, Any]:
    config, data = trainer.config, trainer.data
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
        "test": judged(score),
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
        (
            "model",
            f"{model['name']}, {model['parameters']:,} parameters, {options['dtype']}"
            + ("" if options["fused"] else ", stock layers"),
        ),
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
    files = f"{PAGE}, metrics.json, metrics.jsonl, curve.png, {BEST}"
    rows.append(("run folder", f"{folder} ({files})"))
    return table(rows)


def _require_modules(quiet: bool, tensorboard: bool) -> None:
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs tensorboard: pip install tensorboard")
    needed = ["matplotlib"]
    if not quiet and sys.stderr.isatty():
        needed.append("tqdm")
    for name in needed:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"`resfast train` needs {name}: {INSTALL_HINT}")


def _open_run(folder: Path) -> tuple[dict[str, Any], Path]:
    if not folder.is_dir():
        raise OptionError(f"--resume {folder}: no such folder")
    state, path = CheckpointFolder(folder).load_latest()
    if "optimizer" not in state:
        raise UserError(f"{path} holds weights only, not a run to resume")
    return state, path


@contextlib.contextmanager
def _telling_how_to_resume(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Adds to a WriteError what is kept in spite of it, and the command that goes on from there."""
    try:
        yield
    except WriteError as error:
        if trainer.last_checkpoint is None:
            raise WriteError(f"{error}; no checkpoint was written yet") from error
        raise WriteError(
            f"{error}; kept: {trainer.last_checkpoint}; when it can be written, go on with: "
            f"resfast train --resume {folder}"
        ) from error


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


def _is_of_this_job(folder: Path) -> bool:
    """Whether the torchrun that started this process started the run in the folder, too."""
    try:
        with (folder / "metrics.jsonl").open() as file:
            begun = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return job() is not None and isinstance(begun, dict) and begun.get("job") == job()


def _new_folder(out: Path | None, config: TrainConfig) -> Path:
    if out is not None:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
        if taken and not _is_of_this_job(out):
            raise OptionError(f"--out {out} is there and not empty; --resume {out} continues it")
        with writing(out):
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

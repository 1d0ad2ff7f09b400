"""The training loop: steps, epochs, validation, checkpoints, and stopping without loss.

Interrupted at any step and resumed, a run on the CPU repeats the uninterrupted one bit for bit:
the order and the augmentation are functions of the position, and everything else that changes
(weights, statistics, optimizer, loss scale, random states, running totals) is saved.
"""

from __future__ import annotations

import contextlib
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from resfast.training.checkpoint import (
    CheckpointFolder,
    NonFiniteError,
    WriteError,
    require_finite,
)
from resfast.training.config import TrainConfig, UserError, lars
from resfast.training.data import Dataset, Part, SeededSampler, leave_out
from resfast.training.distributed import Ranks
from resfast.training.mix import Mix, Share
from resfast.training.stream import clear_worker_errors

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = 1
LOG_EVERY = 10
EVAL_BATCH = 256


class Stopped(Exception):
    """Training was asked to stop; its checkpoint is written."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class UnreadableError(UserError):
    """Of streamed images: met late, when steps are done that shall not be lost; on all ranks."""


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a flag; the second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum


class TrainStep:
    """Forward, loss, backward, update of one batch.

    The objective is mean cross-entropy + l1·Σ|w|; l2 is the optimizer's weight decay, so the
    gradient becomes dCE/dw + l1·sign(w) + l2·w (AdamW: decoupled). l1 touches convolution and
    linear weights only, and so does l2 unless asked otherwise. The returned loss is the
    cross-entropy alone.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.model = model
        self.parallel = self.ranks.wrap(model, device, config.sync_bn)
        self.network = torch.compile(self.parallel) if config.compile else self.parallel
        self.device = device
        self.dtype = getattr(torch, config.dtype)
        self.l1 = config.l1
        self.clip = config.clip
        self.parts = config.accumulate
        self.label_smoothing = config.label_smoothing
        self.penalised = penalised_weights(model)
        self.optimizer = build_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def __call__(
        self, inputs: Tensor, targets: Tensor, size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(mean loss over the batch, logits of these rows).

        ``inputs``, ``targets``: of a batch of ``size`` images `Ranks.rows` of this rank, without
        ``size`` the whole. ``targets``: labels ``[N]``, or probabilities ``[N, classes]``.

        Raises:
            NonFiniteError: on CPU, of any rank's loss or gradient; the model is then as it was
                before.
        """
        # reading a value waits for a GPU, so there the loop looks at the loss now and then
        checked = self.device.type == "cpu"
        buffers = [(b, b.clone()) for b in self.model.buffers()] if checked else []
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        outputs: list[Tensor] = []
        size = len(inputs) if size is None else size
        lengths = [len(rows) for rows in self.ranks.rows(torch.arange(size), self.parts)]
        own = zip(inputs.split(lengths), targets.split(lengths), strict=True)
        try:
            for number, (x, target) in enumerate(own, 1):
                with self._gradients_stay_here(number < self.parts):
                    logits = self.forward(x)
                    loss = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
                    # times size, for gradients become the mean over the ranks
                    loss = loss * (len(x) / size * self.ranks.size)
                    penalty: Tensor | float = 0.0
                    if self.l1 and not losses:
                        penalty = self.l1 * sum(w.abs().sum() for w in self.penalised)
                    losses.append(self.ranks.sum(loss.detach()) / self.ranks.size)
                    if checked:
                        require_finite_loss(losses[-1] + penalty)
                    self.scaler.scale(loss + penalty).backward()
                outputs.append(logits.detach())
            # from here on all ranks have the same: gradients are the sum over them
            if self.clip:
                self.scaler.unscale_(self.optimizer)
            self._clip(checked and not self.scaler.is_enabled())
        except NonFiniteError:
            for buffer, before in buffers:
                buffer.copy_(before)
            raise
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.stack(losses).sum(), torch.cat(outputs)

    def _gradients_stay_here(self, here: bool) -> contextlib.AbstractContextManager[None]:
        """Those of all parts are summed over the ranks at once, after the last one."""
        if here and isinstance(self.parallel, nn.parallel.DistributedDataParallel):
            return self.parallel.no_sync()
        return contextlib.nullcontext()

    def _clip(self, checked: bool) -> None:
        if not (self.clip or checked):
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if checked and not math.isfinite(value := float(norm)):
            raise NonFiniteError(f"the gradient's norm became {value}")
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip, norm)

    def forward(self, inputs: Tensor, model: nn.Module | None = None) -> Tensor:
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype if enabled else None, enabled=enabled):
            return (model or self.network)(inputs).float()

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr


def place(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def penalised_weights(model: nn.Module) -> list[Tensor]:
    modules = (nn.modules.conv._ConvNd, nn.Linear)
    weights = [m.weight for m in model.modules() if isinstance(m, modules)]
    return list(dict.fromkeys(weights))


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    decayed = penalised_weights(model)
    ids = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in ids]
    groups = [
        {"params": decayed, "weight_decay": config.l2},
        {"params": rest, "weight_decay": config.l2 if config.decay_all else 0.0},
    ]
    if config.optimizer == "lars":
        # without weight decay timm's adapts nothing unless told; biases and norms are left as with
        # SGD, as large batches are usually trained, unless they decay too
        groups[0]["always_adapt"] = True
        optimizer: torch.optim.Optimizer = lars()(groups, lr=config.peak_lr, momentum=0.9)
        return optimizer
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.peak_lr, momentum=0.9, nesterov=True)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.peak_lr)


def learning_rate(step: int, total: int, peak: float, share: float = 0.05) -> float:
    """Linear warm-up over the first share of the steps, then a half cosine down to zero."""
    warmup = max(1, round(share * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def require_finite_loss(loss: Tensor) -> None:
    if not math.isfinite(value := float(loss.detach())):
        raise NonFiniteError(f"the loss became {value}")


@dataclass(frozen=True)
class Score:
    loss: float
    correct: int
    images: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.images


# gets each batch that is evaluated: pixels, labels and logits
Keep = Callable[[Tensor, Tensor, Tensor], None]


def evaluate(
    forward: Callable[[Tensor], Tensor],
    images: Part,
    prepare: Callable[[Tensor], Tensor],
    keep: Keep | None = None,
) -> Score:
    """`forward` maps prepared inputs to logits; the caller has set evaluation mode."""
    return _score(*_sums(forward, images, prepare, keep), len(images))


def _sums(
    forward: Callable[[Tensor], Tensor],
    images: Part,
    prepare: Callable[[Tensor], Tensor],
    keep: Keep | None,
) -> tuple[float, int, int]:
    """Loss, how many are right, how many there are: of the images that can be read."""
    loss, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for pixels, labels in images.batches(EVAL_BATCH):
            logits = forward(prepare(pixels))
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            correct += int((logits.argmax(1) == labels).sum())
            count += len(labels)
            if keep is not None:
                keep(pixels, labels, logits)
    return loss, correct, count


def _score(loss: float, correct: int, count: int, images: int) -> Score:
    if not count:
        raise UnreadableError(f"none of {images:,} images could be read")
    return Score(loss / count, correct, count)


class Trainer:
    """Trains `model` on `data`; `record` gets one dict per logged step and per epoch.

    `folder` None keeps no checkpoints. `stop` is looked at after every step; of several `ranks`
    all stop when one is asked to. Only rank 0 has a `folder`.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        config: TrainConfig,
        device: torch.device | None = None,
        *,
        folder: CheckpointFolder | None = None,
        record: Callable[[dict[str, Any]], None] = lambda row: None,
        progress: Callable[[int, float | None], None] = lambda step, loss: None,
        stop: StopSignals | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.ranks = ranks or Ranks()
        self.config = config
        self.data = data
        self.folder = folder
        self.record = record
        self.progress = progress
        self.stop = stop or StopSignals()
        self.model = place(model, self.device)
        self.train_step = TrainStep(self.model, config, self.device, self.ranks)
        self.feed = data.train.to(self.device).feed(config)
        self.sampler = SeededSampler(len(data.train), config.batch_size, config.seed)
        self.mix = Mix(config.mixup, config.cutmix, len(data.classes), config.seed)
        self.average: AveragedModel | None = None
        if config.ema:
            self.average = AveragedModel(
                self.model, multi_avg_fn=self._move_average, use_buffers=True
            )
        self.fingerprint = data.fingerprint()
        self.step = 0
        self.skipped = 0
        self.seconds = 0.0
        self.waited = 0.0  # for batches, of these seconds
        self._waiting = 0.0
        self.best: dict[str, Any] | None = None
        self.last_checkpoint: Path | None = None
        self._reset_totals()

    @property
    def total_steps(self) -> int:
        return self.config.epochs * self.sampler.batches

    def fit(self, until: int | None = None) -> None:
        """Trains to the last epoch, or until so many epochs are done.

        Raises:
            Stopped, NonFiniteError, WriteError: the checkpoints being sound.
            UnreadableError: what is done being saved.
            UserError: a process that reads images died.
        """
        last = self.config.epochs if until is None else until
        try:
            while self.sampler.epoch < last:
                with clear_worker_errors():
                    with self._timed():
                        self._train_epoch()
                    self._leave_if_stopped()
                    self._finish_epoch()
                    self._leave_if_stopped(saved=True)
        except NonFiniteError as error:
            raise NonFiniteError(self._non_finite_advice(error)) from None
        except WriteError:
            # of the log or the best, say: what was trained until now is kept where it can be
            with contextlib.suppress(WriteError, NonFiniteError):
                self.save()
            raise
        except UnreadableError as error:
            raise UnreadableError(self._with_saved(error)) from None
        finally:
            self.feed.close()

    @property
    def evaluated(self) -> nn.Module:
        """The averaged weights where there are any, else the model."""
        return self.model if self.average is None else self.average.module

    def evaluate(self, images: Part, keep: Keep | None = None) -> Score:
        """Each rank looks at its part, all get the score of the whole; `keep` gets this rank's."""
        model = self.evaluated.eval()

        def forward(inputs: Tensor) -> Tensor:
            return self.train_step.forward(inputs, model)

        part, shared = images, 1 < self.ranks.size <= len(images)
        if shared:
            part = images.select(self.ranks.part(torch.arange(len(images))))
        with self._readable():
            sums = _sums(forward, part.to(self.device), self.data.normalise, keep)
        if shared:
            loss, correct, count = self.ranks.sum(torch.tensor(sums, dtype=torch.float64)).tolist()
            sums = loss, int(correct), int(count)
        return _score(*sums, len(images))

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Augmented, normalised inputs and labels of this rank's share of the current batch."""
        epoch, batch = self.sampler.epoch, self.sampler.batch
        started = time.perf_counter()
        pixels, labels = self.feed.batch(indices, epoch, batch, self.share(indices, batch).rows)
        self._waiting += time.perf_counter() - started
        inputs = self.data.normalise(pixels)
        size = self.image_size()
        if size != tuple(inputs.shape[2:]):
            inputs = F.interpolate(inputs, size, mode="bilinear", antialias=True)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return inputs, labels

    def share(self, indices: Tensor, batch: int) -> Share:
        """This rank's, of a batch of this epoch."""
        size = len(indices)
        own = torch.cat(self.ranks.rows(torch.arange(size), self.config.accumulate))
        return self.mix.share(own, size, self.sampler.epoch, batch)

    def image_size(self) -> tuple[int, int]:
        """Height and width in this epoch: they grow from the start size in equal steps."""
        start, epochs = self.config.start_size, self.config.epochs
        grown = min(1.0, self.sampler.epoch / max(1, 2 * epochs // 3))
        share = start + (1 - start) * grown
        height, width = (max(1, round(share * side)) for side in self.data.image_shape[1:])
        return height, width

    def save(self) -> Path | None:
        self._require_finite()
        if self.folder is not None:
            self.last_checkpoint = self.folder.save(self.step, self.state_dict())
        return self.last_checkpoint

    def description(self) -> dict[str, Any]:
        """What `predict` needs beside the weights."""
        return {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "classes": list(self.data.classes),
            "image_shape": list(self.data.image_shape),
            "mean": list(self.data.mean),
            "std": list(self.data.std),
            "fingerprint": self.fingerprint,
            "step": self.step,
            "best": self.best,
            "model": dict(self.evaluated.state_dict()),
        }

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        average = self.average
        return self.description() | {
            "model": dict(self.model.state_dict()),
            "average": None if average is None else dict(average.state_dict()),
            "skipped": self.skipped,
            "optimizer": self.train_step.optimizer.state_dict(),
            "scaler": self.train_step.scaler.state_dict(),
            "sampler": self.sampler.state_dict(),
            "seconds": self.seconds,
            "waited": self.waited,
            "left_out": sorted(self.data.left_out),
            "totals": {k: float(v) for k, v in self._totals.items()},
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.fingerprint:
            raise UserError(
                f"the data ({self.data.name}) is not what this run was trained on: images, "
                "labels or split differ"
            )
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.skipped = state.get("skipped", 0)
        self.train_step.optimizer.load_state_dict(state["optimizer"])
        self.train_step.scaler.load_state_dict(state["scaler"])
        self.sampler.load_state_dict(state["sampler"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.waited = state.get("waited", 0.0)
        self.data.left_out.update(dict.fromkeys(state.get("left_out", ()), ""))
        self.best = state["best"]
        self._reset_totals()
        for key, value in state["totals"].items():
            self._totals[key] += value
        torch.set_rng_state(state["rng"]["torch"])
        if self.device.type == "cuda" and state["rng"]["cuda"]:
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])
        version, internal, gauss = state["rng"]["python"]
        random.setstate((version, tuple(internal), gauss))

    def _train_epoch(self) -> None:
        self.model.train()
        config, sampler, in_a_row = self.config, self.sampler, 0
        coming = enumerate(sampler.rest(), sampler.batch + 1)
        self.feed.expect(
            sampler.epoch, [batch[self.share(batch, number).rows] for number, batch in coming]
        )
        for indices in sampler:
            self.ranks.seed(config.seed, self.step)
            try:
                with self._readable():
                    inputs, labels = self.batch(indices)
            except UnreadableError:
                sampler.batch -= 1  # this batch was not trained on
                raise
            share = self.share(indices, sampler.batch)
            inputs, targets = self.mix(inputs, labels, share, sampler.epoch, sampler.batch)
            self.train_step.set_lr(
                learning_rate(self.step, self.total_steps, config.peak_lr, config.warmup)
            )
            try:
                loss, logits = self.train_step(inputs, targets, len(indices))
            except NonFiniteError as error:
                in_a_row += 1
                if in_a_row > config.max_skipped:
                    raise
                self.step += 1
                self.skipped += 1
                self.record({"kind": "skip", "step": self.step, "reason": str(error)})
                if self._signum() is not None:
                    break
                continue
            in_a_row = 0
            self.step += 1
            if self.average is not None:
                self.average.update_parameters(self.model)
            self._totals["loss"] += loss
            right = logits.argmax(1) == labels[: share.own]
            self._totals["correct"] += self.ranks.sum(right.sum())
            self._totals["images"] += len(indices)
            self._totals["steps"] += 1
            self._log_step(loss)
            if config.save_every and self.step % config.save_every == 0:
                self._save_together()
            if self._signum() is not None:
                break

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """What one rank cannot read ends the run on all, which are then at the same step."""
        error: UserError | None = None
        try:
            yield
        except UserError as caught:
            error = caught
        told = self.ranks.first(None if error is None else str(error))
        if told is not None:
            raise UnreadableError(told) from error

    def _save_together(self) -> Path | None:
        """Saves, when all ranks do: each has met the bad files of its share only."""
        for name, problem in self.ranks.union(self.data.left_out).items():
            leave_out(self.data.left_out, name, problem)
        return self.save()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        self._waiting = 0.0
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            seconds = time.perf_counter() - started
            self.seconds += seconds
            self.waited += self._waiting
            self._totals["seconds"] += seconds
            self._totals["waited"] += self._waiting

    @torch.no_grad()
    def _move_average(self, averaged: Any, current: Any, _count: Any) -> None:
        """averaged ← d·averaged + (1 − d)·current, d = min(ema, n/(n + 9)) at the n-th step.

        The smaller d at first forgets where training began: weights, and statistics above all.
        """
        n = self.step - self.skipped
        decay = min(self.config.ema, n / (n + 9))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - decay)
        else:  # how many batches the statistics have seen
            torch._foreach_copy_(averaged, current)

    def _log_step(self, loss: Tensor) -> None:
        if self.step % LOG_EVERY and self.device.type != "cpu":
            self.progress(self.step, None)
            return
        require_finite_loss(loss)
        self.progress(self.step, float(loss))
        if self.step % LOG_EVERY == 0:
            lr = self.train_step.optimizer.param_groups[0]["lr"]
            self.record({"kind": "step", "step": self.step, "loss": float(loss), "lr": lr})

    def _finish_epoch(self) -> None:
        for module in (self.model, self.average):
            # without --sync-bn each rank has its own running statistics: rank 0's are kept
            self.ranks.equalise([] if module is None else module.buffers())
        self._require_finite()
        if not float(self._totals["steps"]):
            raise NonFiniteError("no step of the epoch had a finite loss")
        score = self.evaluate(self.data.validation)
        totals = {k: float(v) for k, v in self._totals.items()}
        row = {
            "kind": "epoch",
            "epoch": self.sampler.epoch + 1,
            "step": self.step,
            "train_loss": totals["loss"] / totals["steps"],
            "train_accuracy": totals["correct"] / totals["images"],
            "validation_loss": score.loss,
            "validation_accuracy": score.accuracy,
            "seconds": self.seconds,
            "images_per_second": self.step * self.config.batch_size / self.seconds,
            "waiting_share": totals["waited"] / totals["seconds"],
            "skipped": self.skipped,
        }
        self.record(row)
        if self.best is None or (score.accuracy, -score.loss) > (
            self.best["validation_accuracy"],
            -self.best["validation_loss"],
        ):
            best = {k: row[k] for k in ("epoch", "validation_accuracy", "validation_loss")}
            if self.folder is not None:
                self.folder.save_best(self.description() | {"best": best})
            self.best = best  # not before it is written: else a checkpoint would tell of it
        self.sampler.next_epoch()
        self._reset_totals()
        self._save_together()

    def _leave_if_stopped(self, saved: bool = False) -> None:
        signum = self._signum()
        if signum is not None and self.sampler.epoch < self.config.epochs:
            if not saved:
                self._save_together()
            raise Stopped(signum)

    def _signum(self) -> int | None:
        """The signal that any rank has got: all leave after the same step."""
        return self.ranks.highest(self.stop.signum or 0) or None

    def _require_finite(self) -> None:
        require_finite_loss(torch.as_tensor(self._totals["loss"]))
        require_finite(self.model.state_dict())
        if self.average is not None:
            require_finite(self.average.state_dict())

    def _non_finite_advice(self, error: NonFiniteError) -> str:
        where = f"step {self.step + 1}, epoch {self.sampler.epoch + 1}"
        kept = "no checkpoint was written yet"
        if self.last_checkpoint:
            kept = f"last good checkpoint: {self.last_checkpoint}"
        return f"{error} ({where}); training stopped; {kept}; try a lower --lr"

    def _with_saved(self, error: UserError) -> str:
        """A streamed file that cannot be read is met late, and costs no step that was done."""
        saved = self._save_together()
        return (
            str(error) if saved is None else f"{error}; saved {saved}; --resume goes on from there"
        )

    def _reset_totals(self) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        names = ("loss", "correct", "images", "steps", "seconds", "waited")
        self._totals = {k: zero.clone() for k in names}

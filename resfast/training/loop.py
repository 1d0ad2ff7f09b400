"""The training loop: steps, epochs, validation, checkpoints, and stopping without loss.

Interrupted at any step and resumed, a run on the CPU repeats the uninterrupted one bit for bit:
the order and the augmentation are functions of the position, and everything else that changes
(weights, statistics, optimizer, loss scale, random states, running totals) is saved.
"""

from __future__ import annotations

import math
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfast.training.checkpoint import CheckpointFolder, NonFiniteError, require_finite
from resfast.training.config import TrainConfig, UserError
from resfast.training.data import Augment, Dataset, Images, SeededSampler

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = 1
LOG_EVERY = 10
WARMUP_SHARE = 0.05
EVAL_BATCH = 256


class Stopped(Exception):
    """Training was asked to stop; its checkpoint is written."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


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
    gradient becomes dCE/dw + l1·sign(w) + l2·w. Both touch convolution and linear weights only,
    not biases or norms. The returned loss is the cross-entropy alone.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.dtype = getattr(torch, config.dtype)
        self.l1 = config.l1
        self.penalised = penalised_weights(model)
        self.optimizer = build_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def __call__(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.forward(inputs)
        loss = F.cross_entropy(logits, labels)
        objective = loss
        if self.l1:
            objective = loss + self.l1 * sum(w.abs().sum() for w in self.penalised)
        self.optimizer.zero_grad(set_to_none=True)
        # Reading a value waits for a GPU, so there the loop looks at the loss now and then.
        if self.device.type == "cpu":
            require_finite_loss(objective)
        self.scaler.scale(objective).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), logits.detach()

    def forward(self, inputs: Tensor) -> Tensor:
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype if enabled else None, enabled=enabled):
            return self.model(inputs).float()

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
    groups = [{"params": decayed, "weight_decay": config.l2}, {"params": rest, "weight_decay": 0.0}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.peak_lr, momentum=0.9, nesterov=True)
    return torch.optim.Adam(groups, lr=config.peak_lr)


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up over the first steps, then a half cosine down to zero."""
    warmup = max(1, round(WARMUP_SHARE * total))
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


def evaluate(
    forward: Callable[[Tensor], Tensor], images: Images, prepare: Callable[[Tensor], Tensor]
) -> Score:
    """`forward` maps prepared inputs to logits; the caller has set evaluation mode."""
    loss, correct = 0.0, 0
    with torch.no_grad():
        for pixels, labels in zip(
            images.pixels.split(EVAL_BATCH), images.labels.split(EVAL_BATCH), strict=True
        ):
            logits = forward(prepare(pixels))
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            correct += int((logits.argmax(1) == labels).sum())
    return Score(loss / len(images), correct, len(images))


class Trainer:
    """Trains `model` on `data`; `record` gets one dict per logged step and per epoch.

    `folder` None keeps no checkpoints. `stop` is looked at after every step.
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
    ) -> None:
        self.device = device or torch.device("cpu")
        self.config = config
        self.data = data
        self.folder = folder
        self.record = record
        self.progress = progress
        self.stop = stop or StopSignals()
        self.model = place(model, self.device)
        self.train_step = TrainStep(self.model, config, self.device)
        self.train_images = data.train.to(self.device)
        self.sampler = SeededSampler(len(data.train), config.batch_size, config.seed)
        shift = config.shift if config.shift >= 0 else data.image_shape[2] // 8
        self.augment = Augment(shift, config.flip, config.seed)
        self.fingerprint = data.fingerprint()
        self.step = 0
        self.seconds = 0.0
        self.best: dict[str, Any] | None = None
        self.last_checkpoint: Path | None = None
        self._reset_totals()

    @property
    def total_steps(self) -> int:
        return self.config.epochs * self.sampler.batches

    def fit(self) -> None:
        """Trains to the last epoch; raises Stopped or NonFiniteError, checkpoints being sound."""
        while self.sampler.epoch < self.config.epochs:
            try:
                self._train_epoch()
                self._leave_if_stopped()
                self._finish_epoch()
                self._leave_if_stopped(saved=True)
            except NonFiniteError as error:
                raise NonFiniteError(self._non_finite_advice(error)) from None

    def evaluate(self, images: Images) -> Score:
        self.model.eval()
        return evaluate(self.train_step.forward, images.to(self.device), self.data.normalise)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Augmented, normalised inputs and labels of the sampler's current batch."""
        images = self.train_images.select(indices.to(self.device))
        pixels = self.augment(images.pixels, self.sampler.epoch, self.sampler.batch)
        return self.data.normalise(pixels), images.labels

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
            "model": dict(self.model.state_dict()),
        }

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        return self.description() | {
            "optimizer": self.train_step.optimizer.state_dict(),
            "scaler": self.train_step.scaler.state_dict(),
            "sampler": self.sampler.state_dict(),
            "seconds": self.seconds,
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
        self.train_step.optimizer.load_state_dict(state["optimizer"])
        self.train_step.scaler.load_state_dict(state["scaler"])
        self.sampler.load_state_dict(state["sampler"])
        self.step = state["step"]
        self.seconds = state["seconds"]
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
        started = time.perf_counter()
        for indices in self.sampler:
            inputs, labels = self.batch(indices)
            self.train_step.set_lr(learning_rate(self.step, self.total_steps, self.config.peak_lr))
            loss, logits = self.train_step(inputs, labels)
            self.step += 1
            self._totals["loss"] += loss
            self._totals["correct"] += (logits.argmax(1) == labels).sum()
            self._totals["images"] += len(labels)
            self._log_step(loss)
            if self.stop.signum is not None:
                break
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - started

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
        self._require_finite()
        score = self.evaluate(self.data.validation)
        totals = {k: float(v) for k, v in self._totals.items()}
        row = {
            "kind": "epoch",
            "epoch": self.sampler.epoch + 1,
            "step": self.step,
            "train_loss": totals["loss"] / self.sampler.batches,
            "train_accuracy": totals["correct"] / totals["images"],
            "validation_loss": score.loss,
            "validation_accuracy": score.accuracy,
            "seconds": self.seconds,
            "images_per_second": self.step * self.config.batch_size / self.seconds,
        }
        self.record(row)
        if self.best is None or (score.accuracy, -score.loss) > (
            self.best["validation_accuracy"],
            -self.best["validation_loss"],
        ):
            self.best = {k: row[k] for k in ("epoch", "validation_accuracy", "validation_loss")}
            if self.folder is not None:
                self.folder.save_best(self.description())
        self.sampler.next_epoch()
        self._reset_totals()
        self.save()

    def _leave_if_stopped(self, saved: bool = False) -> None:
        if self.stop.signum is not None and self.sampler.epoch < self.config.epochs:
            if not saved:
                self.save()
            raise Stopped(self.stop.signum)

    def _require_finite(self) -> None:
        require_finite_loss(torch.as_tensor(self._totals["loss"]))
        require_finite(self.model.state_dict())

    def _non_finite_advice(self, error: NonFiniteError) -> str:
        where = f"step {self.step + 1}, epoch {self.sampler.epoch + 1}"
        kept = "no checkpoint was written yet"
        if self.last_checkpoint:
            kept = f"last good checkpoint: {self.last_checkpoint}"
        return f"{error} ({where}); training stopped; {kept}; try a lower --lr"

    def _reset_totals(self) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        self._totals = {k: zero.clone() for k in ("loss", "correct", "images")}

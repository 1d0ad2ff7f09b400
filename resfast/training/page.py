"""The page of a run, `run.html`: all there is to know of it, in one file that opens from disk."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field, fields
from html import escape
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resfast.diagnostics.curves import draw_curves
from resfast.training.config import TrainConfig
from resfast.training.data import Dataset

PAGE = "run.html"
MATRIX_CLASSES = 50  # beyond, a table of counts is too wide to read
PAIRS = 30
MISTAKES = 24
PICTURE_SIDE = 160  # larger ones are shrunk, so that a page stays some megabytes
# Stands for the text's colour, which depends on the reader's theme, in what matplotlib draws.
_INK = "#010203"

STYLE = """
:root { color-scheme: light dark; --line: #8886; --accent: 31 119 180; }
:root { --paper: #ffffff; --ink: #1a1a1a; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181d; --ink: #e6e6e6; } }
body { color: var(--ink); background: var(--paper); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
table { border-collapse: collapse; } th { text-align: left; font-weight: 600; }
td, th { padding: .15rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
.wide { overflow-x: auto; } .wide svg { max-width: 100%; height: auto; }
.matrix td { text-align: right; background: rgb(var(--accent) / calc(var(--share) * 60%)); }
.matrix .right { outline: 1px solid var(--line); }
.matrix thead th { writing-mode: sideways-lr; vertical-align: bottom; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { width: 10rem; margin: 0; font-size: .85rem; overflow-wrap: anywhere; }
figure img { width: 100%; image-rendering: pixelated; border: 1px solid var(--line); }
"""


@dataclass
class Answers:
    """Gathers what a network says of images, batch by batch, and the worst mistakes' pixels.

    `labels`: int64 ``[B]`` each; `logits`: float32 ``[B, classes]`` each; `pictures`: by the
    image's place among all.
    """

    labels: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    pictures: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, pixels: Tensor, labels: Tensor, logits: Tensor) -> None:
        first = sum(map(len, self.labels))
        self.labels.append(labels.cpu())
        self.logits.append(logits.float().cpu())
        all_labels, all_logits = torch.cat(self.labels), torch.cat(self.logits)
        loss = F.cross_entropy(all_logits, all_labels, reduction="none")
        worst = _worst(all_labels, all_logits.argmax(1), loss).tolist()
        self.pictures = {
            i: self.pictures[i] if i < first else pixels[i - first].cpu().clone() for i in worst
        }


@dataclass(frozen=True)
class Predictions:
    """What a network said of the test images, a row each.

    `labels`, `predicted`: int64 ``[N]``. `loss` (cross-entropy), `probability` (of the predicted
    class), `true_probability`: float32 ``[N]``. `pictures`: pixels of the images ``worst()``, in
    that order, uint8 or float32 in [0, 1], ``[M, C, H, W]``; if `sound`, spectrograms.
    """

    classes: list[str]
    labels: Tensor
    predicted: Tensor
    probability: Tensor
    true_probability: Tensor
    loss: Tensor
    pictures: Tensor
    sound: bool = False

    @classmethod
    def of(cls, answers: Answers, data: Dataset) -> Predictions:
        logits, labels = torch.cat(answers.logits), torch.cat(answers.labels)
        probability, predicted = logits.softmax(1).max(1)
        loss = F.cross_entropy(logits, labels, reduction="none")
        worst = [answers.pictures[i] for i in _worst(labels, predicted, loss).tolist()]
        pictures = torch.stack(worst) if worst else torch.empty(0, *data.image_shape)
        # images in folders have three channels, so one that has not is no image
        sound = data.image_shape[0] == 1 and data.name != "digits"
        return cls(
            list(data.classes),
            labels,
            predicted,
            probability,
            (-loss).exp(),
            loss,
            pictures,
            sound,
        )

    def worst(self) -> Tensor:
        """Indices of the mistakes of highest loss, the highest first, at most MISTAKES."""
        return _worst(self.labels, self.predicted, self.loss)

    def confusion(self) -> Tensor:
        """int64 ``[classes, classes]``: images of the row's class taken for the column's."""
        n = len(self.classes)
        return (self.labels * n + self.predicted).bincount(minlength=n * n).view(n, n)


def render(metrics: dict[str, Any], rows: list[dict[str, Any]], predictions: Predictions) -> str:
    """HTML of a run from its metrics.json, the rows of its metrics.jsonl, and its predictions."""
    title = escape(f"{metrics['model']['name']} on {metrics['data']['name']}")
    sections = [
        ("Result", _pairs_table(_result(metrics))),
        ("Curves", f'<div class="wide">{_curves(rows)}</div>'),
        ("Speed", _pairs_table(_speed(metrics))),
        ("Classes taken for each other", _confusion(predictions)),
        ("Worst mistakes", _mistakes(predictions)),
        ("Data", _pairs_table(_data(metrics))),
        ("Options", _options(metrics["options"])),
        ("Machine", _pairs_table(_machine(metrics, rows))),
    ]
    body = "\n".join(f"<section><h2>{name}</h2>\n{text}</section>" for name, text in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def _worst(labels: Tensor, predicted: Tensor, loss: Tensor) -> Tensor:
    wrong = (labels != predicted).nonzero().flatten()
    return wrong[loss[wrong].argsort(descending=True, stable=True)][:MISTAKES]


def _pairs_table(rows: list[tuple[str, str]]) -> str:
    lines = (f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows)
    return f"<table>{''.join(lines)}</table>"


def _result(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    test, best = metrics["test"], metrics["best"]
    low, high = test["interval_95"]
    return [
        (
            "test accuracy",
            f"{test['accuracy']:.2%}: {test['correct']:,} of {test['images']:,}; "
            f"95 % interval {low:.1%}–{high:.1%}",
        ),
        ("test loss", f"{test['loss']:.4f}"),
        ("weights", test["checkpoint"]),
        (
            "best on validation",
            f"epoch {best['epoch']}: {best['validation_accuracy']:.2%}, "
            f"loss {best['validation_loss']:.4f}",
        ),
        ("parameters", f"{metrics['model']['parameters']:,}"),
    ]


def _speed(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    training, compared = metrics["training"], metrics["comparison"]
    rows = [
        (
            "training",
            f"{training['images_per_second']:,.0f} images/s over {training['seconds']:,.1f} s, "
            f"{training['epochs']} epochs, {training['steps']:,} steps, augmentation included",
        )
    ]
    if compared is None:
        return [*rows, ("comparison with eager", "not made")]
    return [
        *rows,
        ("step, resfast", f"{compared['resfast_images_per_second']:,.0f} images/s"),
        ("step, eager", f"{compared['eager_images_per_second']:,.0f} images/s"),
        ("resfast / eager", f"{compared['verdict']} ({compared['what']})"),
    ]


def _data(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    data = metrics["data"]
    shape = "×".join(map(str, data["image_shape"]))
    sizes = [(f"{name} images", f"{count:,}") for name, count in data["sizes"].items()]
    return [
        ("data", data["name"]),
        *sizes,
        ("classes", f"{data['classes']:,}"),
        ("channels × height × width", shape),
        ("files left out", f"{data['skipped_files']:,}"),
        ("fingerprint", data["fingerprint"]),
    ]


def _options(options: dict[str, Any]) -> str:
    given: list[tuple[str, str]] = []
    usual: list[tuple[str, str]] = []
    for option in fields(TrainConfig):
        flag, value = "--" + option.name.replace("_", "-"), options[option.name]
        if value == option.default:
            usual.append((flag, str(option.metadata.get("shown", value))))
        else:
            given.append((flag, str(value)))
    changed = _pairs_table(given) if given else "<p>All are at their defaults.</p>"
    return (
        f"{changed}<details><summary>{len(usual)} at their defaults</summary>"
        f"{_pairs_table(usual)}</details>"
    )


def _machine(metrics: dict[str, Any], rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    resumed = [f"{row['step']:,}" for row in rows if row["kind"] == "resume"]
    started = [row["date"] for row in rows if row["kind"] == "start"]
    return [
        *((f"device {k}", str(v)) for k, v in metrics["device"].items()),
        *((k, str(v)) for k, v in metrics["versions"].items()),
        ("started", (started or [metrics["date"]])[0]),
        ("finished", metrics["finished"]),
        ("resumed at step", ", ".join(resumed) or "never"),
        ("steps skipped", str(sum(row["kind"] == "skip" for row in rows))),
    ]


def _curves(rows: list[dict[str, Any]]) -> str:
    """matplotlib's SVG, its ink in the colour of the page's text."""
    import matplotlib

    drawn = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(drawn, _INK)
    style |= {"figure.facecolor": "none", "axes.facecolor": "none"}
    style |= {"svg.fonttype": "none", "svg.hashsalt": "resfast"}
    file = io.BytesIO()
    with matplotlib.rc_context(style):
        draw_curves(rows, file, None, kind="svg")
    svg = file.getvalue().decode()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows them
    what = "Loss, accuracy and learning rate over the epochs"
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{what}"', 1)
    return svg.replace("xlink:href", "href").replace(_INK, "currentColor")


def _confusion(predictions: Predictions) -> str:
    counts = predictions.confusion()
    if len(counts) > MATRIX_CLASSES:
        return _most_confused(predictions, counts)
    names = [escape(name) for name in predictions.classes]
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = []
    for i, row in enumerate(counts.tolist()):
        total = max(1, sum(row))
        cells = "".join(
            f'<td class="{"count right" if i == j else "count"}" style="--share:{n / total:.3f}">'
            f"{n or ''}</td>"
            for j, n in enumerate(row)
        )
        lines.append(f"<tr><th>{names[i]}</th>{cells}<th>{row[i] / total:.1%}</th></tr>")
    return (
        "<p>Rows: the true class; columns: the predicted one; last: the share that is right.</p>"
        '<div class="wide"><table class="matrix">'
        f"<thead><tr><th></th>{head}<th>right</th></tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _most_confused(predictions: Predictions, counts: Tensor) -> str:
    classes, n = predictions.classes, len(counts)
    totals = counts.sum(1)
    mistakes = (counts - counts.diag().diag()).flatten()
    lines = []
    for index in mistakes.argsort(descending=True, stable=True)[:PAIRS].tolist():
        true, predicted, count = index // n, index % n, int(mistakes[index])
        if count:
            lines.append(
                f"<tr><td>{escape(classes[true])}</td><td>{escape(classes[predicted])}</td>"
                f'<td class="count">{count}</td><td>{count / int(totals[true]):.1%}</td></tr>'
            )
    return (
        f"<p>The {len(lines)} most frequent confusions among {n:,} classes; "
        f"{int(mistakes.sum()):,} mistakes in all.</p>"
        "<table><thead><tr><th>true class</th><th>predicted</th><th>images</th>"
        f"<th>of the class</th></tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _mistakes(predictions: Predictions) -> str:
    worst, wrong = predictions.worst(), int((predictions.labels != predictions.predicted).sum())
    if not wrong:
        return "<p>There are none.</p>"
    figures = []
    for pixels, i in zip(predictions.pictures, worst.tolist(), strict=True):
        true = escape(predictions.classes[int(predictions.labels[i])])
        taken = escape(predictions.classes[int(predictions.predicted[i])])
        figures.append(
            f'<figure data-index="{i}"><img alt="test image {i}" '
            f'src="data:image/png;base64,{_png(pixels, predictions.sound)}">'
            f"<figcaption>is <b>{true}</b> ({float(predictions.true_probability[i]):.1%})<br>"
            f"taken for <b>{taken}</b> ({float(predictions.probability[i]):.1%})<br>"
            f"test image {i}, loss {float(predictions.loss[i]):.2f}</figcaption></figure>"
        )
    shown = f"The {len(figures)} of highest loss among {wrong:,}."
    if predictions.sound:
        shown += " Spectrograms: time to the right, frequency upwards."
    return f'<p>{shown}</p><div class="pictures">{"".join(figures)}</div>'


def _png(pixels: Tensor, sound: bool) -> str:
    """base64 of a PNG of C×H×W pixels; other than one or three channels: the first."""
    from matplotlib import image

    values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    scale = PICTURE_SIDE / max(values.shape[1:])
    if scale < 1:
        size = [max(1, round(scale * side)) for side in values.shape[1:]]
        values = F.interpolate(values[None], size, mode="bilinear", antialias=True)[0]
    values = values.clamp(0, 1)
    shown = values.permute(1, 2, 0) if len(values) == 3 else values[0]
    style: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1}
    if sound:
        style |= {"cmap": "magma", "origin": "lower"}
    file = io.BytesIO()
    image.imsave(file, shown.numpy(), format="png", **style)
    return base64.b64encode(file.getvalue()).decode()

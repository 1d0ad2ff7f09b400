"""The page of a run: well-formed, closed in itself, and what it says is so."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from resfast import cli
from resfast.training.config import TrainConfig
from resfast.training.data import Dataset, Images, load_dataset
from resfast.training.page import MISTAKES, PAIRS, Answers, Predictions, render
from resfast.training.predict import find_checkpoint, restore_model

pytest.importorskip("matplotlib", reason="draws curves and pictures")
pytestmark = pytest.mark.usefixtures("one_thread", "warnings_format")

VOID = {"meta", "img", "br", "link", "input", "hr"}
NASTY = """<script>alert("1")</script> & 'co'"""


class Page(HTMLParser):
    """Elements in order, each (tag, attributes, text); unbalanced tags are errors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self.open: list[tuple[str, dict, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2].append(data)

    def texts(self, tag: str, kind: str | None = None) -> list[str]:
        return [
            "".join(text)
            for name, attributes, text in self.elements
            if name == tag and (kind is None or kind in (attributes.get("class") or "").split())
        ]


def made_up(classes: list[str], count: int = 40, channels: int = 1, side: int = 8) -> Dataset:
    pixels = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8)
    images = Images(pixels, torch.arange(count) % len(classes))
    return Dataset(NASTY, classes, images, images, images, [0.5] * channels, [0.5] * channels)


def metrics_of(data: Dataset, comparison: dict | None = None) -> dict:
    return {
        "options": TrainConfig(lr=0.5).to_dict(),
        "versions": {"torch": NASTY},
        "date": "2026-01-01",
        "finished": "2026-01-02",
        "device": {"type": "cpu", "name": NASTY},
        "model": {"name": NASTY, "parameters": 1234},
        "data": {
            "name": data.name,
            "classes": len(data.classes),
            "image_shape": list(data.image_shape),
            "sizes": data.sizes(),
            "skipped_files": 17,
            "fingerprint": "abc",
        },
        "test": {
            "accuracy": 0.5,
            "correct": 20,
            "images": 40,
            "loss": 1.5,
            "interval_95": [0.4, 0.6],
            "checkpoint": "best.pt",
        },
        "best": {"epoch": 1, "validation_accuracy": 0.5, "validation_loss": 1.0},
        "training": {"epochs": 2, "steps": 20, "seconds": 1.0, "images_per_second": 640.0},
        "comparison": comparison,
    }


def rows_of() -> list[dict]:
    epoch = dict.fromkeys(("train_loss", "validation_loss"), 1.0)
    epoch |= dict.fromkeys(("train_accuracy", "validation_accuracy"), 0.5)
    return [
        {"kind": "start", "date": "2025-12-31"},
        {"kind": "step", "step": 10, "loss": 2.0, "lr": 0.1},
        {"kind": "epoch", "step": 10, "epoch": 1, **epoch},
        {"kind": "resume", "step": 10},
        {"kind": "skip", "step": 11, "reason": NASTY},
        {"kind": "step", "step": 20, "loss": 1.0, "lr": 0.2},
        {"kind": "epoch", "step": 20, "epoch": 2, **epoch},
    ]


def predictions_of(logits: torch.Tensor, data: Dataset, batch: int = 16) -> Predictions:
    answers = Answers()
    for (pixels, labels), part in zip(data.test.batches(batch), logits.split(batch), strict=True):
        answers(pixels, labels, part)
    return Predictions.of(answers, data)


def everything() -> tuple[dict, list[dict], Predictions]:
    """What `render` takes, of a run that is wrong of every image."""
    data = made_up(["a", "b"])
    logits = -5.0 * F.one_hot(data.test.labels, 2)
    return metrics_of(data), rows_of(), predictions_of(logits, data)


def shown(data: Dataset, logits: torch.Tensor, comparison: dict | None = None) -> Page:
    page = render(metrics_of(data, comparison), rows_of(), predictions_of(logits, data))
    assert_closed(page)
    return Page(page)


def assert_closed(page: str) -> None:
    """Nothing is fetched and nothing runs."""
    assert not re.search(r"(?i)https?:|<script|<link|<iframe|@import|\son\w+=", page)
    for value in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert value.startswith(("data:image/png;base64,", "#"))
    for value in re.findall(r"url\(([^)]*)\)", page):
        assert value.startswith("#")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    options = ["--data", "synthetic", "--image-size", "8", "--epochs", "1", "--quiet"]
    assert cli.main(["train", *options, "--no-compare", "--out", str(folder)]) == 0
    return folder


def test_a_run_ends_with_a_page_that_says_what_its_best_checkpoint_does(run):
    """Matrix and mistakes against the checkpoint, run here on the test images by hand."""
    text = (run / "run.html").read_text()
    assert_closed(text)
    page = Page(text)
    state, path = find_checkpoint(run)
    data = load_dataset(TrainConfig.from_dict(state["config"]))
    with torch.no_grad():
        logits = restore_model(state, path).eval()(data.normalise(data.test.pixels))
    metrics = json.loads((run / "metrics.json").read_text())
    counts = torch.tensor([int(c or 0) for c in page.texts("td", "count")]).view(10, 10)
    assert counts.sum() == metrics["test"]["images"] == len(data.test)
    assert counts.diag().sum() == metrics["test"]["correct"]
    assert torch.equal(counts.sum(1), data.test.labels.bincount(minlength=10))
    assert torch.equal(counts.sum(0), logits.argmax(1).bincount(minlength=10))

    loss = F.cross_entropy(logits, data.test.labels, reduction="none")
    loss[logits.argmax(1) == data.test.labels] = -1
    wrong = int((loss >= 0).sum())
    listed = [int(a["data-index"]) for tag, a, _ in page.elements if tag == "figure"]
    assert len(listed) == min(MISTAKES, wrong) > 0
    torch.testing.assert_close(loss[listed], loss.topk(len(listed)).values)


def test_the_table_names_the_page_and_a_resumed_run_writes_it_anew(run, capsys):
    (run / "run.html").unlink()
    assert cli.main(["train", "--resume", str(run), "--no-compare"]) == 0
    assert "run.html" in capsys.readouterr().out
    page = Page((run / "run.html").read_text())
    cells = dict(zip(page.texts("th"), page.texts("td"), strict=False))
    assert "resumed at step" in cells
    assert re.search(r"resumed at step\d", "".join(page.texts("tr")))


@pytest.mark.parametrize("count", [3, 60], ids=["matrix", "pairs"])
def test_names_are_escaped(count):
    data = made_up([f"{i} {NASTY}" for i in range(count)], count=2 * count)
    page = shown(data, torch.randn(2 * count, count))
    assert page.texts("h1") == [f"{NASTY} on {NASTY}"]
    assert any(NASTY in text for text in page.texts("figcaption"))
    assert f"0 {NASTY}" in page.texts("th") + page.texts("td")


def test_many_classes_are_a_list_of_the_most_confused():
    classes = [f"class {i}" for i in range(60)]
    data = made_up(classes, count=601)  # one more of class 0 than of the others
    logits = F.one_hot(data.test.labels, 60).float()
    for index in (7, 67, 127):
        logits[index] = F.one_hot(torch.tensor(0), 60)
    logits[1] = F.one_hot(torch.tensor(3), 60)
    page = shown(data, logits)
    rows = [text for text in page.texts("tr") if "class " in text]
    assert rows == ["class 7class 0330.0%", "class 1class 3110.0%"]
    assert not page.texts("table", "matrix")
    assert len(shown(data, torch.randn(601, 60)).texts("td", "count")) == PAIRS


def test_pictures_are_the_pixels():
    """Decoded again; a mistake's picture is its image, not another's."""
    image_module = pytest.importorskip("PIL.Image")
    data = made_up(["a", "b"], count=6, channels=3)
    logits = torch.tensor([[0.0, 9.0], [0.0, 1.0], [0.0, 2.0], [1.5, 0.0], [5.0, 0.0], [3.0, 0.0]])
    page = shown(data, logits)
    found = [a for tag, a, _ in page.elements if tag == "figure"]
    assert [int(a["data-index"]) for a in found] == [0, 5, 2, 3]
    for index, source in zip((0, 5, 2, 3), sources(page), strict=True):
        pixels = image_module.open(io.BytesIO(base64.b64decode(source))).convert("RGB").tobytes()
        flat = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(8, 8, 3)
        assert torch.equal(flat.permute(2, 0, 1), data.test.pixels[index])
    first, *_ = page.texts("figcaption")
    assert first == "is a (0.0%)taken for b (100.0%)test image 0, loss 9.00"


def sources(page: Page) -> list[str]:
    return [a["src"].partition(",")[2] for tag, a, _ in page.elements if tag == "img"]


def test_spectrograms_have_low_frequencies_below():
    image_module = pytest.importorskip("PIL.Image")
    data = made_up(["a", "b"], count=2)
    pixels = torch.zeros(2, 1, 8, 400)
    pixels[:, :, 0] = 1.0  # the lowest band, loud; too long, so the picture is made smaller
    data.test = data.train = Images(pixels, torch.tensor([0, 1]))
    page = shown(data, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    (source,) = sources(page)
    picture = image_module.open(io.BytesIO(base64.b64decode(source))).convert("L")
    assert max(picture.size) == 160
    assert picture.getpixel((80, picture.height - 1)) > picture.getpixel((80, 0)) + 50
    assert any("Spectrograms" in text for text in page.texts("p"))


def test_a_run_without_mistakes_or_comparison_says_so():
    data = made_up(["a", "b"])
    right = F.one_hot(data.test.labels, 2).float()
    page = shown(data, right)
    assert "There are none." in page.texts("p")
    assert not page.texts("figure")
    text = "".join(page.texts("tr"))
    for said in (
        "comparison with eagernot made",
        "files left out17",
        "--lr0.5",
        "started2025-12-31",
        "resumed at step10",
        "steps skipped1",
        "test accuracy50.00%: 20 of 40; 95 % interval 40.0%–60.0%",
        "channels × height × width1×8×8",
    ):
        assert said in text, said


def test_the_comparison_is_there():
    compared = {
        "what": "a step",
        "resfast_images_per_second": 1200.0,
        "eager_images_per_second": 1000.0,
        "verdict": "1.20×",
    }
    data = made_up(["a", "b"])
    text = "".join(shown(data, torch.randn(40, 2), compared).texts("tr"))
    assert "step, resfast1,200 images/s" in text
    assert "step, eager1,000 images/s" in text
    assert "resfast / eager1.20× (a step)" in text


def test_curves_take_the_colour_of_the_text_and_have_three_panels():
    data = made_up(["a", "b"])
    page = shown(data, torch.randn(40, 2))
    (svg,) = (text for tag, _, text in page.elements if tag == "svg")
    words = " ".join(" ".join(svg).split())
    for label in ("cross-entropy", "accuracy", "learning rate", "validation", "one batch"):
        assert label in words
    assert any("currentColor" in (a.get("style") or "") for _, a, _ in page.elements)


def brightness(rgb: tuple[float, ...]) -> float:
    """WCAG 2's relative luminance of sRGB in 0 … 255."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)
    ]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    low, high = sorted((brightness(a), brightness(b)))
    return (high + 0.05) / (low + 0.05)


def rgb(colour: str) -> tuple[float, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_curves_stand_out_from_the_page(theme):
    """As WCAG 2 asks: 4.5:1 of text, 3:1 of lines. Grid and frames are there to be overlooked."""
    text = render(*everything())
    dark = re.search(r"@media \(prefers-color-scheme: dark\) \{(.*)\}\n", text)
    light = text.replace(dark[0], "")
    found = dict(re.findall(r"--(\w+): ([^;]+);", light))
    if theme == "dark":
        found |= dict(re.findall(r"--(\w+): ([^;]+);", dark[1]))
    assert "body { color: var(--ink); background: var(--paper); }" in text
    ink, paper = rgb(found["ink"]), rgb(found["paper"])
    assert contrast(ink, paper) >= 4.5
    accent = tuple(map(float, found["accent"].split()))
    full = float(re.search(r"rgb\(var\(--accent\) / calc\(var\(--share\) \* (\d+)%\)\)", text)[1])
    for share in torch.linspace(0, full / 100, 20).tolist():
        cell = [share * a + (1 - share) * p for a, p in zip(accent, paper, strict=True)]
        assert contrast(ink, cell) >= 4.5, share

    styles = [a.get("style") or "" for _, a, _ in Page(text).elements]
    drawn = [s for s in styles if "opacity" not in s]
    curves = {c for s in drawn for c in re.findall(r"(?:stroke|fill): (#\w+)", s)}
    assert len(curves) == 4, "train, validation, one batch, learning rate"
    for colour in curves:
        assert contrast(rgb(colour), paper) >= 3, colour


def test_what_is_seen_has_words_too():
    page = Page(render(*everything()))
    attributes = {tag: a for tag, a, _ in page.elements}
    assert attributes["html"]["lang"] == "en"
    assert page.texts("title") == [f"{NASTY} on {NASTY}"]
    assert attributes["svg"]["role"] == "img"
    assert "accuracy" in attributes["svg"]["aria-label"]
    pictures = [a for tag, a, _ in page.elements if tag == "img"]
    assert len(pictures) == MISTAKES
    assert all(a["alt"].startswith("test image ") for a in pictures)
    names = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(set(names)) == len(names) > 0


def test_rendering_is_a_function_of_its_arguments():
    arguments = everything()
    first = render(*arguments)
    assert render(*arguments) == first
    other = dataclasses.replace(arguments[2], predicted=arguments[2].labels)
    assert render(*arguments[:2], other) != first

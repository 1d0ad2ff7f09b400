"""The command line: options, exit statuses, one-line errors, files of a run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from called import call

from resfast import __version__, cli
from resfast.training import checkpoint
from resfast.training.checkpoint import CheckpointFolder, write_atomically

sklearn = pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="`resfast train` draws curves")


@pytest.fixture(autouse=True)
def _process_state():
    """Commands set the number of threads and install a format for warnings."""
    import warnings

    threads, formatwarning = torch.get_num_threads(), warnings.formatwarning
    yield
    torch.set_num_threads(threads)
    warnings.formatwarning = formatwarning


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of three epochs, comparison included; do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert cli.main(["train", "--epochs", "3", "--quiet", "--out", str(folder)]) == 0
    return folder


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lr", "0"], "--lr must be a finite number above 0"),
        (["--lr", "nan"], "--lr must be a finite number above 0"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--epochs", "1.5"], "argument --epochs: invalid int value"),
        (["--batch-size", "1"], "--batch-size must be at least 2"),
        (["--batch-size", "5000"], "--batch-size 5000 is more than the 1259 training images"),
        (["--l1", "-1"], "--l1 must be a finite number of at least 0"),
        (["--l2", "inf"], "--l2 must be a finite number of at least 0"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--threads", "-2"], "--threads must be at least 0"),
        (["--image-size", "-8"], "--image-size must be at least 0"),
        (["--shift", "-2"], "--shift must be at least -1"),
        (["--optimizer", "lion"], "argument --optimizer: invalid choice: 'lion'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--model", "resnet19"], "did you mean resnet1"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "meta"], "--device must be auto, cpu, cuda or cuda:N, got 'meta'"),
        (["--data", "no/such/folder"], "neither digits, synthetic nor an existing folder"),
        (["--data", __file__], "is a file; give the folder"),
        (["--resume", "no/such/run"], "no such folder"),
        (["--resume", "a", "--out", "b"], "exclude each other"),
        (["--epoch", "3"], "unrecognized arguments: --epoch"),
    ],
)
def test_bad_training_options(capsys, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capsys, "train", *arguments)
    assert status == 2
    assert expected in one_line(err)
    assert out == ""
    assert not list(tmp_path.iterdir()), "a refused run leaves nothing behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["train", "check"])
def test_cuda_without_a_gpu(capsys, command):
    status, _, err = call(capsys, command, "--device", "cuda")
    assert status == 2
    assert "--device cuda: " in one_line(err)


def test_out_that_is_taken(capsys, run):
    status, _, err = call(capsys, "train", "--out", str(run))
    assert status == 2
    assert "not empty" in one_line(err)


def test_help_and_version(capsys):
    assert call(capsys, "--version") == (0, f"resfast {__version__}\n", "")
    for arguments in (["--help"], ["train", "--help"], ["predict", "--help"], ["check", "--help"]):
        status, out, _ = call(capsys, *arguments)
        assert status == 0
        assert "examples:\n  resfast" in out
    assert "--batch-size" in call(capsys, "train", "--help")[1]
    assert call(capsys)[0] == 2
    assert "invalid choice: 'fit'" in one_line(call(capsys, "fit")[2])


def test_run_folder_holds_what_it_should(run):
    names = {p.name for p in run.iterdir()}
    assert names == {
        "best.pt",
        "checkpoint-00000038.pt",
        "checkpoint-00000057.pt",
        "curve.png",
        "metrics.json",
        "metrics.jsonl",
        "run.html",
    }
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_content(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["versions"]["resfast"] == __version__
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["device"]["type"] in ("cpu", "cuda")
    assert metrics["date"] <= metrics["finished"]
    assert metrics["options"]["epochs"] == 3
    assert metrics["data"]["sizes"] == {"train": 1259, "validation": 179, "test": 359}
    test = metrics["test"]
    assert test["accuracy"] == test["correct"] / 359
    assert test["interval_95"][0] < test["accuracy"] < test["interval_95"][1]
    assert test["accuracy"] > 0.8
    training = metrics["training"]
    assert training["steps"] == 57
    assert training["images_per_second"] == pytest.approx(57 * 64 / training["seconds"])
    comparison = metrics["comparison"]
    assert comparison["rounds"] >= 7
    assert comparison["low"] <= comparison["ratio"] <= comparison["high"]
    assert comparison["differs"] == (not comparison["low"] <= 1 <= comparison["high"])

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows].count("start") == 1
    assert [row["step"] for row in rows if row["kind"] == "step"] == [10, 20, 30, 40, 50]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [row["epoch"] for row in epochs] == [1, 2, 3]
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    best = max(epochs, key=lambda row: (row["validation_accuracy"], -row["validation_loss"]))
    assert metrics["best"]["epoch"] == best["epoch"]


def test_table_names_the_run_folder_and_the_accuracy(capsys, tmp_path):
    out = tmp_path / "here"
    options = ["--epochs", "1", "--no-compare", "--data", "synthetic", "--image-size", "8"]
    status, text, err = call(capsys, "train", *options, "--out", str(out))
    assert status == 0
    assert "test accuracy" in text
    assert str(out) in text
    assert "eager" not in text
    assert "epoch 1/1" in err
    assert json.loads((out / "metrics.json").read_text())["comparison"] is None


def test_default_folders_are_new_each_time(tmp_path, monkeypatch):
    from resfast.training.config import TrainConfig
    from resfast.training.run import _new_folder

    monkeypatch.chdir(tmp_path)
    folders = {_new_folder(None, TrainConfig()) for _ in range(3)}
    assert len(folders) == 3
    assert all(f.is_dir() and f.parent == Path("runs") for f in folders)


def test_predict_repeats_the_runs_test_accuracy(capsys, run):
    status, out, _ = call(capsys, "predict", str(run), "--json", "--show", "3")
    assert status == 0
    result = json.loads(out)
    metrics = json.loads((run / "metrics.json").read_text())
    assert result["correct"] == metrics["test"]["correct"]
    assert len(result["predictions"]) == 3
    status, out, _ = call(capsys, "predict", str(run / "best.pt"))
    assert status == 0
    assert f"{metrics['test']['accuracy']:.2%} of 359 held-out images of digits" in out


def test_predict_reads_images(capsys, run, tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    from sklearn.datasets import load_digits

    raw = load_digits()
    paths = []
    for number in range(20):
        pixels = (255 - raw.images[number] / 16 * 255).astype("uint8")
        image = image_module.fromarray(pixels).resize((16, 16), image_module.Resampling.NEAREST)
        paths.append(str(tmp_path / f"{number}.png"))
        image.convert("RGB").save(paths[-1])
    status, out, _ = call(capsys, "predict", str(run), *paths, "--invert", "--json")
    assert status == 0
    predicted = [row["predicted"] for row in json.loads(out)["predictions"]]
    right = sum(p == str(t) for p, t in zip(predicted, raw.target, strict=False))
    assert right >= 16


def test_predict_names_the_likeliest_classes(capsys, run):
    status, out, _ = call(capsys, "predict", str(run), "--json", "--show", "2", "--top", "3")
    assert status == 0
    for row in json.loads(out)["predictions"]:
        assert len({each["class"] for each in row["top"]}) == 3
        chances = [each["probability"] for each in row["top"]]
        assert chances == sorted(chances, reverse=True)
        assert (row["predicted"], row["probability"]) == tuple(row["top"][0].values())
    _, out, _ = call(capsys, "predict", str(run), "--show", "1", "--top", "20")
    (line,) = [line for line in out.splitlines() if "test image 0" in line]
    assert line.count("%)") == 10  # all classes there are


def test_predict_refuses_data_it_may_have_trained_on(capsys, run):
    status, _, err = call(capsys, "predict", str(run), "--data", "synthetic")
    assert status == 1
    assert "is not what this checkpoint was trained on" in one_line(err)


def test_predict_names_what_is_missing_or_damaged(capsys, run, tmp_path):
    status, _, err = call(capsys, "predict", str(tmp_path / "none"))
    assert status == 2
    assert "no such run folder or checkpoint" in one_line(err)
    status, _, err = call(capsys, "predict", str(run), str(tmp_path / "none.png"))
    assert status == 1
    assert "no image at" in one_line(err)
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes((run / "best.pt").read_bytes()[:-1000])
    status, _, err = call(capsys, "predict", str(damaged))
    assert status == 1
    assert "damaged.pt is damaged" in one_line(err)
    with pytest.raises(Exception, match="is damaged"):
        cli.main(["predict", "--debug", str(damaged)])


def copy_run(run: Path, target: Path) -> Path:
    target.mkdir()
    for file in run.iterdir():
        write_atomically(target / file.name, file.read_bytes())
    return target


def test_predict_falls_back_when_the_best_is_damaged(capsys, run, tmp_path):
    copy = copy_run(run, tmp_path / "copy")
    (copy / "best.pt").write_bytes(b"x" * 500)
    with pytest.warns(UserWarning, match=r"best\.pt is damaged.*checkpoint-00000057\.pt"):
        status, out, _ = call(capsys, "predict", str(copy), "--json")
    assert status == 0
    assert json.loads(out)["checkpoint"].endswith("checkpoint-00000057.pt")


def test_resume_of_a_damaged_run_goes_on_from_the_previous(run, tmp_path):
    copy = copy_run(run, tmp_path / "copy")
    newest = copy / "checkpoint-00000057.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match=r"00000057\.pt is damaged.*using checkpoint-00000038"):
        assert cli.main(["train", "--resume", str(copy), "--quiet", "--no-compare"]) == 0
    redone = CheckpointFolder(copy).load_latest()[0]
    original = CheckpointFolder(run).load_latest()[0]
    assert redone["step"] == original["step"] == 57
    for name, tensor in original["model"].items():
        assert torch.equal(tensor, redone["model"][name]), name


@pytest.mark.parametrize("best", ["worst", "damaged"])
def test_test_accuracy_is_of_the_best_checkpoint(capsys, run, tmp_path, best):
    """A finished run, resumed, measures best.pt: here one that always answers the same digit."""
    copy = copy_run(run, tmp_path / "copy")
    state = checkpoint.load(copy / "best.pt")
    state["model"]["fc.weight"].zero_()
    checkpoint.save(copy / "best.pt", state)
    if best == "damaged":
        (copy / "best.pt").write_bytes((copy / "best.pt").read_bytes()[:-1])
        with pytest.warns(UserWarning, match=r"best\.pt is damaged.*using checkpoint-00000057"):
            status, out, _ = call(capsys, "train", "--resume", str(copy), "--no-compare")
    else:
        status, out, _ = call(capsys, "train", "--resume", str(copy), "--no-compare")
    assert status == 0
    test = json.loads((copy / "metrics.json").read_text())["test"]
    assert (test["accuracy"] < 0.2) == (best == "worst")
    assert ("chosen on validation" in out) == (best == "worst")


def test_resume_refuses_changed_options(capsys, run):
    status, _, err = call(capsys, "train", "--resume", str(run), "--lr", "0.5")
    assert status == 2
    assert "--lr cannot change in a resumed run" in one_line(err)


def test_info_json_parses_and_says_why(capsys):
    status, out, _ = call(capsys, "info", "--json")
    assert status == 0
    facts = json.loads(out)
    assert facts["versions"]["resfast"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    assert {"resnet18", "resnet50", "resnet8"} <= set(facts["models"])
    assert facts["backends"][-1]["name"] == "eager"
    assert facts["backends"][-1]["available"]
    assert facts["gpu"]["available"] == torch.cuda.is_available()
    for part in (facts["native"], facts["triton"], facts["gpu"], *facts["backends"]):
        assert part["available"] or part["reason"], part
    status, out, _ = call(capsys, "info")
    assert status == 0
    assert "native library" in out
    assert "triton" in out
    (line,) = (line for line in out.splitlines() if line.strip().startswith("CUTLASS kernels"))
    missing = facts["native"]["cutlass_missing"]
    assert line.endswith("sm_90a" if missing is None else f"no: {missing}")


def test_info_without_the_native_library_names_the_remedy():
    code = "import sys; from resfast.cli import main; sys.exit(main(['info']))"
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={"PATH": "", "RESFAST_DISABLE_NATIVE": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert process.returncode == 0, process.stderr
    assert (
        "no: the native library is disabled by RESFAST_DISABLE_NATIVE; unset it" in process.stdout
    )


def test_check_passes_its_options_and_status_on(monkeypatch, tmp_path):
    import resfast.diagnostics as diagnostics

    seen = {}

    class Numerics:
        @staticmethod
        def main(**options):
            seen.update(options)
            return 3

    monkeypatch.setitem(sys.modules, "resfast.diagnostics.numerics", Numerics)
    monkeypatch.setattr(diagnostics, "numerics", Numerics, raising=False)
    out = tmp_path / "report.json"
    assert cli.main(["check", "--quick", "--dtype", "bfloat16", "--out", str(out)]) == 3
    assert seen == {"quick": True, "dtypes": ["bfloat16"], "out": out, "device": "cpu"}
    cli.main(["check", "--device", "auto"])
    assert seen["device"] == ("cuda" if torch.cuda.is_available() else "cpu")


def test_missing_package_is_one_line_with_the_remedy(capsys, monkeypatch, tmp_path):
    from resfast.training import run as run_module

    monkeypatch.setattr(run_module.importlib.util, "find_spec", lambda name: None)
    status, _, err = call(capsys, "train", "--out", str(tmp_path / "x"))
    assert status == 1
    assert 'needs matplotlib: pip install "resfast[train]"' in one_line(err)


def test_unexpected_errors_and_interrupts_have_no_traceback(capsys, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("resfast.info.info", fail)
    status, _, err = call(capsys, "info")
    assert status == 1
    assert "RuntimeError: two lines" in one_line(err)
    with pytest.raises(RuntimeError):
        cli.main(["--debug", "info"])

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("resfast.info.info", interrupt)
    status, _, err = call(capsys, "info")
    assert status == 128 + signal.SIGINT
    assert "interrupted" in one_line(err)

"""`resfast export`: files that answer as the trained network does, and run without resfast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import called
import pytest
import torch
from torch import Tensor, nn

from resfast.training import checkpoint
from resfast.training import export as export_module
from resfast.training.config import UserError
from resfast.training.data import normalise
from resfast.training.export import FromPixels, compare
from resfast.training.model import create_for

pytestmark = pytest.mark.usefixtures("one_thread", "warnings_format")
SHAPE = (3, 12, 10)
MEAN, STD = [0.2, 0.5, 0.7], [0.1, 0.3, 0.9]
CLASSES = ["cat", 'd"og', "<owl>", "köder"]


def trained(path: Path, model: str = "resnet8", shape: tuple = SHAPE) -> nn.Module:
    """A checkpoint as `resfast train` leaves it, its norms far from identities; the network."""
    torch.manual_seed(0)
    network = create_for(model, shape, len(CLASSES))
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0, 0.2)
            nn.init.normal_(m.bias, 0.0, 0.2)
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2.0)
    network.to(memory_format=torch.channels_last)
    state = {
        "config": {"model": model},
        "classes": CLASSES,
        "image_shape": list(shape),
        "mean": MEAN,
        "std": STD,
        "step": 7,
        "model": dict(network.state_dict()),
    }
    checkpoint.save(path, state)
    return network.eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("run")
    return folder, trained(folder / "best.pt")


def answers(network: nn.Module, pixels: Tensor) -> Tensor:
    """What `resfast predict` computes, from bytes of an image."""
    with torch.no_grad():
        return network(normalise(pixels, MEAN, STD))


def image_bytes(n: int) -> Tensor:
    return torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8)


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    return called.call(capsys, "export", *map(str, arguments))


def assert_info(info: dict) -> None:
    assert info["classes"] == CLASSES
    assert (info["mean"], info["std"]) == (MEAN, STD)
    assert info["image_shape"] == list(SHAPE)
    assert info["step"] == 7


ALONE = """
import json, sys
sys.modules["resfast"] = None
import torch
info = {"resfast.json": ""}
network = torch.export.load(sys.argv[1], extra_files=info).module()
pixels = torch.load(sys.argv[2])
torch.save([network(x) for x in pixels], sys.argv[2])
print(info["resfast.json"])
"""


def test_a_pt2_runs_without_resfast_on_any_batch(tmp_path, capsys, source):
    run, network = source
    status, out, err = call(capsys, run, "--out", tmp_path / "net.pt2")
    assert (status, err) == (0, "")
    assert "net.pt2" in out
    batches = [image_bytes(n) for n in (1, 4)]
    torch.save([x.float() / 255 for x in batches], tmp_path / "io.pt")
    command = [sys.executable, "-W", "ignore", "-c", ALONE, "net.pt2", "io.pt"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stderr
    for x, y in zip(batches, torch.load(tmp_path / "io.pt"), strict=True):
        torch.testing.assert_close(y, answers(network, x), rtol=1e-4, atol=1e-4)
    assert_info(json.loads(process.stdout))


def test_an_onnx_file_is_stock_and_runs_on_any_batch(tmp_path, capsys, source):
    onnx = pytest.importorskip("onnx", reason="writes ONNX")
    pytest.importorskip("onnxscript", reason="torch.onnx needs it")
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs ONNX")
    run, network = source
    assert call(capsys, run / "best.pt", "--out", tmp_path / "net.onnx")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]  # no file of weights beside it
    model = onnx.load(tmp_path / "net.onnx")
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    info = {p.key: p.value for p in model.metadata_props}
    assert info["model"] == "resnet8"
    assert_info({k: json.loads(v) for k, v in info.items() if k != "model"})
    session = onnxruntime.InferenceSession(
        str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"]
    )
    for n in (1, 4):
        x = image_bytes(n)
        (y,) = session.run(["logits"], {"pixels": (x.float() / 255).numpy()})
        torch.testing.assert_close(torch.from_numpy(y), answers(network, x), rtol=1e-4, atol=1e-4)


def test_safetensors_hold_every_weight_and_the_metadata(tmp_path, capsys, source):
    safetensors = pytest.importorskip("safetensors", reason="writes weights")
    run, network = source
    out = tmp_path / "weights.bin"
    status, text, _ = call(capsys, run, "--out", out, "--format", "safetensors")
    assert status == 0
    assert "logits" not in text.split("read back")[0]
    with safetensors.safe_open(out, "pt") as file:
        info = file.metadata()
        # a handle on the file, not a dict: it cannot be iterated over
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert stored.keys() == network.state_dict().keys()
    for key, value in network.state_dict().items():
        assert torch.equal(stored[key], value), key
    assert_info({k: json.loads(v) for k, v in info.items() if k != "model"})


def test_torchvisions_model_loads_the_safetensors(tmp_path, capsys):
    pytest.importorskip("safetensors", reason="writes weights")
    models = pytest.importorskip("torchvision.models", reason="loads them")
    from safetensors.torch import load_file

    shape = (3, 72, 72)
    network = trained(tmp_path / "best.pt", "resnet18", shape)
    assert call(capsys, tmp_path, "--out", tmp_path / "net.safetensors")[0] == 0
    theirs = models.resnet18(num_classes=len(CLASSES)).eval()
    theirs.load_state_dict(load_file(tmp_path / "net.safetensors"))
    x = torch.randn(2, *shape)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), network(x), rtol=1e-3, atol=1e-3)


def test_a_file_that_answers_otherwise_is_not_kept(tmp_path, capsys, source, monkeypatch):
    """The writer forgets the normalisation; what the name held before stays."""
    write, read = export_module._FORMATS["pt2"]

    def forgetful(module, info, path):
        write(FromPixels(module.network, [0.0] * 3, STD), info, path)

    monkeypatch.setitem(export_module._FORMATS, "pt2", (forgetful, read))
    out = tmp_path / "net.pt2"
    out.write_bytes(b"before")
    status, text, err = call(capsys, source[0], "--out", out)
    assert (status, text) == (1, "")
    assert "does not answer a batch of 2 as the trained one does" in err
    assert err.count("\n") == 1
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("net.pt2", b"before")]


@pytest.mark.parametrize("how", ["right", "nudged", "nan", "shape", "only batches of 2"])
def test_comparison_refuses_what_is_not_equal(how, source):
    module = FromPixels(source[1], MEAN, STD)

    def run(pixels: Tensor) -> Tensor:
        logits = module(pixels)
        if how == "nudged":
            return logits * (1 + 1e-4)
        if how == "nan":
            return logits.where(torch.arange(logits.numel()).view_as(logits) != 3, torch.nan)
        if how == "shape":
            return logits[:, :-1]
        if how == "only batches of 2" and len(pixels) != 2:
            return logits.roll(1, 0)
        return logits

    if how == "right":
        assert 0 < compare(run, module, SHAPE) < 1e-5
    else:
        with pytest.raises(UserError, match="nothing was written"):
            compare(run, module, SHAPE)


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--out", "net.pth"], 2, "net.pth: the name must end in one of .pt2, .onnx, .safetensors"),
        (["--out", "net"], 2, "or give --format"),
        (["--out", "none/net.pt2"], 2, "--out none/net.pt2: no such folder"),
        (["--out", "folder.pt2"], 2, "--out folder.pt2: is a folder"),
        (["--out", "net.pt2", "--format", "jit"], 2, "invalid choice: 'jit'"),
        ([], 2, "required: --out"),
        (["--out", "net.onnx"], 1, "exporting onnx needs onnx, onnxscript"),
        (["--out", "net.safetensors"], 1, "needs safetensors: pip install safetensors"),
    ],
)
def test_bad_options(tmp_path, capsys, source, monkeypatch, arguments, status, expected):
    monkeypatch.chdir(tmp_path)
    Path("folder.pt2").mkdir()
    monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda name: None)
    got, out, err = call(capsys, source[0], *arguments)
    assert (got, out) == (status, "")
    assert expected in err
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["folder.pt2"]


def test_a_missing_source_is_named(tmp_path, capsys):
    status, _, err = call(capsys, tmp_path / "none", "--out", tmp_path / "net.pt2")
    assert status == 2
    assert "no such run folder or checkpoint" in err

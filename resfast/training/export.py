"""`resfast export`: a trained network as one file that runs, or loads, without resfast."""

from __future__ import annotations

import copy
import importlib.util
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resfast.nn import unfused
from resfast.testing import FLOOR_ULPS, SINGLE_FACTOR
from resfast.training.checkpoint import write_atomically
from resfast.training.config import EXPORTS, OptionError, TrainConfig, UserError
from resfast.training.predict import find_checkpoint, restore_model
from resfast.training.report import table

INFO = "resfast.json"  # the extra file of a .pt2
BATCHES = (2, 5)  # that a written file is tried with
# Logits are few, so their error on one draw may be several times its mean; a lost layer is 10⁵ off.
FEW = 4.0


class FromPixels(nn.Module):
    """Pixels float32 in [0, 1], ``[N, C, H, W]`` → logits ``[N, classes]``, on stock layers."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.network = unfused(network)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network((pixels - self.mean) / self.std)


Run = Callable[[Tensor], Tensor]


def export(source: Path, out: Path, kind: str | None = None) -> int:
    """Writes `out` from a run folder (its best checkpoint) or a checkpoint. Returns 0.

    `kind` of file: one of EXPORTS; None: by the suffix of `out`. It is read back and compared with
    the network before it gets its name.

    Raises:
        OptionError: no such kind, source or folder.
        UserError: a package is missing, or the file does not answer as the network does.
    """
    kind = _kind(out, kind)
    state, path = find_checkpoint(source)
    module = FromPixels(restore_model(state, path), state["mean"], state["std"])
    info = _info(state)
    write, read = _FORMATS[kind]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations among the exporters
        draft = Path(folder) / f"model.{kind}"
        write(module, info, draft)
        error = compare(read(module, draft), module, info["image_shape"])
        data = draft.read_bytes()
    write_atomically(out, data)
    shape = "×".join(map(str, state["image_shape"]))
    takes = f"N×{shape} float32 pixels in [0, 1], N any; gives N×{len(state['classes'])} logits"
    if kind == "safetensors":
        takes = "weights and statistics under the model's own names; mean and std in the metadata"
    rows = [
        ("checkpoint", f"{path} (step {state['step']:,})"),
        ("written", f"{out} ({len(data):,} bytes)"),
        ("network", f"{info['model']}, {takes}"),
        ("read back", f"differs from float64 by {error:.1e} of the logits, as PyTorch does"),
    ]
    print(table(rows))
    return 0


def compare(run: Run, module: FromPixels, shape: Sequence[int]) -> float:
    """The largest relative error of ``run`` over a batch of each of BATCHES, against float64.

    Raises:
        UserError: it errs by more than `module` does in fp32, by the criterion's factor and floor.
    """
    exact = copy.deepcopy(module).double()
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for n in BATCHES:
        pixels = torch.rand(n, *shape, generator=generator)
        nhwc = pixels.contiguous(memory_format=torch.channels_last)
        want = exact(pixels.double())

        def error(logits: Tensor, want: Tensor = want) -> float:
            return float((logits.double() - want).norm() / want.norm())

        floor = FLOOR_ULPS * 2.0**-24
        limit = FEW * SINGLE_FACTOR * max(error(module(pixels)), error(module(nhwc)), floor)
        logits = run(pixels)
        # not `>`: a NaN is no agreement
        if logits.shape != want.shape or not error(logits) <= limit:
            found = f"shape {tuple(logits.shape)}"
            if logits.shape == want.shape:
                found = f"a relative error of {error(logits):.1e}, the limit is {limit:.1e}"
            raise UserError(
                f"the exported network does not answer a batch of {n} as the trained one does: "
                f"{found}; nothing was written"
            )
        largest = max(largest, error(logits))
    return largest


def _kind(out: Path, kind: str | None) -> str:
    known = ", ".join(f".{each}" for each in EXPORTS)
    kind = kind or out.suffix.lower().lstrip(".")
    if kind not in EXPORTS:
        raise OptionError(f"--out {out}: the name must end in one of {known}, or give --format")
    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder" if out.is_dir() else "no such folder"
        raise OptionError(f"--out {out}: {what}")
    missing = [name for name in EXPORTS[kind] if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise UserError(f"exporting {kind} needs {', '.join(missing)}: pip install {names}")
    return kind


def _info(state: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": TrainConfig.from_dict(state["config"]).model,
        "classes": state["classes"],
        "image_shape": state["image_shape"],  # channels, height, width
        "mean": state["mean"],
        "std": state["std"],
        "step": state["step"],
    }


def _strings(info: dict[str, Any]) -> dict[str, str]:
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in info.items()}


def _example(info: dict[str, Any]) -> dict[str, Any]:
    """Arguments of either exporter: a batch, and that its size may change."""
    batch = torch.export.Dim("batch", min=1)
    pixels = torch.zeros(BATCHES[0], *info["image_shape"])
    return {"args": (pixels,), "dynamic_shapes": {"pixels": {0: batch}}}


def _write_pt2(module: FromPixels, info: dict[str, Any], path: Path) -> None:
    program = torch.export.export(module, **_example(info))
    torch.export.save(program, path, extra_files={INFO: json.dumps(info)})


def _read_pt2(module: FromPixels, path: Path) -> Run:
    run: Run = torch.export.load(path).module()
    return run


def _write_onnx(module: FromPixels, info: dict[str, Any], path: Path) -> None:
    import onnx

    torch.onnx.export(
        module,
        f=path,
        input_names=["pixels"],
        output_names=["logits"],
        verbose=False,
        **_example(info),
    )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, _strings(info))
    onnx.save(model, path)


def _read_onnx(module: FromPixels, path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])

    return run


def _write_safetensors(module: FromPixels, info: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(module.network.state_dict(), path, _strings(info))


def _read_safetensors(module: FromPixels, path: Path) -> Run:
    from safetensors.torch import load_file

    blank = copy.deepcopy(module)
    for value in blank.network.state_dict().values():
        value.zero_()
    blank.network.load_state_dict(load_file(path))
    return blank


_FORMATS = {
    "pt2": (_write_pt2, _read_pt2),
    "onnx": (_write_onnx, _read_onnx),
    "safetensors": (_write_safetensors, _read_safetensors),
}

"""`resfast gradflow`: how gradients fade or grow on their way down plain and residual networks.

Each plain network has its residual twin's weights and lacks only the shortcuts, as in He et al.
2015 (arXiv:1512.03385), section 4.1, where the deeper plain network is the worse one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfast.diagnostics.environment import now, versions
from resfast.nn import BasicBlock, ConvBNAct
from resfast.training.checkpoint import write_atomically
from resfast.training.config import OptionError, TrainConfig
from resfast.training.data import load_dataset
from resfast.training.model import SmallResNet
from resfast.training.report import table

WIDTH = 16
BATCH = 64


class _Plain(nn.Module):
    """A SmallResNet's convolutions, norms and classifier one after the other, no shortcuts."""

    def __init__(self, twin: SmallResNet) -> None:
        super().__init__()
        layers: list[nn.Module] = [twin.stem]
        for block in twin.stages:
            assert isinstance(block, BasicBlock)
            layers += [ConvBNAct(block.conv1, block.bn1), ConvBNAct(block.conv2, block.bn2)]
        self.layers = nn.Sequential(*layers)
        self.fc = twin.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean((2, 3)))


def gradient_norms(model: nn.Module, inputs: Tensor, labels: Tensor) -> list[float]:
    """‖dL/dw‖ of each 3×3 convolution's weight in the order of the forward pass, in training mode.

    L: mean cross-entropy of ``inputs`` ``[N, C, H, W]`` and ``labels`` ``[N]``.
    """
    model.train().zero_grad()
    F.cross_entropy(model(inputs), labels).backward()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    gradients = [c.weight.grad for c in convolutions if c.kernel_size == (3, 3)]
    return [float(g.norm()) for g in gradients if g is not None]


def measure(depths: Sequence[int], data: str, seed: int, repeats: int = 3) -> list[dict[str, Any]]:
    """A row per depth and kind: geometric means of the norms over fresh weights and batches.

    Raises:
        OptionError: a depth is not 6·n + 2.
    """
    for depth in depths:
        if depth < 8 or (depth - 2) % 6:
            raise OptionError(f"--depths: {depth} is not 6·n + 2, such as 8, 20, 56 or 110")
    config = TrainConfig(data=data, seed=seed).validate()
    dataset = load_dataset(config)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for depth in depths:
        sums: dict[str, Tensor] = {}
        for _ in range(repeats):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
                channels, classes = dataset.image_shape[0], len(dataset.classes)
                residual = SmallResNet((depth - 2) // 6, WIDTH, channels, classes)
            chosen = torch.randint(len(dataset.train), (BATCH,), generator=generator)
            ((pixels, labels),) = dataset.train.select(chosen).batches(BATCH)
            inputs = dataset.normalise(pixels)
            for kind, model in (("plain", _Plain(residual)), ("residual", residual)):
                norms = torch.tensor(gradient_norms(model, inputs, labels)).log()
                sums[kind] = sums.get(kind, torch.zeros(())) + norms / repeats
        for kind, logs in sums.items():
            norms = logs.exp()
            first_over_last = float(norms[0] / norms[-1])
            rows.append(
                {
                    "depth": depth,
                    "kind": kind,
                    "norms": norms.tolist(),
                    "first_over_last": first_over_last,
                }
            )
    return rows


def draw(rows: list[dict[str, Any]], path: Path, data: str) -> None:
    """Norm against place in the network, plain beside residual, a line per depth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    depths = sorted({row["depth"] for row in rows})
    colours = plt.get_cmap("viridis")
    for axes, kind in zip(panels, ("plain", "residual"), strict=True):
        for row in (r for r in rows if r["kind"] == kind):
            last = max(1, len(row["norms"]) - 1)
            at = [i / last for i in range(len(row["norms"]))]
            colour = colours(depths.index(row["depth"]) / max(1, len(depths)))
            axes.plot(at, row["norms"], color=colour, label=f"{row['depth']} layers")
        axes.set(title=kind, xlabel="place in the network (0: image, 1: classifier)", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("‖dL/dw‖ of a 3×3 convolution")
    figure.suptitle(f"gradients at the start of training, on {data}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def gradflow(depths: Sequence[int], data: str, seed: int, out: Path) -> int:
    """Print the table, write the picture and, beside it, the numbers as JSON."""
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise OptionError(f"--out {out}: the picture is .png, .svg or .pdf")
    if not out.parent.is_dir():
        raise OptionError(f"--out {out}: no such folder")
    rows = measure(depths, data, seed)
    draw(rows, out, data)
    record = {"data": data, "seed": seed, "versions": versions(), "date": now(), "rows": rows}
    numbers = out.with_suffix(".json")
    write_atomically(numbers, (json.dumps(record, indent=1) + "\n").encode())
    by_depth = {(row["depth"], row["kind"]): row["first_over_last"] for row in rows}
    lines = [("layers", "gradient of the first over that of the last convolution")]
    for depth in depths:
        plain, residual = (by_depth[depth, kind] for kind in ("plain", "residual"))
        lines.append((str(depth), f"plain {plain:.3g}, residual {residual:.3g}"))
    print(table([*lines, ("picture", f"{out} ({numbers.name})")]))
    return 0

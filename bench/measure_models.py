"""resfast against stock PyTorch on whole models, interleaved in one run; writes one JSON file.

    python bench/measure_models.py --out bench/results/<device>/models.json

Each row: median ratio of step times over neighbouring pairs A B A B, with its 95 % interval. Every
pair's outputs are compared before it is timed; random inputs at 224².
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resfast
from resfast.diagnostics.environment import device_info, now, versions
from resfast.training.throughput import compare

# (model, batch, training): the work items of the design's CPU targets
WORK = [
    ("resnet18", 16, True),
    ("resnet50", 8, True),
    ("resnet18", 1, False),
    ("resnet18", 16, False),
    ("resnet50", 1, False),
]


def _peer(name: str, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a user would run instead; ``memory_efficient`` is resfast's own other mode."""
    if name == "memory_efficient":
        return resfast.resnet50(memory_efficient=True).to(memory_format=torch.channels_last)
    stock = resfast.unfused(model).to(memory_format=torch.channels_last)
    return torch.compile(stock) if name == "compile" else stock


def _step(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, training: bool) -> Callable:
    if not training:

        def infer() -> Tensor:
            with torch.no_grad():
                return model(x)

        return infer

    def train() -> None:
        for p in model.parameters():
            p.grad = None
        F.cross_entropy(model(x), y).backward()

    return train


def measure(name: str, batch: int, training: bool, peer: str, budget: float) -> dict:
    """One row: resfast's model and one peer on the same input."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = resfast.create_model(name).to(memory_format=torch.channels_last).train(training)
    other = _peer(peer, model)
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    y = torch.randint(1000, (batch,))
    if peer != "memory_efficient":
        with torch.no_grad():
            torch.testing.assert_close(model(x), other(x), rtol=1e-3, atol=1e-3)
    ours, theirs = _step(model, x, y, training), _step(other, x, y, training)
    result = compare(ours, theirs, batch, budget=budget, warmup=3)
    assert result is not None
    print(f"{name} batch {batch} {'train' if training else 'infer'} vs {peer}: {result.verdict()}")
    return {
        "model": name,
        "batch": batch,
        "work": "train" if training else "infer",
        "peer": peer,
        "ms_per_image": 1e3 / result.rate_a,
        "peer_ms_per_image": 1e3 / result.rate_b,
        **result.to_dict(),
    }


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes autograd keeps for backward, each storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x).sum()
    return sum(n for n, _ in kept.values())


def memory() -> list[dict]:
    """Saved activations of ResNet-50 at batch 2, in MiB per image."""
    x = torch.randn(2, 3, 224, 224)
    model = resfast.resnet50()
    stock = saved_bytes(resfast.unfused(model), x)
    rows = []
    for mode, ours in (
        ("default", saved_bytes(model, x)),
        ("memory_efficient", saved_bytes(resfast.resnet50(memory_efficient=True), x)),
    ):
        print(f"saved activations, {mode}: {ours / stock:.3f} of stock's")
        rows.append(
            {
                "model": "resnet50",
                "mode": mode,
                "mib_per_image": ours / 2**21,
                "stock_mib_per_image": stock / 2**21,
                "ratio": ours / stock,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--peers", nargs="+", default=["eager", "compile"])
    parser.add_argument("--budget", type=float, default=25.0, help="seconds for each comparison")
    parser.add_argument("--models", nargs="+", help="only these models")
    options = parser.parse_args()
    record = {
        "date": now(),
        "versions": versions(),
        "device": device_info(torch.device("cpu")),
        "isa": resfast.native.cpu_isa(),
        "dtype": "float32",
        "image": 224,
        "memory": memory(),
        "models": [],
    }
    work = [w for w in WORK if not options.models or w[0] in options.models]
    rows = [(*w, peer) for w in work for peer in options.peers]
    if any(w[0] == "resnet50" for w in work):
        rows.append(("resnet50", 8, True, "memory_efficient"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for row in rows:
        record["models"].append(measure(*row, options.budget))
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

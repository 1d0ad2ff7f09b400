"""`resfast tune`: measure tiles, and whose convolutions to run, for a model on this GPU."""

from __future__ import annotations

import torch

import resfast
from resfast.backends import tuning
from resfast.benchmark.work import Work
from resfast.training.config import OptionError


def tune(work: Work, steps: list[str]) -> int:
    """One training step, or forward, a fusion step; every kernel's tiles are measured anew."""
    if not work.device.startswith("cuda"):
        raise OptionError(f"tune measures on a GPU, the device is {work.device}")
    tiles = tuning.tiles_of(torch.cuda.get_device_name(work.device))
    model = work.build()
    contender = work.contender(model, model, work.batches())
    with tuning.retuning(), resfast.backend("triton"):
        for step in steps:
            with resfast.fusion(step, "own"):
                contender.step()
                torch.cuda.synchronize()
    engines = {k: v[0] for k, v in tiles.known.items() if k.endswith(" own")}
    print(f"{len(tiles.known) - len(engines)} tiles of {tiles.device} in {tiles.path}")
    print(
        f"convolutions of resfast's own expected to be faster: {sum(engines.values())} of ", end=""
    )
    print(f"{len(engines)} passes")
    return 0

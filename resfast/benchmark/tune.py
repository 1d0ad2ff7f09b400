"""`resfast tune`: measure tiles, and whose convolutions and norms run, for a model on this GPU."""

from __future__ import annotations

import torch

import resfast
from resfast.backends import tuning
from resfast.backends.norm_race import winners
from resfast.benchmark.work import Work
from resfast.training.config import OptionError


def tune(work: Work, steps: list[str]) -> int:
    """Two training steps, or forwards, a fusion step; everything is measured anew.

    The first with Triton's kernels alone, for their tiles; in the second backends race.
    """
    if not work.device.startswith("cuda"):
        raise OptionError(f"tune measures on a GPU, the device is {work.device}")
    tiles = tuning.tiles_of(torch.cuda.get_device_name(work.device))
    model = work.build()
    contender = work.contender(model, model, work.batches())
    with tuning.retuning():
        for step in steps:
            with resfast.backend("triton"), resfast.fusion(step, "own"):
                contender.step()
                torch.cuda.synchronize()
            with resfast.fusion(step):
                contender.step()
                torch.cuda.synchronize()
    known = tiles.known.items()
    engines = {k: v[0] for k, v in known if k.endswith(" own")}
    norms = winners(tiles.known)
    print(f"{sum(len(v) > 1 for _, v in known)} tiles of {tiles.device} in {tiles.path}")
    print(
        f"convolutions of resfast's own expected to be faster: {sum(engines.values())} of ", end=""
    )
    print(f"{len(engines)} passes")
    won = ", ".join(f"{name} {norms[name]}" for name in sorted(norms))
    print(f"norms, races won by backend: {won or 'none'} of {norms.total()}")
    return 0

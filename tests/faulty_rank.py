"""`resfast` whose process sends itself a signal in the middle of a backward pass; for torchrun.

FAULT, as in "SIGKILL 1 14": which signal, on which rank, in which backward pass. A process that
torchrun has started again has no fault.
"""

from __future__ import annotations

import os
import signal

from resfast import cli
from resfast.training import loop

NAME, RANK, PASS = os.environ["FAULT"].split()


class FaultyStep(loop.TrainStep):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.passes = 0
        # not the first layer's: some gradients are still to come, others already on their way
        self.penalised[2].register_hook(self._on_gradient)

    def _on_gradient(self, gradient) -> None:
        self.passes += 1
        if self.passes == int(PASS):
            os.kill(os.getpid(), signal.Signals[NAME])


if __name__ == "__main__":
    if os.environ["RANK"] == RANK and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        loop.TrainStep = FaultyStep
    cli.as_process()

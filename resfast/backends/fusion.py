"""How far training fuses norms into convolutions, and whose convolutions run: process-wide choices.

Each step contains the ones before it:

b    norm, ReLU, residual and their backward in passes of their own beside any convolution
c0   fprop's epilogue takes the statistics, dgrad's the sums of the norm below; wgrad normalises
     its input itself
c    fprop normalises its input itself: inner activations are never stored
c+   dgrad and wgrad apply the norm's backward themselves: dz is never stored

A convolution that is the library's falls back to b around it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

STEPS = ("b", "c0", "c", "c+")
CONVOLUTIONS = ("auto", "own", "library")


class Fusion(NamedTuple):
    """step: one of ``STEPS``. convolutions: resfast's own wherever they can run ("own"), never
    ("library"), or where they are expected to be faster ("auto").
    """

    step: str
    convolutions: str

    def reaches(self, step: str) -> bool:
        """Whether ``step`` is part of this one."""
        return STEPS.index(self.step) >= STEPS.index(step)


def _checked(step: str, convolutions: str) -> Fusion:
    if step not in STEPS:
        raise ValueError(f"unknown fusion step {step!r}; expected one of {', '.join(STEPS)}")
    if convolutions not in CONVOLUTIONS:
        raise ValueError(
            f"unknown convolutions {convolutions!r}; expected one of {', '.join(CONVOLUTIONS)}"
        )
    return Fusion(step, convolutions)


_current = _checked(
    os.environ.get("RESFAST_FUSION_STEP", "c"), os.environ.get("RESFAST_CONVOLUTIONS", "auto")
)


def current_fusion() -> Fusion:
    """The choice in force."""
    return _current


@contextlib.contextmanager
def fusion(step: str | None = None, convolutions: str | None = None) -> Iterator[None]:
    """Choose the step and the convolutions of the backends that have their own.

    Process-wide, as autograd runs backward in other threads; ``RESFAST_FUSION_STEP`` and
    ``RESFAST_CONVOLUTIONS`` set the defaults, "c" and "auto". Changes memory traffic and speed;
    results stay within the error criterion.

    Raises:
        ValueError: no such step or choice of convolutions.
    """
    global _current
    before = _current
    _current = _checked(step or before.step, convolutions or before.convolutions)
    try:
        yield
    finally:
        _current = before

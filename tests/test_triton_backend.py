"""The Triton backend as a whole: ops and models within the error criterion, traffic, reports.

Without a GPU the kernels run in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import resfast
from resfast.backends import select
from resfast.backends.fusion import CONVOLUTIONS, STEPS
from resfast.testing import HALF_DTYPES, judge_seeds, op_cases

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {str(case): case for training in (True, False) for case in op_cases(training)}
# the others differ from these in the norm alone, or have groups, which the library runs
SAMPLE = ("bn_relu_max_pool-train", "conv3x3s2_bn_add_relu-train", "bottlenecks-train")
BLOCKS = ("basic_block_projection-train", "bottlenecks-train", "bottleneck_memory_efficient-train")


@pytest.fixture(autouse=True)
def _triton():
    with resfast.backend("triton"):
        yield


def _assert_ok(verdicts):
    bad = [v for v in verdicts if not v.ok]
    assert not bad, "\n".join(map(str, bad))


@pytest.mark.parametrize("name", CASES)
def test_error(name):
    with resfast.fusion("c", "own"):
        _assert_ok(judge_seeds(CASES[name], torch.float32, 8, DEVICE, ("nhwc",)))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("name", SAMPLE)
def test_error_half_precision(name, dtype):
    with resfast.fusion("c", "own"):
        _assert_ok(judge_seeds(CASES[name], dtype, 32, DEVICE, ("nhwc",)))


@pytest.mark.parametrize("step", [s for s in STEPS if s != "c"])
@pytest.mark.parametrize("name", BLOCKS)
def test_error_at_every_step(name, step):
    with resfast.fusion(step, "own"):
        _assert_ok(judge_seeds(CASES[name], torch.float32, 8, DEVICE, ("nhwc",)))


@pytest.mark.parametrize("convolutions", [c for c in CONVOLUTIONS if c != "own"])
def test_error_beside_the_librarys_convolutions(convolutions):
    with resfast.fusion("c+", convolutions):
        _assert_ok(judge_seeds(CASES[BLOCKS[1]], torch.float32, 8, DEVICE, ("nhwc",)))

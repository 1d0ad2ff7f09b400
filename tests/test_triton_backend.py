"""The Triton backend as a whole: ops and models within the error criterion, traffic, reports.

Without a GPU the kernels run in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ownership import check_own_memory

import resfast
from resfast.backends import select
from resfast.backends.fusion import CONVOLUTIONS, STEPS
from resfast.diagnostics.traffic import inference_traffic, training_traffic
from resfast.models import ResNet
from resfast.testing import HALF_DTYPES, judge_seeds, op_cases

pytest.importorskip("triton")

pytestmark = pytest.mark.cuda
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


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["conv3x3s2_bn_add_relu-train", *SAMPLE[:1], *BLOCKS])
def test_outputs_own_their_memory(name, step):
    with resfast.fusion(step, "own"):
        check_own_memory(CASES[name], DEVICE)


# ---- what it moves


def _megabytes(step, model=None, batch=256):
    with resfast.fusion(step, "own"):
        ledger = training_traffic(model or resfast.resnet50(), (batch, 3, 224, 224))
    return sum(t.reads + t.writes for t in ledger) / batch / 1e6


@pytest.mark.parametrize(("step", "limit"), [("b", 345), ("c0", 275), ("c", 262), ("c+", 250)])
def test_traffic_of_resnet50(step, limit):
    """Forward and backward in bf16, whole: stem, blocks, head and loss; the table in docs/."""
    moved = _megabytes(step)
    assert moved <= limit
    design = Path(__file__).parent.parent / "docs" / "design.md"
    (row,) = [line for line in design.read_text().splitlines() if line.startswith(f"| `{step}` |")]
    assert row.split("|")[-2].strip() == f"{moved:.1f}"


def test_inference_moves_what_its_convolutions_read_and_write():
    """Norms, additions and ReLUs are in the epilogues; beside them the max-pool and the head."""
    x = torch.empty(64, 3, 224, 224, device="meta")
    model = resfast.unfused(resfast.resnet50()).to("meta").eval()
    expected = 0
    for name, conv in model.named_modules():
        if isinstance(conv, torch.nn.Conv2d):
            shortcuts = name.endswith("conv3")  # its epilogue reads the block's other branch

            def add(conv, inputs, output, shortcuts=shortcuts):
                nonlocal expected
                step = conv.stride[0] if conv.kernel_size == (1, 1) else 1  # pixels it reads
                expected += inputs[0][:, :, ::step, ::step].numel() + conv.weight.numel()
                expected += (1 + shortcuts) * output.numel()

            conv.register_forward_hook(add)
    model(x)
    with resfast.fusion("c", "own"):
        ledger = inference_traffic(resfast.resnet50(), tuple(x.shape))
    convolutions = [t for t in ledger if t.kernel == "_conv_fprop_kernel"]
    assert len(convolutions) == 53
    vectors = 53 * 3 * 4 * 2048  # at most: float32 affine
    moved = sum(t.reads + t.writes for t in convolutions)
    assert 2 * expected <= moved <= 2 * expected + vectors
    assert not any("norm_apply_kernel" in t.kernel for t in ledger)


def test_traffic_of_a_block_is_what_its_schedule_says():
    """A bottleneck between others of its kind at step c0, in activations of its inner width."""
    with resfast.fusion("c0", "own"):
        few, more = (
            training_traffic(ResNet(resfast.Bottleneck, [1, n, 1, 1]), (256, 3, 224, 224))
            for n in (3, 4)
        )
    moved = sum(t.reads + t.writes for t in more) - sum(t.reads + t.writes for t in few)
    inner = 256 * 28 * 28 * 128 * 2  # bytes of an inner activation in the second stage; outer: 4
    forward = (4 + 1) + (1 + 1) + (1 + 1) + (1 + 1) + (1 + 4) + (4 + 4 + 4)
    # dgrad also reads what its epilogue needs: z below, or the shortcut's gradient, z and the mask
    dgrads = (4 + 1 + 1) + (1 + 1 + 1) + (1 + 4 + 4 + 4)
    wgrads = (4 + 1) + (1 + 1) + (1 + 4)
    applies = (4 + 4 + 4) + (1 + 1 + 1) + (1 + 1 + 1)
    masks = 2 * 4 / 16
    expected = (forward + dgrads + wgrads + applies + masks) * inner
    # weights, their gradients' split sums and the tiles' statistics come on top
    assert expected <= moved <= 1.05 * expected


def test_explain_shows_step_and_what_each_kernel_fuses():
    model = ResNet(resfast.BasicBlock, [2, 1, 1, 1], stem="cifar", num_classes=3)
    model = model.to(DEVICE).to(memory_format=torch.channels_last)
    with resfast.fusion("c", "own"):
        report = resfast.explain(model, torch.randn(2, 3, 8, 8, device=DEVICE))
    rows = {r.module: r for r in report.rows}
    assert rows["layer1.0"].op == "residual_blocks"
    assert "triton+prologue+epilogue" in rows["layer1.0"].backends["conv_fprop"]
    assert report.backward["conv_dgrad", "triton+epilogue"] > 0
    assert report.backward["conv_wgrad", "triton+prologue"] > 0
    assert "fusion: step c, convolutions own" in str(report)


def test_explain_says_why_a_convolution_is_the_librarys():
    block = resfast.BasicBlock(8, 8).to(DEVICE)
    report = resfast.explain(block, torch.randn(2, 8, 4, 4, device=DEVICE))
    assert "1×1" in report.declined["triton convolution"]
    assert "own" not in report.rows[0].backends["conv_fprop"]


# ---- whole models


def test_three_training_steps_of_a_tiny_resnet():
    """Losses and weights against float64, beside stock layers' own error on the same steps."""

    def train(model, dtype):
        torch.manual_seed(1)
        images = torch.randn(3, 4, 3, 12, 12, dtype=torch.float64)
        labels = torch.randint(5, (3, 4))
        model = model.to(DEVICE, dtype).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for x, target in zip(images, labels, strict=True):
            x = x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), target.to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().double())
        state = [t.double().flatten() for t in model.state_dict().values()]
        return torch.stack(losses), torch.cat(state)

    torch.manual_seed(0)
    model = ResNet(resfast.Bottleneck, [2, 1, 1, 1], stem="cifar", num_classes=5)
    exact = train(resfast.unfused(model), torch.float64)
    stock = train(resfast.unfused(model), torch.float32)
    with resfast.fusion("c", "own"):
        ours = train(model, torch.float32)
    for got, theirs, reference in zip(ours, stock, exact, strict=True):
        error, allowed = (got - reference).norm(), (theirs - reference).norm()
        assert error <= 1.5 * allowed + 8 * 2**-24 * reference.norm()


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(training):
    model = ResNet(resfast.BasicBlock, [1, 1, 1, 1], stem="cifar", num_classes=3)
    model = model.to(DEVICE).to(memory_format=torch.channels_last).train(training)
    x = torch.randn(2, 3, 8, 8, device=DEVICE)
    with resfast.fusion("c", "own"), torch.set_grad_enabled(training):
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        if training:
            compiled(x).sum().backward()


@pytest.mark.skipif(DEVICE == "cuda", reason="nothing is emulated here")
def test_cpu_tensors_are_not_emulated_unless_forced(monkeypatch):
    monkeypatch.setattr(select, "_forced", None)
    others = {name: b for name, b in select._BACKENDS.items() if name != "cpu"}
    monkeypatch.setattr(select, "_BACKENDS", others)
    chosen, declined = select.find("norm_stats", torch.zeros(1, 1, 1, 1))
    assert chosen.name == "eager"
    assert "emulated" in declined["triton"]

"""Convolutions of inference plans on CUDA: cuDNN's fused ones, and which of three engines runs.

On a CPU that stands in for the device; cuDNN itself is never executed.
"""

from __future__ import annotations

from unittest import mock

import pretended
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resfast
from resfast import native
from resfast.backends import cutlass, engines, select, tuning
from resfast.backends.cudnn_convolution import cudnn_convolution, fold
from resfast.backends.engines import plan_convolution
from resfast.backends.interface import ConvGeometry, NormVectors, nhwc
from resfast.nn import ConvBNAct
from resfast.testing import HALF_DTYPES, HALF_FACTOR, OpCase, conv_case, judge_seeds

SAME = ConvGeometry((1, 1), (1, 1), (1, 1), 1)


class Planned(pretended.Cuda):
    """The op's inference form runs what a plan would."""

    def epilogue_declines(self, x, weight, g, residual):
        return None

    def conv_fprop_affine(self, x, weight, bias, g, norm, residual, relu, add_after_act):
        run = plan_convolution(x, weight, bias, g, norm, residual, relu, add_after_act)
        return run(x, residual, relu)


@pytest.fixture
def device(monkeypatch, tmp_path):
    monkeypatch.setenv("RESFAST_TUNE", "never")
    pretended.device(monkeypatch, tmp_path, Planned())
    with pretended.cudnn(monkeypatch) as calls:
        yield calls


def norm_vectors(channels, affine=True):
    gamma, beta = (torch.randn(channels), torch.randn(channels)) if affine else (None, None)
    return NormVectors(gamma, beta, torch.randn(channels), torch.rand(channels) + 0.5, 1e-5)


def arguments(k=8, side=3, dtype=torch.float32):
    x = nhwc(torch.randn(2, 8, 6, 5, dtype=dtype))
    weight = torch.randn(k, 8, side, side) * (2 / (8 * side**2)) ** 0.5
    g = SAME._replace(padding=(side // 2, side // 2))
    return x, weight.to(dtype), None, g, norm_vectors(k)


def choices(f):
    seen: list[select.Choice] = []
    with select.listen(seen.append):
        f()
    return seen


# ---- results


class Centred(OpCase):
    """A norm whose shift is small beside its scale, as in trained models' inner layers."""

    def inputs(self, seed, dtype, device="cpu"):
        tensors = super().inputs(seed, dtype, device)
        for name in ("beta_1", "mean_1"):
            tensors[name] *= 0.25
        return tensors


def centred(*args, **options):
    return Centred(**vars(conv_case(*args, **options)))


SHAPE = (2, 32, 8, 7)
FUSED = [
    centred("conv3x3_bn_relu", SHAPE, (48, 32, 3, 3), False),
    conv_case("conv3x3s2_bn_add_relu", SHAPE, (48, 32, 3, 3), False, residual=True, stride=2),
    conv_case("conv1x1_bias_bn_add_relu", SHAPE, (48, 32, 1, 1), False, residual=True, bias=True),
    centred("conv3x3g4_bn_relu", SHAPE, (48, 8, 3, 3), False, groups=4),
]
# these in float32 alone: in 16 bits rounding the shift costs too much
EXACT = [
    conv_case("conv1x1_bn_relu", SHAPE, (48, 32, 1, 1), False),
    conv_case("conv3x3_bias_bn_relu", SHAPE, (48, 32, 3, 3), False, bias=True),
]
PASSES = [
    conv_case("conv3x3_bn", SHAPE, (48, 32, 3, 3), False, relu=False, bias=True),
    conv_case("conv1x1_bn_add", SHAPE, (48, 32, 1, 1), False, relu=False, residual=True),
    conv_case(
        *("conv3x3_bn_relu_add", SHAPE, (48, 32, 3, 3), False), residual=True, add_after_act=True
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("case", [*FUSED, *EXACT, *PASSES], ids=str)
def test_error(device, case, dtype):
    seeds = 8 if dtype == torch.float32 else 32
    verdicts = judge_seeds(case, dtype, seeds, "cpu", ("nhwc", "nchw"))
    (verdict,) = [v for v in verdicts if v.quantity == "y_inference"]
    assert verdict.ok, str(verdict)
    fused = case in FUSED or (case in EXACT and dtype == torch.float32)
    names = {call["name"] for call in device}
    assert names == ({"add_relu" if "r" in case.shapes else "relu"} if fused else set())


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_error_of_float32_parameters(device, dtype):
    """As under autocast: stock rounds the weights, and z, where these are folded first."""
    ours, theirs = [], []
    for _ in range(16):
        x = nhwc(torch.randn(SHAPE, dtype=dtype))
        weight = torch.randn(48, 32, 3, 3) * (2 / (32 * 9)) ** 0.5
        norm = norm_vectors(48)
        norm.mean.mul_(0.5)
        norm.bias.mul_(0.5)
        run = plan_convolution(x, weight, None, SAME, norm, None, True, False)

        def stock(x, weight, norm=norm):
            z = F.conv2d(x, weight, None, *SAME)
            vectors = (v.to(z.dtype) if z.dtype == torch.float64 else v for v in norm[:4])
            gamma, beta, mean, var = vectors
            return F.batch_norm(z, mean, var, gamma, beta, False, 0, norm.eps).relu()

        exact = stock(x.double(), weight.double())
        ours.append(run(x, None, True) - exact)
        theirs.append(stock(x, weight.to(dtype)) - exact)
    assert len(device) == 2 * 16  # one each to see whether cuDNN takes it
    error, stocks = (torch.stack(e).square().mean().sqrt() for e in (ours, theirs))
    assert error <= HALF_FACTOR * stocks


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_weights_are_folded_from_float32_and_rounded_once(dtype, affine):
    weight, bias, norm = torch.randn(64, 16, 3, 3), torch.randn(64), norm_vectors(64, affine)
    folded, shift = fold(weight, bias, norm, dtype, True)
    gamma, beta, mean, var = (t if t is None else t.double() for t in norm[:4])
    scale = (1 if gamma is None else gamma) / (var + norm.eps).sqrt()
    exact = weight * scale.view(-1, 1, 1, 1)
    offset = (0 if beta is None else beta) + (bias - mean) * scale
    # float32 may fall on the other side of half way between two neighbours
    bound = torch.finfo(dtype).eps / 2 * (1 + 2**-10)
    assert folded.dtype == shift.dtype == dtype
    assert ((folded - exact).abs() <= bound * exact.abs() + 2**-25).all()
    terms = 1 + offset.abs() + (mean * scale).abs() + (bias * scale).abs()
    assert ((shift - offset).abs() <= bound * offset.abs() + 2**-22 * terms).all()


def test_under_autocast_a_plan_folds_the_parameters_before_their_cast(device):
    model = nn.Sequential(ConvBNAct.make(3, 8)).eval()
    model[0].bn.running_var.uniform_(0.5, 1.5)
    optimized = resfast.optimize_for_inference(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = optimized(torch.randn(2, 3, 6, 5))
    layer = optimized.model[0]
    norm = NormVectors(*norm_of(layer.bn))
    expected, _ = fold(layer.conv.weight, None, norm, torch.bfloat16, False)
    twice, _ = fold(layer.conv.weight.bfloat16(), None, norm, torch.bfloat16, False)
    assert y.dtype == torch.bfloat16
    assert not torch.equal(expected, twice)
    assert torch.equal(device[-1]["weight"], expected)


def norm_of(bn):
    return bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps


# ---- who runs


def engine_of(f) -> tuple[str, dict[str, str]]:
    (choice,) = [c for c in choices(f) if c.function == "conv_fprop"]
    return choice.backend, choice.declined


@pytest.mark.parametrize("residual", [False, True])
def test_what_cudnn_refuses_runs_in_passes(device, residual):
    """Which sizes it has no kernel for shows when the plan is made."""
    x, *rest = arguments()
    r = torch.randn_like(x) if residual else None
    device.refusal = "FIND was unable to find an engine\nand more"
    refused = plan_convolution(x, *rest, r, True, False)
    device.refusal = None
    taken = plan_convolution(x, *rest, r, True, False)
    device.clear()
    outputs: list[Tensor] = []
    name, declined = engine_of(lambda: outputs.append(refused(x, r, True)))
    assert (name, declined["cudnn"]) == ("cuda", "FIND was unable to find an engine")
    assert not device
    name, _ = engine_of(lambda: outputs.append(taken(x, r, True)))
    assert name == "cudnn"
    assert len(device) == 1
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize(
    ("relu", "after", "reason"),
    [(False, False, "only with a ReLU"), (True, True, "before the ReLU only")],
)
def test_what_it_cannot_fuse_runs_in_passes(device, relu, after, reason):
    x, *rest = arguments()
    run = plan_convolution(x, *rest, x, relu, after)
    seen = choices(lambda: run(x, x, relu))
    # the second pass writes where the first did
    assert [(c.function, c.backend) for c in seen] == [
        ("conv_fprop", "cuda"),
        ("norm_apply", "cuda"),
    ]
    assert reason in seen[0].declined["cudnn"]
    assert not device


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda: torch.backends.cudnn.flags(enabled=False), "cuDNN is off"),
        (
            lambda: mock.patch("torch.backends.cudnn.is_available", return_value=False),
            "cuDNN is off",
        ),
        (lambda: torch.backends.cudnn.flags(enabled=True, deterministic=True), "deterministic"),
        (
            lambda: mock.patch("torch.are_deterministic_algorithms_enabled", return_value=True),
            "deterministic",
        ),
    ],
)
def test_it_is_not_used_where_it_is_not_wanted(device, change, reason):
    x, *rest = arguments()
    with change():
        run = plan_convolution(x, *rest, None, True, False)
        name, declined = engine_of(lambda: run(x, None, True))
    assert name == "cuda"
    assert reason in declined["cudnn"]


@pytest.mark.parametrize("gamma", [1e6, 1e-6, float("nan")])
def test_weights_that_float16_does_not_hold_are_not_folded(device, gamma):
    x, weight, bias, g, norm = arguments(dtype=torch.float16)
    norm.mean.zero_()
    norm.weight[3] = gamma
    run = plan_convolution(x, weight, bias, g, norm, x, True, False)
    name, declined = engine_of(lambda: run(x, x, True))
    assert name == "cuda"
    assert declined["cudnn"] == "torch.float16 does not hold the folded weights of 1 channels"


def test_plain_pytorch_and_empty_batches_are_left_alone(device):
    x, *rest = arguments()
    assert plan_convolution(x[:0], *rest, None, True, False) is None
    with resfast.backend("eager"):
        assert plan_convolution(x, *rest, None, True, False) is None


# ---- which is faster


NAMES = (engines.TRITON, engines.CUDNN, engines.PASSES, engines.CUTLASS)


@pytest.fixture
def engine_names(monkeypatch, device, tmp_path):
    """Engines that write their number and tell the stopwatch; yields what takes which time."""
    monkeypatch.setenv("RESFAST_TUNE", "first")
    pretended.device(monkeypatch, tmp_path, pretended.Triton())
    milliseconds = {"triton": 3.0, "cudnn": 2.0, "passes": 1.0, "cutlass": 4.0}
    watch = pretended.Stopwatch(monkeypatch, milliseconds)

    def fake(name):
        def run(x, residual, relu, out=None):
            watch.tell(name)
            return torch.full_like(x, NAMES.index(name))

        return run

    monkeypatch.setattr(engines, "_triton", lambda *a: fake("triton"))
    monkeypatch.setattr(engines, "_cudnn", lambda *a: (fake("cudnn"), None))
    monkeypatch.setattr(engines, "_passes", lambda *a: fake("passes"))
    monkeypatch.setattr(engines, "_cutlass", lambda *a: fake("cutlass"))
    return watch


@pytest.fixture
def four(engine_names, monkeypatch):
    """In a build with CUTLASS."""
    monkeypatch.setattr(cutlass, "cutlass_declines", lambda x, weight, g: None)
    monkeypatch.setattr(native, "cutlass_missing", lambda: None)
    return engine_names


def planned(*args) -> str:
    x, *rest = args or arguments()
    y = plan_convolution(x, *rest, None, True, False)(x, None, True)
    return NAMES[int(y.flatten()[0])]


@pytest.mark.parametrize("fastest", NAMES[:3])
def test_the_fastest_is_measured_once_and_remembered(engine_names, monkeypatch, fastest):
    engine_names.milliseconds[fastest] = 0.5
    assert planned() == fastest
    assert set(engine_names.told) == set(NAMES[:3])
    engine_names.told.clear()
    pretended.forget(monkeypatch)
    assert planned() == fastest
    assert engine_names.told == [fastest]
    assert planned(*arguments(k=16)) == fastest
    assert len(engine_names.told) > 2, "another size is another measurement"


def test_an_engine_that_fails_is_left_out(engine_names, monkeypatch):
    def fail(*a):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engines, "_passes", lambda *a: fail)
    assert planned() == "cudnn"


def test_retuning_measures_anew(engine_names, monkeypatch):
    assert planned() == "passes"
    engine_names.milliseconds["triton"] = 0.5
    pretended.forget(monkeypatch)
    assert planned() == "passes"
    with tuning.retuning():
        assert planned() == "triton"
    assert planned() == "triton"


@pytest.mark.parametrize(("side", "expected"), [(1, "triton"), (3, "cudnn")])
def test_unmeasured_ones_run_by_what_is_documented(engine_names, monkeypatch, side, expected):
    monkeypatch.setenv("RESFAST_TUNE", "never")
    assert planned(*arguments(side=side)) == expected
    assert engine_names.told == [expected]
    monkeypatch.setattr(engines, "_cudnn", lambda *a: (None, "no"))
    assert planned(*arguments(side=side)) == ("triton" if side == 1 else "passes")


def test_nothing_is_measured_while_a_graph_is_captured(engine_names, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert planned() == "cudnn"
    assert engine_names.told == ["cudnn"]


@pytest.mark.parametrize(
    ("convolutions", "fastest"), [("own", "triton"), ("library", "passes"), ("auto", "passes")]
)
def test_fusion_says_which_may_run(engine_names, convolutions, fastest):
    engine_names.milliseconds["triton"] = 3.0 if convolutions == "auto" else 0.5
    with resfast.fusion(convolutions=convolutions):
        assert planned() == fastest
    expected = {"own": {"triton"}, "library": {"cudnn", "passes"}, "auto": set(NAMES[:3])}
    assert set(engine_names.told) == expected[convolutions]


def test_a_measurement_holds_among_the_same_engines(engine_names):
    engine_names.milliseconds["triton"] = 0.5
    assert planned() == "triton"
    with resfast.fusion(convolutions="library"):
        assert planned() == "passes"


def test_own_leaves_to_the_library_what_triton_declines(engine_names):
    x, weight, bias, g, norm = arguments()
    grouped = x, weight[:, :4], bias, g._replace(groups=2), norm
    with resfast.fusion(convolutions="own"):
        assert planned(*grouped) == "passes"
    assert "triton" not in engine_names.told


@pytest.mark.parametrize("fastest", NAMES)
def test_what_runs_is_what_is_named(four, fastest):
    four.milliseconds[fastest] = 0.5
    x, *rest = arguments()
    run = plan_convolution(x, *rest, None, True, False)
    assert set(four.told) == set(NAMES)
    four.told.clear()
    (choice,) = choices(lambda: run(x, None, True))
    assert four.told == [fastest]
    assert choice.fused == (() if fastest == "passes" else ("epilogue",))
    assert choice.backend == ("triton" if fastest == "passes" else fastest)
    (others,) = (k for k, v in choice.declined.items() if "faster here" in v)
    assert set(others.split(", ")) == set(NAMES) - {fastest}


@pytest.mark.parametrize(("side", "expected"), [(1, "triton"), (3, "cudnn")])
def test_unmeasured_cutlass_does_not_run(four, monkeypatch, side, expected):
    monkeypatch.setenv("RESFAST_TUNE", "never")
    assert planned(*arguments(side=side)) == expected
    for convolutions, other in (("own", "triton"), ("library", "cudnn")):
        with resfast.fusion(convolutions=convolutions):
            assert planned(*arguments(side=side)) == other
    monkeypatch.setattr(pretended.Triton, "kernel_declines", lambda self, x, weight, g: "no")
    for convolutions in ("own", "auto"):
        with resfast.fusion(convolutions=convolutions):
            assert planned(*arguments(side=side)) == "cudnn"


@pytest.mark.parametrize("convolutions", ["own", "library", "auto"])
def test_cutlass_is_one_of_resfasts_own(four, convolutions):
    four.milliseconds["cutlass"] = 0.1
    with resfast.fusion(convolutions=convolutions):
        assert planned() == ("passes" if convolutions == "library" else "cutlass")
    own, library = {"triton", "cutlass"}, {"cudnn", "passes"}
    assert set(four.told) == {"own": own, "library": library, "auto": own | library}[convolutions]


def test_cutlass_stands_beside_triton_and_cuda_alone(four, monkeypatch):
    four.milliseconds["cutlass"] = 0.1
    for name, expected in (("cuda", "cutlass"), ("cudnn", "passes")):
        backend = pretended.Cuda()
        backend.name = name
        monkeypatch.setattr(select, "_BACKENDS", {name: backend})
        assert planned() == expected


@pytest.mark.parametrize("missing", [None, "not built"])
def test_why_cutlass_declines_is_said_where_it_is_built(four, monkeypatch, missing):
    monkeypatch.setattr(cutlass, "cutlass_declines", lambda x, weight, g: "channels")
    monkeypatch.setattr(native, "cutlass_missing", lambda: missing)
    x, *rest = arguments()
    run = plan_convolution(x, *rest, None, True, False)
    (choice,) = choices(lambda: run(x, None, True))
    assert choice.declined.get("cutlass") == ("channels" if missing is None else None)
    assert "cutlass" not in four.told


# ---- with TF32 and without


@pytest.fixture
def tf32():
    """Allows or forbids it; as before afterwards."""
    flags = torch.backends.cudnn.conv
    before = flags.fp32_precision

    def allow(allowed):
        flags.fp32_precision = "tf32" if allowed else "ieee"

    yield allow
    flags.fp32_precision = before


def test_a_measurement_under_tf32_holds_there(engine_names, tf32):
    tf32(True)
    engine_names.milliseconds["triton"] = 0.5
    assert planned() == "triton"
    engine_names.milliseconds["triton"] = 5.0
    assert planned() == "triton"
    tf32(False)
    assert planned() == "passes"
    half = arguments(dtype=torch.bfloat16)
    assert planned(*half) == "passes"
    engine_names.told.clear()
    tf32(True)
    assert planned(*half) == "passes"
    assert engine_names.told == ["passes"], "of no account to 16 bits"


def test_whose_convolution_trains_is_known_with_tf32_or_without(engine_names, tf32):
    x, weight, _, g, _ = arguments()
    backend = pretended.Triton()
    milliseconds = {"own": 1.0, "library": 1.0}
    engine_names.milliseconds.update(milliseconds)

    def compare():
        key = tuning.convolution_key("conv_fprop", x, weight, g)
        own, library = (lambda name=name: engine_names.tell(name) for name in milliseconds)
        tuning.compare_engines(key, own, library, x.device)

    with tuning.retuning():
        tf32(True)
        compare()
        tf32(False)
        engine_names.milliseconds["own"] = 3.0
        compare()
    assert backend.fusing_declines("conv_fprop", x, weight, g) is not None
    tf32(True)
    assert backend.fusing_declines("conv_fprop", x, weight, g) is None


def test_tiles_are_kept_for_tf32_and_for_exact_products(engine_names, monkeypatch, tf32):
    pytest.importorskip("triton")
    keys = []

    def choose(key, candidates, run, device):
        keys.append(key)
        return candidates[0]

    monkeypatch.setattr(tuning, "choose", choose)
    x, weight, _, g, _ = arguments(side=1)
    for allowed in (True, False):
        tf32(allowed)
        pretended.Triton().conv_fprop_fused(x, weight, None, g, None, False)
    assert [key.split()[1] for key in keys] == ["tf32", "float32"]


@pytest.mark.parametrize("residual", ["none", "before", "after"])
def test_tritons_engine_gives_the_same(device, monkeypatch, tmp_path, residual):
    """The kernels in their interpreter beside the stand-in and passes."""
    pytest.importorskip("triton")
    x, weight, _, g, norm = arguments(k=16)
    bias = torch.randn(16)
    r = None if residual == "none" else torch.randn(2, 16, 6, 5)
    outputs = []
    pretended.device(monkeypatch, tmp_path, pretended.Triton())
    for own in ("own", "library"):
        with resfast.fusion(convolutions=own):
            run = plan_convolution(x, weight, bias, g, norm, r, True, residual == "after")
            assert not any(engine_of(lambda run=run: outputs.append(run(x, r, True)))[1]) or (
                own == "library"
            )
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    assert not torch.equal(*outputs)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_cudnn_itself(residual, dtype):
    """What the stand-in stands for."""
    x, weight, bias, g, norm = arguments(dtype=dtype)
    norm.mean.mul_(0.25)
    norm.bias.mul_(0.25)
    r = torch.randn_like(x) if residual else None
    y = F.conv2d(x.double(), weight.double(), bias, *g)
    gamma, beta, mean, var = (v.double() for v in norm[:4])
    y = F.batch_norm(y, mean, var, gamma, beta, False, 0, norm.eps)
    expected = (y if r is None else y + r.double()).relu()
    x, weight, r = (None if t is None else t.cuda() for t in (x, weight, r))
    norm = NormVectors(*(v.cuda() for v in norm[:4]), norm.eps)
    run = cudnn_convolution(weight.float(), bias, g, norm, dtype, residual)
    torch.testing.assert_close(run(x, r, True).cpu().double(), expected, rtol=2e-2, atol=2e-2)


# ---- whole models


def small(block=resfast.BasicBlock):
    torch.manual_seed(0)
    model = resfast.ResNet(block, [1, 1, 1, 1], stem="cifar", num_classes=5)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_a_model_runs_on_cudnn_but_for_what_has_no_relu(device, layout):
    model = small(resfast.Bottleneck)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=layout)
    exact = resfast.unfused(model).double()(x.double())
    resfast.unfused(model).float()
    optimized = resfast.optimize_for_inference(model)
    y = optimized(x)
    stock = resfast.unfused(model)(x)
    assert (y - exact).norm() <= 2 * max((stock - exact).norm(), 1e-6 * exact.norm())
    (plan,) = optimized.plans.values()
    called = [str(n.target) for n in plan.graph.graph.nodes if n.op == "call_function"]
    assert not any("resfast.conv" in c for c in called)
    device.clear()
    report = resfast.explain(optimized, x)
    projections = 4
    assert len(device) == 2 * (1 + 4 * 3)  # explain makes sure of the plan first
    counts = dict.fromkeys(("cudnn+epilogue", "cuda"), 0)
    for row in report.rows:
        assert row.module == "OptimizedModel"
        if row.op == "conv_fprop":
            counts[row.backends["conv_fprop"]] += 1
    assert counts == {"cudnn+epilogue": 1 + 4 * 3, "cuda": projections}
    assert not report.backward
    assert "only with a ReLU" in str(report)


def test_explain_of_a_fresh_plan_is_of_the_plan(device):
    optimized = resfast.optimize_for_inference(small())
    report = resfast.explain(optimized, torch.randn(2, 3, 16, 16))
    assert {row.module for row in report.rows} == {"OptimizedModel"}

"""The cuDNN backend's use of its graphs, with the package's part played on CPU in float32."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import cudnn_interpreter
import pytest
import torch

import resfast
from resfast.backends import cudnn, cudnn_graphs, select
from resfast.backends.eager import EagerBackend
from resfast.backends.interface import Affine, Below, NormGradient, pack_mask
from resfast.nn.blocks import run_stages
from resfast.testing import HALF_DTYPES, judge_seeds, op_cases

CASES = [case for training in (True, False) for case in op_cases(training)]  # training first
FEW = ("bn_add_relu", "bn_relu_add", "bottleneck_projection", "bottlenecks")
BACKEND = cudnn.CudnnBackend()
EAGER = EagerBackend()


@pytest.fixture
def forced(monkeypatch):
    cudnn_interpreter.install(monkeypatch)
    with resfast.backend("cudnn"):
        yield


def _nhwc(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype, memory_format=torch.channels_last)


def _affine(c):
    mean, var = torch.randn(c), torch.rand(c) + 0.1
    return EAGER.norm_prepare(mean, var, torch.randn(c), torch.randn(c), 1e-5)


# ---- numerics of whole ops


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, torch.float32) for c in CASES]
    + [(c, t) for c in CASES[: len(CASES) // 2] if c.name in FEW for t in HALF_DTYPES],
    ids=str,
)
def test_ops_stay_within_the_error_criterion(forced, case, dtype):
    seeds = 4 if dtype == torch.float32 else 32
    bad = [v for v in judge_seeds(case, dtype, seeds) if not v.ok]
    assert not bad, "\n".join(map(str, bad))


def test_a_variance_far_below_eps_keeps_its_digits(forced):
    """cuDNN's other output, 1/√(var + eps), would not: var/eps is 1e-6 here."""
    z = _nhwc(4, 8, 5, 6) * 3e-6
    _, mean, var = BACKEND.norm_forward(z, None, None, 1e-5, None, True, False, None)
    exact = z.double().var((0, 2, 3), correction=0)
    assert ((var.double() - exact).abs() / exact).max() < 1e-5
    assert (mean - z.mean((0, 2, 3))).abs().max() < 1e-11


# ---- each function beside eager's


@pytest.mark.parametrize("add_after_act", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_forward_and_its_mask(forced, with_residual, relu, add_after_act):
    z = _nhwc(3, 16, 5, 4)
    weight, bias = torch.randn(16), torch.randn(16)
    residual = _nhwc(3, 16, 5, 4) if with_residual else None
    mask = torch.empty(60, 2, dtype=torch.uint8)
    arguments = (weight, bias, 1e-3, residual, relu, add_after_act)
    y, mean, var = BACKEND.norm_forward(z, *arguments, mask)
    assert torch.equal(mask, pack_mask(y))
    exact_mean, m2 = EAGER.norm_stats(z)
    affine, _ = EAGER.norm_prepare(exact_mean, m2 / 60, weight, bias, 1e-3)
    exact = EAGER.norm_apply(z, affine, residual, None, relu, add_after_act)
    for a, b in ((y, exact), (mean, exact_mean), (var * 60, m2)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("add_after_act", [False, True])
@pytest.mark.parametrize("residual_affine", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_norm_apply(forced, in_place, residual_affine, add_after_act):
    z, residual = _nhwc(3, 16, 5, 4), _nhwc(3, 16, 5, 4)
    affine, _ = _affine(16)
    second = _affine(16)[0] if residual_affine else None
    exact = EAGER.norm_apply(z, affine, residual, second, True, add_after_act)
    out = z if in_place else None
    mask = torch.empty(60, 2, dtype=torch.uint8)
    y = BACKEND.norm_apply(z, affine, residual, second, True, add_after_act, out, mask)
    assert (y is z) == in_place
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(mask, pack_mask(y))


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("wants", [(), ("du",), ("activation",), ("du", "activation")], ids=str)
@pytest.mark.parametrize("source", ["none", "again", "y", "mask"])
def test_norm_backward(forced, source, wants, second):
    z, dy, dy2, y = (_nhwc(3, 16, 5, 4) for _ in range(4))
    affine, rstd = _affine(16)
    relu = source != "none"
    given = y if source in ("y", "mask") else None
    got, exact = ({name: torch.zeros_like(z) for name in ("du", "activation")} for _ in range(2))
    written = {name: got[name] if name in wants else None for name in got}
    dz, *sums = BACKEND.norm_backward(
        dy,
        z,
        affine,
        rstd,
        given,
        relu,
        **written,
        dy2=dy2 if second else None,
        mask=pack_mask(y) if source == "mask" else None,
    )
    total = dy + dy2 if second else dy
    exact_sums = EAGER.norm_backward_reduce(
        total, z, affine, rstd, given, relu, exact["activation"]
    )
    coefs = EAGER.norm_coefficients(affine.scale, rstd, exact_sums[0], exact_sums[1] / rstd, 60)
    exact_dz = torch.empty_like(z)
    EAGER.norm_backward_apply(total, z, affine, given, relu, *coefs[1:], exact_dz, exact["du"])
    torch.testing.assert_close(dz, exact_dz, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums, list(exact_sums), rtol=1e-4, atol=1e-4)
    for name in wants:
        torch.testing.assert_close(got[name], exact[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_du", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("source", ["none", "again", "y"])
def test_norm_backward_apply_over_its_gradient(forced, source, training, with_du):
    z, dy, y = (_nhwc(3, 16, 5, 4) for _ in range(3))
    affine, _ = _affine(16)
    coefs = (torch.randn(16), torch.randn(16)) if training else (None, None)
    arguments = (z, affine, y if source == "y" else None, source != "none", *coefs)
    exact_dz, exact_du, du = (torch.full_like(z, torch.nan) for _ in range(3))
    EAGER.norm_backward_apply(dy, *arguments, exact_dz, exact_du)
    BACKEND.norm_backward_apply(dy, *arguments, dy, du if with_du else None)
    torch.testing.assert_close(dy, exact_dz, rtol=1e-5, atol=1e-5)
    if with_du:
        assert torch.equal(du, exact_du)


@pytest.mark.parametrize("bits", [False, True])
def test_a_block_end_of_two_norms(forced, bits):
    z, z2, dy, dy2, y = (_nhwc(3, 16, 5, 4) for _ in range(5))
    mean, mean2, scale = (torch.randn(16) for _ in range(3))
    du = torch.full_like(z, torch.nan)
    end = Below(z, Affine(mean, scale, scale), pack_mask(y) if bits else None, z2, mean2)
    sums = BACKEND.norm_join_reduce(dy, dy2, y, end, du)
    exact = torch.where(y > 0, dy + dy2, 0)
    torch.testing.assert_close(du, exact)
    for row, factor in zip(
        sums, (1, z - mean.view(-1, 1, 1), z2 - mean2.view(-1, 1, 1)), strict=True
    ):
        torch.testing.assert_close(row, (exact * factor).sum((0, 2, 3)), rtol=1e-4, atol=1e-4)
    coef_z, coef_1 = torch.randn(16), torch.randn(16)
    first = NormGradient(du, z, mean, scale, coef_z, coef_1)
    second = NormGradient(du, z2, mean2, coef_1, None, scale)
    dz, dz2 = torch.empty_like(z), torch.empty_like(z)
    BACKEND.norm_join_apply(first, dz, second, dz2)
    for out, g, at in ((dz, first, z), (dz2, second, z2)):
        want = torch.empty_like(z)
        affine = Affine(g.mean, g.scale, g.mean)
        EAGER.norm_backward_apply(du, at, affine, None, False, g.coef_z, g.coef_1, want, None)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_operands_that_lie_anywhere_are_moved(forced):
    """cuDNN reads 16 bytes at once; a flat parameter's slices start where they may."""
    flat = torch.randn(3 * 16 * 20 + 33)
    z = flat[1 : 1 + 960].view(3, 5, 4, 16).permute(0, 3, 1, 2)
    weight, bias = flat[1:17], flat[17:33]
    y, *_ = BACKEND.norm_forward(z, weight, bias, 1e-5, z, True, False, None)
    exact, *_ = BACKEND.norm_forward(
        z.clone(), weight.clone(), bias.clone(), 1e-5, z.clone(), True, False, None
    )
    assert torch.equal(y, exact)


# ---- plans


def test_a_training_block_runs_cudnns_fused_graphs(forced):
    """NormAddRelu with its bits forward; DReluForkDNorm of both gradients backward."""
    blocks = torch.nn.Sequential(*(resfast.Bottleneck(64, 16) for _ in range(2)))
    run_stages([blocks], _nhwc(2, 64, 6, 6).requires_grad_()).sum().backward()
    graphs = {graph for _, graph in cudnn_graphs._plans}
    wide, narrow = (2, 64, 6, 6), (2, 16, 6, 6)
    assert graphs == {
        cudnn_graphs.NormForward(narrow, torch.float32, False, True, False),
        cudnn_graphs.NormForward(wide, torch.float32, True, True, True),
        cudnn_graphs.NormBackward(wide, torch.float32, "mask", False, True),
        cudnn_graphs.NormBackward(wide, torch.float32, "mask", True, True),
        cudnn_graphs.NormBackward(narrow, torch.float32, "again", False, True),
    }


def test_a_graph_is_planned_once_for_a_shape_a_type_and_its_choices(forced, monkeypatch):
    planned = []
    monkeypatch.setattr(
        cudnn_graphs,
        "plan",
        lambda graph, _plan=cudnn_graphs.plan, **options: (
            planned.append(graph) or _plan(graph, **options)
        ),
    )

    def run(shape=(2, 8, 3, 3), dtype=torch.float32, eps=1e-5, relu=True, weight=None):
        z = _nhwc(*shape, dtype=dtype)
        BACKEND.norm_forward(z, weight, None, eps, None, relu, False, None)

    run()
    run(eps=1e-3, weight=torch.randn(8))
    assert len(planned) == 1
    for other in ({"shape": (3, 8, 3, 3)}, {"dtype": torch.bfloat16}, {"relu": False}):
        run(**other)
        run(**other)
    assert len(planned) == 4


def test_threads_share_plans_and_results_are_theirs(forced):
    z = [_nhwc(2, 8, 4, 4) for _ in range(4)]
    alone = [BACKEND.norm_forward(t, None, None, 1e-5, None, True, False, None)[0] for t in z]
    got = [None] * 4

    def work(i):
        for _ in range(5):
            got[i] = BACKEND.norm_forward(z[i], None, None, 1e-5, None, True, False, None)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, got, strict=True))
    assert len(cudnn_graphs._plans) == 1


# ---- availability


def test_it_comes_last_before_eager_and_is_chosen_where_the_others_are_not(monkeypatch):
    assert select.names()[-2:] == ("cudnn", "eager")
    cudnn_interpreter.install(monkeypatch)
    for name in ("cpu", "triton", "cuda"):
        monkeypatch.setattr(type(select._BACKENDS[name]), "unavailable_reason", lambda self: "no")
    assert select.find("norm_apply", torch.zeros(1, 8, 1, 1))[0].name == "cudnn"
    assert select.find("norm_apply", torch.zeros(1, 3, 1, 1))[0].name == "eager"


@pytest.mark.parametrize(
    ("function", "shape", "dtype", "reason"),
    [
        ("norm_apply", (2, 12, 3, 3), torch.float32, None),
        ("norm_apply", (2, 6, 3, 3), torch.float32, "6 channels, not a multiple of 4"),
        ("norm_stats", (2, 12, 3, 3), torch.bfloat16, "12 channels, not a multiple of 8"),
        ("norm_apply", (0, 8, 3, 3), torch.float16, "0 values"),
        ("norm_apply", (2**15, 64, 32, 32), torch.float16, None),
        ("norm_apply", (2**15 + 1, 64, 32, 32), torch.float16, "2147549184 values"),
        ("norm_apply", (2, 8, 3, 3), torch.float64, "no graph for torch.float64"),
        ("conv_fprop", (2, 3, 7, 7), torch.bfloat16, None),
        ("norm_apply", (5,), torch.float32, None),
    ],
)
def test_it_declines_with_a_reason(monkeypatch, function, shape, dtype, reason):
    cudnn_interpreter.install(monkeypatch)
    monkeypatch.setattr(cudnn, "DEVICE", "meta")
    like = torch.empty(shape, dtype=dtype, device="meta")
    assert BACKEND.declines(function, like) == reason
    monkeypatch.setattr(cudnn_graphs, "unsupported", lambda index, dtype: "too old")
    assert BACKEND.declines(function, like) == (reason or "too old")
    monkeypatch.setattr(cudnn, "DEVICE", "cuda")
    assert BACKEND.declines(function, like) == "it runs on cuda, the tensor is on meta"


def test_explain_tells_why_its_convolutions_are_the_librarys(forced):
    block = resfast.BasicBlock(8, 8).half()
    reasons = {
        dtype: BACKEND.fusing_declines("conv_fprop", torch.empty(1, dtype=dtype), None, None)
        for dtype in (torch.float16, torch.bfloat16)
    }
    assert reasons[torch.bfloat16] == "cuDNN fuses norms into fp16 convolutions only"
    report = resfast.explain(block, _nhwc(2, 8, 4, 4, dtype=torch.float16))
    assert reasons[torch.float16] in str(report)


def test_without_the_package_it_is_unavailable_and_nothing_imports_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert BACKEND.unavailable_reason() == "nvidia-cudnn-frontend is not installed"
    code = "import sys, resfast; resfast.backends.available(); assert 'cudnn' not in sys.modules"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


def test_a_package_that_does_not_serve_says_why(monkeypatch):
    monkeypatch.setattr(cudnn_graphs, "installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert BACKEND.unavailable_reason() == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def broken():
        raise OSError("libcudnn.so.9: not found\nmore")

    for version, reason in (
        (broken, "nvidia-cudnn-frontend does not load: OSError: libcudnn.so.9: not found"),
        (lambda: 80907, "it needs cuDNN 9, there is 80907"),
        (lambda: 90000, None),
    ):
        library = SimpleNamespace(backend_version=version)
        monkeypatch.setattr(cudnn_graphs, "_cudnn", lambda library=library: library)
        cudnn_graphs.load_error.cache_clear()
        assert BACKEND.unavailable_reason() == reason
    cudnn_graphs.load_error.cache_clear()


def test_a_device_without_engines_is_declined_in_cudnns_words(monkeypatch):
    ask = cudnn_graphs.unsupported.__wrapped__
    cudnn_interpreter.install(monkeypatch)
    assert ask(0, torch.bfloat16) is None

    def refuse(self):
        raise RuntimeError("no engine for sm_75\nsecond line")

    monkeypatch.setattr(cudnn_interpreter.pygraph, "check_support", refuse)
    assert ask(0, torch.bfloat16) == "cuDNN has no engine: no engine for sm_75"


# ---- on a GPU

on_a_gpu = pytest.mark.skipif(
    BACKEND.unavailable_reason() is not None, reason=str(BACKEND.unavailable_reason())
)


@pytest.mark.cuda
@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
def test_results_and_masks_on_a_gpu_are_eagers(dtype):
    """The bits are in the order of ``pack_mask``, as other backends read them."""
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    z, residual, dy, dy2 = (_nhwc(4, 64, 15, 9, dtype=dtype).cuda() for _ in range(4))
    weight, bias = torch.randn(64).cuda(), torch.randn(64).cuda()
    mask = torch.empty(4 * 15 * 9, 8, dtype=torch.uint8, device="cuda")
    y, mean, var = BACKEND.norm_forward(z, weight, bias, 1e-5, residual, True, False, mask)
    assert torch.equal(mask, pack_mask(y))
    exact_mean, m2 = EAGER.norm_stats(z)
    affine, rstd = EAGER.norm_prepare(exact_mean, m2 / (4 * 15 * 9), weight, bias, 1e-5)
    exact = EAGER.norm_apply(z, affine, residual, None, True, False)
    torch.testing.assert_close(y, exact, **close)
    torch.testing.assert_close((mean, var), (exact_mean, m2 / (4 * 15 * 9)), rtol=1e-4, atol=1e-5)
    du = torch.empty_like(z)
    dz, *sums = BACKEND.norm_backward(dy, z, affine, rstd, y, True, None, du, dy2=dy2, mask=mask)
    exact_du = torch.where(y > 0, dy + dy2, 0)
    torch.testing.assert_close(du, exact_du)
    exact_sums = EAGER.norm_backward_reduce(exact_du, z, affine, rstd, None, False, None)
    torch.testing.assert_close(sums, list(exact_sums), rtol=1e-3, atol=1e-2)
    coefs = EAGER.norm_coefficients(
        affine.scale, rstd, exact_sums[0], exact_sums[1] / rstd, 4 * 15 * 9
    )
    exact_dz = torch.empty_like(z)
    EAGER.norm_backward_apply(exact_du, z, affine, None, False, *coefs[1:], exact_dz, None)
    torch.testing.assert_close(dz, exact_dz, **close)


@pytest.mark.cuda
@on_a_gpu
def test_a_captured_step_replays():
    block = resfast.Bottleneck(64, 16).cuda().half()
    x = _nhwc(2, 64, 8, 8, dtype=torch.float16).cuda().requires_grad_()

    def step():
        x.grad = None
        y = block(x)
        y.sum().backward()
        return y, x.grad

    with resfast.backend("cudnn"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            exact = [t.detach().clone() for t in step()]
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
    for _ in range(2):
        for t in captured:
            t.detach().zero_()
        graph.replay()
        torch.testing.assert_close([t.detach() for t in captured], exact)

"""Every op against float64, its error judged beside stock PyTorch's on the same inputs."""

from __future__ import annotations

import json

import pytest
import torch

import resfast
from resfast import native
from resfast.backends.eager import EagerBackend
from resfast.diagnostics import numerics
from resfast.diagnostics.environment import device_info
from resfast.ops import ConvParams, NormParams, bn_act, conv_bn_act
from resfast.testing import HALF_DTYPES, HALF_SEEDS, Verdict, judge, judge_seeds, op_cases

CASES = [case for training in (True, False) for case in op_cases(training)]
BACKENDS = ["cpu", "eager"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cpu" and not native.is_available():
        pytest.skip(f"no native library: {native.load_error()}")
    with resfast.backend(request.param):
        yield request.param


def _assert_ok(verdicts):
    bad = [v for v in verdicts if not v.ok]
    assert not bad, "\n".join(map(str, bad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_full_precision(case, dtype, backend):
    _assert_ok(judge_seeds(case, dtype, seeds=8))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_half_precision(case, dtype):
    _assert_ok(judge_seeds(case, dtype, seeds=HALF_SEEDS))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_on_a_gpu(case, dtype):
    _assert_ok(
        judge_seeds(case, dtype, seeds=HALF_SEEDS if dtype in HALF_DTYPES else 8, device="cuda")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_of_each_instruction_set(isa, dtype):
    wanted = ("bn_add_relu", "bn_relu_max_pool", "bottleneck_projection")
    for case in op_cases(training=True):
        if case.name in wanted:
            _assert_ok(judge_seeds(case, dtype, seeds=HALF_SEEDS if dtype in HALF_DTYPES else 8))


def test_check_judges_on_the_device_it_is_given(monkeypatch, tmp_path):
    seen = set()

    def judged(case, dtype, seeds, device, layouts):
        seen.add(device)
        return [Verdict("y", 0.0, 0.0, 1.0, 0.0, 1.0)]

    monkeypatch.setattr(numerics, "judge_seeds", judged)
    rows = list(numerics.run(quick=True, dtypes=["float32"], device="meta"))
    assert seen == {"meta"}
    assert {row.backend for row in rows} == {"eager"}, "the cpu backend declines other tensors"

    report = tmp_path / "check.json"
    assert numerics.main(quick=True, dtypes=["float32"], out=report) == 0
    assert seen == {"meta", "cpu"}
    record = json.loads(report.read_text())
    assert record["device"] == device_info(torch.device("cpu"))
    assert record["date"]
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["rows"]) % len(rows) == 0


def test_check_lists_a_dtype_that_a_backend_declines(monkeypatch, tmp_path, capsys):
    def declines(self, function, z):
        return "no such dtype here" if z.dtype == torch.float64 else None

    monkeypatch.setattr(EagerBackend, "declines", declines)
    monkeypatch.setattr(
        numerics, "judge_seeds", lambda *a, **k: [Verdict("y", 0.0, 0.0, 1.0, 0.0, 1.0)]
    )
    report = tmp_path / "check.json"
    dtypes = ["float32", "float64"]
    assert numerics.main(quick=True, dtypes=dtypes, out=report, device="meta") == 0
    record = json.loads(report.read_text())
    declined = {"backend": "eager", "dtype": "float64", "reason": "no such dtype here"}
    assert record["declined"] == [declined]
    assert {row["dtype"] for row in record["rows"]} == {"float32"}
    assert "declined: no such dtype here" in capsys.readouterr().out


def test_the_criterion_notices_an_error_of_one_channel():
    """A tenth of a percent on one channel of 64, in fp32, must not hide in the mean."""
    from resfast.testing import _errors

    ref = torch.randn(2, 64, 10, 9, dtype=torch.float64)
    good = ref.float()
    bad = good.clone()
    bad[:, 5] *= 1.001
    assert judge("y", [_errors(good, ref, [(good, ref)])], torch.float32).ok
    assert not judge("y", [_errors(bad, ref, [(good, ref)])], torch.float32).ok
    assert not judge("y", [_errors(good * float("nan"), ref, [(good, ref)])], torch.float32).ok


def _norm(c, dtype=torch.float32, **options):
    return NormParams(
        torch.ones(c, dtype=dtype),
        torch.linspace(-1, 1, c, dtype=dtype),
        torch.zeros(c, dtype=dtype),
        torch.ones(c, dtype=dtype),
        torch.tensor(0),
        True,
        **options,
    )


def test_variance_of_a_large_mean(backend):
    """mean/std = 1e4: relative error of the variance below 1e-5, where E[x²] − E[x]² is noise."""
    z = torch.randn(8, 16, 28, 28) + 1e4
    norm = _norm(16, momentum=1.0)
    bn_act(z, norm)
    exact = z.double().var((0, 2, 3), unbiased=True)
    assert ((norm.running_var.double() - exact).abs() / exact).max() < 1e-5


@pytest.mark.parametrize("magnitude", [1e2, 1e4, 1e6, 1e8])
def test_a_constant_channel_gives_beta(backend, magnitude):
    z = torch.full((4, 16, 9, 7), magnitude) * torch.linspace(0.5, 1, 16).view(1, -1, 1, 1)
    norm = _norm(16)
    y = bn_act(z, norm, relu=False)
    assert (y - norm.bias.view(1, -1, 1, 1)).abs().max() < 1e-3


def test_running_mean_of_a_large_offset_is_exact_to_an_ulp(backend):
    z = torch.randn(4, 8, 17, 5) * 1e-2 + 4096
    norm = _norm(8, momentum=1.0)
    bn_act(z, norm)
    exact = z.double().mean((0, 2, 3))
    assert ((norm.running_mean.double() - exact).abs() / exact).max() <= 2.0**-23


def test_nan_reaches_the_output_and_its_channel_only(backend):
    z = torch.randn(2, 4, 5, 5)
    z[1, 2, 3, 3] = float("nan")
    y = bn_act(z, _norm(4))
    assert y[:, 2].isnan().all()
    assert not y[:, [0, 1, 3]].isnan().any()


def test_layouts_agree_bitwise(backend):
    z = torch.randn(3, 17, 6, 5)
    r = torch.randn(3, 17, 6, 5)
    sliced = torch.randn(3, 34, 6, 5)[:, ::2].copy_(z)
    a = bn_act(z, _norm(17), r)
    for other in (z.contiguous(memory_format=torch.channels_last), sliced):
        assert torch.equal(a, bn_act(other, _norm(17), r))
    assert a.is_contiguous(memory_format=torch.channels_last)


def test_inference_uses_new_values_after_a_write_that_bumps_no_version():
    """Folded weights are cached; p.data writes leave the version counter alone."""
    x = torch.randn(2, 8, 6, 6)
    w = torch.nn.Parameter(torch.randn(8, 8, 3, 3))
    conv = ConvParams(w, None, padding=(1, 1))
    norm = _norm(8)._replace(training=False)
    with torch.no_grad():
        first = conv_bn_act(x, conv, norm)
        w.data.mul_(2.0)
        second = conv_bn_act(x, conv, norm)
        norm.running_mean.data.add_(1.0)
        third = conv_bn_act(x, conv, norm)
        with resfast.backend("eager"):
            expected = conv_bn_act(x, conv, norm)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    torch.testing.assert_close(third, expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("add_after_act", [False, True])
def test_inference_with_a_residual_at_small_sizes(size, add_after_act):
    x, r = torch.randn(3, 8, *size), torch.randn(3, 8, *size)
    conv = ConvParams(torch.randn(8, 8, 3, 3), None, padding=(1, 1))
    norm = _norm(8)._replace(training=False)
    with torch.no_grad():
        y = conv_bn_act(x, conv, norm, r, add_after_act=add_after_act)
        with resfast.backend("eager"):
            expected = conv_bn_act(x, conv, norm, r, add_after_act=add_after_act)
    torch.testing.assert_close(y, expected)

"""Selecting a backend, forcing one, and saying which ran."""

from __future__ import annotations

import os
import subprocess
import sys

import needs
import pytest
import torch

import resfast
from resfast import native
from resfast.backends import available, names, select
from resfast.ops import NormParams, bn_act


def _norm(c):
    return NormParams(None, None, torch.zeros(c), torch.ones(c), None, True)


def _choices(f):
    seen = []
    with select.listen(seen.append):
        f()
    return [(c.function, c.backend) for c in seen]


@needs.native_library
def test_the_native_backend_comes_first():
    z = torch.randn(2, 3, 4, 4)
    assert _choices(lambda: bn_act(z, _norm(3))) == [("norm_stats", "cpu"), ("norm_apply", "cpu")]


def test_a_forced_backend_runs_forward_and_backward():
    z = torch.randn(2, 3, 4, 4, requires_grad=True)

    def run():
        with resfast.backend("eager"):
            bn_act(z, _norm(3)).sum().backward()

    functions = ("norm_stats", "norm_apply", "norm_backward_reduce", "norm_backward_apply")
    assert _choices(run) == [(f, "eager") for f in functions]


def test_forcing_ends_with_its_context_also_on_an_error():
    before = _choices(lambda: bn_act(torch.randn(2, 3, 4, 4), _norm(3)))
    with pytest.raises(ZeroDivisionError), resfast.backend("eager"):
        raise ZeroDivisionError
    assert _choices(lambda: bn_act(torch.randn(2, 3, 4, 4), _norm(3))) == before


def test_unknown_backend():
    with pytest.raises(ValueError, match="unknown backend 'fast'"), resfast.backend("fast"):
        pass


@needs.native_library
def test_a_forced_backend_never_falls_back():
    z = torch.randn(2, 3, 4, 4, device="meta")
    with resfast.backend("cpu"), pytest.raises(RuntimeError, match="forced but does not run"):
        select.select("norm_apply", z)


def test_available_names_every_backend():
    rows = available()
    assert [name for name, _, _ in rows] == list(names())
    assert ("eager", True, "") in rows
    assert all(ok or reason for _, ok, reason in rows)


@needs.native_library
def test_available_on_a_device_leaves_out_backends_that_decline_its_tensors():
    assert ("cpu", True, "") in available("cpu")
    reasons = {name: reason for name, ok, reason in available("meta") if not ok}
    assert reasons["cpu"] == "it runs on cpu, the tensor is on meta"


def _python(code, **env):
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_the_library_everything_runs_on_eager_and_warns_once():
    done = _python(
        "import torch, resfast\n"
        "import resfast as again\n"
        "m = resfast.resnet18(stem='cifar')\n"
        "m(torch.randn(2, 3, 16, 16)).sum().backward()\n"
        "print([n for n, ok, _ in resfast.backends.available() if ok])\n"
        "print(dict(resfast.backends.available()[i][::2] for i in (0,)))\n",
        RESFAST_DISABLE_NATIVE="1",
    )
    assert done.returncode == 0, done.stderr
    usable = done.stdout.splitlines()[0]
    assert "eager" in usable
    assert "cpu" not in usable
    assert "RESFAST_DISABLE_NATIVE" in done.stdout
    assert done.stderr.count("resfast runs without its native kernels") == 1


def test_the_environment_forces_a_backend():
    code = (
        "import torch, resfast\n"
        "from resfast.backends.select import select\n"
        "print(select('norm_apply', torch.zeros(1, 1, 1, 1)).name)"
    )
    assert _python(code, RESFAST_BACKEND="eager").stdout.strip() == "eager"
    bad = _python(code, RESFAST_BACKEND="fast")
    assert bad.returncode != 0
    assert "unknown backend 'fast'" in bad.stderr


def test_import_needs_no_triton_and_starts_no_cuda():
    done = _python(
        "import sys\n"
        "import torch\n"
        "before = 'triton' in sys.modules\n"
        "import resfast\n"
        "assert before or 'triton' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert done.returncode == 0, done.stderr


def test_explain_names_ops_backends_and_reasons():
    model = resfast.resnet18(stem="cifar", num_classes=3)
    model.layer2[0].conv1.register_forward_hook(lambda *a: None)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    report = resfast.explain(model, torch.randn(2, 3, 16, 16))
    rows = {r.module: r for r in report.rows}
    assert rows["layer1.0"].op == "residual_block"
    hooked = [r for r in report.rows if r.module == "layer2.0"]
    assert hooked[0].op == "unfused"
    assert "hook" in hooked[0].reason
    assert [r.op for r in hooked[1:]] == ["conv_bn_act", "conv_bn_act"]
    expected = "cpu" if native.is_available() else "eager"
    assert set(rows["layer1.0"].backends.values()) == {expected}
    assert report.backward["norm_backward_apply", expected] > 0
    assert "layer2.0" in str(report)
    assert "residual_block" in str(report)
    for k, v in model.state_dict().items():
        assert torch.equal(v, state[k]), k
    assert all(p.grad is None for p in model.parameters())
    assert "forward" not in model.layer1[0].__dict__


def test_scratch_is_reused_by_its_slot_and_freed():
    from resfast.backends import scratch as module

    like = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    a, b = module.scratch("a", like), module.scratch("b", like)
    assert (a.shape, a.stride(), a.dtype) == (like.shape, like.stride(), like.dtype)
    assert a.data_ptr() != b.data_ptr()
    smaller = torch.empty(1, 3, 4, 5, dtype=torch.bfloat16)
    assert module.scratch("a", smaller).data_ptr() == a.data_ptr()
    resfast.clear_caches()
    assert "slots" not in module._threads.__dict__


def test_block_results_survive_the_next_call():
    """What a block returns must not live in scratch memory."""
    block = resfast.BasicBlock(4, 4)
    separate = resfast.nn.Bottleneck(16, 4)
    for module, c in ((block, 4), (separate, 16)):
        x = torch.randn(2, c, 6, 6, requires_grad=True)
        y = module(x)
        gradients = torch.autograd.grad(y.sum(), [x, *module.parameters()])
        kept = [t.clone() for t in (y, *gradients)]
        module(torch.randn(2, c, 6, 6, requires_grad=True)).sum().backward()
        for t, before in zip((y, *gradients), kept, strict=True):
            assert torch.equal(t, before)


@needs.native_library
@pytest.mark.parametrize(
    ("dtype", "functions"),
    [(torch.float32, ["conv_fprop"]), (torch.bfloat16, ["conv_fprop", "norm_apply"])],
    ids=str,
)
def test_explain_says_when_inference_takes_two_steps(dtype, functions):
    block = resfast.BasicBlock(4, 4).eval().to(dtype)
    with torch.no_grad():
        report = resfast.explain(block, torch.randn(2, 4, 6, 6, dtype=dtype))
    assert set(report.rows[0].backends) == set(functions)
    assert ("cpu convolution epilogue" in report.declined) == (len(functions) == 2)

"""optimize_for_inference: equal outputs, nothing left between the layers, and its refusals."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import nn

import resfast
from resfast import native

pytestmark = pytest.mark.skipif(not native.is_available(), reason=str(native.load_error()))
MODELS = ["resnet18", "resnet50", "resnext50_32x4d", "preact_resnet18", "simple_resnet"]


def _model(name="resnet18", **options):
    torch.manual_seed(0)
    model = resfast.create_model(name, num_classes=10, **options)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return model.eval()


def _images(*shape):
    return torch.randn(shape or (2, 3, 64, 64)).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_models(name):
    model, x = _model(name), _images()
    exact = resfast.unfused(model).double()(x.double())
    y = resfast.optimize_for_inference(model)(x)
    with torch.no_grad():
        assert (y - exact).norm() <= 2 * max((model(x) - exact).norm(), 1e-6 * exact.norm())
    assert not y.requires_grad


def test_every_convolution_is_prepared_and_nothing_else_is_called():
    optimized = resfast.optimize_for_inference(_model("resnet50"))
    x = _images()
    optimized(x)
    (plan,) = optimized.plans.values()
    called = [str(n.target) for n in plan.graph.nodes if n.op == "call_function"]
    assert sum("run_conv_bn_act_inference" in c for c in called) == 53
    assert not any("resfast.conv" in c for c in called)
    assert len(called) <= 53 + 7  # pooling, flattening, the linear layer


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_residuals_are_overwritten_only_after_their_last_use(name):
    """In a classifier every one is; features that are returned stay what they were."""
    optimized = resfast.optimize_for_inference(_model(name))
    optimized(_images())
    (plan,) = optimized.plans.values()
    runs = [n for n in plan.graph.nodes if str(n.target).startswith("<function run_")]
    added = [n for n in runs if n.args[1] is not None]
    first = 1 if name == "resnet18" else 0  # the max-pool's output is not a convolution's
    assert [n.args[3] for n in added] == [False] * first + [True] * (len(added) - first)

    class Both(nn.Module):
        """Returns what the second block also takes as its residual, and a view of it."""

        def __init__(self):
            super().__init__()
            self.blocks = _model(name).layer1

        def forward(self, x):
            first = self.blocks[0](x)
            return first, self.blocks[1](first), first.flatten(1)

    model, x = Both().eval(), _images(2, 64, 16, 16)
    with torch.no_grad():
        wanted = model(x)
    got = resfast.optimize_for_inference(model)(x)
    for y, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)


def test_each_input_size_has_a_plan_up_to_a_limit(monkeypatch):
    monkeypatch.setattr("resfast.inference.MAX_PLANS", 2)
    model = _model()
    optimized = resfast.optimize_for_inference(model)
    for shape in ((1, 3, 32, 32), (2, 3, 32, 32), (1, 3, 40, 48), (2, 3, 32, 32)):
        x = _images(*shape)
        with torch.no_grad():
            torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(optimized.plans) == 2


def test_later_changes_of_the_model_do_not_reach_the_copy():
    model, x = _model(), _images()
    optimized = resfast.optimize_for_inference(model)
    with torch.no_grad():
        model.conv1.weight.zero_()
    before = optimized(x)
    with torch.no_grad():
        model.fc.weight.zero_()
    assert torch.equal(optimized(x), before)
    assert before.std() > 0.01


def test_training_models_are_refused():
    model = _model()
    model.layer1[0].bn1.train()
    with pytest.raises(RuntimeError, match=r"layer1\.0\.bn1 is in training mode"):
        resfast.optimize_for_inference(model)
    with pytest.raises(RuntimeError, match="cannot train"):
        resfast.optimize_for_inference(_model()).train()
    assert not resfast.optimize_for_inference(_model()).eval().training


def test_what_cannot_be_traced_runs_as_it_is():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = _model().layer1

        def forward(self, x):
            y = self.block(x)
            return y if y.sum() > 0 else -y

    model, x = Fickle().eval(), _images(1, 64, 16, 16)
    optimized = resfast.optimize_for_inference(model)
    with pytest.warns(UserWarning, match="Fickle cannot be traced"):
        y = optimized(x)
    torch.testing.assert_close(y, model(x).detach())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimized(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_run_too(dtype):
    model, x = _model().to(dtype), _images().to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(resfast.optimize_for_inference(model)(x), model(x))


def test_on_another_device_no_convolution_is_prepared_for_the_cpu():
    optimized = resfast.optimize_for_inference(_model().to("meta"))
    y = optimized(_images().to("meta"))
    assert y.device.type == "meta"
    assert y.shape == (2, 10)
    (plan,) = optimized.plans.values()
    assert not any("run_" in str(n.target) for n in plan.graph.nodes)


def test_threads_share_one_optimized_model():
    model = _model()
    optimized = resfast.optimize_for_inference(model)
    inputs = [_images(2, 3, 32, 32) for _ in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    optimized(inputs[0])
    results: list = [None] * 4

    def work(i):
        for _ in range(10):
            results[i] = optimized(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


def test_wrong_input_is_refused_with_the_models_own_error():
    optimized = resfast.optimize_for_inference(_model())
    with (
        pytest.warns(UserWarning, match="cannot be traced"),
        pytest.raises(RuntimeError, match="channels"),
    ):
        optimized(_images(1, 4, 64, 64))

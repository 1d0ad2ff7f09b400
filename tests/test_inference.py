"""optimize_for_inference: equal outputs, nothing left between the layers, and its refusals."""

from __future__ import annotations

import copy
import io
import threading
import time
import warnings

import needs
import pytest
import torch
from torch import Tensor, nn

import resfast
from resfast import BasicBlock
from resfast.nn import ConvBNAct
from resfast.ops.params import ConvParams, NormParams

pytestmark = needs.native_library
MODELS = ["resnet18", "resnet50", "resnext50_32x4d", "preact_resnet18", "simple_resnet"]


def _model(name="resnet18", build=None):
    torch.manual_seed(0)
    model = build() if build else resfast.create_model(name, num_classes=10)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return model.eval()


def _small():
    """Where nothing depends on the size of the model."""
    return _model(build=lambda: resfast.SimpleResNet(num_classes=10, channels=16))


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
    called = [str(n.target) for n in plan.graph.graph.nodes if n.op == "call_function"]
    assert sum("run_conv_bn_act_inference" in c for c in called) == 53
    assert not any("resfast.conv" in c for c in called)
    assert sum("run_addmm" in c for c in called) == 1
    others = [c for c in called if "run_" not in c and "getitem" not in c]
    assert len(others) <= 5  # pooling, flattening


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_residuals_are_overwritten_only_after_their_last_use(name):
    """In a classifier every one is; features that are returned stay what they were."""
    optimized = resfast.optimize_for_inference(_model(name))
    optimized(_images())
    (plan,) = optimized.plans.values()
    runs = [n for n in plan.graph.graph.nodes if str(n.target).startswith("<function run_conv")]
    added = [n for n in runs if n.args[1] is not None]
    first = 1 if name == "resnet18" else 0  # the max-pool's output is not a convolution's
    overwrites = [n.args[3] is n.args[1] for n in added]
    assert overwrites == [False] * first + [True] * (len(added) - first)

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


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "preact_resnet18"])
def test_planned_memory_holds_what_is_still_needed(name):
    """Whatever is in it before a call; and what it holds in turn shares a few buffers: what a
    layer reads and writes, and what is kept for the addition."""
    optimized, x = resfast.optimize_for_inference(_model(name)), _images(2, 3, 160, 160)
    first = optimized(x)
    (plan,) = optimized.plans.values()
    assert len(plan.memory.shapes) >= 4
    assert len(plan.memory.sizes) <= 4
    assert max(plan.memory.sizes) == max(4 * shape.numel() for shape in plan.memory.shapes)
    (tensors,) = plan.idle
    for t in tensors:
        t.fill_(float("nan"))
    assert torch.equal(optimized(x), first)
    assert not any(t.isnan().any() for t in tensors), "it is where the results go"
    other = optimized(-x)
    assert torch.equal(optimized(x), first)
    assert not torch.equal(other, first)


def test_results_do_not_live_in_planned_memory():
    class Features(nn.Module):
        """Returns a block's output, a view of another's, and one within a list."""

        def __init__(self):
            super().__init__()
            self.blocks = _model("resnet50").layer1

        def forward(self, x):
            a = self.blocks[0](x)
            b = self.blocks[1](a)
            return a, b.permute(0, 2, 3, 1), [self.blocks[2](b)]

    model, x = Features().eval(), _images(2, 64, 16, 16)
    optimized = resfast.optimize_for_inference(model)
    a, b, (c,) = optimized(x)
    kept = [t.clone() for t in (a, b, c)]
    optimized(-x)
    for t, wanted in zip((a, b, c), kept, strict=True):
        assert torch.equal(t, wanted)


def test_calls_at_the_same_time_have_memory_of_their_own():
    optimized, x = resfast.optimize_for_inference(_model("resnet50")), _images()
    wanted = optimized(x)
    (plan,) = optimized.plans.values()
    inner = plan.graph

    def nested(x, memory):
        """Another call in the middle of this one."""
        plan.graph = inner
        assert torch.equal(optimized(-x), below)
        return inner(x, memory)

    below = optimized(-x)
    plan.graph = nested
    assert torch.equal(optimized(x), wanted)
    assert len(plan.idle) == 2
    assert plan.idle[0][0].data_ptr() != plan.idle[1][0].data_ptr()


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (2, 1, 1)])
def test_a_convolution_and_its_max_pool_run_a_few_images_at_a_time(n, window, monkeypatch):
    monkeypatch.setattr("resfast.backends.packed_pool._PIECE_BYTES", 2 * 16 * 12 * 10 * 4)
    model = _model(build=lambda: nn.Sequential(ConvBNAct.make(3, 16), nn.MaxPool2d(*window)))
    optimized, x = resfast.optimize_for_inference(model), _images(n, 3, 12, 10)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), model(x))
    assert len(_calls(optimized, "conv_bn_act_inference_max_pool")) == (n > 2)
    assert len(_calls(optimized, "max_pool2d_with_indices")) == (n <= 2)
    assert not _calls(optimized, "aten.max_pool2d")


def _calls(optimized, name):
    (plan,) = optimized.plans.values()
    return [n for n in plan.graph.graph.nodes if n.op == "call_function" and name in str(n.target)]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_max_pool_alone_runs_natively(layout, dtype):
    model = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2))
    x = torch.randn(2, 5, 9, 14, dtype=dtype).to(memory_format=layout)
    x[0, 1, 2, 3], x[1, :, 6:] = float("nan"), -float("inf")
    optimized = resfast.optimize_for_inference(model.eval())
    torch.testing.assert_close(optimized(x), model(x), rtol=0, atol=0, equal_nan=True)
    assert len(_calls(optimized, "run_max_pool2d")) == 2
    assert not _calls(optimized, "aten.max")


@pytest.mark.parametrize(
    "x", [torch.randn(3, 9, 14), torch.arange(192).view(2, 3, 4, 8)], ids=["no batch", "integers"]
)
def test_a_max_pool_that_the_native_one_lacks_stays(x):
    model = nn.MaxPool2d(3, 2, 1).eval()
    optimized = resfast.optimize_for_inference(model)
    assert torch.equal(optimized(x), model(x))
    assert _calls(optimized, "aten.max_pool2d")


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("side", "pooled"), [(7, True), (1, True), (8, True), (9, False)])
def test_the_mean_over_small_images_is_a_pooling(side, pooled, layout):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3)).eval()
    x = torch.randn(2, 24, side, side, generator=torch.Generator().manual_seed(0))
    optimized, x = resfast.optimize_for_inference(model), x.to(memory_format=layout)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), model(x))
    assert len(_calls(optimized, "avg_pool2d")) == pooled
    assert len(_calls(optimized, "aten.mean")) == (not pooled)
    assert not (pooled and layout == torch.channels_last and _calls(optimized, "as_strided"))


@pytest.mark.parametrize(
    "mean",
    [
        lambda x: x.mean((2, 3)),
        lambda x: x.mean((1, 2), keepdim=True),
        lambda x: x.mean(3, keepdim=True),
        lambda x: x.mean((2, 3), keepdim=True, dtype=torch.float64),
        lambda x: x[0].mean((1, 2), keepdim=True),
    ],
)
def test_other_means_stay(mean):
    class Mean(nn.Module):
        def forward(self, x):
            return mean(x)

    x = torch.randn(2, 4, 5, 6)
    optimized = resfast.optimize_for_inference(Mean().eval())
    torch.testing.assert_close(optimized(x), mean(x), rtol=0, atol=0)
    assert not _calls(optimized, "avg_pool2d")


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d((3, 2), 2),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.MaxPool2d(3, 2, dilation=2),
        nn.MaxPool2d(3, 2, return_indices=True),
    ],
    ids=str,
)
def test_other_max_pools_run_as_they_are(pool, monkeypatch):
    monkeypatch.setattr("resfast.backends.packed_pool._PIECE_BYTES", 1)
    model, x = nn.Sequential(ConvBNAct.make(3, 16), pool).eval(), _images(3, 3, 12, 10)
    with torch.no_grad():
        torch.testing.assert_close(resfast.optimize_for_inference(model)(x), model(x))


class Doubled(nn.Module):
    """A convolution whose weight, or another parameter, is made on every call."""

    def __init__(self, doubled):
        super().__init__()
        self.layer = ConvBNAct.make(16, 16)
        self.doubled = doubled

    def forward(self, x):
        conv, norm = self.layer.conv, self.layer.bn
        t = {"weight": conv.weight, "mean": norm.running_mean}
        t[self.doubled] = t[self.doubled] * 2
        geometry = (1, 1), (1, 1), (1, 1), 1
        parameters = NormParams(
            norm.weight, norm.bias, t["mean"], norm.running_var, None, False, None, norm.eps
        )
        return resfast.ops.conv_bn_act(x, ConvParams(t["weight"], None, *geometry), parameters)


@pytest.mark.parametrize("doubled", ["weight", "mean"])
def test_what_the_model_computes_is_not_prepared_ahead(doubled):
    model, x = _model(build=lambda: Doubled(doubled)), _images(2, 16, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(resfast.optimize_for_inference(model)(x), model(x))


def test_activations_in_another_layout_are_taken_too():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = ConvBNAct.make(16, 16)

        def forward(self, x):
            return self.layer(x, x * 2)

    model, x = _model(build=Joined), torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(resfast.optimize_for_inference(model)(x), model(x))


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
    assert not any("run_" in str(n.target) for n in plan.graph.graph.nodes)


def test_threads_share_one_optimized_model(monkeypatch):
    """Also at the first call, where no thread finds a plan: each is made once, and traces well."""
    model = _small()
    optimized = resfast.optimize_for_inference(model)
    inputs = [_images(2, 3, size, 32) for size in (32, 32, 48, 64)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    made = []
    plan = resfast.inference._plan
    monkeypatch.setattr("resfast.inference._plan", lambda *a: made.append(1) or plan(*a))
    results: list[list[Tensor]] = [[] for _ in inputs]
    start = threading.Barrier(len(inputs))

    def work(i):
        start.wait()
        for _ in range(5):
            results[i].append(optimized(inputs[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert len(made) == 3
    for got, wanted in zip(results, expected, strict=True):
        assert len(got) == 5
        for y in got:
            torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)


def test_threads_plan_one_model_after_another(monkeypatch):
    """Tracing has global state: two at once, of two models, spoil each other."""
    planning, together = [], []
    plan = resfast.inference._plan

    def watched(*args):
        planning.append(args)
        together.append(len(planning))
        time.sleep(0.05)  # the other thread is there by now
        try:
            return plan(*args)
        finally:
            planning.pop()

    monkeypatch.setattr("resfast.inference._plan", watched)
    models = [resfast.optimize_for_inference(_small()) for _ in range(2)]
    threads = [threading.Thread(target=m, args=(_images(2, 3, 32, 32),)) for m in models]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert together == [1, 1]


def test_wrong_input_is_refused_with_the_models_own_error():
    """And takes up no plan."""
    optimized = resfast.optimize_for_inference(_small())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="channels"):
            optimized(_images(1, 4, 64, 64))
        with pytest.raises(ValueError, match="4D"):
            optimized(torch.randn(3, 64, 64))
    assert not optimized.plans


# ---- batch sizes


def _features():
    return _model(build=lambda: resfast.ResNet(BasicBlock, [1, 1, 1, 1], features_only=True))


@pytest.mark.parametrize("build", [_small, _features])
def test_batches_are_padded_and_cut_to_the_sizes_asked_for(build):
    model = build()
    optimized = resfast.optimize_for_inference(model, batch_sizes=(4, 1))
    for n in (1, 2, 3, 4, 5, 10):
        x = _images(n, 3, 32, 32)
        with torch.no_grad():
            expected = model(x)
        torch.testing.assert_close(optimized(x), expected, rtol=1e-4, atol=1e-4)
    assert sorted(key[0][0] for key in optimized.plans) == [1, 4]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_padding_changes_no_bit_and_no_layout(layout):
    """One plan, whatever else is in the batch; a padded batch is as the caller's in memory."""
    optimized = resfast.optimize_for_inference(_small(), batch_sizes=[4])
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=layout)
    whole = optimized(x)
    for n in (1, 2, 3):
        assert torch.equal(optimized(x[:n]), whole[:n])
    assert len(optimized.plans) == 1


def test_an_empty_batch_gives_an_empty_result():
    for sizes in ((), (2,)):
        assert resfast.optimize_for_inference(_small(), batch_sizes=sizes)(
            torch.empty(0, 3, 32, 32)
        ).shape == (0, 10)


class Whitened(nn.Module):
    """Samples depend on each other."""

    def forward(self, x):
        return x - x.mean(0)


class Total(nn.Module):
    def forward(self, x):
        return x.sum()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Whitened(), "depends on the others"),
        (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), "depends on the others"),
        (Total(), "no batch dimension"),
    ],
)
@pytest.mark.parametrize("n", [2, 3])
def test_batch_sizes_need_independent_samples(model, words, n):
    optimized = resfast.optimize_for_inference(model.eval(), batch_sizes=[3])
    for _ in range(2):
        with pytest.raises(RuntimeError, match=words):
            optimized(_images(n, 3, 8, 8))
    assert resfast.optimize_for_inference(model)(_images(n, 3, 8, 8)) is not None


def test_bad_batch_sizes():
    with pytest.raises(ValueError, match="at least 1"):
        resfast.optimize_for_inference(_small(), batch_sizes=(0, 4))


# ---- what else may change between calls


def test_plans_under_autocast_are_plans_of_their_own():
    model, x = _small(), _images()
    optimized = resfast.optimize_for_inference(model)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-4)
            with torch.autocast("cpu", torch.bfloat16):
                y = optimized(x)
                assert y.dtype == torch.bfloat16
                torch.testing.assert_close(y, model(x))
    assert len(optimized.plans) == 2


def test_copies_moves_and_loads_make_new_plans():
    model, other, x = _small(), _small().requires_grad_(False), _images()
    other.conv1.weight.mul_(-2)
    optimized = resfast.optimize_for_inference(model, batch_sizes=[2])
    y = optimized(x)
    file = io.BytesIO()
    torch.save(optimized, file)
    file.seek(0)
    for twin in (copy.deepcopy(optimized), torch.load(file, weights_only=False)):
        assert not twin.plans
        assert torch.equal(twin(x), y)
    optimized.load_state_dict({f"model.{k}": v for k, v in other.state_dict().items()})
    torch.testing.assert_close(optimized(x), other(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(optimized(x), y, rtol=1e-2)
    optimized.to(torch.float64)
    torch.testing.assert_close(optimized(x.double()), other.double()(x.double()))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_optimizing_and_calling_in_inference_mode(mode):
    model, x = _small(), _images()
    with mode():
        optimized = resfast.optimize_for_inference(model)
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graphs_replay_each_call_anew():
    model = _small().cuda()
    optimized = resfast.optimize_for_inference(model, cuda_graphs=True)
    results = []
    for _ in range(3):
        x = _images().cuda()
        with torch.no_grad():
            results.append((optimized(x), model(x)))
    for y, wanted in results:
        torch.testing.assert_close(y, wanted, rtol=1e-3, atol=1e-3)

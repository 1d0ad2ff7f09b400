"""What people do to a model: autocast, compile, export, averaging, sharing, freezing, saving."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from resfast.models import PreActResNet, ResNet, SimpleResNet
from resfast.nn import BasicBlock, Bottleneck, PreActBlock, unfused
from resfast.testing import FLOOR_ULPS, HALF_FACTOR, POOL_INPUTS, POOL_VALUES

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = 5
BUILDS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: ResNet(BasicBlock, [1, 1, 1, 1], CLASSES),
    "bottleneck": lambda: ResNet(Bottleneck, [1, 1, 1, 1], CLASSES, shortcut="d"),
    "preact": lambda: PreActResNet(PreActBlock, [1, 1, 1, 1], CLASSES),
    "simple": lambda: SimpleResNet(num_classes=CLASSES),
}


def build(name: str = "basic") -> nn.Module:
    """A model whose norms differ from identities, in float64: twins then agree to rounding."""
    torch.manual_seed(0)
    model = BUILDS[name]().double()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0, 0.2)
            nn.init.normal_(m.bias, 0.0, 0.2)
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2.0)
    return model


def images(n: int = 4, size: int = 40, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64)


def loss_of(y: Tensor) -> Tensor:
    return F.cross_entropy(y.float() if y.dtype.itemsize == 2 else y, torch.arange(len(y)) % 3)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Gradients that exist, and buffers."""
    grads = {f"d {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach().clone() for k, v in (grads | dict(model.named_buffers())).items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-8) -> None:
    """Two float64 runs that differ in the order of summation, amplified by the norms."""
    assert got.keys() == want.keys()
    for k, w in want.items():
        error = float((got[k] - w).abs().max())
        assert error <= rtol * max(float(w.abs().max()), 1e-3), f"{k}: {error}"


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    y = model(x)
    loss_of(y).backward()
    return {"y": y.detach(), **state_of(model)}


def assert_steps_as_stock(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    twin = unfused(model)
    got = step(model, x)
    assert_same(got, step(twin, x))
    return got


# ---- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["basic", "bottleneck", "preact"])
def test_autocast_errs_no_more_than_stock(name, dtype):
    """The criterion for 16 bits, pooled over inputs; features, because logits are too few."""
    exact = build(name)
    model, stock = copy.deepcopy(exact).float(), unfused(exact).float()
    model, stock = (m.to(memory_format=torch.channels_last) for m in (model, stock))
    squares: dict[str, list[float]] = {}
    for seed in range(POOL_INPUTS):
        x = images(seed=seed)
        with torch.no_grad(), torch.autocast("cpu", dtype):
            runs = []
            for m in (exact, model, stock):
                m = copy.deepcopy(m)  # statistics start anew with every input
                y = m.forward_features(x if m.fc.weight.dtype == torch.float64 else x.float())
                runs.append({"y": y, **dict(m.named_buffers())})
        want, got, theirs = runs
        assert got["y"].dtype == theirs["y"].dtype == dtype
        for k, w in want.items():
            assert got[k].dtype == theirs[k].dtype
            if k.endswith("num_batches_tracked"):
                assert got[k] == w
                continue
            errors = [float((r[k].double() - w).square().sum()) for r in (got, theirs)]
            sums = squares.setdefault(k, [0.0, 0.0, 0.0])
            for i, e in enumerate([*errors, float(w.square().sum())]):
                sums[i] += e
    for k, (ours, stocks, size) in squares.items():
        floor = FLOOR_ULPS * 2.0**-24 * size**0.5
        assert ours**0.5 <= max(HALF_FACTOR * stocks**0.5, floor), k


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_gradients_err_no_more_than_stock(dtype):
    """Where a ReLU's input rounds across zero a gradient jumps, in either alike: without ReLUs.

    What has too few values for a pool of its own shares one with its like, each by its size.
    """

    def linear(model: nn.Module) -> nn.Module:
        for m in model.modules():
            if hasattr(m, "relu"):
                m.relu = nn.Identity()
        return model

    exact = linear(build("basic"))
    model, stock = copy.deepcopy(exact).float(), unfused(exact).float()
    squares: dict[str, list[float]] = {}
    for seed in range(POOL_INPUTS):
        x = images(seed=seed)
        want = step(exact, x)
        with torch.autocast("cpu", dtype):
            got, theirs = step(model, x.float()), step(stock, x.float())
        for k, w in want.items():
            if k.startswith("d "):
                assert got[k].dtype == torch.float32
                small = w.numel() * POOL_INPUTS < POOL_VALUES
                sums = squares.setdefault("d vectors" if small else k, [0.0, 0.0])
                for i, r in enumerate((got, theirs)):
                    sums[i] += float((r[k].double() - w).square().sum() / w.square().mean())
    assert {"d layer3.0.conv2.weight", "d layer4.0.bn1.bias", "d vectors"} <= squares.keys()
    for k, (ours, stocks) in squares.items():
        assert ours**0.5 <= HALF_FACTOR * stocks**0.5, k


def test_grad_scaler_steps_and_skips_as_with_stock():
    """An overflow of the scaled loss leaves weights alone and halves the scale."""
    model = build().float()
    stock = unfused(model)
    histories = []
    for m in (model, stock):
        optimizer = torch.optim.SGD(m.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        history = []
        for i in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(m(images(seed=i).float()))
            before = m.conv1.weight.detach().clone()
            # 2¹⁵ overflows float16's gradients, as a wrong scale would
            scaler.scale(loss * (2.0**15 if i == 1 else 1)).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            moved = not torch.equal(before, m.conv1.weight)
            history.append((bool(torch.isfinite(norm)), moved, scaler.get_scale()))
        histories.append(history)
    assert histories[0] == histories[1]
    assert [h[:2] for h in histories[0]] == [(i != 1, i != 1) for i in range(4)]


# ---- torch.compile and torch.export


@pytest.mark.parametrize(
    ("name", "training"), [("basic", True), ("bottleneck", False), ("preact", True)]
)
def test_compiles_once_for_all_batch_sizes(name, training):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    model = build(name).train(training)
    twin = unfused(model)
    model.compile(backend=counter, fullgraph=True)
    for n in (4, 7, 2):
        x = images(n)
        torch._dynamo.mark_dynamic(x, 0)
        assert_same(step(model, x), step(twin, x))
    assert counter.frame_count == 1


def test_inductor_with_a_dynamic_batch():
    torch._dynamo.reset()
    block = BasicBlock(16, 16).eval()
    compiled = torch.compile(block, fullgraph=True)
    with torch.no_grad():
        for n in (4, 3):
            x = torch.randn(n, 16, 8, 8)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BUILDS)
def test_exported_programs_are_saved_and_loaded(name):
    model = build(name).eval()
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(model, (images(2),), dynamic_shapes={"x": {0: batch}})
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for n in (1, 5):
            torch.testing.assert_close(loaded(images(n)), model(images(n)), rtol=1e-9, atol=1e-10)


def test_an_exported_training_graph_counts_its_batches():
    model = build()
    twin = unfused(model)
    exported = torch.export.export(model, (images(2),)).module()
    y = exported(images(2))
    loss_of(y).backward()
    assert_same({"y": y.detach(), **state_of(exported)}, step(twin, images(2)))


# ---- torch.fx and torch.func


@pytest.mark.parametrize("name", BUILDS)
def test_symbolic_traces_train_as_the_model(name):
    """Stock layers in the graph, so that passes which look for them find them."""
    model = build(name)
    graph = torch.fx.symbolic_trace(unfused(model))
    own = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert [str(n) for n in own.graph.nodes] == [str(n) for n in graph.graph.nodes]
    assert_same(step(own, images()), step(model, images()))


@pytest.mark.parametrize("name", BUILDS)
def test_vmap_over_inputs(name):
    model = build(name).eval()
    x = torch.stack([images(2, seed=s) for s in range(3)])
    with torch.no_grad():
        got = torch.func.vmap(model)(x)
        torch.testing.assert_close(got, torch.stack([model(b) for b in x]), rtol=1e-9, atol=1e-10)


def test_ensembles_of_stacked_states():
    models = [build().eval() for _ in range(3)]
    for i, m in enumerate(models):
        nn.init.normal_(m.conv1.weight, std=0.1 * (i + 1))
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def call(parameters, buffers, x):
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    x = images(2)
    got = torch.func.vmap(call, (0, 0, None))(parameters, buffers, x)
    torch.testing.assert_close(got, torch.stack([m(x) for m in models]), rtol=1e-9, atol=1e-10)


def test_jacobians():
    model = build().eval()
    x = images(1, 36)
    jacobian = torch.func.jacrev(model)(x)
    leaf = x.clone().requires_grad_()
    rows = [torch.autograd.grad(model(leaf)[0, i], leaf)[0] for i in range(CLASSES)]
    torch.testing.assert_close(jacobian[0], torch.stack(rows), rtol=1e-8, atol=1e-10)
    tangent = torch.randn_like(x)
    _, pushed = torch.func.jvp(model, (x,), (tangent,))
    wanted = torch.stack([(row * tangent).sum() for row in rows])
    torch.testing.assert_close(pushed[0], wanted, rtol=1e-8, atol=1e-10)


# ---- copies, averages, files


@pytest.mark.parametrize("name", BUILDS)
def test_averaged_models_and_their_norms(name):
    """EMA of parameters, then statistics anew; what was packed for inference follows."""
    model = build(name)
    averages = []
    for m in (model, unfused(model)):
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        ema = AveragedModel(m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
        ema.eval()(images())  # before the first average
        ema.train()
        for i in range(2):
            step(m, images(seed=i))
            optimizer.step()
            ema.update_parameters(m)
        update_bn([images(seed=i) for i in range(3)], ema)
        ema.eval()
        with torch.no_grad():
            averages.append({"y": ema(images()), **dict(ema.named_buffers())})
    assert_same(*averages)
    assert averages[0]["module.bn1.num_batches_tracked"] == 3


def test_inference_follows_an_average_in_float32():
    """Weights that are packed once must be packed anew after every update."""
    model = build().float()
    ema = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)).eval()
    x = images().float()
    ema.update_parameters(model)
    with torch.no_grad():
        ema(x)
        for p in model.parameters():
            p.mul_(1.5)
        ema.update_parameters(model)
        want = unfused(ema.module)(x)
        torch.testing.assert_close(ema(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_safetensors(tmp_path: Path, layout):
    safetensors = pytest.importorskip("safetensors.torch")
    model = build("bottleneck").to(memory_format=layout).eval()
    safetensors.save_model(model, tmp_path / "model.safetensors")
    other = BUILDS["bottleneck"]().double().to(memory_format=layout).eval()
    missing, unexpected = safetensors.load_model(other, tmp_path / "model.safetensors")
    assert not missing
    assert not unexpected
    with torch.no_grad():
        assert torch.equal(other(images()), model(images()))


def test_a_whole_saved_model_goes_on_training(tmp_path: Path):
    """Modes and flags are part of what is saved."""
    model = build("bottleneck")
    model.layer2.eval()
    model.layer3[0].checkpoint = True
    model.fc.requires_grad_(False)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert loaded.layer3[0].checkpoint
    assert_same(step(loaded, images()), step(model, images()), rtol=0)


# ---- sharing, freezing, recomputing


class Twice(nn.Module):
    """One block in two places, and one weight in two blocks."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        width = 16 * kind.expansion
        self.block = kind(width, 16)
        self.other = kind(width, 16)
        self.other.conv2.weight = self.block.conv2.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.block(self.block(x))).mean((2, 3))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_weights_shared_between_calls(kind, training):
    model = Twice(kind).double().train(training)
    x = torch.randn(3, 16 * kind.expansion, 9, 9, dtype=torch.float64)
    assert_steps_as_stock(model, x)
    assert int(model.block.bn1.num_batches_tracked) == (2 if training else 0)


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_weights_shared_between_calls_in_inference(kind):
    """float32, where weights are packed by shape and by the norm that follows."""
    model = Twice(kind).eval()
    nn.init.uniform_(model.other.bn2.weight)
    with torch.no_grad():
        for size in (9, 12, 9):
            x = torch.randn(3, 16 * kind.expansion, size, size)
            torch.testing.assert_close(model(x), unfused(model)(x), rtol=1e-4, atol=1e-5)


SUBSETS: dict[str, Callable[[str], bool]] = {
    "head": lambda k: k.startswith("fc"),
    "norms": lambda k: "bn" in k or "downsample.2" in k,
    "betas": lambda k: k.endswith("bias"),
    "one convolution": lambda k: k == "layer3.0.conv2.weight",
    "last stage": lambda k: k.startswith(("layer4", "fc")),
}


@pytest.mark.parametrize("frozen", ["none", "some", "all"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_fine_tuning_a_subset(subset, frozen):
    """Gradients exactly where asked for; a norm in eval keeps its statistics."""
    model = build("bottleneck")
    for k, p in model.named_parameters():
        p.requires_grad_(SUBSETS[subset](k))
    norms = [(k, m) for k, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    chosen = {"none": [], "some": norms[::2], "all": norms}[frozen]
    for _, m in chosen:
        m.eval()
    got = assert_steps_as_stock(model, images())
    asked = {k for k, _ in model.named_parameters() if SUBSETS[subset](k)}
    assert asked
    assert {k[2:] for k in got if k.startswith("d ")} == asked
    for k, m in norms:
        kept = any(m is c for _, c in chosen)
        assert int(got[f"{k}.num_batches_tracked"]) == (0 if kept else 1)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_checkpoints_around_blocks(name, use_reentrant):
    """By the user, not by ``checkpoint=True``: the same gradients, each batch counted once."""
    model = build(name)
    want = step(model, images())
    again = build(name)
    x = again.stem(images())
    x = checkpoint(again.layer1, x, use_reentrant=use_reentrant)
    rest = nn.Sequential(again.layer2, again.layer3, again.layer4)
    x = checkpoint_sequential(rest, 2, x, use_reentrant=use_reentrant)
    y = again.forward_head(x)
    loss_of(y).backward()
    assert_same({"y": y.detach(), **state_of(again)}, want, rtol=1e-12)

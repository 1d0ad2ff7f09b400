"""Synchronised norms and data-parallel training, on two gloo processes that run every check.

The judge is one process with the joined batch: stock layers, or the criterion of docs/numerics.md.
"""

from __future__ import annotations

import copy
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from needs import gloo
from ranks import Checks, every, run_checks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import resfast
import resfast.ops as fused_ops
from resfast.backends import select
from resfast.ops import ConvParams, NormParams, collectives
from resfast.ops import convolution as C
from resfast.ops import norm as N
from resfast.ops.registry import KERNELS
from resfast.testing import OpCase, Tensors, _Recording, bn_case, conv_case, judge_seeds

pytestmark = gloo

on_ranks = Checks()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_checks(on_ranks, tmp_path_factory.mktemp("ranks"))


# ---- the criterion


def rows(n: int, sizes: tuple[int, int]) -> slice:
    """This rank's part of a batch of n."""
    assert sum(sizes) == n
    start = sizes[0] * dist.get_rank()
    return slice(start, start + sizes[dist.get_rank()])


def synchronised_ops(group: str) -> SimpleNamespace:
    return SimpleNamespace(
        bn_act=lambda x, norm, r=None, **o: fused_ops.bn_act_synchronised(x, norm, group, r, **o),
        conv_bn_act=lambda x, conv, norm, r=None, **o: fused_ops.conv_bn_act_synchronised(
            x, conv, norm, group, r, **o
        ),
    )


BATCHES = {"x", "r", "y", "dx", "dr"}


def run_split(
    sizes: tuple[int, int], case: OpCase, tensors: Tensors, dy: Tensor, layout: str
) -> tuple[list[Tensor], Tensors]:
    """A case with its batch split between the ranks, the results put together again."""
    part = rows(len(dy), sizes)
    mine = {k: v[part] if k in BATCHES else v for k, v in tensors.items()}
    ops = synchronised_ops(dist.group.WORLD.group_name)
    recording = _Recording(ops, None, None)
    case.run(recording, mine, None, layout)
    branches = [torch.cat(b) for b in zip(*every(recording.branches), strict=True)]
    all_ranks = every(case.run(ops, mine, dy[part], layout))
    results = {}
    for k, first in all_ranks[0].items():
        if k in BATCHES:
            results[k] = torch.cat([r[k] for r in all_ranks])
        elif k.startswith("d"):
            results[k] = sum(r[k].double() for r in all_ranks)
        else:
            assert all(torch.equal(r[k], first) for r in all_ranks), k
            results[k] = first
    return branches, results


def check_criterion(dtype: torch.dtype, seeds: int, sizes: tuple[int, int]) -> None:
    shape = (8, 64, 6, 5)
    cases = [
        bn_case("bn_add_relu", shape, True, residual=True),
        bn_case("bn_relu_add", shape, True, residual=True, add_after_act=True),
        conv_case("conv3x3s2_bn_add_relu", shape, (64, 64, 3, 3), True, residual=True, stride=2),
        conv_case("conv1x1_bn", shape, (64, 64, 1, 1), True, relu=False, bias=True),
    ]
    for case in cases:
        for verdict in judge_seeds(case, dtype, seeds, ours=partial(run_split, sizes)):
            assert verdict.ok, f"{case} {verdict}"


@on_ranks
def fp32_meets_the_criterion_on_uneven_batches():
    check_criterion(torch.float32, 8, (5, 3))


@on_ranks
def fp32_meets_the_criterion_with_an_empty_rank():
    check_criterion(torch.float32, 8, (0, 8))
    check_criterion(torch.float32, 8, (8, 0))


@on_ranks
def bf16_meets_the_criterion():
    check_criterion(torch.bfloat16, 32, (6, 2))


# ---- statistics of many ranks, in one process


def merged(parts: list[Tensor], monkeypatch) -> list:
    """What ``norm.synchronised`` gives to ranks that hold these parts; of none, NaN statistics."""
    own: list[Tensor] = []

    def listen(t, group):
        own.append(t)
        return torch.stack([t, t])

    monkeypatch.setattr(collectives, "gathered", listen)
    nothing = N.Statistics(*parts[0].new_full((2, parts[0].shape[1]), float("nan")).double())
    local = [None if len(z) else nothing for z in parts]
    for z, stats in zip(parts, local, strict=True):
        N.synchronised(z, "", stats)
    monkeypatch.setattr(collectives, "gathered", lambda t, group: torch.stack(own))
    return [N.synchronised(z, "", stats) for z, stats in zip(parts, local, strict=True)]


def skip_without(backend: str) -> None:
    reasons = {name: reason for name, usable, reason in select.available() if not usable}
    if backend in reasons:
        pytest.skip(reasons[backend])


@pytest.fixture(params=["cpu", "eager", "triton"])
def backend(request):
    skip_without(request.param)
    with resfast.backend(request.param):
        yield


def test_statistics_of_many_ranks(backend, monkeypatch):
    # ranks apart by as much as they spread, far from 0: where rounding a rank's mean would show
    parts = [torch.randn(n, 6, 5, 7) + 1e4 + i for i, n in enumerate((3, 1, 0, 4, 2))]
    parts = [p.contiguous(memory_format=torch.channels_last) for p in parts]
    z = torch.cat(parts).double()
    every = merged(parts, monkeypatch)
    stats, ranks = every[0]
    assert float(ranks.total) == 10 * 5 * 7
    assert torch.equal(stats.mean, z.mean((0, 2, 3)).float())
    assert (stats.var.double() / z.var((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-5
    for other, _ in every:
        assert torch.equal(other.mean, stats.mean)
        assert torch.equal(other.var, stats.var)


def test_statistics_out_of_a_convolution_are_not_rounded_either():
    skip_without("triton")
    x, w = torch.randn(2, 16, 5, 4) + 1e4, torch.randn(16, 16, 1, 1)
    geometry = ConvParams(w).geometry
    with resfast.backend("triton"), resfast.fusion("c0", "own"):
        z, stats = C.fprop(C.Activation(x), w, None, geometry, True, exact=True)
    torch.testing.assert_close(stats.mean, z.double().mean((0, 2, 3)), rtol=1e-9, atol=0)


def test_no_value_is_read_off_the_device(monkeypatch):
    monkeypatch.setattr(collectives, "gathered", lambda t, group: torch.stack([t, t]))
    monkeypatch.setattr(collectives, "summed", lambda t, group: t.clone())
    with torch.device("meta"):  # where there are no values: reading one raises
        z, dy = torch.empty(4, 3, 5, 7), torch.empty(4, 3, 5, 7)
        running_mean, running_var = torch.zeros(3), torch.ones(3)
    stats, ranks = N.synchronised(z, "")
    prepared = N.prepare(stats, None, None, 1e-5)
    g = N.backward(dy, z, prepared, y=None, relu=True, training=True, ranks=ranks)
    assert g.dz.shape == z.shape
    update = KERNELS[torch.ops.resfast.update_running_stats.default]  # the op itself runs its fake
    update(running_mean, running_var, None, *stats, N.count(z), 0.1, ranks.total)


@pytest.mark.parametrize("value", [1e8, -1.1, 12345678.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_constant_channel_is_exact_on_many_ranks(dtype, value, monkeypatch):
    # 13 in all: the shares, rounded, do not add up to 1
    parts = [torch.full((n, 3, 5, 7), value, dtype=dtype) for n in (0, 5, 1, 4, 3)]
    for stats, _ in merged(parts, monkeypatch):
        assert (stats.mean == parts[0].new_tensor(value)).all()
        assert (stats.var == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_single_rank_meets_the_criterion_on_each_backend(backend, dtype, monkeypatch):
    monkeypatch.setattr(collectives, "gathered", lambda t, group: t.unsqueeze(0))
    monkeypatch.setattr(collectives, "summed", lambda t, group: t.clone())
    ops = synchronised_ops("alone")
    case = conv_case("conv1x1_bn_add_relu", (1, 16, 5, 4), (16, 16, 1, 1), True, residual=True)

    def ours(case, tensors, dy, layout):
        recording = _Recording(ops, None, None)
        case.run(recording, tensors, None, layout)
        return recording.branches, case.run(ops, tensors, dy, layout)

    with resfast.fusion("c0", "own"):  # statistics from the convolution, where it takes them
        for verdict in judge_seeds(case, dtype, 8, ours=ours):
            assert verdict.ok, verdict


# ---- conversion


def test_conversion_and_back():
    model = small()
    hooked = []
    model.layer1[0].bn1.register_forward_hook(lambda *_: hooked.append(1))
    model.layer2[0].bn1 = model.layer2[0].bn2  # shared
    bn, keys = model.bn1, list(model.state_dict())
    want = model(leaf(2, 3, 8, 8))
    assert resfast.convert_sync_batchnorm(model) is model
    assert model.bn1 is bn
    assert type(bn) is nn.SyncBatchNorm
    assert bn.process_group is None
    assert model.layer2[0].bn1 is model.layer2[0].bn2
    assert list(model.state_dict()) == keys
    assert "residual_block" in ops_of(model)  # no peers: as before
    torch.testing.assert_close(model(leaf(2, 3, 8, 8)), want, rtol=0, atol=0)
    assert len(hooked) == 2
    repr(model)
    again = pickle.loads(pickle.dumps(model.layer3))
    assert type(again[0].bn1) is nn.SyncBatchNorm
    assert resfast.revert_sync_batchnorm(model) is model
    assert type(bn) is nn.BatchNorm2d
    assert vars(bn).keys() == vars(nn.BatchNorm2d(4)).keys()
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())


class NormWithReLU(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("norm", [NormWithReLU, nn.BatchNorm1d, nn.LazyBatchNorm2d])
def test_conversion_refuses_what_would_lose_its_forward(norm):
    model = nn.Sequential(nn.BatchNorm2d(4), norm() if norm is nn.LazyBatchNorm2d else norm(4))
    with pytest.raises(TypeError, match=f"1 is a {norm.__name__}, not a plain BatchNorm2d"):
        resfast.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_converted_model_is_optimized_for_inference():
    model = resfast.convert_sync_batchnorm(small().float()).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(resfast.optimize_for_inference(model)(x), model(x))


# ---- what the criterion does not see


def leaf(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


def mine(t: Tensor, part: slice) -> Tensor:
    return t.detach()[part].clone().requires_grad_()


def all_sum(t: Tensor) -> Tensor:
    t = t.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(t)
    return t


@on_ranks
def second_derivatives_are_those_of_the_joined_batch():
    for sizes in ((3, 2), (5, 0)):
        part = rows(5, sizes)
        x, w, r = leaf(5, 3, 4, 4), leaf(4, 3, 3, 3, seed=1), leaf(5, 4, 4, 4, seed=2)
        gamma, beta = leaf(4, seed=3), leaf(4, seed=4)
        probes = [leaf(*t.shape, seed=9).detach() for t in (x, w, gamma, beta, r)]

        def joined(x, w, gamma, beta, r):
            u = F.batch_norm(F.conv2d(x, w, None, 1, 1), None, None, gamma, beta, True)
            return F.relu(u + r)

        def split(x, w, gamma, beta, r):
            norm = NormParams(gamma, beta, None, None, None, True)
            conv = ConvParams(w, None, (1, 1), (1, 1))
            group = dist.group.WORLD.group_name
            return fused_ops.conv_bn_act_synchronised(x, conv, norm, group, r)

        def second(function, tensors, weight, probes):
            y = function(*tensors)
            first = torch.autograd.grad((y.sin() * weight).sum(), tensors, create_graph=True)
            inner = sum((g * p).sum() for g, p in zip(first, probes, strict=True))
            return torch.autograd.grad(inner, tensors)

        weight = leaf(5, 4, 4, 4, seed=7).detach()
        want = second(joined, (x, w, gamma, beta, r), weight, probes)
        own = (mine(x, part), *(t.detach().requires_grad_() for t in (w, gamma, beta)))
        own_probes = [probes[0][part], *probes[1:4], probes[4][part]]
        got = second(split, (*own, mine(r, part)), weight[part], own_probes)
        for i in (0, 4):
            torch.testing.assert_close(got[i], want[i][part])
        for i in (1, 2, 3):
            torch.testing.assert_close(all_sum(got[i]), want[i])

        # where nothing but the batch has a gradient
        def alone(x):
            norm = NormParams(None, None, None, None, None, True)
            return fused_ops.bn_act_synchronised(x, norm, dist.group.WORLD.group_name, relu=False)

        def alone_joined(x):
            return F.batch_norm(x, None, None, training=True)

        weight, own_weight = probes[0].flip(0), probes[0].flip(0)[part]
        (want,) = second(alone_joined, (x,), weight, probes[:1])
        (got,) = second(alone, (mine(x, part),), own_weight, own_probes[:1])
        torch.testing.assert_close(got, want[part])


def norm_of(c: int, **kw) -> nn.SyncBatchNorm:
    return resfast.convert_sync_batchnorm(nn.BatchNorm2d(c, **kw).double())


def call(bn: nn.Module, x: Tensor) -> Tensor:
    """bn alone, by the synchronised op."""
    return resfast.nn.run_bn_act(bn, x, relu=False)


@on_ranks
def running_statistics_are_those_of_the_joined_batch():
    for sizes in ((3, 2), (5, 0)):
        for kw in ({}, {"momentum": None}, {"momentum": 0.3}, {"track_running_stats": False}):
            want, got = nn.BatchNorm2d(4, **kw).double(), norm_of(4, **kw)
            for seed in range(3):
                x = leaf(5, 4, 3, 3, seed=seed).detach() * 3 + 2
                y = call(got, x[rows(5, sizes)])
                torch.testing.assert_close(y, want(x)[rows(5, sizes)])
            for k, v in want.state_dict().items():
                torch.testing.assert_close(got.state_dict()[k], v)


@on_ranks
def an_empty_batch_on_every_rank_changes_no_statistics():
    bn = norm_of(4)
    x = torch.empty(0, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    y = call(bn, x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert torch.equal(bn.running_mean, torch.zeros_like(bn.running_mean))
    assert torch.equal(bn.running_var, torch.ones_like(bn.running_var))
    assert not bn.weight.grad.any()
    assert not bn.bias.grad.any()


@on_ranks
def one_value_per_channel_is_too_few_only_on_all_ranks_together():
    x = leaf(2, 4, 1, 1).detach()
    want, got = nn.BatchNorm2d(4).double(), norm_of(4)
    torch.testing.assert_close(call(got, x[rows(2, (1, 1))]), want(x)[rows(2, (1, 1))])
    torch.testing.assert_close(got.running_var, want.running_var)
    before = copy.deepcopy(got.state_dict())
    for sizes in ((1, 0), (0, 1)):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            call(got, x[:1][rows(1, sizes)])
    assert all(torch.equal(v, before[k]) for k, v in got.state_dict().items())


@on_ranks
def bad_input_raises_before_the_collective_and_before_any_write():
    bn = norm_of(4)
    x = leaf(2, 4, 3, 3).detach()
    if dist.get_rank() == 0:  # the other rank takes no part: a collective would wait for it
        with pytest.raises(RuntimeError, match="should contain 5 elements not 4"):
            call(bn, leaf(2, 5, 3, 3).detach())
        with pytest.raises(RuntimeError, match="residual"):
            resfast.nn.run_bn_act(bn, x, x[:1])
        with pytest.raises(ValueError, match="4D"):
            call(bn, x[0])
        layer = resfast.ConvBNAct(nn.Conv2d(3, 4, 1).double(), bn)
        with pytest.raises(RuntimeError, match="channels"):
            layer(x)
    assert int(bn.num_batches_tracked) == 0


@on_ranks
def a_frozen_or_evaluated_norm_is_not_synchronised():
    bn = norm_of(4).eval()
    x = leaf(2 + dist.get_rank(), 4, 3, 3, seed=dist.get_rank()).detach()
    assert torch.equal(call(bn, x), call(resfast.revert_sync_batchnorm(copy.deepcopy(bn)), x))


# ---- models


def small(block=resfast.BasicBlock, **kw) -> resfast.ResNet:
    torch.manual_seed(3)
    kw = {"num_classes": 5, "stem": "cifar", **kw}
    model = resfast.ResNet(block, [1, 1, 1, 1], **kw).double()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1, 0.2)
            nn.init.normal_(m.bias, 0, 0.2)
    return model


def ops_of(model: nn.Module) -> set[str]:
    rows = [r for m in model.modules() if isinstance(m, resfast.nn.Fusible) for r in m.plan()]
    return {r.op for r in rows}


@on_ranks
def stocks_conversion_keeps_relu_and_addition():
    part, x = rows(6, (4, 2)), leaf(6, 3, 8, 8)
    for block in (resfast.BasicBlock, resfast.Bottleneck):
        model = small(block)
        stock = resfast.unfused(model)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
        assert list(converted.state_dict()) == list(model.state_dict())
        assert ops_of(converted) == {"conv_bn_act_synchronised"}
        y = converted(x.detach()[part])
        torch.testing.assert_close(y, stock(x.detach())[part])
        for k, v in stock.state_dict().items():
            torch.testing.assert_close(converted.state_dict()[k], v)

        # stock's own layer does not run on CPU with peers
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
            resfast.unfused(converted)(x.detach())
        for m in (converted.eval(), resfast.unfused(converted)):
            torch.testing.assert_close(m(x.detach()), stock.eval()(x.detach()))
        assert "conv_bn_act_synchronised" not in ops_of(converted)
        with torch.no_grad():
            torch.testing.assert_close(converted(x), stock(x))


@on_ranks
def explain_names_synchronised_layers():
    model = resfast.convert_sync_batchnorm(small(stem="imagenet"))
    rows = resfast.explain(model, leaf(2, 3, 16, 16).detach()).rows
    assert {r.op for r in rows} == {"conv_bn_act_synchronised", "unfused"}
    assert {r.reason for r in rows} == {"a norm synchronised between ranks"}
    assert {r.children for r in rows if r.op == "unfused"} == {("maxpool",)}
    assert all(r.backends for r in rows if r.op != "unfused")
    model = resfast.convert_sync_batchnorm(
        resfast.PreActResNet(resfast.nn.PreActBlock, [1, 1, 1, 1], stem="cifar").double()
    )
    assert "bn_act_synchronised" in ops_of(model)
    alone = resfast.convert_sync_batchnorm(resfast.ConvBNAct.make(3, 4))
    assert alone.plan() == [(("conv", "bn"), "conv_bn_act_synchronised", None)]


@on_ranks
def groups_bound_what_is_synchronised():
    alone = [dist.new_group([r]) for r in range(2)]
    both = dist.new_group([0, 1])
    x = leaf(4, 3, 8, 8).detach()[rows(4, (2, 2))]
    model = small()
    stock = resfast.unfused(model)
    with pytest.raises(ValueError, match="not in the process group"):
        resfast.convert_sync_batchnorm(model, alone[1 - dist.get_rank()])
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    resfast.convert_sync_batchnorm(model, alone[dist.get_rank()])
    assert ops_of(model) == {"residual_block", "conv_bn_act"}
    torch.testing.assert_close(model(x), stock(x))
    resfast.convert_sync_batchnorm(model, both)
    assert ops_of(model) == {"conv_bn_act_synchronised"}
    difference = model(x) - stock(x)
    assert difference.abs().max() > 1e-3


@on_ranks
def compiles_whole_and_gives_the_same():
    torch._dynamo.reset()
    layers = [
        resfast.ConvBNAct.make(3, 8),
        resfast.BasicBlock(8, 8),
        resfast.nn.PreActBlock(8, 8),
    ]
    model = resfast.convert_sync_batchnorm(nn.Sequential(*layers).double())
    again = copy.deepcopy(model)
    compiled = torch.compile(again, backend="aot_eager", fullgraph=True)
    x = leaf(4, 3, 6, 6).detach()[rows(4, (3, 1))]
    want, got = model(x), compiled(x)
    torch.testing.assert_close(got, want)
    want.square().sum().backward()
    got.square().sum().backward()
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
    for k, v in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[k], v)


@on_ranks
def ops_pass_opcheck():
    group = dist.group.WORLD.group_name
    x, w, r = leaf(2, 3, 4, 4), leaf(4, 3, 3, 3, seed=1), leaf(2, 4, 4, 4, seed=2)
    v = [leaf(4, seed=i) for i in (3, 4)]
    stats = [torch.zeros(4).double(), torch.ones(4).double()]
    geometry, tail = ((1, 1), (1, 1), (1, 1), 1), (1e-5, True, False, group)
    opcheck = torch.library.opcheck
    opcheck(torch.ops.resfast.bn_act_synchronised.default, (r, *v, *stats, r, *tail))
    opcheck(
        torch.ops.resfast.conv_bn_act_synchronised.default,
        (x, w, None, *v, *stats, r, *geometry, *tail),
    )


@on_ranks
def a_checkpointed_block_counts_a_batch_once():
    x = leaf(4, 8, 6, 6)
    block = resfast.BasicBlock(8, 8).double()
    stock = resfast.unfused(block)
    resfast.convert_sync_batchnorm(block).checkpoint = True
    own = mine(x, rows(4, (3, 1)))
    block(own).square().sum().backward()
    stock(x).square().sum().backward()
    torch.testing.assert_close(own.grad, x.grad[rows(4, (3, 1))])
    for p, q in zip(block.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(all_sum(p.grad), q.grad)
    for k, v in stock.state_dict().items():
        torch.testing.assert_close(block.state_dict()[k], v)


@on_ranks
def autocast_casts_activations_only():
    layer = resfast.convert_sync_batchnorm(resfast.ConvBNAct.make(3, 8))
    x = torch.randn(4, 3, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.bn.weight.grad.dtype == layer.conv.weight.grad.dtype == torch.float32


# ---- data-parallel training


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def batches(steps: int, n: int, side: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    return [
        (
            torch.randn(n, 3, side, side, generator=generator, dtype=torch.float64),
            torch.randint(5, (n,), generator=generator),
        )
        for _ in range(steps)
    ]


def loss_of(model: nn.Module, x: Tensor, target: Tensor, n: int) -> Tensor:
    return F.cross_entropy(model(x), target, reduction="sum") / n


def train(
    model: nn.Module,
    data: list[tuple[Tensor, Tensor]],
    part: slice | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Steps of SGD. A part: of data parallelism, which averages the ranks' gradients."""
    optimizer = optimizer or optimizer_of(model)
    for x, target in data:
        optimizer.zero_grad()
        if part is None:
            loss = loss_of(model, x, target, len(x))
        else:
            loss = loss_of(model, x[part], target[part], len(x)) * dist.get_world_size()
        loss.backward()
        optimizer.step()


def assert_same_training(model: nn.Module, want: nn.Module) -> None:
    gradients = {k: p.grad for k, p in want.named_parameters()}
    for k, p in model.named_parameters():
        torch.testing.assert_close(full(p), full(dict(want.named_parameters())[k]))
        torch.testing.assert_close(full(p.grad), gradients[k])
    for k, b in model.named_buffers():
        torch.testing.assert_close(b, want.get_buffer(k))


def full(t: Tensor) -> Tensor:
    """Of a DTensor the whole of it."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


DDP_OPTIONS = (
    {},
    {"static_graph": True},
    {"gradient_as_bucket_view": True, "find_unused_parameters": False},
)


def on_cpu(model: nn.Module, **options) -> DistributedDataParallel:
    """Data-parallel with synchronised norms: DDP refuses them on CPU, so they come second."""
    parallel = DistributedDataParallel(model, **options)
    resfast.convert_sync_batchnorm(model)
    return parallel


@on_ranks
def ddp_with_synchronised_norms_trains_as_one_process():
    for options, block, sizes in zip(
        DDP_OPTIONS,
        (partial(small), partial(small, resfast.Bottleneck), partial(small, stem="imagenet")),
        ((5, 3), (4, 4), (2, 6)),
        strict=True,
    ):
        model = block()
        want = resfast.unfused(model)
        parallel = on_cpu(model, **options)
        data = batches(2, 8)
        train(want, data)
        train(parallel, data, rows(8, sizes))
        assert_same_training(model, want)


@on_ranks
def ddp_with_plain_norms_trains_as_stock():
    for options in DDP_OPTIONS[:2]:
        model = small(memory_efficient=True)
        want = resfast.unfused(model)
        assert ops_of(model) == {"residual_block", "conv_bn_act"}
        data = batches(2, 8)
        for m in (model, want):
            train(DistributedDataParallel(m, **options), data, rows(8, (5, 3)))
        assert_same_training(model, want)


@on_ranks
def ddp_accumulates_gradients_without_synchronising_them():
    model = small()
    want = resfast.unfused(model)
    parallel = on_cpu(model)
    data = batches(2, 8)
    for x, target in data:
        loss_of(want, x, target, 16).backward()
    (x, target), (x2, target2) = data
    part = rows(8, (5, 3))
    with parallel.no_sync():
        (loss_of(parallel, x[part], target[part], 16) * 2).backward()
    (loss_of(parallel, x2[part], target2[part], 16) * 2).backward()
    assert_same_training(model, want)


def sharded(model: nn.Module) -> nn.Module:
    """FSDP2 on each stage and on the whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for stage in (model.layer1, model.layer2[0], model.layer3, model.layer4[0]):
        fully_shard(stage, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@on_ranks
def fsdp_with_synchronised_norms_trains_as_one_process():
    model = small()
    want = resfast.unfused(model)
    sharded(resfast.convert_sync_batchnorm(model))
    data = batches(2, 8)
    train(want, data)
    train(model, data, rows(8, (5, 3)))
    assert ops_of(model) == {"conv_bn_act_synchronised"}
    assert_same_training(model, want)
    x = data[0][0]
    optimizers = optimizer_of(model), optimizer_of(want)
    for _ in range(2):  # also after the weights have changed
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), want.eval()(x))
        train(model.train(), data[:1], rows(8, (5, 3)), optimizers[0])
        train(want.train(), data[:1], None, optimizers[1])


@on_ranks
def fsdp_with_plain_norms_trains_as_stock():
    model = small()
    want = resfast.unfused(model)
    data = batches(2, 8)
    train(DistributedDataParallel(want, broadcast_buffers=False), data, rows(8, (5, 3)))
    train(sharded(model), data, rows(8, (5, 3)))
    assert ops_of(model) == {"residual_block", "conv_bn_act"}
    assert_same_training(model, want)


@pytest.mark.parametrize("name", [c.__name__ for c in on_ranks])
def test_on_two_ranks(name, outcomes):
    for rank, problem in enumerate(outcomes[name]):
        assert not problem, f"rank {rank}: {problem}"

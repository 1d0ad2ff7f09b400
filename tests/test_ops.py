"""The ops as PyTorch sees them: gradients, fakes, autocast, compile, checkpointing, statistics."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ownership import check_own_memory
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import resfast
import resfast.ops as fused
from resfast import native
from resfast.ops import ConvParams, NormParams
from resfast.testing import op_cases, stock_ops

raw = torch.ops.resfast


def _leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def _norm(c, training=True, dtype=torch.float64, **options):
    return NormParams(
        (torch.randn(c, dtype=dtype) + 1).requires_grad_(),
        torch.randn(c, dtype=dtype).requires_grad_(),
        torch.randn(c, dtype=dtype),
        torch.rand(c, dtype=dtype) + 0.5,
        torch.tensor(0),
        training,
        **options,
    )


def _check_both_orders(f, inputs):
    torch.autograd.gradcheck(f, inputs)
    torch.autograd.gradgradcheck(f, inputs)


# ---- gradients and gradients of gradients


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("order", ["alone", "before", "after"])
def test_bn_act_gradients(training, relu, order):
    norm = _norm(3, training)
    residual = () if order == "alone" else (_leaf(2, 3, 4, 5),)

    def f(z, gamma, beta, *r):
        n = norm._replace(weight=gamma, bias=beta)
        return fused.bn_act(z, n, *r, relu=relu, add_after_act=order == "after")

    _check_both_orders(f, (_leaf(2, 3, 4, 5), norm.weight, norm.bias, *residual))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv_bn_act_gradients(training, groups):
    norm = _norm(4, training)

    def f(x, w, b, gamma, beta, r):
        conv = ConvParams(w, b, (2, 1), (1, 0), (1, 2), groups)
        return fused.conv_bn_act(x, conv, norm._replace(weight=gamma, bias=beta), r)

    x, w, b = _leaf(2, 4, 6, 6), _leaf(4, 4 // groups, 3, 2), _leaf(4)
    _check_both_orders(f, (x, w, b, norm.weight, norm.bias, _leaf(2, 4, 3, 4)))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
def test_bn_act_max_pool_gradients(training, window):
    norm = _norm(3, training)
    kernel_size, stride, padding = window

    def f(z, gamma, beta):
        n = norm._replace(weight=gamma, bias=beta)
        return fused.bn_act_max_pool(z, n, kernel_size=kernel_size, stride=stride, padding=padding)

    _check_both_orders(f, (_leaf(2, 3, 6, 7), norm.weight, norm.bias))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_conv_bn_act_max_pool_gradients(training):
    norm = _norm(2, training)

    def f(x, w, gamma, beta):
        n = norm._replace(weight=gamma, bias=beta)
        return fused.conv_bn_act_max_pool(x, ConvParams(w, None, (1, 2), (1, 1)), n)

    _check_both_orders(f, (_leaf(2, 3, 5, 8), _leaf(2, 3, 3, 3), norm.weight, norm.bias))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("memory_efficient", [True, False])
def test_residual_block_gradients(training, length, projection, separate, memory_efficient):
    c = 2
    norms = [_norm(c, training) for _ in range(length + projection)]
    weights = [_leaf(c, c, 3, 3) for _ in range(length)]
    x = _leaf(2, c, 3, 4)
    leaves = [x, *weights]
    if projection:
        leaves.append(_leaf(c, c, 1, 1))
    if separate:
        leaves.append(_leaf(2, c, 3, 4))

    def f(x, *rest):
        rest = list(rest)
        convs = [ConvParams(rest.pop(0), None, padding=(1, 1)) for _ in range(length)]
        options = {"memory_efficient": memory_efficient}
        if projection:
            options |= {"shortcut_conv": ConvParams(rest.pop(0)), "shortcut_norm": norms[-1]}
        if separate:
            options["shortcut_input"] = rest.pop(0)
        return fused.residual_block(x, convs, norms[:length], **options)

    _check_both_orders(f, tuple(leaves))


def test_residual_block_norm_gradients():
    norms = [_norm(2) for _ in range(3)]
    weights = [_leaf(2, 2, 3, 3), _leaf(2, 2, 3, 3), _leaf(2, 2, 1, 1)]
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64)

    def f(*vectors):
        n = [
            m._replace(weight=vectors[2 * i], bias=vectors[2 * i + 1]) for i, m in enumerate(norms)
        ]
        convs = [ConvParams(w, None, padding=(1, 1)) for w in weights[:2]]
        return fused.residual_block(
            x, convs, n[:2], shortcut_conv=ConvParams(weights[2]), shortcut_norm=n[2]
        )

    _check_both_orders(f, tuple(v for n in norms for v in n[:2]))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("memory_efficient", [True, False])
@pytest.mark.parametrize("pack_masks", [True, False])
def test_residual_blocks_gradients(monkeypatch, training, memory_efficient, pack_masks):
    """Three blocks as one op, a strided projection among them."""
    module = sys.modules["resfast.ops.residual_block"]  # its function has its name
    monkeypatch.setattr(module, "chains", lambda x: pack_masks)
    norms = [_norm(2, training) for _ in range(7)]
    weights = [_leaf(2, 2, 3, 3) for _ in range(6)]
    leaves = (_leaf(2, 2, 4, 5), *weights, _leaf(2, 2, 1, 1))

    def f(x, *w):
        convs = [ConvParams(v, None, padding=(1, 1)) for v in w[:6]]
        convs[2] = convs[2]._replace(stride=(2, 2))
        shortcut = {"shortcut_conv": ConvParams(w[6], None, (2, 2)), "shortcut_norm": norms[6]}
        blocks = [
            fused.BlockParams(convs[2 * i : 2 * i + 2], norms[2 * i : 2 * i + 2]) for i in range(3)
        ]
        blocks[1] = blocks[1]._replace(**shortcut)
        return fused.residual_blocks(x, blocks, memory_efficient=memory_efficient)

    _check_both_orders(f, leaves)


@pytest.mark.parametrize("needed", ["x", "first", "last", "gamma"])
def test_residual_blocks_stop_where_no_gradient_is_needed(needed):
    """Every subset of gradients is what the whole set has."""
    torch.manual_seed(1)
    norms = [_norm(2, True) for _ in range(4)]
    weights = [_leaf(2, 2, 3, 3) for _ in range(4)]
    x = _leaf(2, 2, 4, 5)

    def run(*leaves):
        for t in (x, *weights, *(n.weight for n in norms)):
            t.requires_grad_(any(t is leaf for leaf in leaves))
        convs = [ConvParams(v, None, padding=(1, 1)) for v in weights]
        blocks = [fused.BlockParams(convs[i : i + 2], norms[i : i + 2]) for i in (0, 2)]
        y = fused.residual_blocks(x, blocks)
        return torch.autograd.grad(
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), leaves
        )

    every = (x, *weights, *(n.weight for n in norms))
    wanted = {"x": x, "first": weights[0], "last": weights[3], "gamma": norms[1].weight}[needed]
    index = next(i for i, t in enumerate(every) if t is wanted)
    torch.testing.assert_close(run(wanted)[0], run(*every)[index])


def test_only_the_gradients_asked_for_are_computed():
    norm = _norm(3)
    x, w = torch.randn(2, 3, 4, 4, dtype=torch.float64), _leaf(3, 3, 1, 1)
    y = fused.conv_bn_act(x, ConvParams(w), norm._replace(weight=norm.weight.detach()))
    y.sum().backward()
    assert w.grad is not None
    assert norm.bias.grad is not None
    assert x.grad is None
    assert norm.weight.grad is None


# ---- torch.library's own checks, and its rule that outputs share no memory


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("case", [*op_cases(True), *op_cases(False)], ids=str)
def test_outputs_own_their_memory(case, backend):
    with resfast.backend(backend):
        check_own_memory(case)


def _vectors(norm):
    return norm[:4]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
class TestOpcheck:
    def test_bn_act(self, training):
        n, z = _norm(3, training, torch.float32), _leaf(2, 3, 5, 4, dtype=torch.float32)
        opcheck(raw.bn_act.default, (z, *_vectors(n), None, training, 1e-5, True, False))
        r = torch.randn_like(z)
        opcheck(raw.bn_act.default, (z, *_vectors(n), r, training, 1e-5, True, True))

    def test_conv_bn_act(self, training):
        n = _norm(4, training, torch.float32)
        x, w = _leaf(2, 3, 6, 5, dtype=torch.float32), _leaf(4, 3, 3, 3, dtype=torch.float32)
        r, b = torch.randn(2, 4, 3, 3), torch.randn(4)
        geometry = ((2, 2), (1, 1), (1, 1), 1)
        args = (x, w, b, *_vectors(n), r, *geometry, training, 1e-5, True, False)
        opcheck(raw.conv_bn_act.default, args)

    def test_bn_act_max_pool(self, training):
        n, z = _norm(3, training, torch.float32), _leaf(2, 3, 5, 4, dtype=torch.float32)
        opcheck(raw.bn_act_max_pool.default, (z, *_vectors(n), 3, 2, 1, training, 1e-5))

    def test_conv_bn_act_max_pool(self, training):
        n, x = _norm(4, training, torch.float32), _leaf(2, 3, 9, 8, dtype=torch.float32)
        w = _leaf(4, 3, 3, 3, dtype=torch.float32)
        geometry = ((2, 2), (1, 1), (1, 1), 1)
        opcheck(
            raw.conv_bn_act_max_pool.default,
            (x, w, *_vectors(n), *geometry, (3, 2, 1), training, 1e-5),
        )

    @pytest.mark.parametrize("projection", [True, False])
    @pytest.mark.parametrize(("c", "pack_masks"), [(3, False), (3, True), (8, True)])
    def test_residual_block(self, training, projection, c, pack_masks):
        k = 2 + projection
        n = [_norm(c, training, torch.float32) for _ in range(k)]
        w = [_leaf(c, c, 3, 3, dtype=torch.float32) for _ in range(k)]
        vectors = [[m[i] for m in n] for i in range(4)]
        geometry = [1, 1, 1, 1, 1, 1, 1] * k
        x = _leaf(2, c, 4, 4, dtype=torch.float32)
        options = (geometry, [1e-5] * k, [training] * k, [2], [projection], False, pack_masks)
        opcheck(raw.residual_block.default, (x, None, w, *vectors, *options))


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 2, 1)], ids=str)
def test_strides_where_size_1_makes_layouts_ambiguous(shape):
    """Outputs, gradients and fakes agree on channels_last's strides, whatever came in."""
    c = shape[1]
    n = _norm(c, False, torch.float32)
    z = torch.randn(shape, requires_grad=True)
    expected = torch.empty(shape, memory_format=torch.channels_last).stride()
    y = fused.bn_act(z, n, z)
    w = _leaf(c, c, 1, 1, dtype=torch.float32)
    for out in (y, fused.conv_bn_act(z, ConvParams(w), n), fused.bn_act(z.detach(), n)):
        assert out.stride() == expected
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    opcheck(raw.bn_act.default, (z, *_vectors(n), z, False, 1e-5, True, False))
    args = (z, w, None, *_vectors(n), None, *geometry, False, 1e-5, True, False)
    opcheck(raw.conv_bn_act.default, args)


def test_opcheck_inference_ops():
    n, z = _norm(3, False, torch.float32), torch.randn(2, 3, 5, 4)
    vectors = tuple(v.detach() for v in _vectors(n))
    opcheck(raw.bn_act_inference.default, (z, *vectors, z, 1e-5, True, False))
    w, geometry = torch.randn(3, 3, 3, 3), ((1, 1), (1, 1), (1, 1), 1)
    args = (z, w, None, *vectors, z, *geometry, 1e-5, True, False)
    opcheck(raw.conv_bn_act_inference.default, args)


def test_opcheck_update_running_stats():
    args = (torch.zeros(3), torch.ones(3), torch.tensor(0), torch.randn(3), torch.rand(3), 8, 0.1)
    opcheck(raw.update_running_stats.default, args)


def test_opcheck_native_ops():
    if not native.is_available():
        pytest.skip(f"no native library: {native.load_error()}")
    z = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    v = [torch.randn(3) for _ in range(5)]
    opcheck(raw.norm_stats.default, (z, v[0], v[1]))
    affine = (v[0], v[1], v[2])
    none = (None, None, None)
    opcheck(raw.norm_apply.default, (z, *affine, None, *none, True, False, torch.empty_like(z)))


# ---- statistics


def _bn_pair(**options):
    bn = torch.nn.BatchNorm2d(5, **options)
    return bn, copy.deepcopy(bn)


def _params(bn):
    return NormParams(
        bn.weight,
        bn.bias,
        bn.running_mean,
        bn.running_var,
        bn.num_batches_tracked,
        bn.training or bn.running_mean is None,
        bn.momentum,
        bn.eps,
    )


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_running_statistics_are_stocks(momentum):
    ours, stock = _bn_pair(momentum=momentum)
    for _ in range(3):
        x = torch.randn(4, 5, 6, 7) * 3 + 2
        fused.bn_act(x, _params(ours), relu=False)
        stock(x)
    for a, b in zip(ours.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert int(ours.num_batches_tracked) == 3


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"track_running_stats": False}, {"eps": 0.5}], ids=str
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_norm_options_are_stocks(options, training):
    ours, stock = _bn_pair(**options)
    ours.train(training), stock.train(training)
    x = torch.randn(4, 5, 6, 7)
    torch.testing.assert_close(fused.bn_act(x, _params(ours), relu=False), stock(x))


def test_empty_batch_is_stocks():
    ours, stock = _bn_pair()
    x = torch.empty(0, 5, 6, 7, requires_grad=True)
    y = fused.bn_act(x, _params(ours), relu=False)
    assert y.shape == stock(x).shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(ours.running_mean, stock.running_mean)
    assert torch.equal(ours.running_var, stock.running_var)
    assert ours.num_batches_tracked == stock.num_batches_tracked


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_statistics_once(use_reentrant):
    convs = [ConvParams(_leaf(5, 5, 3, 3, dtype=torch.float32), None, padding=(1, 1))] * 2
    results = []
    for recompute in (False, True):
        torch.manual_seed(1)
        bns = [torch.nn.BatchNorm2d(5) for _ in range(2)]

        def run(x, bns=bns):
            return fused.residual_block(x, convs, [_params(b) for b in bns])

        x = torch.randn(3, 5, 4, 4, requires_grad=True)
        y = checkpoint(run, x, use_reentrant=use_reentrant) if recompute else run(x)
        y.square().sum().backward()
        results.append((x.grad, bns))
    (gradient, bns), (again, checkpointed) = results
    assert torch.equal(gradient, again)
    for a, b in zip(bns, checkpointed, strict=True):
        assert int(b.num_batches_tracked) == 1
        assert torch.equal(a.running_mean, b.running_mean)
        assert torch.equal(a.running_var, b.running_var)


def test_a_failed_call_leaves_the_buffers_alone():
    bn = torch.nn.BatchNorm2d(5)
    before = copy.deepcopy(bn.state_dict())
    x, w = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1)
    with pytest.raises(RuntimeError):
        fused.conv_bn_act(x, ConvParams(w), _params(bn), torch.randn(2, 5, 4, 3))
    with pytest.raises(RuntimeError):
        fused.residual_block(x, [ConvParams(w)] * 2, [_params(bn)] * 2)
    for k, v in bn.state_dict().items():
        assert torch.equal(v, before[k]), k


# ---- memory: what a block keeps for its backward


def _saved_bytes(model, x):
    seen = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = (storage.nbytes(), t)  # holding t keeps the address taken
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad
    return sum(n for n, _ in seen.values())


@pytest.mark.parametrize(
    ("memory_efficient", "share"), [(False, 0.85), (True, 0.55)], ids=["default", "efficient"]
)
def test_saved_activations_of_resnet50(memory_efficient, share):
    model = resfast.resnet50(memory_efficient=memory_efficient)
    x = torch.randn(2, 3, 224, 224)
    stock = _saved_bytes(resfast.unfused(model), x)
    ours = _saved_bytes(model, x)
    assert ours <= share * stock, f"{ours / stock:.3f} of stock's {stock / 2**20:.0f} MiB"


# ---- autocast and compile


def test_autocast_casts_activations_and_keeps_norm_parameters():
    n = _norm(4, True, torch.float32)
    x, w = torch.randn(2, 3, 6, 6), _leaf(4, 3, 3, 3, dtype=torch.float32)
    r = torch.randn(2, 4, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fused.conv_bn_act(x, ConvParams(w), n, r)
        z = fused.bn_act(y, n, r)
        b = fused.residual_block(
            z, [ConvParams(_leaf(4, 4, 1, 1, dtype=torch.float32))] * 2, [n, n]
        )
    assert y.dtype == z.dtype == b.dtype == torch.bfloat16
    b.sum().backward()
    assert w.grad.dtype == n.weight.grad.dtype == torch.float32
    assert n.running_mean.dtype == torch.float32
    assert n.num_batches_tracked == 4
    double = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fused.conv_bn_act(double, ConvParams(w.detach().double()), _norm(4))
    assert y.dtype == torch.float64


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile_fullgraph(training):
    norms = [_norm(4, training, torch.float32) for _ in range(4)]
    w = [_leaf(4, 4, 3, 3, dtype=torch.float32) for _ in range(3)]

    def f(x):
        convs = [ConvParams(v, None, padding=(1, 1)) for v in w]
        y = fused.conv_bn_act(x, convs[0], norms[0], x)
        y = fused.residual_block(
            y, convs[:2], norms[:2], shortcut_conv=convs[2], shortcut_norm=norms[2]
        )
        return fused.bn_act_max_pool(fused.bn_act(y, norms[3]), norms[3])

    x = torch.randn(2, 4, 8, 8)
    start = [n.running_mean.clone() for n in norms]
    expected = f(x)
    expected.sum().backward()
    gradients = [v.grad.clone() for v in w]
    after = [n.running_mean.clone() for n in norms]
    for v, n, mean in zip([*w, None], norms, start, strict=True):
        n.running_mean.copy_(mean)
        if v is not None:
            v.grad = None
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    for v, g in zip(w, gradients, strict=True):
        torch.testing.assert_close(v.grad, g)
    for n, mean in zip(norms, after, strict=True):
        torch.testing.assert_close(n.running_mean, mean)


# ---- arbitrary shapes


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 4),
    c=st.integers(1, 40),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    k=st.integers(1, 20),
    size=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    training=st.booleans(),
    residual=st.sampled_from([None, "before", "after"]),
)
def test_any_shape_is_stocks(
    n, c, h, w, k, size, stride, padding, dilation, layout, training, residual
):
    out = [(s + 2 * padding - dilation * (size - 1) - 1) // stride + 1 for s in (h, w)]
    conv = ConvParams(
        torch.randn(k, c, size, size, dtype=torch.float64),
        None,
        (stride, stride),
        (padding, padding),
        (dilation, dilation),
    )
    norm = _norm(k, training)
    x = torch.randn(n, c, h, w, dtype=torch.float64).contiguous(memory_format=layout)
    r = torch.randn(n, k, *map(abs, out), dtype=torch.float64) if residual else None

    def run(ops):
        leaf = x.clone().requires_grad_()
        fresh = norm._replace(
            running_mean=norm.running_mean.clone(), running_var=norm.running_var.clone()
        )
        try:
            y = ops.conv_bn_act(leaf, conv, fresh, r, add_after_act=residual == "after")
        except (RuntimeError, ValueError) as error:
            return type(error)
        y.square().sum().backward()
        return y.detach(), leaf.grad, fresh.running_mean, fresh.running_var

    ours, stock = run(fused), run(stock_ops)
    if isinstance(stock, type) or isinstance(ours, type):
        assert ours is stock
        return
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ---- bad input: stock's exception types and key words, from the ops and the raw ops


def _good():
    n = _norm(4, True, torch.float32)
    return SimpleNamespace(
        x=torch.randn(2, 3, 6, 6), w=torch.randn(4, 3, 3, 3), n=n, r=torch.randn(2, 4, 4, 4)
    )


def _conv(t, **changes):
    return ConvParams(t.w, None)._replace(**changes)


BAD_CONV = {
    "channels": (lambda t: _conv(t, weight=torch.randn(4, 5, 3, 3)), "channels"),
    "kernel larger than input": (lambda t: _conv(t, weight=torch.randn(4, 3, 9, 9)), "Kernel size"),
    "stride 0": (lambda t: _conv(t, stride=(0, 0)), "stride"),
    "negative padding": (lambda t: _conv(t, padding=(-1, -1)), "padding"),
    "groups": (lambda t: _conv(t, groups=2), "groups|divisible|channels"),
    "dtype": (lambda t: _conv(t, weight=t.w.double()), "type|dtype"),
    "bias size": (lambda t: _conv(t, bias=torch.randn(3)), "bias"),
    "weight rank": (lambda t: _conv(t, weight=torch.randn(4, 3, 3)), "weight|dim|input"),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("what", BAD_CONV)
def test_bad_convolution(what, training):
    make, words = BAD_CONV[what]
    t = _good()
    norm = t.n._replace(training=training)
    with torch.no_grad():
        with pytest.raises(RuntimeError) as stock:
            F.conv2d(t.x, *make(t))
        with pytest.raises(stock.type, match=f"(?i){words}"):
            fused.conv_bn_act(t.x, make(t), norm)


BAD_NORM = {
    "weight size": ({"weight": torch.ones(5)}, RuntimeError, "weight should contain 4 elements"),
    "bias size": ({"bias": torch.ones(5)}, RuntimeError, "bias should contain 4 elements"),
    "running_mean size": (
        {"running_mean": torch.ones(3)},
        RuntimeError,
        "running_mean should contain 4 elements not 3",
    ),
    "running_var size": ({"running_var": torch.ones(1)}, RuntimeError, "running_var should"),
    "weight dtype": ({"weight": torch.ones(4).double()}, RuntimeError, "weight"),
    "eps of 0": ({"eps": 0.0}, ValueError, "eps must be positive"),
    "negative eps": ({"eps": -1.0, "training": False}, ValueError, "eps must be positive"),
    "half a pair": ({"running_mean": None}, RuntimeError, "running_var"),
    "no statistics in eval": (
        {"running_mean": None, "running_var": None, "training": False},
        RuntimeError,
        "running_mean and running_var",
    ),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("what", BAD_NORM)
def test_bad_norm(what, grad):
    changes, error, words = BAD_NORM[what]
    t = _good()
    norm = t.n._replace(**changes)
    with torch.set_grad_enabled(grad):
        with pytest.raises(error, match=words):
            fused.conv_bn_act(t.x, _conv(t), norm)
        with pytest.raises(error, match=words):
            fused.bn_act(t.r, norm)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("residual", "words"),
    [
        (torch.randn(2, 4, 4, 3), "must match the size"),
        (torch.randn(1, 4, 1, 1), "must match the size"),
        (torch.randn(2, 4, 4, 4).double(), "dtype"),
    ],
    ids=["shape", "broadcast", "dtype"],
)
def test_bad_residual(residual, words, training):
    t = _good()
    norm = t.n._replace(training=training)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=words):
            fused.conv_bn_act(t.x, _conv(t), norm, residual)
        with pytest.raises(RuntimeError, match=words):
            fused.bn_act(torch.randn(2, 4, 4, 4), norm, residual)


@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 6), (1, 2, 3, 6, 6)])
def test_bad_rank(shape):
    t = _good()
    with pytest.raises((ValueError, RuntimeError), match=r"4D|3D"):
        fused.conv_bn_act(torch.randn(shape), _conv(t), t.n)
    with pytest.raises(ValueError, match="expected 4D input"):
        fused.bn_act(torch.randn(shape), t.n)


def test_integer_input():
    t = _good()
    with pytest.raises(RuntimeError):
        fused.conv_bn_act(t.x.long(), _conv(t), t.n)
    with pytest.raises(RuntimeError, match="floating point"):
        fused.bn_act(t.r.long(), t.n)


def test_one_value_per_channel_in_training():
    t = _good()
    for f in (
        lambda: fused.bn_act(torch.randn(1, 4, 1, 1), t.n),
        lambda: fused.conv_bn_act(torch.randn(1, 3, 3, 3), _conv(t), t.n),
        lambda: F.batch_norm(torch.randn(1, 4, 1, 1), None, None, training=True),
    ):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            f()


def test_bad_block():
    t = _good()
    conv, norm = ConvParams(torch.randn(4, 4, 3, 3), None, padding=(1, 1)), t.n
    x = torch.randn(2, 4, 6, 6)
    with pytest.raises(ValueError, match="as many norms"):
        fused.residual_block(x, [conv], [norm])
    with pytest.raises(ValueError, match="without bias"):
        fused.residual_block(x, [conv._replace(bias=torch.zeros(4))] * 2, [norm] * 2)
    with pytest.raises(ValueError, match="running statistics"):
        fused.residual_block(x, [conv] * 2, [norm._replace(running_mean=None)] * 2)
    with pytest.raises(RuntimeError, match="shortcut"):
        fused.residual_block(x, [conv._replace(stride=(2, 2)), conv], [norm] * 2)
    with pytest.raises(ValueError, match="go together"):
        fused.residual_block(x, [conv] * 2, [norm] * 2, shortcut_conv=conv)
    with pytest.raises(ValueError, match="without bias"):
        fused.conv_bn_act_max_pool(x, conv._replace(bias=torch.zeros(4)), norm)
    with pytest.raises(ValueError, match="at least one block"):
        fused.residual_blocks(x, [])


@pytest.mark.parametrize("name", ["cpu", "eager"])
@pytest.mark.parametrize(
    "dy",
    [torch.randn(2, 4, 4, 3), torch.randn(1, 4, 1, 1), torch.randn(2, 4, 4, 4).double()],
    ids=["shape", "broadcast", "dtype"],
)
def test_bad_gradient_to_the_backward_ops(dy, name):
    if name == "cpu" and not native.is_available():
        pytest.skip(f"no native library: {native.load_error()}")
    z, v, w = torch.randn(2, 4, 4, 4), torch.ones(4), torch.randn(4, 4, 1, 1)
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    norm = (v, v, v, v)
    index = torch.zeros(2, 4, 4, 4, dtype=torch.uint8)
    lists = ([w, w], [v, v], [v, v], [], [], [z, z], [v, v], [v, v], [1, 1, 0, 0, 1, 1, 1] * 2)
    need = [True, False, True, True, True, True]
    options = ([1e-5] * 2, [True] * 2, [2], [False], False, need)
    conv_options = (*geometry, True, 1e-5, True, False, [True, True, False, False])
    calls = [
        lambda: raw.bn_act_backward(dy, z, None, *norm, True, 1e-5, True, False, False),
        lambda: raw.conv_bn_act_backward(dy, z, w, None, z, None, *norm, *conv_options),
        lambda: raw.bn_act_max_pool_backward(dy, z, index, *norm, 3, 1, 1, True, 1e-5),
        lambda: raw.conv_bn_act_max_pool_backward(
            dy, z, w, z, index, *norm, *geometry, (3, 1, 1), True, 1e-5, [True, True]
        ),
        lambda: raw.residual_block_backward(dy, z, None, z, *lists, *options),
    ]
    for call in calls:
        with resfast.backend(name), pytest.raises(RuntimeError, match="dy"):
            call()


def test_bad_statistics_change_no_buffer():
    mean, var, batches = torch.zeros(3), torch.ones(3), torch.tensor(0)
    with pytest.raises(RuntimeError, match="one shape"):
        raw.update_running_stats(mean, var, batches, torch.ones(4), torch.ones(3), 8, 0.1)
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        raw.update_running_stats(mean, var, None, torch.ones(3), torch.ones(3), 8, None)
    assert batches == 0
    assert torch.equal(mean, torch.zeros(3))


def test_mixed_devices():
    t = _good()
    norm = t.n._replace(weight=torch.ones(4, device="meta"))
    with pytest.raises(RuntimeError, match="same device"):
        fused.bn_act(t.r, norm)
    with pytest.raises(RuntimeError, match="same device"):
        fused.bn_act(t.r, t.n, torch.empty(2, 4, 4, 4, device="meta"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eps": float("nan")}, "eps"),
        ({"eps": float("inf")}, "eps"),
        ({"momentum": 1.5}, "momentum"),
        ({"running_var": -torch.ones(4)}, "running_var"),
        ({"running_mean": torch.full((4,), float("inf"))}, "running_mean"),
        ({"weight": torch.full((4,), float("nan"))}, "weight"),
    ],
)
def test_strict_raises_what_stock_lets_through(change, words):
    t = _good()
    norm = t.n._replace(**change)
    fused.bn_act(t.r, norm._replace(training=False))
    with resfast.strict(), pytest.raises(ValueError, match=words):
        fused.bn_act(t.r, norm._replace(training=False))


def test_every_case_has_a_name_of_its_own():
    names = [str(c) for training in (True, False) for c in op_cases(training)]
    assert len(names) == len(set(names))

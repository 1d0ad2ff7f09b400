"""PyTorch's own samples and error inputs of batch norm and conv2d, on resfast's ops and layers.

What is compared, by the criterion of resfast/testing.py: samples with 4 dimensions and a floating
dtype. Batch norm's samples of 2 or 3 dimensions are compared once more as ``[N, C, L, 1]``. All
others must raise what the ops' docstrings say: ValueError for another rank, RuntimeError for
another dtype. A convolution gets an identity norm, of mean 0, variance 1 and eps 2⁻⁵⁰⁰.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfast import ConvBNAct
from resfast.nn import run_bn_act
from resfast.ops import ConvParams, NormParams, bn_act, conv_bn_act
from resfast.testing import LAYOUTS, POOL_INPUTS, Errors, judge

pytest.importorskip("expecttest", reason="PyTorch's sample inputs import expecttest")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    common_modules = pytest.importorskip("torch.testing._internal.common_modules")


pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NO_EPS = 2.0**-500  # stock's functions refuse 0
OPS = {o.name: o for o in invocations.op_db if not o.variant_test_name}
MODULES = {m.module_cls: m for m in common_modules.module_db}


def samples(name: str, dtype: torch.dtype, seed: int) -> Iterator[Any]:
    torch.manual_seed(seed)
    yield from OPS[name].sample_inputs("cpu", dtype, requires_grad=True)


# ---- running and comparing


Run = Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]


def outcome(run: Run, tensors: Sequence[Tensor | None], layout: str, exact: bool) -> list[Tensor]:
    """The outputs of ``run`` on copies, and the gradients of what required one."""

    def copy(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        c = t.detach().double() if exact else t.detach().clone()
        if c.dim() == 4:
            c = c.contiguous(memory_format=LAYOUTS[layout])
        return c.requires_grad_(t.requires_grad)

    copies = [copy(t) for t in tensors]
    outputs = [t for t in run(copies) if t is not None]
    y = outputs[0]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    y.backward(dy.to(tensors[0].dtype).to(y.dtype))
    grads = [c.grad for c in copies if c is not None and c.requires_grad]
    return [t.detach() for t in outputs] + [g for g in grads if g is not None]


class Comparison:
    """Errors by quantity, pooled over samples and seeds, and judged at the end."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.errors: dict[int, list[Errors]] = {}

    def add(self, ours: Run, stock: Run, tensors: Sequence[Tensor | None]) -> None:
        want = outcome(stock, tensors, "nchw", exact=True)
        theirs = [outcome(stock, tensors, layout, exact=False) for layout in LAYOUTS]
        for layout in LAYOUTS:
            got = outcome(ours, tensors, layout, exact=False)
            assert len(got) == len(want)
            for i, (g, w) in enumerate(zip(got, want, strict=True)):
                assert g.shape == w.shape
                assert g.dtype == theirs[0][i].dtype
                if g.numel():
                    self.errors.setdefault(i, []).append(_errors(g, w, [t[i] for t in theirs]))

    def check(self, quantities: int) -> None:
        assert len(self.errors) == quantities
        for i, errors in self.errors.items():
            verdict = judge(str(i), errors, self.dtype)
            assert verdict.ok, verdict


def _errors(got: Tensor, want: Tensor, theirs: Sequence[Tensor]) -> Errors:
    def size(t: Tensor) -> tuple[float, float]:
        return float(t.square().sum()), float(t.abs().max())

    stock = tuple(size(t.double() - want) for t in theirs)
    roundoff = torch.finfo(got.dtype).eps / 2
    return Errors(got.numel(), size(got.double() - want), stock, size(want), roundoff)


def identity(channels: int, dtype: torch.dtype) -> NormParams:
    vectors = torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype)
    return NormParams(None, None, *vectors, eps=NO_EPS)


def vector_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- batch norm


def norm_arguments(sample: Any) -> tuple[list[Tensor | None], dict[str, Any]]:
    """x, running_mean, running_var, weight, bias, and training, momentum, eps."""
    options = {"training": False, "momentum": 0.1, "eps": 1e-5, **sample.kwargs}
    tensors = [sample.input, *sample.args]
    tensors += [options.pop(k, None) for k in ("weight", "bias")][: 5 - len(tensors)]
    return tensors, options


def fused_norm(options: dict[str, Any]) -> Run:
    def run(t: Sequence[Tensor | None]) -> list[Tensor | None]:
        x, mean, var, weight, bias = t
        norm = NormParams(weight, bias, mean, var, None, **options)
        assert x is not None
        return [bn_act(x, norm, relu=False), mean, var]

    return run


def stock_norm(options: dict[str, Any]) -> Run:
    def run(t: Sequence[Tensor | None]) -> list[Tensor | None]:
        x, mean, var, weight, bias = t
        assert x is not None
        return [F.batch_norm(x, mean, var, weight, bias, **options), mean, var]

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm_samples(dtype):
    """Only errors against stock count, so a sample that both refuse is a failure."""
    comparison = Comparison(dtype)
    ranks = []
    for seed in range(POOL_INPUTS):
        for sample in samples("nn.functional.batch_norm", dtype, seed):
            tensors, options = norm_arguments(sample)
            x = tensors[0]
            ranks.append(x.dim())
            if x.dim() != 4:
                with pytest.raises(ValueError, match="expected 4D"):
                    fused_norm(options)(tensors)
            if x.dim() == 1:
                continue
            if x.dim() < 4:
                x = x.detach().reshape(*x.shape, *(1,) * (4 - x.dim())).requires_grad_()
            given = [t is not None for t in tensors]
            if given == [True] * 5:  # else the quantities are not the same
                comparison.add(fused_norm(options), stock_norm(options), [x, *tensors[1:]])
            else:
                alone = Comparison(dtype)
                alone.add(fused_norm(options), stock_norm(options), [x, *tensors[1:]])
                alone.check(2)
    assert {1, 2, 3, 4} <= set(ranks)
    comparison.check(6)  # y, the running statistics, three gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_batch_norm_statistics(dtype):
    """The op's own mean and variance against stock's saved mean and 1/√(var + eps)."""
    compared = 0
    for sample in samples("native_batch_norm", dtype, 0):
        x, (weight, bias, mean, var, training, momentum, eps) = sample.input, sample.args
        if not training or x.dim() < 2:
            continue
        x = x.detach().reshape(*x.shape, *(1,) * (4 - x.dim()))
        exact = [None if t is None else t.detach().double() for t in (x, weight, bias, mean, var)]
        _, want_mean, want_rstd = torch.native_batch_norm(*exact, True, momentum, eps)
        vectors = [None if t is None else t.detach().clone() for t in (weight, bias, mean, var)]
        _, got_mean, got_var = torch.ops.resfast.bn_act(x, *vectors, None, True, eps, False, False)
        assert got_mean.dtype == vector_dtype(x)
        rtol = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(got_mean.double(), want_mean, rtol=rtol, atol=rtol)
        torch.testing.assert_close((got_var + eps).rsqrt().double(), want_rstd, rtol=rtol, atol=0)
        compared += 1
    assert compared >= 5


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_norm_2d_module_samples(training):
    """ModuleInfo's samples, with whatever arguments its constructor was given.

    Running statistics by PyTorch's own tolerance: they start at 0, and a mean that happens to be
    small beside the data has no scale of its own that the criterion could go by.
    """
    info = MODULES[nn.BatchNorm2d]
    comparisons: dict[str, Comparison] = {}
    for seed in range(POOL_INPUTS):
        torch.manual_seed(seed)
        for sample in info.module_inputs_func(
            info, "cpu", torch.float32, requires_grad=True, training=training
        ):
            made, called = sample.constructor_input, sample.forward_input

            def make(dtype: torch.dtype, made: Any = made) -> nn.BatchNorm2d:
                return nn.BatchNorm2d(*made.args, **made.kwargs, dtype=dtype).train(training)

            (x,) = called.args
            comparisons.setdefault(sample.desc, Comparison(torch.float32)).add(
                lambda t, make=make: [run_bn_act(make(t[0].dtype), t[0], relu=False)],
                lambda t, make=make: [make(t[0].dtype)(t[0])],
                [x],
            )
            ours, stock = make(x.dtype), make(x.dtype)
            run_bn_act(ours, x, relu=False), stock(x)
            torch.testing.assert_close(ours.state_dict(), stock.state_dict())
    assert {"not_affine", "not_tracking_stats", "zero_batch"} <= comparisons.keys()
    for description, comparison in comparisons.items():
        comparison.check(0 if description == "zero_batch" else 2)  # y and dx, if there are any


def test_batch_norm_2d_module_errors():
    info = MODULES[nn.BatchNorm2d]
    errors = info.module_error_inputs_func(
        info, "cpu", torch.float32, requires_grad=False, training=True
    )
    assert errors
    for error in errors:
        made = error.module_error_input.constructor_input
        called = error.module_error_input.forward_input
        for training in (True, False):
            bn = nn.BatchNorm2d(*made.args, **made.kwargs).train(training)
            with pytest.raises(error.error_type, match=error.error_regex):
                run_bn_act(bn, *called.args, relu=False)
            assert int(bn.num_batches_tracked) == 0
            conv = nn.Conv2d(called.args[0].shape[1], bn.num_features, 1)
            with pytest.raises(error.error_type, match=error.error_regex), torch.no_grad():
                ConvBNAct(conv, bn)(*called.args)


# ---- convolution


def pair(value: Any) -> Any:
    """(h, w) of what conv2d takes: an int, one or two of them, or a name."""
    if isinstance(value, str):
        return value
    value = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(value) * 2 if len(value) == 1 else tuple(value)


def geometry(options: dict[str, Any]) -> dict[str, Any]:
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    merged = {**defaults, **options}
    return {k: v if k == "groups" else pair(v) for k, v in merged.items()}


def fused_conv(options: dict[str, Any]) -> Run:
    """The op; by way of the layer, which is what resolves padding="same" and "valid"."""
    g = geometry(options)

    def by_op(t: Sequence[Tensor | None]) -> list[Tensor | None]:
        x, weight, bias = t
        assert x is not None
        assert weight is not None
        norm = identity(weight.shape[0], vector_dtype(x))
        return [conv_bn_act(x, ConvParams(weight, bias, **g), norm, relu=False)]

    def by_layer(t: Sequence[Tensor | None]) -> list[Tensor | None]:
        x, weight, bias = t
        assert x is not None
        assert weight is not None
        k, c, *size = weight.shape
        conv = nn.Conv2d(c * g["groups"], k, size, bias=bias is not None, **g)
        del conv.weight, conv.bias
        conv.weight, conv.bias = weight, bias  # leaves of the caller
        bn = nn.BatchNorm2d(k, eps=NO_EPS, affine=False, dtype=vector_dtype(x)).eval()
        return [ConvBNAct(conv, bn, relu=False)(x)]

    return by_layer if isinstance(g["padding"], str) else by_op


def stock_conv(options: dict[str, Any]) -> Run:
    return lambda t: [F.conv2d(*t, **options)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv2d_samples(dtype):
    with_bias, without = Comparison(dtype), Comparison(dtype)
    unbatched = 0
    for seed in range(POOL_INPUTS):
        for sample in samples("nn.functional.conv2d", dtype, seed):
            tensors = [sample.input, *sample.args]
            tensors += [None] * (3 - len(tensors))
            ours, stock = fused_conv(sample.kwargs), stock_conv(sample.kwargs)
            if sample.input.dim() == 4:
                comparison = without if tensors[2] is None else with_bias
                comparison.add(ours, stock, tensors)
            else:
                unbatched += 1
                with pytest.raises(ValueError, match="expected 4D"):
                    ours(tensors)
    assert unbatched
    with_bias.check(4)  # y, dx, dweight, dbias
    without.check(3)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=str)
def test_conv2d_samples_of_other_dtypes(dtype):
    assert dtype in OPS["nn.functional.conv2d"].dtypes
    torch.manual_seed(0)
    for sample in OPS["nn.functional.conv2d"].sample_inputs("cpu", dtype):
        if sample.input.dim() != 4 or isinstance(sample.kwargs.get("padding"), str):
            continue
        with pytest.raises(RuntimeError, match="must be floating point"):
            fused_conv(sample.kwargs)([sample.input, *sample.args])


@pytest.mark.parametrize("where", ["grad", "no_grad", "fake"])
def test_conv2d_error_inputs(where):
    """By type; the words too where the call is stock's own: on values, with padding in numbers.

    Error inputs with padding="same" are about something else, so the op gets numbers for it.
    """
    checked = 0
    for error in OPS["nn.functional.conv2d"].error_inputs("cpu"):
        sample = error.sample_input
        tensors, options = [sample.input, *sample.args], sample.kwargs
        kind, words = error.error_type, error.error_regex
        if options.get("padding") == "same":
            options = {**options, "padding": [(k - 1) // 2 for k in tensors[1].shape[2:]]}
            words = None
        if where == "fake":
            tensors, words = [t.to("meta") for t in tensors], None
        elif where == "grad":
            tensors = [t.requires_grad_(t.is_floating_point()) for t in tensors]
        if sample.input.dim() != 4:
            kind, words = ValueError, "expected 4D"
        elif not sample.input.is_floating_point():
            words = "must be floating point"
        with torch.set_grad_enabled(where == "grad"), pytest.raises(kind, match=words):
            fused_conv(options)(tensors)
        checked += 1
    assert checked >= 10


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_conv_2d_module_samples(training):
    info = MODULES[nn.Conv2d]
    comparison = Comparison(torch.float32)
    unbatched = 0
    for seed in range(POOL_INPUTS):
        torch.manual_seed(seed)
        for sample in info.module_inputs_func(
            info, "cpu", torch.float32, requires_grad=True, training=training
        ):
            made, (x, *_) = sample.constructor_input, sample.forward_input.args
            conv = nn.Conv2d(*made.args, **made.kwargs).train(training)
            bn = nn.BatchNorm2d(conv.out_channels, eps=NO_EPS, affine=False).eval()
            layer = ConvBNAct(conv, bn, relu=False)
            if x.dim() != 4:
                unbatched += 1
                with pytest.raises(ValueError, match="expected 4D"):
                    layer(x)
                continue

            def run(forward: nn.Module) -> Run:
                return lambda t: [forward.to(t[0].dtype)(t[0])]

            comparison.add(run(layer), run(conv), [x])
    assert unbatched
    comparison.check(2)

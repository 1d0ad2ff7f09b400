"""Inputs, stock peers and the error criterion: tests, benchmarks and ``resfast check`` share them.

Criterion: on the same inputs, E = RMSE against a float64 reference built from the already rounded
inputs. bf16, fp16: E ≤ 1.1 × stock's. fp32: E ≤ 1.5 × the worst of stock's own paths, or ≤ 8·2⁻²⁴
of the reference's RMS. And per channel, by the largest error; docs/numerics.md derives each factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import resfast.ops as fused_ops
from resfast.backends.accuracy import CHANNEL_FACTOR, FLOOR_ULPS, POOL_VALUES, SINGLE_FACTOR
from resfast.ops import BlockParams, ConvParams, NormParams, reference

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
HALF_DTYPES = (torch.bfloat16, torch.float16)

# factor on stock's error in 16 bits; the other constants are accuracy.py's
HALF_FACTOR = 1.1
# A weight gradient's errors share those of its activations, so that a pool's n is smaller than it
# looks: never fewer than 8 inputs, in 16 bits, whose roundings outlast a chain of blocks, 32.
POOL_INPUTS = 8
HALF_POOL_INPUTS = 32
HALF_SEEDS = 64  # two such pools, or one of a quantity with 32 values


# ---- stock PyTorch behind the signatures of resfast.ops


def _stock_bn_act(x, norm, residual=None, *, relu=True, add_after_act=False):
    u = F.batch_norm(
        x,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        norm.training,
        norm.momentum,
        norm.eps,
    )
    if residual is not None and not add_after_act:
        u = u + residual
    y = F.relu(u) if relu else u
    return y + residual if residual is not None and add_after_act else y


def _stock_conv_bn_act(x, conv, norm, residual=None, *, relu=True, add_after_act=False):
    z = reference.conv(x, conv)
    return _stock_bn_act(z, norm, residual, relu=relu, add_after_act=add_after_act)


def _stock_bn_act_max_pool(x, norm):
    return F.max_pool2d(_stock_bn_act(x, norm), 3, 2, 1)


def _stock_conv_bn_act_max_pool(x, conv, norm):
    return _stock_bn_act_max_pool(reference.conv(x, conv), norm)


def _stock_residual_block(x, convs, norms, **options):
    return block_by_layers(stock_ops, x, convs, norms, **options)


def _stock_residual_blocks(x, blocks, **options):
    return blocks_one_by_one(stock_ops, x, blocks, **options)


stock_ops = SimpleNamespace(
    bn_act=_stock_bn_act,
    conv_bn_act=_stock_conv_bn_act,
    bn_act_max_pool=_stock_bn_act_max_pool,
    conv_bn_act_max_pool=_stock_conv_bn_act_max_pool,
    residual_block=_stock_residual_block,
    residual_blocks=_stock_residual_blocks,
)


# ---- cases: an op call over named tensors, run by any of the implementations


Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class OpCase:
    """One op call. ``shapes`` names its leaf tensors; ``call`` runs it with an implementation.

    ``norms`` names the norms: name → channels; a norm brings gamma_, beta_, mean_ and var_name.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    norms: dict[str, int]
    call: Callable[[Any, Tensors, dict[str, NormParams]], Tensor]
    training: bool

    def __str__(self) -> str:
        return f"{self.name}-{'train' if self.training else 'eval'}"

    def inputs(self, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensors:
        """Random leaves of ``dtype`` (norm vectors float32, or float64); convolutions He-scaled."""
        generator = torch.Generator().manual_seed(seed)
        vector_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        tensors: Tensors = {}
        for name, shape in self.shapes.items():
            t = normal(*shape)
            if name.startswith("w"):
                t = t * math.sqrt(2 / math.prod(shape[1:]))
            tensors[name] = t.to(dtype)
        for name, c in self.norms.items():
            gamma = 1 + 0.5 * normal(c)  # some negative
            for key, v in (
                ("gamma", gamma),
                ("beta", normal(c)),
                ("mean", normal(c)),
                ("var", 0.5 + normal(c).abs()),
            ):
                tensors[f"{key}_{name}"] = v.to(vector_dtype)
        return {k: v.to(device) for k, v in tensors.items()}

    def prepare(
        self, tensors: Tensors, layout: str, gradients: bool = True
    ) -> tuple[Tensors, list[str], dict[str, NormParams]]:
        """Copies in `layout` to call the op on, the names of its leaves, and its norms."""
        t = {
            k: v.contiguous(memory_format=LAYOUTS[layout]) if v.dim() == 4 else v.clone()
            for k, v in tensors.items()
        }
        leaves = [k for k in t if not k.startswith(("mean_", "var_"))]
        for k in leaves:
            t[k] = t[k].detach().requires_grad_(gradients)
        norms = {
            name: NormParams(
                t[f"gamma_{name}"],
                t[f"beta_{name}"],
                t[f"mean_{name}"],
                t[f"var_{name}"],
                None,
                self.training,
            )
            for name in self.norms
        }
        return t, leaves, norms

    def run(self, ops: Any, tensors: Tensors, dy: Tensor | None, layout: str) -> Tensors:
        """Forward and backward: y, d<leaf> for each leaf, mean_<norm> and var_<norm> afterwards."""
        t, leaves, norms = self.prepare(tensors, layout)
        y = self.call(ops, t, norms)
        result = {"y": y.detach()}
        if dy is not None:
            y.backward(dy.to(y.dtype).contiguous(memory_format=LAYOUTS[layout]))
            result |= {f"d{k}": g for k in leaves if (g := t[k].grad) is not None}
        if self.training:
            result |= {k: v for k, v in t.items() if k.startswith(("mean_", "var_"))}
        return result


class _Recording:
    """An implementation's ops, layer by layer, noting which branch each ReLU and max-pool takes."""

    def __init__(self, ops: Any, pool_index: Callable, conv_pool_index: Callable) -> None:
        self.ops = ops
        self.pool_index = pool_index
        self.conv_pool_index = conv_pool_index
        self.branches: list[Tensor] = []

    def bn_act(self, x, norm, residual=None, *, relu=True, add_after_act=False):
        norm = _untracked(norm)
        if relu:
            joined = None if add_after_act else residual
            self.branches.append(reference.positive(self.ops.bn_act(x, norm, joined)))
        return self.ops.bn_act(x, norm, residual, relu=relu, add_after_act=add_after_act)

    def conv_bn_act(self, x, conv, norm, residual=None, *, relu=True, add_after_act=False):
        norm = _untracked(norm)
        if relu:
            joined = None if add_after_act else residual
            self.branches.append(reference.positive(self.ops.conv_bn_act(x, conv, norm, joined)))
        return self.ops.conv_bn_act(x, conv, norm, residual, relu=relu, add_after_act=add_after_act)

    def bn_act_max_pool(self, x, norm):
        norm = _untracked(norm)
        self.branches.append(reference.positive(self.ops.bn_act(x, norm)))
        self.branches.append(self.pool_index(x, norm))
        return self.ops.bn_act_max_pool(x, norm)

    def conv_bn_act_max_pool(self, x, conv, norm):
        norm = _untracked(norm)
        self.branches.append(reference.positive(self.ops.conv_bn_act(x, conv, norm)))
        self.branches.append(self.conv_pool_index(x, conv, norm))
        return self.ops.conv_bn_act_max_pool(x, conv, norm)

    def residual_block(self, x, convs, norms, **options):
        block_by_layers(self, x, convs, norms, **options)
        # the block itself joins a projection without rounding it first
        y = self.ops.residual_block(x, convs, norms, **options)
        self.branches[-1] = reference.positive(y)
        return y

    def residual_blocks(self, x, blocks, **options):
        return blocks_one_by_one(self, x, blocks, **options)


class _Reference:
    """reference.py along given branches, with the running statistics it leaves to its caller."""

    def __init__(self, branches: Sequence[Tensor] | None = None) -> None:
        self.branches = None if branches is None else iter(branches)

    def _next(self, wanted: bool = True) -> Tensor | None:
        return next(self.branches) if wanted and self.branches is not None else None

    def _track(self, norm: NormParams, z: Tensor) -> None:
        if norm.training and norm.running_mean is not None and norm.running_var is not None:
            with torch.no_grad():
                mean, var = reference.running_stats(z, norm)
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(var)

    def bn_act(self, x, norm, residual=None, *, relu=True, add_after_act=False):
        mask = self._next(relu)
        y = reference.bn_act(x, norm, residual, relu=relu, add_after_act=add_after_act, mask=mask)
        self._track(norm, x)
        return y

    def conv_bn_act(self, x, conv, norm, residual=None, **options):
        return self.bn_act(reference.conv(x, conv), norm, residual, **options)

    def bn_act_max_pool(self, x, norm):
        mask, index = self._next(), self._next()
        if mask is None or index is None:
            y = reference.bn_act_max_pool(x, norm)
        else:
            a = reference.bn_act(x, norm, mask=mask)
            y = a.flatten(2).gather(2, index.flatten(2)).view(index.shape)
        self._track(norm, x)
        return y

    def conv_bn_act_max_pool(self, x, conv, norm):
        return self.bn_act_max_pool(reference.conv(x, conv), norm)

    def residual_block(self, x, convs, norms, **options):
        return block_by_layers(self, x, convs, norms, **options)

    def residual_blocks(self, x, blocks, **options):
        return blocks_one_by_one(self, x, blocks, **options)


def block_by_layers(
    ops,
    x,
    convs,
    norms,
    *,
    shortcut_conv=None,
    shortcut_norm=None,
    shortcut_input=None,
    memory_efficient=False,
):
    """A residual block as calls of conv_bn_act."""
    a = x
    for c, n in zip(convs[:-1], norms[:-1], strict=True):
        a = ops.conv_bn_act(a, c, n)
    shortcut = x if shortcut_input is None else shortcut_input
    if shortcut_conv is not None:
        shortcut = ops.conv_bn_act(shortcut, shortcut_conv, shortcut_norm, relu=False)
    return ops.conv_bn_act(a, convs[-1], norms[-1], shortcut)


def blocks_one_by_one(ops, x, blocks, **options):
    """Residual blocks in a row as calls of residual_block."""
    for convs, norms, shortcut_conv, shortcut_norm in blocks:
        shortcut = {"shortcut_conv": shortcut_conv, "shortcut_norm": shortcut_norm}
        x = ops.residual_block(x, convs, norms, **shortcut, **options)
    return x


def _untracked(norm: NormParams) -> NormParams:
    if not norm.training:
        return norm
    return norm._replace(running_mean=None, running_var=None, num_batches_tracked=None)


def _stock_pool_index(x: Tensor, norm: NormParams) -> Tensor:
    return F.max_pool2d(stock_ops.bn_act(x, norm), 3, 2, 1, return_indices=True)[1]


def _stock_conv_pool_index(x: Tensor, conv: ConvParams, norm: NormParams) -> Tensor:
    return _stock_pool_index(reference.conv(x, conv), norm)


def _fused_pool_index(x: Tensor, norm: NormParams) -> Tensor:
    _, within, _, _ = torch.ops.resfast.bn_act_max_pool(
        x, *norm[:4], 3, 2, 1, norm.training, norm.eps
    )
    return _in_plane(within, x.shape[3])


def _fused_conv_pool_index(x: Tensor, conv: ConvParams, norm: NormParams) -> Tensor:
    _, z, within, _, _ = torch.ops.resfast.conv_bn_act_max_pool(
        x, conv.weight, *norm[:4], *conv.geometry, (3, 2, 1), norm.training, norm.eps
    )
    return _in_plane(within, z.shape[3])


def _in_plane(within: Tensor, width: int) -> Tensor:
    """Positions in planes of that width, of positions in windows of side 3, stride 2."""
    p = torch.arange(within.shape[2], device=within.device).view(-1, 1) * 2 - 1
    q = torch.arange(within.shape[3], device=within.device) * 2 - 1
    return (within.long() // 3 + p) * width + within.long() % 3 + q


Shape = tuple[int, ...]


def bn_case(
    name: str, shape: Shape, training: bool, *, residual: bool = False, **options
) -> OpCase:
    """bn_act on x of `shape`; `options` are its own."""
    return OpCase(
        name,
        {"x": shape, **({"r": shape} if residual else {})},
        {"1": shape[1]},
        lambda ops, t, n: ops.bn_act(t["x"], n["1"], t.get("r"), **options),
        training,
    )


def max_pool_case(name: str, shape: Shape, training: bool) -> OpCase:
    return OpCase(
        name,
        {"x": shape},
        {"1": shape[1]},
        lambda ops, t, n: ops.bn_act_max_pool(t["x"], n["1"]),
        training,
    )


def stem_case(name: str, shape: Shape, weight: Shape, training: bool) -> OpCase:
    """conv_bn_act_max_pool on x of `shape`, its convolution of stride 2 padded to "same"."""
    pad = (weight[2] // 2, weight[3] // 2)
    return OpCase(
        name,
        {"x": shape, "w": weight},
        {"1": weight[0]},
        lambda ops, t, n: ops.conv_bn_act_max_pool(
            t["x"], ConvParams(t["w"], None, (2, 2), pad), n["1"]
        ),
        training,
    )


def conv_case(
    name: str,
    shape: Shape,
    weight: Shape,
    training: bool,
    *,
    residual: bool = False,
    bias: bool = False,
    stride: int = 1,
    groups: int = 1,
    **options,
) -> OpCase:
    """conv_bn_act on x of `shape`, padded to "same"; `options` are its own."""
    k, side = weight[0], weight[2]
    shapes = {"x": shape, "w": weight}
    if residual:
        # ⌊(H + 2·(side // 2) − side) / stride⌋ + 1 for odd sides
        shapes["r"] = (shape[0], k, *((s - 1) // stride + 1 for s in shape[2:]))
    if bias:
        shapes["b"] = (k,)
    geometry = (stride, stride), (side // 2, side // 2), (1, 1), groups
    return OpCase(
        name,
        shapes,
        {"1": k},
        lambda ops, t, n: ops.conv_bn_act(
            t["x"], ConvParams(t["w"], t.get("b"), *geometry), n["1"], t.get("r"), **options
        ),
        training,
    )


def block_case(
    name: str,
    shape: Shape,
    weights: Sequence[Shape],
    training: bool,
    *,
    stride: int = 1,
    projection: bool = False,
    **options,
) -> OpCase:
    """residual_block on x of `shape`; its first 3×3 convolution strides (ResNet v1.5)."""
    last = weights[-1][0]
    shapes = {"x": shape} | {f"w{i}": w for i, w in enumerate(weights)}
    norms = {str(i): w[0] for i, w in enumerate(weights)}
    if projection:
        shapes["wd"] = (last, shape[1], 1, 1)
        norms["d"] = last

    def call(ops, t, n):
        convs: list[ConvParams] = []
        for i, w in enumerate(weights):
            pad = (w[2] // 2, w[3] // 2)
            s = stride if w[2] == 3 and stride not in [x.stride[0] for x in convs] else 1
            convs.append(ConvParams(t[f"w{i}"], None, (s, s), pad))
        shortcut = {}
        if projection:
            shortcut = {
                "shortcut_conv": ConvParams(t["wd"], None, (stride, stride)),
                "shortcut_norm": n["d"],
            }
        ordered = [n[str(i)] for i in range(len(weights))]
        return ops.residual_block(t["x"], convs, ordered, **shortcut, **options)

    return OpCase(name, shapes, norms, call, training)


def chain_case(
    name: str, shape: Shape, blocks: Sequence[Sequence[Shape]], training: bool, **options
) -> OpCase:
    """residual_blocks on x of `shape`; a block that changes the channels strides and projects."""
    shapes = {"x": shape}
    norms: dict[str, int] = {}
    c = shape[1]
    projections = []
    for b, weights in enumerate(blocks):
        shapes |= {f"w{b}_{i}": w for i, w in enumerate(weights)}
        norms |= {f"{b}_{i}": w[0] for i, w in enumerate(weights)}
        last = weights[-1][0]
        projections.append(last != c)
        if projections[-1]:
            shapes[f"w{b}_d"] = (last, c, 1, 1)
            norms[f"{b}_d"] = last
        c = last

    def call(ops, t, n):
        params = []
        for b, weights in enumerate(blocks):
            strided = next((i for i, w in enumerate(weights) if w[2] == 3), 0)
            convs = []
            for i, w in enumerate(weights):
                stride = 2 if projections[b] and i == strided else 1
                pad = (w[2] // 2, w[3] // 2)
                convs.append(ConvParams(t[f"w{b}_{i}"], None, (stride, stride), pad))
            block = BlockParams(convs, [n[f"{b}_{i}"] for i in range(len(weights))])
            if projections[b]:
                block = block._replace(
                    shortcut_conv=ConvParams(t[f"w{b}_d"], None, (2, 2)),
                    shortcut_norm=n[f"{b}_d"],
                )
            params.append(block)
        return ops.residual_blocks(t["x"], params, **options)

    return OpCase(name, shapes, norms, call, training)


def basic_weights(c: int, planes: int) -> list[Shape]:
    return [(planes, c, 3, 3), (planes, planes, 3, 3)]


def bottleneck_weights(c: int, planes: int, k: int) -> list[Shape]:
    return [(planes, c, 1, 1), (planes, planes, 3, 3), (k, planes, 1, 1)]


def op_cases(training: bool) -> list[OpCase]:
    """Every op in every form: residual orders, strides, groups, blocks of both kinds."""
    shape = (2, 64, 10, 9)
    c = shape[1]

    def bn(name: str, **options) -> OpCase:
        return bn_case(name, shape, training, **options)

    def conv(name: str, weight: Shape, **options) -> OpCase:
        return conv_case(name, shape, weight, training, **options)

    def block(name: str, weights: Sequence[Shape], **options) -> OpCase:
        return block_case(name, shape, weights, training, **options)

    basic, wide = basic_weights(c, c), bottleneck_weights(c, 64, 128)
    projection = {"stride": 2, "projection": True}
    return [
        bn("bn", relu=False),
        bn("bn_relu"),
        bn("bn_add_relu", residual=True),
        bn("bn_relu_add", residual=True, add_after_act=True),
        max_pool_case("bn_relu_max_pool", shape, training),
        stem_case("stem", (2, 3, 22, 20), (64, 3, 7, 7), training),
        conv("conv3x3_bn_relu", (64, c, 3, 3)),
        conv("conv3x3s2_bn_add_relu", (64, c, 3, 3), residual=True, stride=2),
        conv("conv1x1_bn_relu_add", (64, c, 1, 1), residual=True, add_after_act=True, bias=True),
        conv("conv3x3g4_bn", (64, c // 4, 3, 3), groups=4, relu=False),
        block("basic_block", basic),
        block("basic_block_projection", basic, **projection),
        block("bottleneck", bottleneck_weights(c, 64, c)),
        block("bottleneck_projection", wide, **projection),
        block("bottleneck_memory_efficient", wide, **projection, memory_efficient=True),
        chain_case(
            "bottlenecks",
            shape,
            [bottleneck_weights(i, 32, o) for i, o in ((c, c), (c, 128), (128, 128))],
            training,
        ),
    ]


# ---- the criterion


def _ratio(error: float, limit: float) -> float:
    """error / limit, where NaN and an error without allowance are infinitely bad."""
    if not math.isfinite(error):
        return math.inf
    return error / limit if limit else math.inf if error else 0.0


class Errors(NamedTuple):
    """One quantity's errors on one input: ours, and each stock path's (squares summed, largest)."""

    values: int
    ours: tuple[float, float]
    stock: tuple[tuple[float, float], ...]
    reference: tuple[float, float]
    unit_roundoff: float


class Verdict(NamedTuple):
    """One quantity's error beside the worst stock path's: RMSE, and the largest of any channel."""

    quantity: str
    error: float
    stock: float
    limit: float
    channel_error: float
    channel_limit: float

    @property
    def ok(self) -> bool:
        # written so that a NaN fails
        return self.error <= self.limit and self.channel_error <= self.channel_limit

    @property
    def ratio(self) -> float:
        """Error over the allowed error, the larger of the two; ≤ 1 passes."""
        pairs = ((self.error, self.limit), (self.channel_error, self.channel_limit))
        return max(_ratio(*pair) for pair in pairs)


def _size(t: Tensor) -> tuple[float, float]:
    return float(t.square().sum()), float(t.abs().max())


def _errors(fused: Tensor, ref: Tensor, stock: Sequence[tuple[Tensor, Tensor]]) -> Errors:
    return Errors(
        ref.numel(),
        _size(fused.double() - ref),
        tuple(_size(s.double() - r) for s, r in stock),
        _size(ref),
        torch.finfo(fused.dtype).eps / 2,
    )


def judge(quantity: str, errors: Sequence[Errors], dtype: torch.dtype) -> Verdict:
    """Apply the criterion for activations of ``dtype`` to one quantity, pooled over inputs."""
    values = sum(e.values for e in errors)

    def pooled(sizes: Sequence[tuple[float, float]]) -> tuple[float, float]:
        return math.sqrt(math.fsum(s for s, _ in sizes) / values), max(m for _, m in sizes)

    error, largest = pooled([e.ours for e in errors])
    paths = [pooled(path) for path in zip(*(e.stock for e in errors), strict=True)]
    stock, stock_largest = max(p for p, _ in paths), max(m for _, m in paths)
    scale, largest_value = pooled([e.reference for e in errors])
    half = dtype in HALF_DTYPES
    floor = FLOOR_ULPS * (2.0**-53 if dtype == torch.float64 else 2.0**-24)
    return Verdict(
        quantity,
        error,
        stock,
        max((HALF_FACTOR if half else SINGLE_FACTOR) * stock, floor * scale),
        largest,
        # storing the largest value already rounds by that much
        max(CHANNEL_FACTOR * stock_largest, max(floor, errors[0].unit_roundoff) * largest_value),
    )


# An implementation of a case: (branches its ReLUs and max-pools took, results) of
# (case, tensors, dy, layout).
Implementation = Callable[[OpCase, Tensors, Tensor, str], tuple[list[Tensor], Tensors]]


def _by_ops(ops: Any, *pool_indices: Callable) -> Implementation:
    """A case run by ``ops``."""

    def run(
        case: OpCase, tensors: Tensors, dy: Tensor, layout: str
    ) -> tuple[list[Tensor], Tensors]:
        recording = _Recording(ops, *pool_indices)
        case.run(recording, tensors, None, layout)
        return recording.branches, case.run(ops, tensors, dy, layout)

    return run


run_fused = _by_ops(fused_ops, _fused_pool_index, _fused_conv_pool_index)
_run_stock = _by_ops(stock_ops, _stock_pool_index, _stock_conv_pool_index)


def compare(
    case: OpCase,
    dtype: torch.dtype,
    layout: str,
    seed: int,
    device: str = "cpu",
    ours: Implementation = run_fused,
) -> dict[str, Errors]:
    """Run the fused op, stock's paths and the float64 reference on the same inputs.

    Gradients are compared with the reference along the branches each implementation's own ReLUs
    and max-pools took: where a value rounds across zero either branch is right, and a single
    such element would outweigh all rounding. The output itself is compared with the plain
    reference, so a wrong branch shows there.
    """
    tensors = case.inputs(seed, dtype, device)
    exact = {k: v.double() for k, v in tensors.items()}
    plain = case.run(_Reference(), exact, None, "nchw")
    shape = plain["y"].shape
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)).to(device, dtype)

    def run(implementation: Implementation, layout: str) -> tuple[Tensors, Tensors]:
        branches, results = implementation(case, tensors, dy, layout)
        branches = [b if b.dtype == torch.int64 else b.double() for b in branches]
        ref = case.run(_Reference(branches), exact, dy.double(), "nchw")
        return results, ref | plain

    got, ref = run(ours, layout)
    assert set(got) == set(ref), f"{sorted(got)} against {sorted(ref)}"
    stock = [run(_run_stock, stock_layout) for stock_layout in LAYOUTS]
    if not case.training:
        # without autograd an op takes its inference form
        with torch.no_grad():
            got["y_inference"] = case.run(fused_ops, tensors, None, layout)["y"]
        for results in (ref, *(side for pair in stock for side in pair)):
            results["y_inference"] = results["y"]
    return {k: _errors(got[k], ref[k], [(s[k], r[k]) for s, r in stock]) for k in ref}


def judge_seeds(
    case: OpCase,
    dtype: torch.dtype,
    seeds: int,
    device: str = "cpu",
    layouts: Sequence[str] = tuple(LAYOUTS),
    ours: Implementation = run_fused,
) -> list[Verdict]:
    """The worst verdict of each quantity over pools of ``seeds`` inputs, ``layouts`` by turns."""
    runs = [compare(case, dtype, layouts[i % len(layouts)], i, device, ours) for i in range(seeds)]
    verdicts = []
    for quantity, first in runs[0].items():
        least = HALF_POOL_INPUTS if dtype in HALF_DTYPES else POOL_INPUTS
        per_pool = min(seeds, max(least, -(-POOL_VALUES // first.values)))
        pools = [
            [r[quantity] for r in runs[i : i + per_pool]]
            for i in range(0, seeds - per_pool + 1, per_pool)
        ]
        worst = max(
            (judge(quantity, p, dtype) for p in pools), key=lambda v: _ratio(v.error, v.limit)
        )
        # a largest error is one over all inputs
        overall = judge(quantity, [r[quantity] for r in runs], dtype)
        verdicts.append(
            worst._replace(channel_error=overall.channel_error, channel_limit=overall.channel_limit)
        )
    return verdicts

"""No kernel touches memory outside its arguments, at sizes where every tile has a tail."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from guarded import OutOfBounds, check_bounds, guarded, naming

from resfast.backends.interface import (
    Affine,
    Below,
    ConvGeometry,
    NormGradient,
    mask_shape,
)
from resfast.kernels import (
    conv_dgrad,
    conv_fprop,
    conv_wgrad,
    launch,
    norm,
    norm_pool,
)
from resfast.kernels.launch import launch as run_kernel
from resfast.kernels.tiles import ConvTile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # CPU: Triton's interpreter, see conftest

interpreted = pytest.mark.skipif(
    not launch.INTERPRETED, reason="only the interpreter sees addresses"
)


# ---- the check itself, on a kernel that is wrong on demand


@triton.jit
def _double_kernel(
    x_ptr, y_ptr, M, C, READ: tl.constexpr, WRITE: tl.constexpr, USE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = 2·x, reading ``READ`` and writing ``WRITE`` rows past the end, or before the start."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_c = tl.arange(0, BLOCK_C)[None, :]
    m_read = (o_m >= 0) & (o_m < M + READ) & (o_c < C)
    b_x = tl.load(x_ptr + (o_m * C + o_c).to(tl.int64), mask=m_read, other=0.0).to(tl.float32)
    if USE:  # what was read too far gets into the result
        b_x += tl.sum(b_x) * 0
    else:
        b_x = tl.where(o_m < M, b_x, 0.0)
    shift = tl.where(WRITE < 0, WRITE * C, 0)
    m_write = (o_m < M + WRITE) & (o_c < C) if WRITE > 0 else (o_m < M) & (o_c < C)
    tl.store(y_ptr + o_m * C + o_c + shift, (2 * b_x).to(y_ptr.dtype.element_ty), mask=m_write)


def _double(x, y, read=0, write=0, use=True):
    m, c = x.shape
    run_kernel(
        _double_kernel, (triton.cdiv(m + 1, 8),), x, y, m, c, reads=[x], writes=[y],
        READ=read, WRITE=write, USE=use, BLOCK_M=8, BLOCK_C=triton.next_power_of_2(c),
    )  # fmt: skip
    return y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (8, 16), (0, 4), (17, 1)], ids=str)
def test_a_right_kernel_passes_and_its_result_comes_back(dtype, shape):
    x = torch.randn(shape, device=DEVICE).to(dtype)
    check_bounds(lambda: _double(x, torch.empty_like(x)))
    with guarded():
        y = _double(x, torch.empty_like(x))
    assert torch.equal(y, 2 * x)


@pytest.mark.parametrize("addresses", [False, pytest.param(True, marks=interpreted)])
@pytest.mark.parametrize(
    ("write", "where"), [(1, "6 bytes|0 bytes after its end"), (-1, "6 bytes before its start")]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_row_written_too_far_is_found(addresses, write, where, dtype):
    x = torch.ones(5, 3, device=DEVICE, dtype=dtype)
    y = torch.empty_like(x)
    with (
        guarded(addresses=addresses),
        pytest.raises(OutOfBounds, match=rf"_double_kernel wrote .*y_ptr \[5, 3\].*({where})"),
    ):
        _double(x, y, write=write)


def test_a_row_read_too_far_gives_nan():
    x, y = torch.ones(5, 3, device=DEVICE), torch.zeros(5, 3, device=DEVICE)
    with guarded(addresses=False):
        _double(x, y, read=1)
    assert y.isnan().any()
    with pytest.raises(AssertionError, match=r"NaN|_double_kernel read 3 elements"):
        check_bounds(lambda: _double(x, torch.empty_like(x), read=1))


@interpreted
def test_a_row_read_too_far_is_found_even_where_it_is_thrown_away():
    x, y = torch.ones(5, 3, device=DEVICE), torch.zeros(5, 3, device=DEVICE)
    with guarded(addresses=False):
        assert torch.equal(_double(x, y, read=1, use=False), 2 * x)
    with (
        guarded(),
        pytest.raises(OutOfBounds, match=r"_double_kernel read 3 elements.*x_ptr.* 0 bytes after"),
    ):
        _double(x, y, read=1, use=False)
    assert launch.run.__name__ == "run", "restored after a failure"


def test_a_view_is_guarded_from_the_rest_of_its_tensor():
    whole = torch.ones(3, 4, 5, device=DEVICE)
    x = whole[0]
    with guarded():
        _double(x, whole[1])
    assert torch.equal(whole[1], 2 * x)
    assert torch.equal(whole[2], x)
    out = torch.zeros_like(whole)
    with guarded(addresses=False), pytest.raises(OutOfBounds, match="y_ptr"):
        _double(x, out[1], write=1)


def test_the_gaps_of_a_strided_view_are_guarded():
    wide = torch.zeros(6, 8, device=DEVICE)
    view = wide[:, :3]  # the kernel takes it for dense, so its second row lies in the gap
    x = torch.ones(6, 3, device=DEVICE)
    with guarded(addresses=False), pytest.raises(OutOfBounds, match=r"y_ptr .*in its gaps"):
        _double(x, view)
    assert (wide == 0).all(), "nothing comes back from a launch that failed"


def test_arguments_of_one_storage_stay_one():
    x = torch.ones(5, 3, device=DEVICE)
    with guarded():
        _double(x, x)
    assert (x == 2).all()
    with guarded():
        _double(x[1:3], x[2:4])  # overlapping
    assert x[:, 0].tolist() == [2, 2, 4, 4, 2]


def test_an_expanded_argument_is_copied_once():
    rows = torch.ones(1, 3, device=DEVICE).expand(4, 3)
    with guarded(addresses=False):
        _double(rows, y := torch.zeros(4, 3, device=DEVICE), read=-3)
    assert (y[0] == 2).all()
    assert (y[1:] == 0).all()


def test_what_is_never_written_is_found():
    x = torch.ones(5, 3, device=DEVICE)
    with pytest.raises(AssertionError, match="NaN"):
        check_bounds(lambda: (_double(x[:4], torch.empty_like(x)),))
    # uninitialised memory is as it was afterwards
    assert not torch.are_deterministic_algorithms_enabled()


# ---- norm


def _nhwc(shape, dtype=torch.float32):
    # made of [N, H, W, C], as a permuted [N, C, H, W] would lose its strides where a size is 1
    n, c, h, w = shape
    return torch.randn(n, h, w, c, device=DEVICE).to(dtype).permute(0, 3, 1, 2)


def _vectors(c, count):
    """Rows of one tensor, as launchers themselves allocate them."""
    return torch.rand(count, c, device=DEVICE).unbind()


def _affine(c):
    return Affine(*_vectors(c, 3))


SMALL = norm.NormTile(16, 16, 1)
NORMS = [
    ((2, 24, 3, 5), SMALL, torch.bfloat16),  # tails of pixels and of channels
    ((1, 17, 4, 4), SMALL, torch.float32),  # one channel more than a tile
    ((1, 1, 1, 1), SMALL, torch.float32),
    ((2, 65, 3, 5), None, torch.float16),
    ((1, 3, 5, 7), None, torch.bfloat16),
    ((0, 8, 3, 3), None, torch.bfloat16),
]


def _norm_calls(shape, dtype, tile):
    """Every option of every launcher of norm.py that takes a tile."""
    _, c, _, _ = shape
    z, r, dy, dy2, y, z2 = (_nhwc(shape, dtype) for _ in range(6))
    affine, r_affine = _affine(c), _affine(c)
    coef_z, coef_1, mean2, scale2, coef_z2, coef_12 = _vectors(c, 6)
    batch = {"coef_z": coef_z, "coef_1": coef_1}

    def new():
        return torch.empty_like(z)

    def new_mask():
        return torch.empty(mask_shape(shape), dtype=torch.uint8, device=DEVICE)

    def apply(*args, out=None, mask=None, **options):
        return norm.norm_apply(
            z, affine, *args, out=out, mask=mask, tile=tile, **options
        ), mask  # fmt: skip

    def reduce(relu=True, **options):
        sums = norm.norm_backward_reduce(dy, z, affine, relu=relu, tile=tile, **options)
        return sums, options.get("du"), options.get("activation")

    def gradient(relu=True, second=(), **options):
        dz = new()
        norm.norm_backward_apply(
            dy, z, affine, relu=relu, dz=dz, second=second or None, tile=tile, **options
        )
        return dz, options.get("du"), *second[5:]

    def in_place(call):
        """Writes onto one of the tensors read."""
        return lambda: call(z.clone(memory_format=torch.preserve_format))

    calls = {
        "stats": lambda: norm.norm_stats(z, tile),
        "apply": lambda: apply(),
        "apply without relu": lambda: apply(relu=False),
        "apply, residual": lambda: apply(r),
        "apply, residual after": lambda: apply(r, add_after_act=True),
        "apply, residual's affine": lambda: apply(r, r_affine),
        "apply in place": in_place(lambda own: norm.norm_apply(own, affine, r, out=own, tile=tile)),
        "reduce": lambda: reduce(),
        "reduce without relu": lambda: reduce(relu=False),
        "reduce by y": lambda: reduce(y=y),
        "reduce, activation": lambda: reduce(activation=new()),
        "reduce at a join": lambda: reduce(y=y, dy2=dy2, du=new(), z2=z2, mean2=mean2),
        "dz": lambda: gradient(**batch),
        "dz, running": lambda: gradient(),
        "dz by y, du": lambda: gradient(y=y, du=new(), **batch),
        "dz of two": lambda: gradient(
            relu=False, second=(z2, mean2, scale2, coef_z2, coef_12, new()), **batch
        ),
        "dz of two, running": lambda: gradient(
            relu=False, second=(z2, mean2, scale2, None, None, new())
        ),
    }
    if c % 8 == 0:
        mask = torch.randint(256, mask_shape(shape), dtype=torch.uint8, device=DEVICE)
        calls |= {
            "apply, mask": lambda: apply(r, mask=new_mask()),
            "reduce by mask": lambda: reduce(mask=mask, du=new()),
        }
    return calls


@pytest.mark.parametrize(("shape", "tile", "dtype"), NORMS, ids=str)
def test_norms_stay_in_bounds(shape, tile, dtype):
    for name, call in _norm_calls(shape, dtype, tile).items():
        with naming(name):
            check_bounds(call)


@pytest.mark.parametrize(("tiles", "c"), [(1, 3), (33, 9), (600, 1)])
def test_merges_stay_in_bounds(tiles, c):
    mean, m2, rest = _vectors(tiles * c, 3)
    stats = norm.TileStats(mean.view(tiles, c), m2.view(tiles, c), 5, 5 * tiles - 3)
    exact = stats._replace(rest=rest.view(tiles, c))
    sums = torch.randn(3, tiles, c, device=DEVICE)
    check_bounds(lambda: (norm.merge_stats(stats), norm.merge_stats(exact)))
    check_bounds(lambda: norm.merge_sums(norm.TileSums(sums)))


@pytest.mark.parametrize("c", [1, 129])
def test_vectors_stay_in_bounds(c):
    v = _vectors(c, 4)
    check_bounds(lambda: norm.norm_prepare(*v, 1e-5))
    check_bounds(lambda: norm.norm_prepare(v[0], v[1], None, None, 1e-5))
    check_bounds(lambda: norm.norm_coefficients(*v, 7))


@pytest.mark.parametrize("shape", [(1, 3, 1, 2), (3, 24, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_persistent_norms_stay_in_bounds(shape, dtype):
    _, c, _, _ = shape
    z, r, dy, dy2, y = (_nhwc(shape, dtype) for _ in range(5))
    affine, (weight, bias, rstd) = _affine(c), _vectors(c, 3)
    packed = mask_shape(shape)
    new_mask = partial(torch.empty, packed, dtype=torch.uint8, device=DEVICE)
    new = partial(torch.empty_like, z)

    def forward(weight=weight, bias=bias, residual=None, mask=None, **options):
        return norm.norm_forward_persistent(
            z, weight, bias, 1e-5, residual, mask=mask, **options
        ), mask  # fmt: skip

    def backward(**options):
        results = norm.norm_backward_persistent(dy, z, affine, rstd, **options)
        return results, options.get("du"), options.get("activation")

    check_bounds(lambda: forward())
    check_bounds(lambda: forward(None, None, r, add_after_act=True))
    check_bounds(lambda: backward(activation=new()))
    check_bounds(lambda: backward(y=y, dy2=dy2, du=new()))
    if c % 8 == 0:
        mask = torch.randint(256, packed, dtype=torch.uint8, device=DEVICE)
        check_bounds(lambda: forward(residual=r, mask=new_mask()))
        check_bounds(lambda: backward(mask=mask, dy2=dy2, du=new()))


@pytest.mark.parametrize(
    ("shape", "window", "tile", "dtype"),
    [
        ((1, 24, 5, 5), (3, 2, 1), SMALL, torch.bfloat16),
        ((2, 3, 7, 4), (2, 2, 0), SMALL, torch.float32),
        ((1, 8, 6, 5), (3, 1, 1), None, torch.float16),
    ],
    ids=str,
)
def test_max_pools_stay_in_bounds(shape, window, tile, dtype):
    _, c, _, _ = shape
    z, affine, coefs = _nhwc(shape, dtype), _affine(c), _vectors(c, 2)
    y, index = norm_pool.norm_apply_max_pool(z, affine, *window)
    dy = _nhwc(y.shape, dtype)
    args = dy, z, affine, index, *window
    check_bounds(lambda: norm_pool.norm_apply_max_pool(z, affine, *window, tile))
    check_bounds(lambda: norm_pool.norm_max_pool_backward_reduce(*args, tile))
    for each in (coefs, (None, None)):
        check_bounds(lambda c=each: norm_pool.norm_max_pool_backward_apply(*args, *c, tile))


# ---- convolutions

BLOCK = ConvTile(16, 16, 16, 4, 2)


class Conv(NamedTuple):
    """An input ``[N, C, H, W]`` and what convolves it."""

    shape: tuple[int, int, int, int]
    k: int
    window: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def geometry(self):
        return ConvGeometry(self.stride, self.padding, self.dilation, 1)

    @property
    def weight(self):
        return self.k, self.shape[1], *self.window

    @property
    def output(self):
        size = conv_fprop.conv_output_size(self.shape[2:], self.geometry, self.window)
        return self.shape[0], self.k, *size


CONVS = {
    "1x1": Conv((1, 24, 3, 7), 17, (1, 1)),
    "1x1 one tile": Conv((1, 16, 4, 4), 16, (1, 1)),
    "1x1 stride 2": Conv((2, 8, 5, 3), 24, (1, 1), stride=(2, 2)),
    "3x3": Conv((2, 8, 3, 4), 17, (3, 3), padding=(1, 1)),
    "3x3 stride 2": Conv((1, 17, 5, 6), 8, (3, 3), stride=(2, 2), padding=(1, 1)),
    "3x2 dilation 2": Conv((1, 3, 6, 7), 8, (3, 2), padding=(2, 0), dilation=(2, 2)),
    "one value": Conv((1, 1, 1, 1), 1, (1, 1)),
    "7x7 stride 2": Conv((1, 3, 8, 9), 8, (7, 7), stride=(2, 2), padding=(3, 3)),
    "empty": Conv((0, 8, 4, 4), 8, (3, 3), padding=(1, 1)),
}
CONV_RUNS = [
    *((name, BLOCK, torch.bfloat16) for name in CONVS),
    ("3x3 stride 2", BLOCK, torch.float32),
    ("3x3", None, torch.float16),
    ("1x1", None, torch.float32),
]
CONV_IDS = [f"{name}-{'default' if t is None else 'small'}-{d}" for name, t, d in CONV_RUNS]


def _norm_gradient(dz, running=False):
    mean, scale, coef_z, coef_1 = _vectors(dz.shape[1], 4)
    coefs = (None, None) if running else (coef_z, coef_1)
    return NormGradient(dz, _nhwc(dz.shape, dz.dtype), mean, scale, *coefs)


@pytest.mark.parametrize(("name", "tile", "dtype"), CONV_RUNS, ids=CONV_IDS)
def test_conv_fprop_stays_in_bounds(name, tile, dtype):
    conv = CONVS[name]
    x, w, r = (_nhwc(s, dtype) for s in (conv.shape, conv.weight, conv.output))
    above, below = _affine(conv.k), _affine(conv.shape[1])
    (bias,) = _vectors(conv.k, 1)
    run = partial(conv_fprop.conv_fprop, x, w, g=conv.geometry, tile=tile)
    check_bounds(lambda: run(bias))
    check_bounds(lambda: run(None, prologue=below, stats=True))
    check_bounds(lambda: run(bias, norm=above, residual=r, relu=True))
    check_bounds(lambda: run(None, norm=above, residual=r))


@pytest.mark.parametrize(("name", "tile", "dtype"), CONV_RUNS, ids=CONV_IDS)
def test_conv_dgrad_stays_in_bounds(name, tile, dtype):
    conv = CONVS[name]
    n, c, h, w = conv.shape
    dz, weight, z, z2, r = (_nhwc(s, dtype) for s in (conv.output, conv.weight, *[conv.shape] * 3))
    compact = _nhwc((n, c, -(-h // 2), -(-w // 2)), dtype)
    below, (mean2,) = Below(z, _affine(c), None), _vectors(c, 1)
    run = partial(conv_dgrad.conv_dgrad, weight=weight, shape=conv.shape, g=conv.geometry)
    run = partial(run, tile=tile)
    check_bounds(lambda: run(dz))
    gradient, running = _norm_gradient(dz), _norm_gradient(dz, running=True)
    check_bounds(lambda: run(running, residual=r))
    joined = below._replace(z2=z2, mean2=mean2)
    check_bounds(lambda: run(gradient, below=below, residual=compact, residual_stride=(2, 2)))
    if c % 8 == 0:
        mask = torch.randint(256, mask_shape(conv.shape), dtype=torch.uint8, device=DEVICE)
        joined = joined._replace(mask=mask)
    check_bounds(lambda: run(dz, below=joined, residual=r))


@pytest.mark.parametrize(("name", "tile", "dtype"), CONV_RUNS, ids=CONV_IDS)
@pytest.mark.parametrize("splits", [1, 2])
def test_conv_wgrad_stays_in_bounds(name, tile, dtype, splits):
    conv = CONVS[name]
    dz, x, below = _nhwc(conv.output, dtype), _nhwc(conv.shape, dtype), _affine(conv.shape[1])
    run = partial(conv_wgrad.conv_wgrad, x=x, weight_shape=conv.weight, g=conv.geometry)
    run = partial(run, tile=tile, splits=splits)
    gradient, running = _norm_gradient(dz), _norm_gradient(dz, running=True)
    if splits == 1:
        check_bounds(lambda: run(dz))
        check_bounds(lambda: run(dz, prologue=below))
        check_bounds(lambda: run(running))
    check_bounds(lambda: run(gradient, prologue=below))

"""The convolutions for Hopper: their epilogues' arithmetic, bad input, and when they are chosen.

On a Hopper GPU, with a library built from CUTLASS, the kernels run. Elsewhere the ops are replaced
by what they must compute, so that everything around them is tested, and their epilogues' arithmetic
runs on the CPU from the kernels' own source. Arguments are checked before their device is, so that
CPU tensors get every check's answer.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from types import SimpleNamespace

import needs
import pretended
import pytest
import torch
from cuda_on_cpu.emulator import compile_program, missing_compiler
from torch import Tensor, nn
from torch.nn.functional import conv2d

import resfast
from resfast import native
from resfast.backends import cutlass, select, tuning
from resfast.backends.cuda import CudaBackend
from resfast.backends.eager import EagerBackend
from resfast.backends.engines import plan_convolution
from resfast.backends.interface import Affine, Backend, ConvGeometry, NormVectors, nhwc
from resfast.nn import ConvBNAct

ops = torch.ops.resfast
DTYPES = (torch.bfloat16, torch.float16)
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def on_hopper() -> bool:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return False
    return native.cutlass_missing() is None


DEVICE = "cuda" if on_hopper() else "cpu"


def geometry(stride=1, padding=0, dilation=1, groups=1) -> ConvGeometry:
    return ConvGeometry((stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)


def randn(*shape: int, dtype=torch.bfloat16, device=DEVICE) -> Tensor:
    t = torch.randn(shape, dtype=torch.float64).to(dtype).to(device)
    return nhwc(t) if len(shape) == 4 else t


def channels(t: Tensor) -> Tensor:
    return t.double().view(1, -1, 1, 1)


# ---- the arithmetic of the epilogues, from the kernels' source


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    missing = missing_compiler()
    if missing:
        pytest.skip(missing)
    return compile_program(tmp_path_factory.mktemp("cuda_on_cpu"), "conv_program")


def run(program, header: tuple[int, ...], *values: Tensor) -> Tensor:
    message = struct.pack("6q", *header) + b"".join(v.numpy().tobytes() for v in values)
    done = subprocess.run([program], input=message, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[:3000]
    return torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)


@pytest.mark.parametrize("add_after_act", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_norm_residual_and_relu_of_the_epilogue(program, has_residual, relu, add_after_act):
    z, mean, scale, beta, residual = (torch.randn(1000) for _ in range(5))
    z[0] = float("nan")
    y = run(
        program, (0, 1000, 0, has_residual, relu, add_after_act), z, mean, scale, beta, residual
    )
    u = (z.double() - mean.double()) * scale.double() + beta.double()
    if relu and (add_after_act or not has_residual):
        u = u.relu()
    if has_residual:
        u = u + residual.double()
        if relu and not add_after_act:
            u = u.relu()
    terms = (z - mean).abs() * scale.abs() + beta.abs() + residual.abs()
    assert y[0].isnan()
    assert ((y - u).abs()[1:] <= 4 * 2.0**-24 * terms[1:]).all()


def stats(program, z: Tensor) -> tuple[Tensor, Tensor]:
    m, k = z.shape
    return run(program, (1, m, k, 0, 0, 0), z).chunk(2)


@pytest.mark.parametrize(("m", "k"), [(1, 8), (15, 8), (16, 40), (65, 32), (130, 72), (1000, 8)])
def test_statistics_of_the_epilogue(program, m, k):
    """Tails of tiles, pieces and columns; the mean up to 100 standard deviations off zero."""
    mean = torch.linspace(-100, 100, k)
    z = (torch.randn(m, k) + mean).to(torch.float16).float()
    found_mean, found_m2 = stats(program, z)
    exact = z.double()
    m2 = (exact - exact.mean(0)).square().sum(0)
    torch.testing.assert_close(found_mean.double(), exact.mean(0), rtol=2.0**-23, atol=1e-7)
    torch.testing.assert_close(found_m2.double(), m2, rtol=1e-5, atol=1e-9)


def test_statistics_of_a_mean_that_hides_the_spread(program):
    """bfloat16 values of which neighbours differ by 1 part in 128, where Σz² loses the variance."""
    z = 1000.0 + 4.0 * torch.randint(0, 2, (4096, 8)).float()
    z = z.to(torch.bfloat16).float()
    exact = z.double()
    m2 = (exact - exact.mean(0)).square().sum(0)
    naive = (z * z).sum(0) - z.sum(0) ** 2 / len(z)
    assert ((naive - m2) / m2).abs().max() > 1e-4  # so that the test can tell
    assert ((stats(program, z)[1] - m2) / m2).abs().max() < 1e-5


@pytest.mark.parametrize("m", [13, 77, 200])
def test_a_constant_channel_has_no_variance(program, m):
    values = torch.tensor([0.0, 1.0, -3.140625, 1e8, 6.1e-5, 1e-3, 65504.0, -7.0])
    z = values.to(torch.bfloat16).float().repeat(m, 1)
    mean, m2 = stats(program, z)
    assert torch.equal(mean, z[0])
    assert (m2 == 0).all()


# ---- bad input

GOOD_SHAPE = (2, 16, 5, 6)


def good_arguments(op: str) -> dict[str, object]:
    n, c, h, w = GOOD_SHAPE
    arguments: dict[str, object] = {
        "x": randn(n, c, h, w, device="cpu"),
        "weight": randn(8, c, 3, 3, device="cpu"),
        "stride_h": 1,
        "stride_w": 1,
        "padding_h": 1,
        "padding_w": 1,
        "dilation_h": 1,
        "dilation_w": 1,
        "tile_m": 128,
        "tile_n": 64,
    }
    y = randn(n, 8, h, w, device="cpu")
    vectors = [torch.randn(8) for _ in range(3)]
    if op == "cuda_conv_affine":
        arguments |= dict(zip(("mean", "scale", "beta"), vectors, strict=True))
        arguments |= {"residual": y.clone(), "relu": True, "add_after_act": False, "out": y}
    else:
        arguments |= {"z": y, "mean": vectors[0], "m2": vectors[1]}
    return arguments


def assert_rejected(op: str, changes: dict[str, object], match: str) -> None:
    arguments = good_arguments(op) | changes
    schema = getattr(ops, op).default._schema.arguments
    written = [a.name for a in schema if a.alias_info is not None]
    before = {name: arguments[name].clone() for name in written}
    with pytest.raises(RuntimeError, match=match):
        getattr(ops, op)(**arguments)
    for name, t in before.items():
        assert torch.equal(arguments[name], t), f"{name} was written"


def shifted(t: Tensor) -> Tensor:
    """At an address that TMA cannot start from."""
    memory = torch.zeros(t.numel() + 1, dtype=t.dtype)
    return memory[1:].as_strided(t.shape, t.stride(), 1).copy_(t)


@needs.cuda_library
@pytest.mark.parametrize("op", native.CUTLASS_RAW_OPS)
def test_good_arguments_are_only_on_the_wrong_device(op):
    assert_rejected(op, {}, "x must be a CUDA tensor")
    for m, n in cutlass.TILES:
        assert_rejected(op, {"tile_m": m, "tile_n": n}, "x must be a CUDA tensor")


@needs.cuda_library
@pytest.mark.parametrize("op", native.CUTLASS_RAW_OPS)
@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("x", randn(*GOOD_SHAPE, device="cpu")[0], "x must be 4-D"),
        ("x", randn(*GOOD_SHAPE, device="cpu").float(), "x must be bfloat16 or float16, got Float"),
        ("x", randn(*GOOD_SHAPE, device="cpu").contiguous(), "x must be dense channels_last"),
        ("x", shifted(randn(*GOOD_SHAPE, device="cpu")), "x must start at a multiple of 16 bytes"),
        ("x", randn(2, 8, 5, 6, device="cpu"), "weight must have the 8 input channels of x"),
        ("x", randn(2, 24, 5, 6, device="cpu"), "weight must have the 24 input channels of x"),
        ("weight", randn(8, 16, device="cpu"), "weight must be 4-D"),
        (
            "weight",
            randn(8, 16, 3, 3, dtype=torch.float16, device="cpu"),
            "weight must have the dty",
        ),
        ("weight", randn(8, 16, 3, 3, device="cpu").contiguous(), "weight must be dense"),
        ("weight", shifted(randn(8, 16, 3, 3, device="cpu")), "weight must start at"),
        ("weight", randn(8, 16, 9, 3, device="cpu"), "must fit into the padded x"),
        ("weight", randn(16, 16, 3, 3, device="cpu"), r"(out|z) must have shape \[2, 16, 5, 6\]"),
        ("stride_h", 0, "stride must be positive, got 0 and 1"),
        ("stride_w", -1, "stride must be positive, got 1 and -1"),
        ("padding_w", -1, "padding must not be negative"),
        ("dilation_h", 0, "dilation must be positive"),
        ("stride_h", 2, r"(out|z) must have shape \[2, 8, 3, 6\]"),
        ("tile_n", 96, "there is no tile of 128 by 96"),
    ],
)
def test_bad_operand_is_rejected_before_any_write(op, name, value, match):
    assert_rejected(op, {name: value}, match)


Y = randn(2, 8, 5, 6, device="cpu")


@needs.cuda_library
@pytest.mark.parametrize(
    ("op", "changes", "match"),
    [
        ("affine", {"out": Y.half()}, "out must have the dtype of x"),
        ("affine", {"out": Y.contiguous()}, "out must be dense channels_last"),
        ("affine", {"out": shifted(Y)}, "out must start at"),
        ("affine", {"residual": Y[:1]}, "residual must have the shape of out"),
        ("affine", {"residual": Y.half()}, "residual must have the dtype of out"),
        ("affine", {"residual": shifted(Y)}, "residual must start at"),
        ("affine", {"residual": None}, "x must be a CUDA tensor"),
        ("affine", {"mean": torch.zeros(16)}, r"mean must have shape \[8\]"),
        ("affine", {"scale": torch.zeros(8).half()}, "scale must be Float"),
        ("affine", {"beta": torch.zeros(16)[::2]}, "beta must be contiguous"),
        ("affine", {"out": Y, "residual": Y}, "x must be a CUDA tensor"),  # in place
        ("stats", {"z": Y.half()}, "z must have the dtype of x"),
        ("stats", {"z": Y.contiguous()}, "z must be dense channels_last"),
        ("stats", {"mean": torch.zeros(8).double()}, "mean must be Float"),
        ("stats", {"m2": torch.zeros(7)}, r"m2 must have shape \[8\]"),
    ],
)
def test_bad_result_is_rejected_before_any_write(op, changes, match):
    assert_rejected(f"cuda_conv_{op}", changes, match)


@needs.cuda_library
def test_overlapping_memory_is_rejected():
    x = randn(*GOOD_SHAPE, device="cpu")
    square = {"x": x, "weight": randn(16, 16, 3, 3, device="cpu")}
    vectors = {name: torch.zeros(16) for name in ("mean", "scale", "beta")}
    changes = square | vectors | {"residual": None, "out": x}
    assert_rejected("cuda_conv_affine", changes, "out overlaps the memory of x")
    m2 = torch.zeros(8)
    assert_rejected("cuda_conv_stats", {"mean": m2, "m2": m2}, "mean overlaps the memory of m2")


# (x, weight, geometry), none of a size that costs memory
SIZES = [
    ((2, 8, 5, 6), (8, 8, 1, 1), geometry()),
    ((2, 64, 9, 9), (72, 64, 3, 3), geometry(padding=1)),
    ((1, 8, 9, 9), (8, 8, 1, 1), geometry(stride=2)),
    ((1, 8, 224, 3), (8, 8, 7, 7), geometry(stride=2, padding=3)),
    ((1, 12, 5, 5), (8, 12, 3, 3), geometry()),
    ((1, 8, 5, 5), (12, 8, 3, 3), geometry()),
    ((1, 8, 9, 9), (8, 8, 3, 3), geometry(stride=8)),
    ((1, 8, 9, 9), (8, 8, 3, 3), geometry(stride=9)),
    ((1, 8, 5, 5), (8, 8, 1, 1), geometry(padding=127)),
    ((1, 8, 5, 5), (8, 8, 1, 1), geometry(padding=128)),
    ((1, 8, 300, 300), (8, 8, 2, 2), geometry(dilation=254, padding=126)),
    ((1, 8, 300, 300), (8, 8, 2, 2), geometry(dilation=255, padding=127)),
    ((1, 8, 300, 300), (8, 8, 2, 2), geometry(dilation=128)),
    ((1, 8, 300, 300), (8, 8, 2, 2), geometry(dilation=129)),
]


@needs.cuda_library
@pytest.mark.parametrize(("shape", "filters", "g"), SIZES)
def test_sizes_are_declined_where_the_op_rejects_them(shape, filters, g):
    """And CUTLASS itself, asked by the op if it is built in, takes what is not."""
    x, weight = (nhwc(torch.zeros(s, dtype=torch.bfloat16)) for s in (shape, filters))
    reason = cutlass.size_declines(x, weight, g)
    for tile in cutlass.TILES:
        with pytest.raises(RuntimeError, match=reason or "x must be a CUDA tensor"):
            cutlass.conv_stats(x, weight, g, tile=tile)


def test_declined_sizes_are_of_every_kind():
    reasons = {
        cutlass.size_declines(torch.empty(s, dtype=torch.bfloat16), weight.bfloat16(), g)
        for s, f, g in SIZES
        for weight in [torch.empty(f)]
    }
    assert len(reasons) == 6  # five and None


@pytest.mark.parametrize(
    ("x", "weight", "g", "reason"),
    [
        (randn(1, 8, 2, 2).float(), randn(8, 8, 1, 1), geometry(), "no kernel for torch.float32"),
        (randn(1, 8, 2, 2), randn(8, 8, 1, 1).half(), geometry(), "weight torch.float16"),
        (randn(1, 8, 2, 2), randn(8, 1, 1, 1), geometry(groups=8), "8 groups"),
        (randn(0, 8, 2, 2), randn(8, 8, 1, 1), geometry(), "an empty batch"),
        (
            torch.empty(2**15, 8, 256, 256, dtype=torch.float16, device="meta"),
            torch.empty(8, 8, 1, 1, dtype=torch.float16, device="meta"),
            geometry(),
            "pixels are counted in 32 bits",
        ),
    ],
)
def test_other_reasons_to_decline(x, weight, g, reason):
    assert reason in cutlass.size_declines(x, weight, g)


def test_the_machine_is_asked_before_the_size(monkeypatch):
    x, weight = randn(1, 7, 2, 2, device="cpu"), randn(8, 7, 1, 1, device="cpu")
    monkeypatch.setattr(native, "cutlass_missing", lambda: "RESFAST_BUILD_CUTLASS is not set")
    assert cutlass.cutlass_declines(x, weight, geometry()) == "RESFAST_BUILD_CUTLASS is not set"
    monkeypatch.setattr(native, "cutlass_missing", lambda: None)
    assert "the tensor is on cpu" in cutlass.cutlass_declines(x, weight, geometry())
    like = SimpleNamespace(device=torch.device("cuda", 0), dtype=x.dtype, shape=x.shape)
    like.numel = x.numel
    monkeypatch.setattr(cutlass, "_capability", lambda index: (8, 0))
    assert "compute capability 9.0" in cutlass.cutlass_declines(like, weight, geometry())
    monkeypatch.setattr(cutlass, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(native, "cuda_unusable", lambda index: "no kernel image")
    assert cutlass.cutlass_declines(like, weight, geometry()) == "no kernel image"
    monkeypatch.setattr(native, "cuda_unusable", lambda index: None)
    assert "multiples of 8" in cutlass.cutlass_declines(like, weight, geometry())
    with resfast.fusion("b", "library"):
        assert "were asked for" in cutlass.cutlass_declines(like, weight, geometry())


# ---- results


class Replacement:
    """The ops' meaning in float64, for where no kernel can run."""

    def __getattr__(self, op: str):
        schema = getattr(ops, op).default._schema.arguments

        def call(*values):
            assert len(values) == len(schema)
            getattr(self, f"_{op}")(**{a.name: v for a, v in zip(schema, values, strict=True)})

        return call

    def _convolve(self, a: dict) -> Tensor:
        pairs = ([a[f"{what}_h"], a[f"{what}_w"]] for what in ("stride", "padding", "dilation"))
        assert cutlass.Tile(a["tile_m"], a["tile_n"]) in cutlass.TILES
        return conv2d(a["x"].double(), a["weight"].double(), None, *pairs)

    def _cuda_conv_affine(self, **a) -> None:
        z, mean, scale, beta = (
            self._convolve(a),
            *(channels(a[v]) for v in ("mean", "scale", "beta")),
        )
        u = (z - mean) * scale + beta
        joined = a["residual"] is not None
        if a["relu"] and (a["add_after_act"] or not joined):
            u = u.relu()
        if joined:
            u = u + a["residual"].double()
            if a["relu"] and not a["add_after_act"]:
                u = u.relu()
        a["out"].copy_(u)

    def _cuda_conv_stats(self, **a) -> None:
        z = a["z"].copy_(self._convolve(a)).double()
        a["mean"].copy_(z.mean((0, 2, 3)))
        a["m2"].copy_((z - channels(a["mean"])).square().sum((0, 2, 3)))


@pytest.fixture
def kernels(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(cutlass, "_native", Replacement())


# pointwise with tails of pixels and channels; a 3×3; strided; the stem's; dilated
CONVOLUTIONS = [
    ((3, 72, 7, 9), (136, 72, 1, 1), geometry()),
    ((2, 64, 11, 13), (64, 64, 3, 3), geometry(padding=1)),
    ((2, 64, 12, 13), (200, 64, 3, 3), geometry(stride=2, padding=1)),
    ((2, 128, 14, 14), (256, 128, 1, 1), geometry(stride=2)),
    ((1, 8, 33, 31), (64, 8, 7, 7), geometry(stride=2, padding=3)),
    ((1, 64, 17, 19), (64, 64, 3, 3), geometry(padding=2, dilation=2)),
]


@pytest.mark.cuda
@needs.native_library
@pytest.mark.parametrize("tile", cutlass.TILES if DEVICE == "cuda" else cutlass.TILES[:1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "filters", "g"), CONVOLUTIONS)
def test_convolution_with_its_norm(kernels, shape, filters, g, dtype, tile):
    x, weight = randn(*shape, dtype=dtype), randn(*filters, dtype=dtype)
    k = filters[0]
    bias = randn(k, dtype=dtype)
    norm = Affine(*(torch.randn(k, device=DEVICE) for _ in range(3)))
    z = conv2d(x.double(), weight.double(), bias.double(), *g[:3])
    mean, scale, beta = map(channels, norm)
    u = (z - mean) * scale + beta
    # of a sum of products in float32
    size = conv2d(x.double().abs(), weight.double().abs(), None, *g[:3]) * scale.abs() + u.abs()
    for relu, residual, after in [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (0, 1, 0)]:
        r = randn(*u.shape, dtype=dtype) if residual else None
        y = cutlass.conv_affine(
            *(x, weight, bias, g),
            norm=norm,
            residual=r,
            relu=bool(relu),
            add_after_act=bool(after),
            tile=tile,
        )
        expected = u.relu() if relu and (after or not residual) else u
        if r is not None:
            expected = expected + r.double()
            expected = expected.relu() if relu and not after else expected
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        allowed = ROUNDOFF[dtype] * expected.abs() + 2.0**-18 * size
        assert ((y.double() - expected).abs() <= allowed).all()


@pytest.mark.cuda
@needs.native_library
@pytest.mark.parametrize("tile", cutlass.TILES if DEVICE == "cuda" else cutlass.TILES[:1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "filters", "g"), CONVOLUTIONS)
def test_convolution_with_its_statistics(kernels, shape, filters, g, dtype, tile):
    x, weight = randn(*shape, dtype=dtype), randn(*filters, dtype=dtype)
    z, (mean, m2) = cutlass.conv_stats(x, weight, g, tile=tile)
    expected = conv2d(x.double(), weight.double(), None, *g[:3])
    size = conv2d(x.double().abs(), weight.double().abs(), None, *g[:3])
    assert (z - expected).abs().le(ROUNDOFF[dtype] * expected.abs() + 2.0**-18 * size).all()
    stored = z.double()  # what is normalised is z as stored
    exact = (stored - stored.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3))
    torch.testing.assert_close(mean.double(), stored.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m2.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_view_between_16_bytes_is_copied():
    t = shifted(randn(1, 8, 3, 3, device="cpu"))
    assert t.data_ptr() % 16
    copied = cutlass._aligned(t)
    assert copied.data_ptr() % 16 == 0
    assert torch.equal(copied, t)
    assert cutlass._aligned(copied) is copied


# ---- when they are chosen


def choosing(tile: cutlass.Tile, seen: list):
    def choose(key, candidates, run, device):
        seen.append((key, list(candidates)))
        for candidate in candidates:
            run(candidate)
        return tile

    return choose


class Own(pretended.Triton):
    """Triton's backend, a kernel of its own for 1×1 convolutions, with PyTorch's own norms."""

    norm_prepare = Backend.norm_prepare
    norm_stats = EagerBackend.norm_stats
    norm_apply = EagerBackend.norm_apply

    def reads_once(self, z):
        return False

    def conv_fprop_affine(self, x, weight, bias, g, norm, residual, relu, add_after_act):
        z = Backend.conv_fprop(self, x, weight, bias, g)
        affine = norm.affine(z.dtype)
        return EagerBackend().norm_apply(z, affine, residual, None, relu, add_after_act)

    def conv_fprop_fused(self, x, weight, bias, g, prologue, statistics, exact=False):
        z = Backend.conv_fprop(self, x, weight, bias, g)
        return z, EagerBackend().norm_stats(z) if statistics else None


class Cuda(CudaBackend):
    """The CUDA backend with PyTorch's own norms."""

    norm_prepare = Backend.norm_prepare
    norm_apply = EagerBackend.norm_apply

    def unavailable_reason(self):
        return None

    def declines(self, function, z):
        return None


@pytest.fixture
def built(monkeypatch, tmp_path):
    """A build with CUTLASS, on a CPU that stands in for a Hopper; yields who runs, in order."""
    pretended.device(monkeypatch, tmp_path, Own())
    monkeypatch.setattr(cutlass, "cutlass_declines", lambda *arguments: None)
    monkeypatch.setattr(native, "cutlass_missing", lambda: None)
    ran = []

    class Kernels(Replacement):
        def _cuda_conv_affine(self, **a):
            ran.append((a["tile_m"], a["tile_n"]))
            super()._cuda_conv_affine(**a)

        def _cuda_conv_stats(self, **a):
            ran.append((a["tile_m"], a["tile_n"]))
            super()._cuda_conv_stats(**a)

    monkeypatch.setattr(cutlass, "_native", Kernels())
    return ran


def layer(side: int) -> ConvBNAct:
    module = ConvBNAct.make(8, 16, side).to(torch.bfloat16)
    module.bn.running_mean.normal_()
    module.bn.running_var.uniform_(0.5, 1.5)
    return module.eval()


def explained(module, x) -> tuple[dict[str, str], str]:
    with torch.no_grad():
        report = resfast.explain(module, x)
    return {f: b for row in report.rows for f, b in row.backends.items()}, str(report)


@needs.native_library
@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("tile", [cutlass.OTHER, cutlass.TILES[1]])
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_inference_runs_and_names_what_was_measured_to_be_faster(
    built, monkeypatch, name, tile, side
):
    """A 3×3 convolution is one that Triton's kernels leave to the library unless measured."""
    if name == "cuda":
        monkeypatch.setattr(select, "_BACKENDS", {"cuda": Cuda(), "eager": EagerBackend()})
    seen: list = []
    x, module = randn(2, 8, 4, 4, device="cpu"), layer(side)
    residual = randn(2, 16, 4, 4, device="cpu")
    with monkeypatch.context() as eager, torch.no_grad():
        eager.setattr(select, "_forced", "eager")
        expected = module(x), module(x, residual)
    monkeypatch.setattr(tuning, "choose", choosing(tile, seen))
    backends, text = explained(module, x)
    ((key, candidates),) = seen
    padding = side // 2
    assert key == (
        f"conv_fprop bfloat16 2x8x4x4 16x8x{side}x{side} 1,1,{padding},{padding},1,1 cutlass affine"
    )
    assert candidates == [cutlass.OTHER, *cutlass.TILES]
    assert built == [*cutlass.TILES, *(t for t in [tile] if t != cutlass.OTHER)]
    if tile != cutlass.OTHER:
        assert backends == {"conv_fprop": "cutlass+epilogue"}
    elif (name, side) == ("triton", 1):
        assert backends == {"conv_fprop": "triton+epilogue"}
    else:
        assert backends == {"conv_fprop": name, "norm_apply": name}
        assert "CUTLASS's was not measured to be faster" in text
    with torch.no_grad():
        got = module(x), module(x, residual)
    assert seen[-1][0].endswith(" cutlass affine residual")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=5e-2)


@needs.native_library
@pytest.mark.parametrize("side", [1, 3])
def test_unmeasured_the_others_run(built, monkeypatch, side):
    monkeypatch.setenv("RESFAST_TUNE", "never")
    backends, _ = explained(layer(side), randn(2, 8, 4, 4, device="cpu"))
    own = {"conv_fprop": "triton+epilogue"}
    assert backends == (own if side == 1 else {"conv_fprop": "triton", "norm_apply": "triton"})
    assert not built


def test_without_cutlass_a_reason_is_given(built, monkeypatch):
    monkeypatch.setattr(select, "_BACKENDS", {"cuda": Cuda(), "eager": EagerBackend()})
    monkeypatch.setattr(cutlass, "cutlass_declines", lambda *arguments: "not built")
    backends, text = explained(layer(1), randn(2, 8, 4, 4, device="cpu"))
    assert backends == {"conv_fprop": "cuda", "norm_apply": "cuda"}
    assert "cuda convolution epilogue: not built" in text


@needs.native_library
@pytest.mark.parametrize("tile", [cutlass.OTHER, cutlass.TILES[2]])
def test_training_names_what_takes_the_statistics(built, monkeypatch, tile):
    module = layer(1).train()
    x = randn(2, 8, 4, 4, device="cpu")
    expected = module.bn(module.conv(x)).relu()
    monkeypatch.setattr(tuning, "choose", choosing(tile, []))
    backends, _ = explained(module, x)
    name = "triton" if tile == cutlass.OTHER else "cutlass"
    assert backends == {"conv_fprop": f"{name}+epilogue", "norm_apply": "triton"}
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, rtol=2e-2, atol=5e-2)


@needs.native_library
@pytest.mark.parametrize(
    ("bias", "prologue", "statistics", "exact", "asked"),
    [
        (False, False, True, False, True),
        (True, False, True, False, False),
        (False, True, True, False, False),
        (False, False, False, False, False),
        (False, False, True, True, False),
    ],
)
def test_training_asks_for_statistics_where_nothing_else_is_fused(
    built, monkeypatch, bias, prologue, statistics, exact, asked
):
    x, weight = randn(1, 16, 4, 4, device="cpu"), randn(16, 16, 1, 1, device="cpu")
    seen: list = []
    monkeypatch.setattr(tuning, "choose", choosing(cutlass.TILES[2], seen))
    affine = Affine(*(torch.rand(16) for _ in range(3)))
    kernel = Own().fprop_kernel(
        *(x, weight, torch.ones_like(x[0, :, 0, 0]) if bias else None, geometry()),
        *(affine if prologue else None, statistics, exact),
    )
    assert [key.split()[-1] for key, _ in seen] == (["stats"] if asked else [])
    assert kernel.name == ("cutlass" if asked else "triton")
    z, found = kernel.run()
    if statistics:
        mean = z.double().mean((0, 2, 3))
        torch.testing.assert_close(found[0].double(), mean, rtol=1e-5, atol=1e-5)


@needs.native_library
@pytest.mark.parametrize("residual", [False, True])
def test_an_engine_of_inference_plans(built, monkeypatch, residual):
    """Beside the others, by its fastest tile, under its own name."""
    seen: list = []
    monkeypatch.setattr(tuning, "choose", choosing(cutlass.TILES[2], seen))
    names: list = []
    monkeypatch.setattr(
        tuning, "choose_name", lambda key, runs, device: names.append(list(runs)) or "cutlass"
    )
    x, module = randn(2, 8, 4, 4, device="cpu"), layer(3)
    r = randn(2, 16, 4, 4, device="cpu") if residual else None
    bn, bias = module.bn, torch.full((16,), 2.0)
    vectors = (bn.weight.detach(), bn.bias.detach(), bn.running_mean, bn.running_var)
    run = plan_convolution(
        *(x, module.conv.weight.detach(), bias, geometry(padding=1)),
        *(NormVectors(*vectors, bn.eps), r, True, False),
    )
    assert names == [["passes", "triton", "cutlass"]]
    with torch.no_grad():
        u = bn(module.conv(x) + bias.bfloat16().view(-1, 1, 1))
    expected = (u if r is None else u + r).relu()
    built.clear()
    choices: list[select.Choice] = []
    with select.listen(choices.append):
        y = run(x, r, True)
    assert built[-1] == cutlass.TILES[2]
    assert seen[-1][1] == list(cutlass.TILES)
    assert seen[-1][0].endswith(f"cutlass affine{' residual' if residual else ''} tile")
    (choice,) = choices
    assert (choice.backend, choice.fused) == ("cutlass", ("epilogue",))
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=5e-2)


@needs.native_library
def test_explain_of_an_optimized_model_names_it(built, monkeypatch):
    monkeypatch.setattr(tuning, "choose", choosing(cutlass.TILES[0], []))
    monkeypatch.setattr(tuning, "choose_name", lambda key, runs, device: "cutlass")
    optimized = resfast.optimize_for_inference(nn.Sequential(layer(3)).eval())
    backends, _ = explained(optimized, randn(2, 8, 4, 4, device="cpu"))
    assert backends["conv_fprop"] == "cutlass+epilogue"


def test_measurements_are_kept_without_triton(monkeypatch, tmp_path):
    monkeypatch.setenv("RESFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises ImportError
    tiles = tuning.tiles_of.__wrapped__("NVIDIA H100")
    tiles.remember("key", cutlass.TILES[1])
    again = tuning.tiles_of.__wrapped__("NVIDIA H100")
    assert again.known["key"] == list(cutlass.TILES[1])

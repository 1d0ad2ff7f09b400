"""The CUDA library's raw ops and its backend without a GPU: loading, bad input, who is chosen.

Arguments are checked before their device is, so that CPU tensors get every check's answer.
"""

from __future__ import annotations

import os
import subprocess
import sys

import needs
import pytest
import torch

from resfast import native
from resfast.backends import cuda as cuda_backend
from resfast.backends import select
from resfast.backends.interface import nhwc
from resfast.diagnostics import ptxas

ops = torch.ops.resfast
SHAPE = (2, 8, 3, 5)


def activation() -> torch.Tensor:
    return nhwc(torch.randn(SHAPE))


def vector() -> torch.Tensor:
    return torch.randn(8)


def mask() -> torch.Tensor:
    return torch.zeros(30, 1, dtype=torch.uint8)


def good_arguments(op: str) -> dict[str, object]:
    """Names of the schema: activations, vectors and masks told apart by theirs."""
    values: dict[str, object] = {"mask": mask(), "eps": 1e-5, "n": 30, "relu": True}
    values |= {"add_after_act": False, "sums": torch.randn(3, 8)}
    activations = {"z", "z2", "dy", "dy2", "y", "residual", "out", "dz", "dz2", "du", "activation"}
    return {
        a.name: values[a.name]
        if a.name in values
        else activation()
        if a.name in activations
        else vector()
        for a in getattr(ops, op).default._schema.arguments
    }


def outputs(op: str) -> list[str]:
    arguments = getattr(ops, op).default._schema.arguments
    return [a.name for a in arguments if a.alias_info is not None]


def assert_rejected(op: str, arguments: dict[str, object], match: str) -> None:
    before = {name: arguments[name].clone() for name in outputs(op) if arguments[name] is not None}
    with pytest.raises(RuntimeError, match=match):
        getattr(ops, op)(**arguments)
    for name, t in before.items():
        assert torch.equal(arguments[name], t), f"{name} was written"


@needs.cuda_library
@pytest.mark.parametrize("op", native.CUDA_RAW_OPS)
def test_good_arguments_are_only_on_the_wrong_device(op):
    assert_rejected(op, good_arguments(op), r"\b(z|var|scale) must be a CUDA tensor")
    for name, value in good_arguments(op).items():
        if name == "mask" or (name in outputs(op) and name in ("du", "activation")):
            assert_rejected(op, good_arguments(op) | {name: None}, "must be a CUDA tensor")
            assert value is not None


TENSORS = [
    (op, name)
    for op in native.CUDA_RAW_OPS
    if native.is_available()
    for name, value in good_arguments(op).items()
    if isinstance(value, torch.Tensor)
]


@needs.cuda_library
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_bad_tensor_is_rejected_before_any_write(op, name):
    good = good_arguments(op)[name]
    if good.dim() == 4:
        bad = {
            "rank": good[0],
            "channels": nhwc(good[:, :5]),
            "height": nhwc(good[:, :, :1]),
            "layout": good.clone(memory_format=torch.contiguous_format),
            "dtype": good.to(torch.bfloat16),
            "double": good.double(),
            "integer": good.to(torch.int32),
        }
    elif good.dim() == 2:
        bad = {
            "rank": good[0],
            "rows": good[:-1],
            "columns": torch.zeros(len(good), good.shape[1] + 1, dtype=good.dtype),
            "dtype": good.to(torch.int16),
            "strided": torch.zeros(2 * len(good), good.shape[1], dtype=good.dtype)[::2],
        }
    else:
        bad = {
            "length": good[:5],
            "rank": good.view(1, -1),
            "dtype": good.double(),
            "half": good.to(torch.bfloat16),
            "strided": torch.randn(16)[::2],
        }
    if (op, name) == ("cuda_norm_stats", "z"):  # the only activation there
        del bad["height"], bad["dtype"]
    if op == "cuda_norm_stats" and name != "z":  # for who merges them with other ranks'
        del bad["dtype"]
    for kind, value in bad.items():
        if kind == "strided" and value.is_contiguous():
            continue  # one column
        setting = name in ("z", "var", "scale")  # others must be like it, and are named
        match = r"\bmust " if setting else rf"\b{name} must "
        assert_rejected(op, good_arguments(op) | {name: value}, match + "(?!be a CUDA)")


@needs.cuda_library
@pytest.mark.parametrize(
    ("op", "changes", "match"),
    [
        ("apply", {"residual": None}, "residual_mean is given without residual"),
        ("apply", {"residual_scale": None}, "must be given together, got 2 of 3"),
        ("backward_reduce", {"z2": None}, "z2 and mean2 must be given together"),
        ("backward_reduce", {"z2": None, "mean2": None}, r"sums must have shape \[2, 8\]"),
        ("backward_apply", {"dz2": None}, "must be given together, got 3 of 4"),
        (
            "backward_apply",
            {"z2": None, "mean2": None, "scale2": None, "dz2": None},
            "coef_z2 or coef_12 is given without z2",
        ),
        ("coefficients", {"n": 0}, "n must be at least 1, got 0"),
    ],
)
def test_bad_combination_is_rejected(op, changes, match):
    op = f"cuda_norm_{op}"
    assert_rejected(op, good_arguments(op) | changes, match)


@needs.cuda_library
def test_a_mask_needs_whole_bytes_and_aligned_memory():
    six = {
        k: v[:, :6] if v is not None and not isinstance(v, (bool, float)) and v.dim() == 4 else v
        for k, v in good_arguments("cuda_norm_apply").items()
    }
    six = {
        k: nhwc(v) if isinstance(v, torch.Tensor) and v.dim() == 4 else v for k, v in six.items()
    }
    six |= {k: v[:6] for k, v in six.items() if isinstance(v, torch.Tensor) and v.dim() == 1}
    assert_rejected("cuda_norm_apply", six, "mask needs channels in multiples of 8, got 6")
    arguments = good_arguments("cuda_norm_apply")
    z = arguments["z"]
    arguments["z"] = torch.randn(z.numel() + 1)[1:].as_strided(z.shape, z.stride(), 1)
    assert_rejected("cuda_norm_apply", arguments, "mask needs activations that start at")


@needs.cuda_library
@pytest.mark.parametrize("op", ["cuda_norm_forward", "cuda_norm_backward"])
def test_reading_once_has_a_limit(op):
    for shape, pixels in (((1, 8, 25, 41), 1025), ((0, 8, 3, 5), 0)):
        arguments = {
            k: nhwc(torch.randn(shape)) if isinstance(v, torch.Tensor) and v.dim() == 4 else v
            for k, v in good_arguments(op).items()
        }
        assert_rejected(op, arguments | {"mask": None}, f"to be read once, got {pixels}")
    assert cuda_backend.HELD_PIXELS == 1024


@needs.cuda_library
@pytest.mark.parametrize(
    ("op", "output", "other"),
    [
        ("stats", "mean", "m2"),
        ("prepare", "scale", "var"),
        ("coefficients", "coef_z", "rstd"),
        ("apply", "mask", "out"),
        ("backward_reduce", "du", "activation"),
        ("backward_apply", "dz", "dz2"),
        ("forward", "mean", "weight"),
        ("backward", "sum_du", "rstd"),
    ],
)
def test_overlapping_memory_is_rejected(op, output, other):
    op = f"cuda_norm_{op}"
    arguments = good_arguments(op)
    if output == "mask":
        memory = torch.zeros(arguments["out"].numel() * 4, dtype=torch.uint8)
        arguments["mask"] = memory[:30].view(30, 1)
        z = arguments["out"]
        arguments["out"] = memory.view(torch.float32).as_strided(z.shape, z.stride())
    else:
        arguments[output] = arguments[other]
    assert_rejected(op, arguments, f"({output} overlaps the memory of {other})|({other} overlaps)")


# ---- the library and the backend


@needs.cuda_library
def test_the_library_loads_without_a_driver():
    """In a process that sees no device; only asking for one fails, with CUDA's reason."""
    code = (
        "from resfast import native\n"
        "assert native.cuda_library()['built'], native.cuda_library()\n"
        "print(native.cuda_unusable(0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() not in ("", "None")


def test_triton_comes_first_and_then_these_kernels(monkeypatch):
    """No order has been measured; Triton also fuses norms into convolutions."""
    assert select.names() == ("cpu", "triton", "cuda", "cudnn", "eager")
    backend = select._BACKENDS["cuda"]
    monkeypatch.setattr(select, "_forced", None)
    for name in ("cpu", "triton"):
        monkeypatch.setattr(type(select._BACKENDS[name]), "unavailable_reason", lambda self: "no")
    monkeypatch.setattr(type(backend), "unavailable_reason", lambda self: None)
    monkeypatch.setattr(type(backend), "declines", lambda self, f, z: None)
    assert select.find("norm_apply", torch.zeros(1, 1, 1, 1))[0] is backend


@pytest.mark.parametrize(
    ("device", "dtype", "unusable", "reason"),
    [
        ("meta", torch.float32, None, "it runs on cuda, the tensor is on meta"),
        ("cuda", torch.float64, None, "no kernel for torch.float64"),
        ("cuda", torch.float32, "no kernel image is available", "device 0: no kernel image is"),
        ("cuda", torch.bfloat16, None, None),
    ],
)
def test_it_declines_with_a_reason(monkeypatch, device, dtype, unusable, reason):
    class Like:
        def __init__(self):
            self.device = torch.device(device, 0)
            self.dtype = dtype

    monkeypatch.setattr(native, "cuda_unusable", lambda index: unusable)
    said = cuda_backend.CudaBackend().declines("norm_apply", Like())
    assert said is None if reason is None else said.startswith(reason)


def test_it_is_unavailable_with_a_reason(monkeypatch):
    backend = cuda_backend.CudaBackend()
    monkeypatch.setattr(native, "cuda_library", lambda: {"built": False, "reason": "no nvcc"})
    assert backend.unavailable_reason() == "no CUDA library: no nvcc"
    monkeypatch.setattr(native, "cuda_library", lambda: {"built": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.unavailable_reason() == "no CUDA device"


# ---- the table of what kernels take

REPORT = """
ptxas info    : Compiling entry function '_ZN4goodEv' for 'sm_90a'
ptxas info    : Function properties for _ZN4goodEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem
ptxas info    : Compiling entry function '_ZN3badEv' for 'sm_80'
ptxas info    : Function properties for _ZN3badEv
    24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


def test_ptxas_report_is_read():
    rows = ptxas.parse(REPORT)
    assert rows == [
        ("90a", "_ZN4goodEv", 40, 0, 512, False),
        ("80", "_ZN3badEv", 255, 20, 0, False),
    ]
    with pytest.raises(ValueError, match="does not say"):
        ptxas.parse(REPORT.replace("Used 255 registers", ""))


GOOD = REPORT.split("ptxas info    : Compiling entry function '_ZN3bad")[0]
SERIAL = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
    "serialized due to wgmma pipeline crossing function boundary at a function call in the "
    "function '_ZN4goodEv'\n"
)


@pytest.mark.parametrize(("report", "status"), [(REPORT, 1), (GOOD, 0), (SERIAL + GOOD, 1)])
def test_a_spill_is_a_failure_and_so_are_serial_products(monkeypatch, capsys, report, status):
    monkeypatch.setattr(ptxas, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(ptxas, "compile_source", lambda *arguments: report)
    assert ptxas.main(["--only", "device"]) == status
    assert f"{status} failed" in capsys.readouterr().out


def test_without_nvcc_the_table_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(ptxas, "find_nvcc", lambda: None)
    assert ptxas.main([]) == 0
    assert "skipped: no nvcc" in capsys.readouterr().out


def test_without_cutlass_its_table_is_skipped(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ptxas, "find_nvcc", lambda: "nvcc")
    monkeypatch.setenv("RESFAST_CUTLASS_DIR", str(tmp_path))
    assert ptxas.main(["--cutlass"]) == 0
    assert "skipped: no CUTLASS headers" in capsys.readouterr().out


# what matters of two mangled names
KERNELS = {
    "implicit_gemm": "_ZN7cutlass13device_kernelINS_4conv6kernel13ConvUniversalINS1_46MainloopSm90"
    "TmaGmmaWarpSpecializedImplicitGemmILS5_0ELi4ELi2EN4cute5tupleIJNSA_1CILi1EEESD_SD_EEENS1_36"
    "KernelImplicitTmaWarpSpecializedSm90ELi1EEENSB_IJNSC_ILi128EEENSC_ILi64EEENSB_IJSI_EEEEEENS_10"
    "bfloat16_tESL_NSA_4SM904GMMA27MMA_64x64x16_F32BF16BF16_SSINS2914TileStatisticsISL_Li64EEE6half",
    "product": "_ZN7cutlass13device_kernelINS_4gemm6kernel13GemmUniversalIN4cute5tupleIJiiiiEEENS1_"
    "34MainloopSm90TmaGmmaWarpSpecializedILi6ENS5_IJNS4_1CILi1EEESB_SB_EEENS1_32KernelTmaWarp"
    "SpecializedPingpongEEENS5_IJNSA_ILi128EEESF_NSA_ILi64EEEEEENS_6half_tENS5_IJlSB_lEEESI_SJ_NS4_4"
    "SM904GMMA26MMA_64x128x16_F32F16F16_SSILNSN_5MajorE0E9FinishingESI_12Sm90SrcFetchISI_EEEEE",
}


def test_cutlass_kernels_are_compiled_with_its_headers_and_named(monkeypatch, capsys, tmp_path):
    (tmp_path / "include" / "cutlass").mkdir(parents=True)
    (tmp_path / "include" / "cutlass" / "cutlass.h").touch()
    monkeypatch.setattr(ptxas, "find_nvcc", lambda: "nvcc")
    monkeypatch.setenv("RESFAST_CUTLASS_DIR", str(tmp_path))
    seen = []

    def compile_source(nvcc, source, architectures, flags):
        seen.append((source.name, architectures, str(tmp_path / "include") in flags))
        return GOOD.replace("_ZN4goodEv", KERNELS[source.stem])

    monkeypatch.setattr(ptxas, "compile_source", compile_source)
    assert ptxas.main(["--cutlass"]) == 0
    assert seen == [(f"{stem}.cu", ["90a"], True) for stem in ("implicit_gemm", "product")]
    out = capsys.readouterr().out
    assert "implicit_gemm_stats<bf16, 128, 64> " in out
    assert "product_affine<f16, 128, 128, residual> " in out


@pytest.mark.skipif(ptxas.find_nvcc() is None, reason="no nvcc")
def test_no_kernel_of_the_backward_spills_on_one_chip(capsys):
    assert ptxas.main(["--arch", "90a", "--only", "norm_backward"]) == 0
    assert "norm_backward_kernel<BFloat16, 8>" in capsys.readouterr().out

"""Every shipped kernel compiles ahead of time, without a GPU, and within the table's rules."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

import resfast.kernels
from resfast.diagnostics import aot
from resfast.kernels.tiles import CONV_TILES


def _python(*arguments: object, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: this one may have Triton interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def _modules():
    found = pkgutil.iter_modules(resfast.kernels.__path__)
    return [importlib.import_module(f"resfast.kernels.{each.name}") for each in found]


@pytest.fixture(scope="module")
def launches():
    return [variant.launch for variant in aot.variants(aot.specimens())]


def test_the_table_has_every_kernel(launches):
    kernels = {
        name
        for module in _modules()
        for name in vars(module)
        if re.fullmatch(r"_[a-z]\w*_kernel", name)
    }
    assert kernels
    assert {launch.kernel.__name__ for launch in launches} == kernels


def test_the_table_has_every_shipped_tile(launches):
    shipped = {
        (kernel, *tile)
        for kernel, kinds in CONV_TILES.items()
        for tiles in kinds.values()
        for tile in tiles
    }
    compiled = set()
    for launch in launches:
        at = launch.constexprs
        blocks = (at.get(f"BLOCK_{axis}") for axis in "MNK")
        kernel = launch.kernel.__name__[1:].removesuffix("_kernel")
        compiled.add((kernel, *blocks, at["num_warps"], at.get("num_stages")))
    assert shipped
    assert shipped <= compiled


def test_the_usual_variants_compile_within_the_rules(tmp_path):
    report = tmp_path / "rows.json"
    done = _python("-m", "resfast.diagnostics.aot", "--quick", "--arch", 90, "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())
    assert {row["arch"] for row in rows} == {90}
    assert all(row["registers"] > 0 and row["spilled"] == 0 for row in rows)
    products = [row for row in rows if row["matrix"].startswith("wgmma bf16")]
    assert {re.match(r"_(conv_[a-z]+)_", row["kernel"])[1] for row in products} == {
        "conv_fprop",
        "conv_dgrad",
        "conv_wgrad",
    }
    assert {row["copies"] for row in products if row["stages"] > 1} <= {"cp.async", "TMA"}


# a matrix product, and what goes wrong with it
WRONG = """
import sys, torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from resfast.diagnostics import aot
from resfast.kernels.tiles import CONV_TILES
from resfast.kernels.launch import Launch

@triton.jit
def product(a_ptr, b_ptr, c_ptr, M, N, K, step, WIDE: tl.constexpr, FMA: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K) * step
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        b_a = tl.load(a_ptr + o_m[:, None] * K + k + o_k[None, :])
        b_b = tl.load(b_ptr + o_n[None, :] * K + k + o_k[:, None])
        if WIDE:
            b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
        total = tl.dot(b_a, b_b, total, input_precision="ieee" if FMA else "tf32")
    tl.store(c_ptr + o_m[:, None] * N + o_n[None, :], total.to(c_ptr.dtype.element_ty))

def faults(arch, size=(128, 128, 64), warps=8, stages=3, step=1, wide=False, fma=False):
    x = torch.empty(4096, dtype=torch.bfloat16, device="meta")
    m, n, k = size
    launch = Launch(product, (1,), (x, x, x, 4096, 4096, 4096, step), dict(
        WIDE=wide, FMA=fma, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=warps, num_stages=stages))
    row = aot.compile_variant(aot.Variant("wrong", launch), arch)
    return row.faults, row.matrix, row.copies

print(faults(80))
print(faults(90))
print(faults(100))
print(faults(80, warps=2, stages=2)[0])
print(faults(90, size=(128, 256, 64), stages=6)[0])
print(faults(90, wide=True, fma=True, size=(64, 64, 16), stages=2)[0])
print(faults(90, step=3)[0])
print(faults(90, step=3, stages=1)[0])
print(faults(90, size=(100, 128, 64))[0])

a = torch.empty(64, dtype=torch.float16, device="meta")
args = (a, a[1:], None, 48, 1, 2**31, 7)
arguments = dict(WIDE=False, FMA=False, BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, num_warps=2)
src, options = aot.source(Launch(product, (1,), args, arguments), GPUTarget("cuda", 90, 32))
print(list(src.signature.values())[:7], src.attrs, src.constants[(4,)], options.num_warps)
same = [aot.Variant(str(m), Launch(product, (m,), (a, a, a, m, 32, 32, 1), arguments))
        for m in (32, 64, 33, 35)]
print([v.name for v in aot.distinct(same, GPUTarget("cuda", 90, 32))])
"""


def test_each_rule_finds_what_breaks_it(tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    done = _python(script)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        "([], 'mma.sync bf16', 'cp.async')",
        "([], 'wgmma bf16', 'cp.async')",
        "([], 'tcgen05 f16', 'cp.async')",
    ]
    assert re.fullmatch(r"\['spills \d+ bytes'\]", lines[3])
    assert lines[4] == "['more shared memory than 227 KB']"
    assert "no wgmma" in lines[5]
    assert lines[6] == "['no asynchronous copies']"
    assert lines[7] == "[]"
    assert re.match(r"\['\w+: ", lines[8]), "what the compiler raises is a fault"
    signature = ["*fp16", "*fp16", "constexpr", "i32", "constexpr", "i64", "i32"]
    divisible = {(i,): [["tt.divisibility", 16]] if i in (0, 3, 5) else [] for i in (0, 1, 3, 5, 6)}
    assert lines[9] == f"{signature} {divisible} 1 2"
    assert lines[10] == "['32', '33']"


def test_interpreting_is_refused():
    done = _python("-m", "resfast.diagnostics.aot", interpret=True)
    assert done.returncode == 2
    assert "unset TRITON_INTERPRET" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--arch", "75"], "not among"), (["--arch", "x"], "not numbers"), (["--only", "?"], "'?'")],
)
def test_wrong_arguments_are_refused(arguments, message):
    done = _python("-m", "resfast.diagnostics.aot", *arguments)
    assert done.returncode == 2
    assert message in done.stderr

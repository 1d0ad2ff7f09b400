"""Ahead-of-time compilation of the kernels with every shipped tile, without a GPU, as a table.

    python -m resfast.diagnostics.aot [--arch 80,90,100] [--only SUBSTRING] [--quick] [--json FILE]

The launchers themselves run on meta tensors (``specimens.py``); each launch is compiled as
Triton's just-in-time compiler would compile it. Exit status 1 if a row breaks a rule:
no registers spilled to memory; shared memory within the chip's; and where there is a matrix
product, in 16 bit the chip's matrix instruction, and asynchronous copies if it has stages.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from resfast.diagnostics.specimens import Specimen, specimens
from resfast.kernels.launch import INTERPRETED, Launch, capture


class Chip(NamedTuple):
    """Shared memory one program may use, and the matrix instructions that count, best first."""

    shared: int
    matrix: tuple[str, ...]


CHIPS = {
    80: Chip(163 << 10, ("mma.sync",)),
    90: Chip(227 << 10, ("wgmma",)),
    100: Chip(227 << 10, ("tcgen05", "mma.sync")),
}

# in PTX; the group is the type of the factors
MATRIX = {
    "wgmma": r"wgmma\.mma_async\.[\w.]*?\.(?:f32)\.(\w+)\.\w+ ",
    "tcgen05": r"tcgen05\.mma\.[\w:.]*?kind::(\w+)",
    "mma.sync": r"mma\.sync\.aligned\.[\w.]*?\.f32\.(\w+)\.\w+\.f32",
}
COPIES = {"TMA": r"cp\.async\.bulk\.tensor", "cp.async": r"cp\.async\.c[ag]\."}

# ---- compiling


class Variant(NamedTuple):
    """One launch and the specimen it came from."""

    name: str
    launch: Launch


@dataclass
class Row:
    """What a variant compiled to; ``faults`` are the rules it breaks."""

    arch: int
    kernel: str
    name: str
    registers: int
    spilled: int  # bytes of local memory per thread
    shared: int  # bytes per program
    matrix: str  # "wgmma bf16", "-"
    copies: str  # "cp.async", "TMA", "-"
    stages: int
    faults: list[str]

    def cells(self) -> tuple[str, ...]:
        """The table's columns after the name."""
        return (
            str(self.registers),
            str(self.spilled),
            f"{self.shared / 1024:.1f}",
            str(self.stages),
            self.matrix,
            self.copies,
            "; ".join(self.faults) or "ok",
        )


def variants(calls: Sequence[Specimen]) -> list[Variant]:
    """All launches of ``calls``."""
    found = []
    for specimen in calls:
        with capture() as launches:
            specimen.call()
        found += [Variant(specimen.name + _tile(each), each) for each in launches]
    return found


def _tile(launch: Launch) -> str:
    """Of a convolution, " 128×64×32 4w 3s"."""
    at = launch.constexprs
    if "BLOCK_K" not in at:
        return ""
    return " {BLOCK_M}×{BLOCK_N}×{BLOCK_K} {num_warps}w {num_stages}s".format(**at)


def source(launch: Launch, target: GPUTarget) -> tuple[ASTSource, Any]:
    """The launch specialised to its arguments as the just-in-time compiler does, and options."""
    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.constexprs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.constexprs, bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes), options


def distinct(found: Sequence[Variant], target: GPUTarget) -> list[Variant]:
    """The first of each that compile to the same."""
    seen: dict[tuple[str, ...], Variant] = {}
    for variant in found:
        src, options = source(variant.launch, target)
        key = (src.name, *map(str, (src.signature, src.constants, src.attrs, options)))
        seen.setdefault(key, variant)
    return list(seen.values())


def compile_variant(variant: Variant, arch: int) -> Row:
    """Compile and judge; what the compiler raises is a fault too."""
    kernel = variant.launch.kernel.__name__
    try:
        target = GPUTarget("cuda", arch, 32)
        src, options = source(variant.launch, target)
        binary = triton.compile(src, target=target, options=options.__dict__)
        registers, spilled = resource_usage(binary.asm["cubin"])
    except Exception as error:
        fault = f"{type(error).__name__}: {error}".splitlines()[0]
        return Row(arch, kernel, variant.name, 0, 0, 0, "-", "-", 0, [fault])
    ptx = binary.asm["ptx"]
    matrix = (f"{what} {m[1]}" for what, p in MATRIX.items() if (m := re.search(p, ptx)))
    copies = (what for what, pattern in COPIES.items() if re.search(pattern, ptx))
    row = Row(
        arch,
        kernel,
        variant.name,
        registers,
        spilled,
        binary.metadata.shared,
        next(matrix, "-"),
        next(copies, "-"),
        options.num_stages,
        [],
    )
    half = any(kind in ("*bf16", "*fp16") for kind in src.signature.values())
    row.faults = faults(row, product="tt.dot " in binary.asm["ttir"], half=half)
    return row


def faults(row: Row, product: bool, half: bool) -> list[str]:
    """The rules that ``row`` breaks; ``product``: it multiplies matrices; ``half``: in 16 bit."""
    chip = CHIPS[row.arch]
    found = []
    if row.spilled:
        found.append(f"spills {row.spilled} bytes")
    if row.shared > chip.shared:
        found.append(f"more shared memory than {chip.shared >> 10} KB")
    if product and half and not row.matrix.startswith(chip.matrix):
        found.append(f"no {chip.matrix[0]}")
    if product and row.stages > 1 and row.copies == "-":
        found.append("no asynchronous copies")
    return found


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


# ---- the table


_jobs: list[tuple[Variant, int]] = []  # inherited by the forked workers: kernels do not pickle


def _compile_job(i: int) -> Row:
    return compile_variant(*_jobs[i])


def compile_all(jobs: list[tuple[Variant, int]]) -> Iterator[Row]:
    """Rows in the order of ``jobs``, compiled on all CPUs."""
    _jobs[:] = jobs
    with multiprocessing.get_context("fork").Pool(min(os.cpu_count() or 1, len(jobs))) as pool:
        yield from pool.imap(_compile_job, range(len(jobs)))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m resfast.diagnostics.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", default="80,90,100", help="comma-separated, of %(default)s")
    parser.add_argument("--only", default="", help="only names with this in them")
    parser.add_argument("--quick", action="store_true", help="only each launcher's usual call")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    try:
        args.arch = [int(arch) for arch in args.arch.split(",")]
    except ValueError:
        parser.error(f"--arch: not numbers: {args.arch}")
    if unknown := set(args.arch) - set(CHIPS):
        parser.error(f"--arch: {unknown} not among {list(CHIPS)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a row breaks a rule."""
    args = _arguments(argv)
    if INTERPRETED:
        print("unset TRITON_INTERPRET: it replaces the compiler", file=sys.stderr)
        return 2
    start = time.monotonic()
    chosen = [
        v
        for v in variants(specimens(args.quick))
        if args.only in f"{v.launch.kernel.__name__} {v.name}"
    ]
    chosen = distinct(chosen, GPUTarget("cuda", args.arch[0], 32))
    jobs = [(v, arch) for arch in args.arch for v in chosen]
    if not jobs:
        print(f"no variant has {args.only!r} in its name", file=sys.stderr)
        return 2
    names = [f"{v.launch.kernel.__name__} {v.name}" for v, _ in jobs]
    width = max(map(len, names))
    layout = f"{{:>4}}  {{:{width}}}  {{:>4}} {{:>6}} {{:>6}} {{:>6}}  {{:13}} {{:8}}  {{}}"
    header = ("arch", "variant", "regs", "spill", "KB", "stages", "matrix", "copies", "verdict")
    print(layout.format(*header), flush=True)
    rows = []
    for row, name in zip(compile_all(jobs), names, strict=True):
        rows.append(row)
        print(layout.format(row.arch, name, *row.cells()), flush=True)
    failed = sum(bool(row.faults) for row in rows)
    print(f"{len(rows)} compiled, {failed} failed, {time.monotonic() - start:.0f} s")
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

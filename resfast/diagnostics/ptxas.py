"""What the CUDA kernels take of a chip, asked of nvcc without a GPU, as a table.

    python -m resfast.diagnostics.ptxas [--arch 80,90a,100] [--only SUBSTRING]
    python -m resfast.diagnostics.ptxas --cutlass [--only SUBSTRING]

Registers, bytes spilled and static shared memory of every kernel in a checkout's csrc/cuda; more
shared memory is asked for at launch, 16 KiB at most. With --cutlass instead of those in
csrc/cuda/cutlass, for sm_90a: minutes, and by the headers of the package nvidia-cutlass or of
RESFAST_CUTLASS_DIR. Exit status 1 if a kernel spills registers to memory, waits for each product
where it need not, or does not compile; 0, with the reason, where there is no nvcc, no checkout or
no header.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ARCHITECTURES = "80,90a,100"


class Row(NamedTuple):
    """One kernel on one architecture; spill: bytes stored and loaded, shared: static bytes."""

    arch: str
    kernel: str
    registers: int
    spill: int
    shared: int
    serial: bool = False  # matrix instructions that wait for each other


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    in_home = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None
    return in_home or shutil.which("nvcc")


def find_cutlass() -> Path | None:
    """A CUTLASS source tree as setup.py looks for it."""
    given = os.environ.get("RESFAST_CUTLASS_DIR")
    spec = None if given else importlib.util.find_spec("cutlass_library")
    folders = (
        [given]
        if given
        else [f"{f}/source" for f in spec.submodule_search_locations or ()]
        if spec
        else []
    )
    trees = [Path(f) for f in folders if (Path(f) / "include" / "cutlass" / "cutlass.h").exists()]
    return trees[0] if trees else None


def cutlass_flags(tree: Path) -> list[str]:
    """As setup.py compiles those sources."""
    flags = ["-DNDEBUG", "--expt-relaxed-constexpr"]
    for include in (tree / "include", tree / "tools" / "util" / "include"):
        flags += ["-isystem", str(include)]
    return flags


def compile_source(
    nvcc: str, source: Path, architectures: Sequence[str], flags: Sequence[str] = ()
) -> str:
    """What ptxas says; raises CalledProcessError with nvcc's message."""
    command = [nvcc, "-std=c++17", "-O3", f"-I{CSRC}", "-Xptxas", "-v", "-c", str(source)]
    command += flags
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    # facts of a build, of no consequence here
    facts = ("CUDA_ARCHS", "NVCC_VERSION", "CUTLASS_KEY", "CUTLASS_VALUE")
    command += [f'-DRESFAST_{fact}=""' for fact in facts]
    with tempfile.TemporaryDirectory() as folder:
        command += ["-o", os.path.join(folder, "object.o")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '\w*?_(\w+)'")
_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_SERIAL = re.compile(r"wgmma\.mma_async instructions are serialized.*'(\w+)'")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def parse(text: str) -> list[Row]:
    """Rows of ptxas's report, in its order."""
    rows = []
    serial = set(_SERIAL.findall(text))
    for part in re.split(r"(?=Compiling entry function)", text):
        entry = _ENTRY.search(part)
        if entry is None:
            continue
        spill, used = _SPILL.search(part), _USED.search(part)
        if spill is None or used is None:
            raise ValueError(f"ptxas does not say what {entry[1]} takes")
        spilled = int(spill[1]) + int(spill[2])
        shared = int(used[2] or 0)
        rows.append(Row(entry[2], entry[1], int(used[1]), spilled, shared, entry[1] in serial))
    return rows


def readable(names: Sequence[str]) -> list[str]:
    """Kernels as in the source, without namespaces; mangled where there is no c++filt."""
    names = [_cutlass_name(n) if "7cutlass13device_kernel" in n else n for n in names]
    if not names or shutil.which("c++filt") is None:
        return list(names)
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = [re.sub(r"resfast::cuda::|\(anonymous namespace\)::|^void ", "", n) for n in done]
    return [re.sub(r"\([^()]*\)$", "", name) for name in names]


def _cutlass_name(mangled: str) -> str:
    """What tells CUTLASS's kernels apart, out of thousands of characters."""
    kind = "implicit_gemm" if "ImplicitGemm" in mangled else "product"
    element = "bf16" if "bfloat16_t" in mangled else "f16"
    # the block's tile follows the schedule; its second size is the instruction's
    rows = re.search(r"(?:Sm90ELi1|Pingpong)EEE.*?ILi(\d+)E", mangled)
    columns = re.search(r"MMA_64x(\d+)x16", mangled)
    if rows is None or columns is None:
        return mangled
    ending = "stats" if "TileStatistics" in mangled else "affine"
    residual = ", residual" if "Sm90SrcFetch" in mangled else ""
    return f"{kind}_{ending}<{element}, {rows[1]}, {columns[1]}{residual}>"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a kernel spills or does not compile."""
    parser = argparse.ArgumentParser(
        prog="python -m resfast.diagnostics.ptxas",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", default=ARCHITECTURES, help="comma-separated, of %(default)s")
    parser.add_argument("--only", default="", help="only sources with this in their name")
    parser.add_argument("--cutlass", action="store_true", help="the kernels that need CUTLASS")
    args = parser.parse_args(argv)
    nvcc = find_nvcc()
    if nvcc is None:
        print("skipped: no nvcc in CUDA_HOME or on PATH")
        return 0
    folder, flags = CSRC / "cuda", []
    if args.cutlass:
        tree = find_cutlass()
        if tree is None:
            print("skipped: no CUTLASS headers, neither nvidia-cutlass nor RESFAST_CUTLASS_DIR")
            return 0
        folder, flags, args.arch = folder / "cutlass", cutlass_flags(tree), "90a"
    sources = [s for s in sorted(folder.glob("*.cu")) if args.only in s.name]
    if not sources:
        print(f"skipped: no sources in {folder}")
        return 0
    rows: list[Row] = []
    for source in sources:
        try:
            rows += parse(compile_source(nvcc, source, args.arch.split(","), flags))
        except subprocess.CalledProcessError as error:
            print(f"{source.name} does not compile:\n{error.stderr}", file=sys.stderr)
            return 1
    names = readable([row.kernel for row in rows])
    width = max(map(len, names), default=6)
    print(f"{'arch':>5}  {'kernel':{width}}  {'regs':>4}  {'spill':>5}  {'shared':>6}  verdict")
    for row, name in zip(rows, names, strict=True):
        verdict = "spills" if row.spill else "serial products" if row.serial else "ok"
        numbers = f"{row.registers:>4}  {row.spill:>5}  {row.shared:>6}"
        print(f"{row.arch:>5}  {name:{width}}  {numbers}  {verdict}")
    failed = sum(bool(row.spill) or row.serial for row in rows)
    print(f"{len(rows)} compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

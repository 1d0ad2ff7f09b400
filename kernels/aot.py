"""Ahead-of-time compilation of the kernels with every shipped tile, without a GPU, as a table.

    python -m resfast.kernels.aot [--arch 80,90,100] [--only SUBSTRING] [--quick] [--json FILE]

The launchers themselves run on meta tensors at ResNet-50's shapes; each launch is compiled as
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from resfast.backends.interface import Affine, Below, ConvGeometry, NormGradient, mask_shape
from resfast.kernels import conv_dgrad, conv_fprop, conv_wgrad, norm, norm_pool
from resfast.kernels.launch import INTERPRETED, Launch, capture
from resfast.kernels.tiles import CONV_TILES


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

# ---- what ships: one function per kernel file, one line per call of a launcher


class Specimen(NamedTuple):
    """A launcher's call on meta tensors."""

    name: str
    call: Callable[[], object]


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Shape = tuple[int, ...]


def _nhwc(shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def _float32(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="meta")


def _affine(c: int) -> Affine:
    return Affine(_float32(c), _float32(c), _float32(c))


def _mask(shape: Shape) -> Tensor:
    return torch.empty(mask_shape(shape), dtype=torch.uint8, device="meta")


def _sizes(quick: bool, *shapes: Shape) -> Iterator[tuple[str, Shape, torch.dtype]]:
    """(name, shape, dtype): each in each dtype; ``quick``: the first in bf16."""
    for name, dtype in DTYPES.items():
        for n, c, h, w in shapes:
            yield f"{name} {n}×{c}×{h}²", (n, c, h, w), dtype
            if quick:
                return


def _norm(quick: bool) -> Iterator[Specimen]:
    shapes: tuple[Shape, ...] = (256, 256, 56, 56), (256, 64, 112, 112), (8, 2048, 7, 7)
    for name, shape, dtype in _sizes(quick, *shapes):
        c = shape[1]
        z, r, dy, dy2, y, z2 = (_nhwc(shape, dtype) for _ in range(6))
        affine, r_affine, coef, mask = _affine(c), _affine(c), _float32(c), _mask(shape)
        batch = {"coef_z": coef, "coef_1": coef}
        second = (z2, coef, coef, coef, coef, z2)
        apply = partial(norm.norm_apply, z, affine)
        reduce = partial(norm.norm_backward_reduce, dy, z, affine)
        join = partial(reduce, du=dy)
        gradient = partial(norm.norm_backward_apply, dy, z, affine, dz=dy)
        yield Specimen(f"{name}", partial(norm.norm_stats, z))
        yield Specimen(f"{name} relu", apply)
        yield Specimen(f"{name}", partial(apply, relu=False))
        yield Specimen(f"{name} +r relu", partial(apply, r))
        yield Specimen(f"{name} +norm(r) relu", partial(apply, r, r_affine))
        yield Specimen(f"{name} +r relu mask", partial(apply, r, mask=mask))
        yield Specimen(f"{name} +norm(r) relu mask", partial(apply, r, r_affine, mask=mask))
        yield Specimen(f"{name} relu +r", partial(apply, r, add_after_act=True))
        yield Specimen(f"{name} relu +norm(r)", partial(apply, r, r_affine, add_after_act=True))
        yield Specimen(f"{name} relu", reduce)
        yield Specimen(f"{name}", partial(reduce, relu=False))
        yield Specimen(f"{name} relu by y", partial(reduce, y=y))
        yield Specimen(f"{name} relu activation", partial(reduce, activation=y))
        yield Specimen(f"{name} join by mask", partial(join, mask=mask))
        yield Specimen(f"{name} join of 2 by mask", partial(join, mask=mask, z2=z2, mean2=coef))
        yield Specimen(f"{name} join of dy+dy2 by mask", partial(join, mask=mask, dy2=dy2))
        yield Specimen(
            f"{name} join of 2, dy+dy2 by y", partial(join, y=y, dy2=dy2, z2=z2, mean2=coef)
        )
        yield Specimen(f"{name} relu", partial(gradient, **batch))
        yield Specimen(f"{name} running relu", gradient)
        yield Specimen(f"{name}", partial(gradient, **batch, relu=False))
        yield Specimen(f"{name} relu by y, du", partial(gradient, **batch, y=y, du=dy2))
        yield Specimen(f"{name} of 2", partial(gradient, **batch, relu=False, second=second))
    for t, c in ((16, 2048), (512, 256), (6272, 256)):
        tiles = norm.TileStats(_float32(t, c), _float32(t, c), 128, 128 * t)
        exact = tiles._replace(rest=_float32(t, c))
        yield Specimen(f"{t} tiles", partial(norm.merge_stats, tiles))
        yield Specimen(f"{t} tiles, rest", partial(norm.merge_stats, exact))
        yield Specimen(f"{t} tiles", partial(norm.merge_sums, norm.TileSums(_float32(3, t, c))))
    v = _float32(256)
    yield Specimen("", partial(norm.norm_prepare, v, v, v, v, 1e-5))
    yield Specimen("affine=False", partial(norm.norm_prepare, v, v, None, None, 1e-5))
    yield Specimen("", partial(norm.norm_coefficients, v, v, v, v, 100))


def _norm_persistent(quick: bool) -> Iterator[Specimen]:
    shapes: tuple[Shape, ...] = (16, 512, 7, 7), (4, 512, 7, 7), (1, 2048, 7, 7)
    for name, shape, dtype in _sizes(quick, *shapes):
        c = shape[1]
        z, r, dy, dy2, y = (_nhwc(shape, dtype) for _ in range(5))
        affine, v, mask = _affine(c), _float32(c), _mask(shape)
        forward = partial(norm.norm_forward_persistent, z, v, v, 1e-5)
        backward = partial(norm.norm_backward_persistent, dy, z, affine, v)
        yield Specimen(f"{name} relu", forward)
        yield Specimen(f"{name}", partial(forward, relu=False))
        yield Specimen(f"{name} +r relu mask", partial(forward, r, mask=mask))
        yield Specimen(f"{name} relu +r", partial(forward, r, add_after_act=True))
        yield Specimen(f"{name} relu", backward)
        yield Specimen(f"{name}", partial(backward, relu=False))
        yield Specimen(f"{name} relu by y, du", partial(backward, y=y, du=dy2))
        yield Specimen(f"{name} relu activation", partial(backward, activation=y))
        yield Specimen(f"{name} dy+dy2 by mask, du", partial(backward, dy2=dy2, mask=mask, du=dy))


def _norm_pool(quick: bool) -> Iterator[Specimen]:
    for name, shape, dtype in _sizes(quick, (256, 64, 112, 112), (1, 64, 112, 112)):
        n, c, h, w = shape
        z, dy = _nhwc(shape, dtype), _nhwc((n, c, h // 2, w // 2), dtype)
        index, v, affine, window = _nhwc(dy.shape, torch.uint8), _float32(c), _affine(c), (3, 2, 1)
        reduce, gradient = (
            norm_pool.norm_max_pool_backward_reduce,
            norm_pool.norm_max_pool_backward_apply,
        )
        yield Specimen(name, partial(norm_pool.norm_apply_max_pool, z, affine, *window))
        yield Specimen(name, partial(reduce, dy, z, affine, index, *window))
        yield Specimen(name, partial(gradient, dy, z, affine, index, *window, v, v))
        yield Specimen(
            f"{name} running", partial(gradient, dy, z, affine, index, *window, None, None)
        )


class Layer(NamedTuple):
    """A convolution of ResNet-50 with a batch, ``size``: its input's height and width."""

    n: int
    c: int
    k: int
    size: int
    window: int
    stride: int

    @property
    def geometry(self) -> ConvGeometry:
        stride, padding = (self.stride,) * 2, (self.window // 2,) * 2
        return ConvGeometry(stride, padding, (1, 1), 1)

    @property
    def input(self) -> Shape:
        return self.n, self.c, self.size, self.size

    @property
    def output(self) -> Shape:
        return self.n, self.k, self.size // self.stride, self.size // self.stride

    @property
    def weight(self) -> Shape:
        return self.k, self.c, self.window, self.window


def _layers(n: int) -> Iterator[Layer]:
    yield Layer(n, 3, 64, 224, 7, 2)
    c = 64
    for width, size, stride in ((64, 56, 1), (128, 56, 2), (256, 28, 2), (512, 14, 2)):
        yield Layer(n, c, 4 * width, size, 1, stride)
        yield Layer(n, c, width, size, 1, 1)
        yield Layer(n, width, width, size, 3, stride)
        yield Layer(n, width, 4 * width, size // stride, 1, 1)
        yield Layer(n, 4 * width, width, size // stride, 1, 1)
        yield Layer(n, width, width, size // stride, 3, 1)
        c = 4 * width


KINDS = (
    ("half", torch.bfloat16, "ieee"),
    ("tf32", torch.float32, "tf32"),
    ("exact", torch.float32, "tf32x3"),
)
USUAL = Layer(256, 128, 128, 56, 3, 1)


def _convolutions(
    quick: bool, kernel: str, normed: bool
) -> Iterator[tuple[str, Layer, torch.dtype, dict[str, Any]]]:
    """(name, layer, dtype, options): every tile at a usual layer, then ResNet-50's in bf16."""
    for kind, dtype, precision in KINDS[: 1 if quick else None]:
        tiles = CONV_TILES[kernel][f"{kind} normed" if normed else kind]
        for tile in tiles[: 1 if quick else None]:
            shape = "{}×{}×{} {}w {}s".format(*tile)
            options = {"tile": tile, "precision": precision}
            yield f"{kind} {USUAL.window}² {shape}", USUAL, dtype, options
    if quick:
        return
    for layer in _layers(256):
        window = f"{layer.window}²" if layer.stride == 1 else f"{layer.window}²/2"
        sizes = f"{layer.n}×{layer.c}→{layer.k}×{layer.size}²"
        yield f"bf16 {window} {sizes}", layer, torch.bfloat16, {}


def _conv_fprop(quick: bool) -> Iterator[Specimen]:
    for normed in (False, True):
        for name, layer, dtype, options in _convolutions(quick, "conv_fprop", normed):
            if normed and layer.window == 7:  # the image is no norm's output
                continue
            x, w = _nhwc(layer.input, dtype), _nhwc(layer.weight, dtype)
            above, r = _affine(layer.k), _nhwc(layer.output, dtype)
            call = partial(conv_fprop.conv_fprop, x, w, None, layer.geometry, **options)
            if normed:
                before = _affine(layer.c)
                yield Specimen(
                    f"{name}: prologue, stats", partial(call, prologue=before, stats=True)
                )
                continue
            yield Specimen(f"{name}: stats", partial(call, stats=True))
            yield Specimen(
                f"{name}: norm +r relu", partial(call, norm=above, residual=r, relu=True)
            )


def _norm_gradient(dz: Tensor) -> NormGradient:
    v = _float32(dz.shape[1])
    return NormGradient(dz, torch.empty_like(dz), v, v, v, v)


def _conv_dgrad(quick: bool) -> Iterator[Specimen]:
    for normed in (False, True):
        for name, layer, dtype, options in _convolutions(quick, "conv_dgrad", normed):
            if layer.window == 7:  # the image needs no gradient
                continue
            dz, w, z = (_nhwc(s, dtype) for s in (layer.output, layer.weight, layer.input))
            below = Below(z, _affine(layer.c), None)
            join = below._replace(mask=_mask(layer.input), z2=z, mean2=_float32(layer.c))
            gradient, prologue = (_norm_gradient(dz), "norm's dz, ") if normed else (dz, "")
            call = partial(
                conv_dgrad.conv_dgrad, gradient, w, layer.input, layer.geometry, **options
            )
            yield Specimen(f"{name}: {prologue}relu, sums", partial(call, below=below))
            yield Specimen(
                f"{name}: {prologue}+r mask, 3 sums", partial(call, below=join, residual=z)
            )


def _conv_wgrad(quick: bool) -> Iterator[Specimen]:
    for normed in (False, True):
        for name, layer, dtype, options in _convolutions(quick, "conv_wgrad", normed):
            if normed and layer.window == 7:
                continue
            dz, x = _nhwc(layer.output, dtype), _nhwc(layer.input, dtype)
            shapes = {"x": x, "weight_shape": layer.weight, "g": layer.geometry}
            call = partial(conv_wgrad.conv_wgrad, **shapes, **options)
            if not normed:
                yield Specimen(f"{name}: x", partial(call, dz))
                continue
            call = partial(call, prologue=_affine(layer.c))
            yield Specimen(f"{name}: relu(norm(x))", partial(call, dz))
            lazy = _norm_gradient(dz)
            yield Specimen(f"{name}: norm's dz, relu(norm(x))", partial(call, lazy))


def specimens(quick: bool = False) -> list[Specimen]:
    """Every shipped tile at one layer, and ResNet-50's layers in bf16 at batch 256.

    ``quick``: the first shape in bf16 and the usual tile only.
    """
    files = _norm, _norm_persistent, _norm_pool, _conv_fprop, _conv_dgrad, _conv_wgrad
    return [each for file in files for each in file(quick)]


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
        found += [Variant(specimen.name, each) for each in launches]
    return found


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
    parser = argparse.ArgumentParser(prog="python -m resfast.kernels.aot", description=__doc__)
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

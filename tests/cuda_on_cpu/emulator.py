"""The CUDA library's raw ops on CPU tensors: its kernels' own source, compiled for the CPU."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from resfast import native

HERE = Path(__file__).resolve().parent
# both find what a kernel does outside its memory, or with a misaligned or uninitialised value
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# in the order of norm_program.cpp
OPS = native.CUDA_RAW_OPS
STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def missing_compiler() -> str | None:
    """Why no program with sanitizers can be built on this machine, or None."""
    compiler = _compiler()
    if shutil.which(compiler) is None:
        return f"no C++ compiler {compiler!r}"
    probe = [compiler, "-x", "c++", "-", *SANITIZERS, "-o", os.devnull]
    done = subprocess.run(probe, input="int main() {}", capture_output=True, text=True)
    return f"{compiler} has no sanitizers here: {done.stderr[-300:]}" if done.returncode else None


def compile_program(folder: Path, name: str = "norm_program") -> Path:
    """A program that runs kernels' source; AssertionError if it does not build."""
    compiler, program = _compiler(), folder / name
    command = [compiler, "-std=c++17", "-O1", "-g1", "-fno-strict-aliasing", *SANITIZERS]
    command += [f"-I{HERE}", f"-I{HERE.parent.parent / 'csrc'}", str(HERE / f"{name}.cpp")]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


class Emulator:
    """``torch.ops.resfast`` as far as ``cuda_norm_*`` goes, on CPU tensors.

    Arguments first pass the library's own checks, where it is built. ``processors``: of the chip
    that launches are made for.
    """

    def __init__(self, program: Path, processors: int = 2) -> None:
        self.processors = processors
        self._log = program.with_suffix(".log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(program)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
            )

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def __getattr__(self, name: str):
        if name not in OPS:
            raise AttributeError(name)
        schema = getattr(torch.ops.resfast, name).default._schema

        def call(*values, **keywords):
            names = [a.name for a in schema.arguments]
            arguments = dict(zip(names, values, strict=False)) | keywords
            assert list(arguments) == names
            check_arguments(name, arguments)
            self.run(name, arguments)

        return call

    def tilings(self, m: int, c: int, dtype: torch.dtype, aligned: bool) -> Tensor:
        """lanes, threads_c, threads_m, blocks_c, tiles, rows: of reductions, elementwise, held."""
        out = torch.zeros(3, 6, dtype=torch.int64)
        header = (len(OPS), m, c, STORAGE[dtype], aligned, self.processors, 0, 0, 0, 0, 0.0, 1)
        self._exchange(header, [out])
        return out

    def run(self, name: str, arguments: dict) -> None:
        buffers = [v for v in arguments.values() if v is None or isinstance(v, Tensor)]
        z = arguments.get("z")
        m, c, dtype = 1, next(len(b) for b in buffers if b is not None), torch.float32
        aligned = True
        if z is not None:
            m, c, dtype = z.shape[0] * z.shape[2] * z.shape[3], z.shape[1], z.dtype
            activations = [b for b in buffers if b is not None and b.dim() == 4]
            aligned = all(b.data_ptr() % 16 == 0 for b in activations)
        header = (
            *(OPS.index(name), m, c, STORAGE[dtype], aligned, self.processors),
            *(_mask_source(arguments), arguments.get("relu", False)),
            *(arguments.get("add_after_act", False), arguments.get("n", _in_double(arguments))),
            *(arguments.get("eps", 0.0), len(buffers)),
        )
        self._exchange(header, buffers)

    def _exchange(self, header: tuple, buffers: list[Tensor | None]) -> None:
        """Send a call; what comes back replaces the buffers' contents."""
        message = [struct.pack("10qdq", *map(int, header[:10]), *header[10:])]
        own: dict[int, int] = {}
        for i, b in enumerate(buffers):
            if b is None:
                message.append(struct.pack("qq", -1, 0))
            elif b.data_ptr() in own and b.numel():
                message.append(struct.pack("qq", -2 - own[b.data_ptr()], 0))
            else:
                own[b.data_ptr()] = i
                contents = _memory(b)
                message += [struct.pack("qq", len(contents), b.data_ptr() % 16), contents]
        try:
            self._process.stdin.write(b"".join(message))
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        for i in own.values():
            size = buffers[i].numel() * buffers[i].element_size()
            answer = self._process.stdout.read(size)
            if len(answer) < size:
                self._process.wait()
                raise AssertionError(self._log.read_text(errors="replace")[:4000])
            _fill(buffers[i], answer)


def check_arguments(name: str, arguments: dict) -> None:
    """The library's own op finds nothing wrong with them but that they are no CUDA tensors."""
    if not native.cuda_library()["built"]:
        return
    try:
        getattr(torch.ops.resfast, name)(**arguments)
    except RuntimeError as error:
        if "must be a CUDA tensor" not in str(error):
            raise
    else:
        raise AssertionError(f"{name} took CPU tensors")


def _mask_source(arguments: dict) -> int:
    """none, recompute, from_y, from_bits; the mask of a forward op is an output."""
    if "dy" not in arguments or not arguments["relu"]:
        return 0
    if arguments.get("mask") is not None:
        return 3
    return 1 if arguments["y"] is None else 2


def _in_double(arguments: dict) -> int:
    """Bits for a mean and M2 in double."""
    statistics = [arguments.get(name) for name in ("mean", "m2")]
    return sum(
        1 << i for i, t in enumerate(statistics) if t is not None and t.dtype == torch.float64
    )


def _in_memory(t: Tensor) -> Tensor:
    """Its values in the order of its memory."""
    t = t.detach()
    return t.permute(0, 2, 3, 1) if t.dim() == 4 else t


def _memory(t: Tensor) -> bytes:
    return _in_memory(t).contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _fill(t: Tensor, contents: bytes) -> None:
    if contents:
        into = _in_memory(t)
        values = torch.frombuffer(bytearray(contents), dtype=torch.uint8).view(t.dtype)
        into.copy_(values.view(into.shape))

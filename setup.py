"""Builds resfast's native libraries with ninja, one set of compiler flags per source file.

Environment: CXX, CXXFLAGS, MAX_JOBS; CUDA_HOME, TORCH_CUDA_ARCH_LIST, RESFAST_SKIP_CUDA_BUILD=1
(do not try), RESFAST_FORCE_CUDA=1 (fail where it cannot be built); RESFAST_BUILD_CUTLASS=1 (also
the convolutions for Hopper, from CUTLASS's headers), RESFAST_CUTLASS_DIR (where those are).
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

from torch_lookup import MINIMUM, Torch, find_torch, package_folders  # noqa: E402

TARGET_VERSION = "0x{:02x}{:02x}000000000000".format(*MINIMUM)
COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
]
# A source whose name ends in _<isa>.cpp is compiled for that instruction set.
ISA_FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        *("-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    ],
}
# Beyond a set: kernels of their own, chosen by what they compute.
EXTENSION_FLAGS = {"avx512bf16": [*ISA_FLAGS["avx512"], "-mavx512bf16"]}
DEFAULT_CUDA_ARCHS = {"8.0": (11, 0), "9.0a": (12, 0), "10.0": (12, 8)}  # and the first nvcc
MINIMUM_NVCC = (12, 0)
CUTLASS_ARCH = "9.0a"
MINIMUM_CUTLASS = (4, 2)


def is_set(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no", "off")


def say(message: str) -> None:
    print(f"resfast: {message}", flush=True)


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]


def isas() -> list[str]:
    return list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["scalar"]


class NoCuda(Exception):
    """The one-line reason why the CUDA library is not built."""


def find_nvcc() -> tuple[str, str]:
    """Path and version of nvcc, from CUDA_HOME, then PATH."""
    home = os.environ.get("CUDA_HOME")
    nvcc = os.path.join(home, "bin", "nvcc") if home else None
    if not nvcc or not os.path.exists(nvcc):
        nvcc = shutil.which("nvcc")
    if not nvcc:
        raise NoCuda("no nvcc in CUDA_HOME or on PATH")
    try:
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoCuda(f"{nvcc} --version failed: {error}") from None
    version = re.search(r"V(\d+)\.(\d+)\.(\d+)", answer.stdout)
    if not version:
        raise NoCuda(f"{nvcc} --version names no version")
    if tuple(map(int, version.groups()[:2])) < MINIMUM_NVCC:
        wanted = ".".join(map(str, MINIMUM_NVCC))
        raise NoCuda(f"nvcc {version.group(0)[1:]} is older than {wanted}")
    return nvcc, version.group(0)[1:]


def cuda_archs(nvcc_version: str) -> list[str]:
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    if asked:
        return asked
    have = tuple(map(int, nvcc_version.split(".")[:2]))
    return [arch for arch, first in DEFAULT_CUDA_ARCHS.items() if have >= first]


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if not parts:
            raise NoCuda(
                f"TORCH_CUDA_ARCH_LIST has {arch!r}; numbers like 8.0, 9.0a or 9.0+PTX are read"
            )
        number = "".join(parts.groups()[:3])
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if parts.group(4):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class NoCutlass(Exception):
    """The one-line reason why the kernels that need CUTLASS are not built."""


def find_cutlass(archs: list[str]) -> tuple[Path, str]:
    """A CUTLASS source tree, RESFAST_CUTLASS_DIR or nvidia-cutlass's, and its version."""
    if not is_set("RESFAST_BUILD_CUTLASS"):
        raise NoCutlass("RESFAST_BUILD_CUTLASS is not set")
    if CUTLASS_ARCH not in archs:
        raise NoCutlass(f"they are for {CUTLASS_ARCH}, TORCH_CUDA_ARCH_LIST is {' '.join(archs)}")
    asked = os.environ.get("RESFAST_CUTLASS_DIR")
    folders = [Path(asked)] if asked else []
    if not asked:
        folders = [folder / "source" for folder in package_folders("cutlass_library")]
    for folder in folders:
        if all(include.is_dir() for include in cutlass_includes(folder)):
            return folder, cutlass_version(folder)
    raise NoCutlass(
        f"RESFAST_CUTLASS_DIR={asked} is no CUTLASS source tree"
        if asked
        else "no headers: pip install nvidia-cutlass==4.2.0, or name a tree in RESFAST_CUTLASS_DIR"
    )


def cutlass_includes(folder: Path) -> list[Path]:
    return [folder / "include", folder / "tools" / "util" / "include"]


def cutlass_version(folder: Path) -> str:
    try:
        text = (folder / "include" / "cutlass" / "version.h").read_text()
    except OSError as error:
        raise NoCutlass(f"CUTLASS names no version: {error}") from None
    numbers = [
        int(n) for n in re.findall(r"^#define CUTLASS_(?:MAJOR|MINOR|PATCH)\s+(\d+)", text, re.M)
    ]
    version = ".".join(map(str, numbers))
    if tuple(numbers[:2]) < MINIMUM_CUTLASS:
        raise NoCutlass(
            f"CUTLASS {version} in {folder} is older than {'.'.join(map(str, MINIMUM_CUTLASS))}"
        )
    return version


class Ninja:
    """A build.ninja under `folder`, its commands run in the project's root."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file = folder / "build.ninja"
        self.lines = [
            "ninja_required_version = 1.5",
            f"builddir = {self.escape(folder)}",
            "rule compile",
            "  command = $cc -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $in",
            "rule link",
            "  command = $cc -shared $in -o $out $flags",
            "  description = $out",
        ]

    @staticmethod
    def escape(path) -> str:
        path = os.path.relpath(path, ROOT) if Path(path).is_relative_to(ROOT) else str(path)
        return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def add(self, rule: str, out: Path, sources: list, cc: list[str], flags: list[str]) -> Path:
        inputs = " ".join(map(self.escape, sources))
        self.lines += [
            f"build {self.escape(out)}: {rule} {inputs}",
            f"  cc = {self.quote(cc)}",
            f"  flags = {self.quote(flags)}",
        ]
        return out

    @staticmethod
    def quote(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    def command(self, targets: list[Path], *options: str) -> list[str]:
        write_if_changed(self.file, "\n".join(self.lines) + "\n")
        names = [os.path.relpath(t, ROOT) if t.is_relative_to(ROOT) else str(t) for t in targets]
        program = [ninja_program(), "-C", str(ROOT), "-f", str(self.file)]
        return [*program, "-j", str(jobs()), *options, *names]

    def up_to_date(self, targets: list[Path]) -> bool:
        answer = subprocess.run(self.command(targets, "-n"), capture_output=True, text=True)
        return answer.returncode == 0 and "no work to do" in answer.stdout

    def run(self, targets: list[Path], *options: str) -> tuple[int, str]:
        """Exit status and what ninja said, shown as it comes."""
        said = []
        with subprocess.Popen(
            self.command(targets, *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                said.append(line)
        return process.returncode, "".join(said)


def jobs() -> int:
    asked = os.environ.get("MAX_JOBS", "")
    if asked:
        if not asked.isdigit() or int(asked) < 1:
            raise BaseError(f"MAX_JOBS={asked!r} is not a positive number")
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ninja_program() -> str:
    try:
        import ninja

        program = os.path.join(ninja.BIN_DIR, "ninja")
        if os.path.exists(program):
            return program
    except ImportError:
        pass
    program = shutil.which("ninja")
    if not program:
        raise BaseError("ninja is not installed: pip install ninja")
    return program


def pybind11_include(folder: Path) -> Path:
    """pybind11's headers, copied to a path that outlives pip's build environment, so that
    module.cpp is not rebuilt by every install."""
    import pybind11

    copy = folder / f"pybind11-{pybind11.__version__}"
    if not copy.exists():
        partial = folder / f"pybind11-partial-{os.getpid()}"
        shutil.copytree(pybind11.get_include(), partial)
        partial.rename(copy)
    return copy


class NinjaBuildExt(build_ext):
    """`_C` for the CPU; `_C_cuda` beside it where nvcc can build it."""

    def run(self) -> None:
        if sys.platform != "linux":
            raise BaseError(f"resfast's native library builds on Linux only, not {sys.platform}")
        torch = find_torch()
        if torch is None:
            wanted = ".".join(map(str, MINIMUM))
            raise BaseError(f"no torch >= {wanted} found to build against: pip install torch")
        tag = f"{sysconfig.get_config_var('SOABI')}-torch{torch.version}"
        folder = ROOT / "build" / tag
        if not os.access(ROOT, os.W_OK):
            folder = Path(self.build_temp).resolve() / tag
        folder.mkdir(parents=True, exist_ok=True)
        self.built = self.build_libraries(torch, folder)
        if "resfast._C_cuda" not in self.built:
            self.extensions = [e for e in self.extensions if e.name != "resfast._C_cuda"]
            if self.inplace:  # nothing stale may be left beside the sources
                (ROOT / "resfast" / "_C_cuda.so").unlink(missing_ok=True)
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_C_cuda"):  # loaded by path, no Python module
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy2(self.built[ext.name], partial)
        partial.replace(target)  # a process that has the old one loaded keeps it

    def build_libraries(self, torch: Torch, folder: Path) -> dict[str, Path]:
        cxx = shlex.split(os.environ.get("CXX", "")) or ["c++"]
        if not shutil.which(cxx[0]):
            raise BaseError(f"no C++ compiler {cxx[0]!r}: install g++, or name one in CXX")
        flags = COMMON_FLAGS + shlex.split(os.environ.get("CXXFLAGS", ""))
        suffixes = {isa: ISA_FLAGS[isa] for isa in isas()}
        if len(suffixes) > 1:
            suffixes |= EXTENSION_FLAGS
        defines = [f"-DRESFAST_HAS_{suffix.upper()}" for suffix in suffixes]
        torch_include = ["-isystem", str(torch.include)]
        # torch carries a pybind11 of its own, closed to users of the stable ABI.
        python_include = [
            *("-isystem", str(pybind11_include(folder))),
            *("-isystem", sysconfig.get_paths()["include"]),
        ]
        ninja = Ninja(folder)

        objects = []
        for source in sorted((ROOT / "csrc").glob("*.cpp")) + sorted(
            (ROOT / "csrc" / "cpu").glob("*.cpp")
        ):
            suffix = source.stem.rpartition("_")[2]
            if suffix in ISA_FLAGS | EXTENSION_FLAGS and suffix not in suffixes:
                continue
            own = list(suffixes.get(suffix, []))
            own += python_include if source.stem == "module" else torch_include
            out = folder / source.relative_to(ROOT).with_suffix(".o")
            objects.append(
                ninja.add("compile", out, [source], cxx, [*flags, *defines, "-Icsrc", *own])
            )

        cuda: dict[str, object] = {"built": False}
        cuda_library = None
        try:
            if is_set("RESFAST_SKIP_CUDA_BUILD"):
                raise NoCuda("RESFAST_SKIP_CUDA_BUILD is set")
            host = [*flags, "-Icsrc", *torch_include]
            cuda_library, cuda = self.add_cuda(ninja, folder, cxx, host, torch)
        except NoCuda as reason:
            cuda["reason"] = str(reason)

        # Objects and the CUDA library first: whether the latter was built goes into the former.
        targets = objects + ([cuda_library] if cuda_library else [])
        status, said = ninja.run(targets, "-k", "0")
        if status:
            if not ninja.up_to_date(objects):
                raise BaseError("the CPU library failed to compile; see the compiler's message")
            if cuda_library:
                lines = [line for line in said.split("\n") if re.search(r"\b(error|fatal)\b", line)]
                cuda = {"built": False, "reason": f"nvcc failed: {(lines or ['see above'])[0]}"}
                cuda_library = None
        if not cuda["built"]:
            say(f"CUDA library not built: {cuda['reason']}")
            if is_set("RESFAST_FORCE_CUDA"):
                raise BaseError(f"RESFAST_FORCE_CUDA is set, but: {cuda['reason']}")

        info = {
            "version": self.distribution.get_version(),
            "torch": torch.version,
            "compiler": first_line([*cxx, "--version"]),
            "isas": isas(),
            "cxx_flags": shlex.join(flags),
            "isa_flags": {isa: shlex.join(ISA_FLAGS[isa]) for isa in isas()},
            "cuda": cuda,
        }
        generated = folder / "build_info.cpp"
        write_if_changed(
            generated,
            "namespace resfast { extern const char* const build_info_json; }\n"
            "const char* const resfast::build_info_json =\n"
            f'    R"resfast({json.dumps(info, indent=1)})resfast";\n',
        )
        objects.append(
            ninja.add(
                "compile",
                generated.with_suffix(".o"),
                [generated],
                cxx,
                ["-fPIC", "-fvisibility=hidden"],
            )
        )
        # libstdc++ first: libtorch_cpu carries copies of some of its symbols, without versions.
        link = ["-Wl,-O1", "-Wl,--gc-sections", "-lstdc++", f"-L{torch.lib}", "-ltorch_cpu"]
        library = ninja.add("link", folder / "_C.so", objects, cxx, link)
        if ninja.run([library])[0]:
            raise BaseError("the CPU library failed to link; see the linker's message")
        built = {"resfast._C": library}
        if cuda_library:
            built["resfast._C_cuda"] = cuda_library
        return built

    def add_cuda(
        self, ninja: Ninja, folder: Path, cxx: list[str], host_flags: list[str], torch: Torch
    ) -> tuple[Path, dict]:
        nvcc, version = find_nvcc()
        archs = cuda_archs(version)
        common = ["-std=c++17", "-O3", "-Icsrc", "-ccbin", cxx[0]]
        common += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        objects = []
        try:
            cutlass_folder, cutlass_number = find_cutlass(archs)
            cutlass = ("version", cutlass_number)
            host_flags = [*host_flags, "-DRESFAST_HAS_CUTLASS"]
            # an assertion in a kernel is a call, and calls keep ptxas from overlapping products
            own = [*common, *gencode([CUTLASS_ARCH]), "-DNDEBUG", "--expt-relaxed-constexpr"]
            for include in cutlass_includes(cutlass_folder):
                own += ["-isystem", str(include)]
            for source in sorted((ROOT / "csrc" / "cuda" / "cutlass").glob("*.cu")):
                out = folder / source.relative_to(ROOT).with_name(source.name + ".o")
                objects.append(ninja.add("compile", out, [source], [nvcc], own))
        except NoCutlass as reason:
            cutlass = ("reason", str(reason))
            if is_set("RESFAST_BUILD_CUTLASS"):
                say(f"CUTLASS kernels not built: {reason}")
        flags = [
            *(*common, *gencode(archs)),
            f"-DRESFAST_CUDA_ARCHS={json.dumps(' '.join(archs))}",
            f"-DRESFAST_NVCC_VERSION={json.dumps(version)}",
            f"-DRESFAST_CUTLASS_KEY={json.dumps(cutlass[0])}",
            f"-DRESFAST_CUTLASS_VALUE={json.dumps(cutlass[1])}",
        ]
        # norm.cpp and norm.cu lie side by side: the object keeps the whole name
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.c[pu]*")):
            out = folder / source.relative_to(ROOT).with_name(source.name + ".o")
            compiler, own = ([nvcc], flags) if source.suffix == ".cu" else (cxx, host_flags)
            objects.append(ninja.add("compile", out, [source], compiler, own))
        # nothing of torch's CUDA libraries: the library also loads with a CPU build of torch
        link = ["-cudart", "static", *gencode(archs), "-ccbin", cxx[0]]
        link += ["-lstdc++", f"-L{torch.lib}", "-ltorch_cpu", "-ldl"]
        library = ninja.add("link", folder / "_C_cuda.so", objects, [nvcc], link)
        return library, {"built": True, "nvcc": version, "architectures": archs}


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def headers() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "resfast._C",
                sources=sources("", ".cpp") + sources("cpu", ".cpp"),
                depends=headers(),
            ),
            Extension(
                "resfast._C_cuda",
                sources=sources("cuda", ".cpp") + sources("cuda", ".cu"),
                depends=headers(),
            ),
        ],
        cmdclass={"build_ext": NinjaBuildExt},
    )

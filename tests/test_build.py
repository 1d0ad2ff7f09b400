"""The build: what it says of itself, what the libraries link to, and what is asked of torch."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import needs
import pytest
import torch

from resfast import native

ROOT = Path(__file__).resolve().parent.parent


# ---- the library


@needs.native_library
def test_build_info():
    info = native.build_info()
    import resfast

    assert info["version"] == resfast.__version__
    assert re.match(r"\d+\.\d+", info["torch"])
    assert info["compiler"]
    assert "scalar" in info["isas"]
    assert native.cpu_isa() in info["isas"]
    assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in info["cxx_flags"]
    assert "-O3" in info["cxx_flags"]
    assert "mavx" not in info["cxx_flags"] + info["isa_flags"]["scalar"]
    assert info["cuda"]["built"] or info["cuda"]["reason"]


def library() -> str:
    return importlib.import_module("resfast._C").__file__


def lines_of(*command: str) -> list[str]:
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@needs.native_library
def test_only_stable_symbols_of_torch_are_used():
    undefined = [line.split()[-1] for line in lines_of("nm", "-D", "--undefined-only", library())]
    of_torch = [name for name in undefined if re.match(r"(aoti_)?torch_", name)]
    assert any(name.startswith("torch_parallel_for") for name in of_torch)
    # Those of libc and libstdc++ carry versions; the rest are Python's, weak hooks and torch's C.
    known = r"Py|_Py|(aoti_)?torch_|_ITM_|__gmon_start__|__cxa_|__gxx|.*@(GLIBC|CXXABI|GCC)"
    foreign = [name for name in undefined if not re.match(known, name)]
    assert foreign == []


@needs.native_library
def test_links_against_libtorch_cpu_only_and_without_a_path():
    dynamic = lines_of("readelf", "-d", "-W", library())
    needed = {re.search(r"\[(.*)\]", line).group(1) for line in dynamic if "(NEEDED)" in line}
    allowed = r"libtorch_cpu|libstdc\+\+|libgcc_s|libc|libm|libpthread|ld-linux"
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if not re.match(rf"({allowed})[.-]", name)] == []
    assert not any("RPATH" in line or "RUNPATH" in line for line in dynamic)


@needs.cuda_library
def test_cuda_library_asks_nothing_of_cuda_builds_of_torch():
    dynamic = lines_of("readelf", "-d", "-W", needs.CUDA_LIBRARY)
    needed = {re.search(r"\[(.*)\]", line).group(1) for line in dynamic if "(NEEDED)" in line}
    allowed = r"libtorch_cpu|libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux"
    assert [name for name in needed if not re.match(rf"({allowed})[.-]", name)] == []
    assert not any("RPATH" in line or "RUNPATH" in line for line in dynamic)
    in_cpu = {line.split()[-1] for line in lines_of("nm", "-D", "--defined-only", libtorch_cpu())}
    undefined = [
        line.split()[-1] for line in lines_of("nm", "-D", "--undefined-only", needs.CUDA_LIBRARY)
    ]
    of_torch = {name for name in undefined if re.match(r"(aoti_)?torch_", name)}
    assert of_torch
    assert of_torch - in_cpu == set()


def libtorch_cpu() -> str:
    return str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")


@needs.native_library
def test_nothing_but_the_module_is_exported():
    exported = [line.split()[-1] for line in lines_of("nm", "-D", "--defined-only", library())]
    assert "PyInit__C" in exported
    assert [name for name in exported if "resfast" in name] == []


def test_no_function_leaks_out_of_an_instruction_set():
    """A weak symbol in an AVX object may be the copy that the linker keeps for all."""
    objects = list(ROOT.glob("build/*/csrc/cpu/*_avx*.o"))
    if not objects:
        pytest.skip("no object files here")
    for path in objects:
        symbols = [line.split()[-2:] for line in lines_of("nm", "--defined-only", str(path))]
        assert [name for kind, name in symbols if kind in "WVu"] == [], path.name
        code = [name for kind, name in symbols if kind == "T"]
        assert code == [], path.name


# ---- resfast.native


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_disabled_library_reports_its_absence():
    code = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from resfast import native
    native.warn_if_unavailable()
    native.warn_if_unavailable()
texts = [str(w.message) for w in caught if "native" in str(w.message)]
print(json.dumps([native.is_available(), native.load_error(), native.build_info(),
                  native.cpu_isa(), texts]))
"""
    done = run_python(code, RESFAST_DISABLE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    available, error, info, isa, warned = json.loads(done.stdout.splitlines()[-1])
    assert not available
    assert "RESFAST_DISABLE_NATIVE" in error
    assert info == {}
    assert isa is None
    assert len(warned) == 1
    assert error in warned[0]


@needs.native_library
def test_unknown_instruction_set_in_the_environment_is_an_error():
    code = "import resfast._C as c; print(c.build_info()['isas']); c.cpu_isa()"
    done = run_python("import torch; " + code, RESFAST_CPU_ISA="altivec")
    assert done.returncode != 0
    assert "RESFAST_CPU_ISA: 'altivec' is no instruction set" in done.stderr


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ModuleNotFoundError("No module named 'resfast._C'"), ["not built", "pip install -e ."]),
        (ImportError("undefined symbol: torch_x"), ["undefined symbol: torch_x", "pip install"]),
        (OSError("wrong ELF class"), ["wrong ELF class", torch.__version__]),
    ],
)
def test_load_error_gives_reason_and_command(monkeypatch, error, says):
    def fail(name):
        raise error

    monkeypatch.delenv("RESFAST_DISABLE_NATIVE", raising=False)
    monkeypatch.setattr(native.importlib, "import_module", fail)
    module, reason = native._load()
    assert module is None
    for part in says:
        assert part in reason


def test_cuda_library_says_what_it_is():
    info = native.cuda_library()
    if info["built"]:
        assert info["nvcc"]
        assert info["architectures"]
        missing = native.cutlass_missing()
        assert info["cutlass"] == ({"reason": missing} if missing else info["cutlass"])
        assert missing or re.fullmatch(r"\d+\.\d+\.\d+", info["cutlass"]["version"])
    else:
        assert info["reason"]


# ---- the build backend


@pytest.fixture
def lookup(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    return importlib.import_module("torch_lookup")


@pytest.fixture
def backend(lookup, monkeypatch):
    pytest.importorskip("setuptools")
    module = importlib.import_module("resfast_build")
    for hook in ("get_requires_for_build_wheel", "get_requires_for_build_editable"):
        monkeypatch.setattr(module._setuptools, hook, lambda settings=None: ["wheel"])
    return module


def fake_torch(folder: Path, version: str) -> Path:
    headers = folder / "torch" / "include" / "torch" / "csrc" / "stable"
    headers.mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    return folder / "torch"


@pytest.mark.parametrize(
    ("version", "asked"),
    [
        (None, ["torch>=2.11"]),
        ("2.9.1", ["torch>=2.11"]),
        ("2.10.0+cpu", ["torch>=2.11"]),
        ("2.11.0", []),
        ("2.13.0a0+git1234", []),
        ("3.0", []),
    ],
)
def test_torch_is_asked_for_only_where_there_is_none(
    backend, lookup, monkeypatch, tmp_path, version, asked
):
    paths = {"purelib": str(tmp_path / "pure"), "platlib": str(tmp_path / "plat")}
    if version:
        fake_torch(tmp_path / "plat", version)
    monkeypatch.setattr(lookup, "_importable_here", lambda: [])
    monkeypatch.setattr(lookup, "_outside_isolation", lambda: [])
    monkeypatch.setattr(lookup.sysconfig, "get_paths", lambda: paths)
    assert backend.get_requires_for_build_wheel() == ["wheel", *asked]
    assert backend.get_requires_for_build_editable() == ["wheel", *asked]


def test_torch_in_the_build_environment_comes_first(lookup, monkeypatch, tmp_path):
    here = fake_torch(tmp_path / "here", "2.12.0")
    outside = fake_torch(tmp_path / "outside", "2.11.0")
    monkeypatch.setattr(lookup, "_in_site_packages", lambda: [])
    monkeypatch.setattr(lookup, "_outside_isolation", lambda: [str(outside)])
    monkeypatch.setattr(lookup, "_importable_here", lambda: [str(here)])
    assert lookup.find_torch().version == "2.12.0"
    monkeypatch.setattr(lookup, "_importable_here", lambda: [])
    assert lookup.find_torch().path == outside


def test_lookup_finds_the_running_torch_from_outside_isolation(lookup, monkeypatch):
    monkeypatch.setattr(lookup, "_importable_here", lambda: [])
    monkeypatch.setattr(lookup, "_in_site_packages", lambda: [])
    found = lookup.find_torch()
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    if any(Path(torch.__file__).is_relative_to(Path(p).resolve()) for p in paths):
        pytest.skip("torch is importable through PYTHONPATH only, which isolation hides")
    assert found is not None
    assert found.version == torch.__version__


# ---- setup.py


@pytest.fixture(scope="module")
def setup_py():
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("resfast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    before = sys.path[:]
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def test_cuda_architectures(setup_py, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert setup_py.cuda_archs("13.0.88") == ["8.0", "9.0a", "10.0"]
    assert setup_py.cuda_archs("12.4.1") == ["8.0", "9.0a"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0a+PTX 12.0")
    archs = setup_py.cuda_archs("13.0.88")
    assert setup_py.gencode(archs) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
        "-gencode=arch=compute_120,code=sm_120",
    ]
    with pytest.raises(setup_py.NoCuda, match="'Hopper'"):
        setup_py.gencode(["Hopper"])


def fake_nvcc(folder: Path, says: str) -> Path:
    program = folder / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(0o755)
    return program


def test_nvcc_is_taken_from_cuda_home_then_path(setup_py, monkeypatch, tmp_path):
    in_home = fake_nvcc(tmp_path / "home", "Cuda compilation tools, release 12.8, V12.8.61")
    on_path = fake_nvcc(tmp_path / "path", "Cuda compilation tools, release 11.8, V11.8.89")
    monkeypatch.setenv("PATH", str(on_path.parent) + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup_py.find_nvcc() == (str(in_home), "12.8.61")
    monkeypatch.delenv("CUDA_HOME")
    with pytest.raises(setup_py.NoCuda, match=r"nvcc 11\.8\.89 is older than 12\.0"):
        setup_py.find_nvcc()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(setup_py.NoCuda, match="no nvcc"):
        setup_py.find_nvcc()


def fake_cutlass(folder: Path, version: tuple[int, int, int]) -> Path:
    (folder / "include" / "cutlass").mkdir(parents=True)
    (folder / "tools" / "util" / "include").mkdir(parents=True)
    lines = zip(("MAJOR", "MINOR", "PATCH"), version, strict=True)
    text = "".join(f"#define CUTLASS_{name} {number}\n" for name, number in lines)
    (folder / "include" / "cutlass" / "version.h").write_text(text)
    return folder


def test_cutlass_is_used_where_it_is_asked_for_and_there(setup_py, monkeypatch, tmp_path):
    archs = ["8.0", "9.0a"]
    monkeypatch.delenv("RESFAST_BUILD_CUTLASS", raising=False)
    monkeypatch.delenv("RESFAST_CUTLASS_DIR", raising=False)
    with pytest.raises(setup_py.NoCutlass, match="RESFAST_BUILD_CUTLASS is not set"):
        setup_py.find_cutlass(archs)
    monkeypatch.setenv("RESFAST_BUILD_CUTLASS", "1")
    with pytest.raises(setup_py.NoCutlass, match=r"for 9\.0a, TORCH_CUDA_ARCH_LIST is 8\.0"):
        setup_py.find_cutlass(["8.0"])
    package = tmp_path / "cutlass_library"
    monkeypatch.setattr(
        setup_py, "package_folders", lambda name: [package] if name == package.name else []
    )
    with pytest.raises(setup_py.NoCutlass, match="pip install nvidia-cutlass"):
        setup_py.find_cutlass(archs)
    tree = fake_cutlass(package / "source", (4, 2, 0))
    assert setup_py.find_cutlass(archs) == (tree, "4.2.0")
    monkeypatch.setenv("RESFAST_CUTLASS_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(setup_py.NoCutlass, match="nowhere is no CUTLASS source tree"):
        setup_py.find_cutlass(archs)
    old = fake_cutlass(tmp_path / "old", (3, 9, 2))
    monkeypatch.setenv("RESFAST_CUTLASS_DIR", str(old))
    with pytest.raises(setup_py.NoCutlass, match=r"CUTLASS 3\.9\.2 in .* is older than 4\.2"):
        setup_py.find_cutlass(archs)


def test_packages_are_found_as_torch_is(lookup):
    folders = lookup.package_folders("pytest")
    assert Path(pytest.__file__).parent in folders


def test_max_jobs(setup_py, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup_py.jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(setup_py.BaseError, match="MAX_JOBS='many'"):
        setup_py.jobs()
    monkeypatch.delenv("MAX_JOBS")
    assert setup_py.jobs() >= 1


def test_every_package_is_listed():
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^packages = \[(.*?)\]", text, re.S | re.M).group(1)
    listed = set(re.findall(r'"([\w.]+)"', listed))
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "resfast").rglob("__init__.py")
    }
    assert found | {"resfast.kernels"} == listed


def installed() -> bool:
    """Whether this environment's own folders, not PYTHONPATH, know the distribution."""
    folders = [sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
    return any(importlib.metadata.distributions(name="resfast", path=folders))


def test_kernels_package_is_importable_from_elsewhere(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import resfast.kernels as k; print(k.__doc__)"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "No module named 'resfast'" in done.stderr and not installed():
        pytest.skip("resfast is not installed in this environment")
    assert done.returncode == 0, done.stderr
    assert "Triton" in done.stdout

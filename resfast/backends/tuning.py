"""Tiles measured on this device and remembered: in a file a device, and shipped with the package.

So are choices among kernels: whose norms (norm_race.py), whose convolutions (engines.py, and on
CPU cpu_engines.py).

``RESFAST_TUNE``: "first" measures at the first use of a size (default), "never" takes what is
remembered, or else the cost model's tile and the first in order. ``RESFAST_CACHE_DIR``: where the
files are, by default ``$XDG_CACHE_HOME/resfast`` or ``~/.cache/resfast``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import statistics
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from resfast import native
from resfast.backends.interface import ConvGeometry, takes_tf32
from resfast.backends.processor import cpu_name

MODES = ("first", "never")
FORMAT = 2
REPETITIONS = 10
# a candidate this much slower than the best is not measured further
HOPELESS = 1.5
# seconds for the file, while other processes write to it
PATIENCE = 10.0

_lock = threading.RLock()


def cache_dir() -> Path:
    """Where measurements are kept."""
    given = os.environ.get("RESFAST_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "resfast"


def mode() -> str:
    """``RESFAST_TUNE``, checked.

    Raises:
        ValueError: no such mode.
    """
    value = os.environ.get("RESFAST_TUNE", "first")
    if value not in MODES:
        raise ValueError(f"RESFAST_TUNE must be one of {', '.join(MODES)}, got {value!r}")
    return value


def file_name(device: str) -> str:
    """Of a device's measurements: ``tiles-nvidia-h100-80gb-hbm3.json``."""
    return f"tiles-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


class Tiles:
    """The remembered tiles of one device: key → tile, as numbers."""

    def __init__(self, device: str, versions: dict[str, str]) -> None:
        self.device = device
        self.versions = versions
        self.path = cache_dir() / file_name(device)
        shipped = Path(__file__).parent / "shipped" / file_name(device)
        # shipped tiles hold for whatever version; one's own were measured with these
        self.known = self._read(shipped, None) | self._read(self.path, versions)

    def _read(self, path: Path, versions: dict[str, str] | None) -> dict[str, list[int]]:
        try:
            record = json.loads(path.read_text())
            if record["format"] != FORMAT or versions not in (None, record["versions"]):
                return {}
            tiles = {str(k): [int(n) for n in v] for k, v in record["tiles"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"{path} is not read: {type(error).__name__}: {error}", stacklevel=2)
            return {}
        return tiles

    def remember(self, key: str, tile: Sequence[int]) -> None:
        """Keep it, also on disk, where that can be written, beside what other processes kept."""
        self.known[key] = list(tile)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=PATIENCE):
                self.known = self._read(self.path, self.versions) | self.known
                self._write()
        except OSError as error:  # filelock.Timeout is one
            warnings.warn(f"tiles are not kept: {error}", stacklevel=2)

    def _write(self) -> None:
        record = {
            "format": FORMAT,
            "device": self.device,
            "versions": self.versions,
            "tiles": dict(sorted(self.known.items())),
        }
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(record, indent=1) + "\n")
            temporary.replace(self.path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _code_version(*kernels: Path) -> str:
    """resfast's version, and a digest of these files: a checkout's kernels change within one."""
    import resfast

    digest = hashlib.sha256()
    for path in kernels:
        digest.update(path.read_bytes())
    return f"{resfast.__version__}+{digest.hexdigest()[:16]}"


def _cuda_kernels() -> list[Path]:
    package = importlib.util.find_spec("resfast.kernels")  # None in a checkout on the path alone
    found = package.submodule_search_locations if package is not None else None
    folders = [Path(folder) for folder in found or ()]
    library = native.cuda_library_path()
    sources = sorted(path for folder in folders for path in folder.glob("*.py"))
    return [*sources, library] if library.exists() else sources


@functools.cache
def tiles_of(device: str) -> Tiles:
    """The process's tiles for devices of this name."""
    try:
        import triton

        version = triton.__version__
    except ImportError:  # CUTLASS's are measured without it
        version = ""
    # whose kernels race, and what was found of cuDNN's statistics before they did
    cudnn = str(torch.backends.cudnn.version())
    resfast = _code_version(*_cuda_kernels())
    versions = {"torch": torch.__version__, "triton": version, "cudnn": cudnn, "resfast": resfast}
    return Tiles(device, versions)


@functools.cache
def cpu_tiles() -> Tiles:
    """The process's choices for this processor."""
    library = native.library_path()
    resfast = _code_version(*([] if library is None else [library]))
    return Tiles(cpu_name(), {"torch": torch.__version__, "resfast": resfast})


@functools.cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def measures(device: torch.device) -> bool:
    """Whether measurements are made, and remembered ones used, on such a device."""
    return device.type == "cuda"


_retuning = False


@contextlib.contextmanager
def retuning() -> Iterator[None]:
    """Measure anew whatever is used inside, also what is remembered."""
    global _retuning
    before, _retuning = _retuning, True
    try:
        yield
    finally:
        _retuning = before


def is_retuning() -> bool:
    """Whether what is remembered may be measured anew."""
    return _retuning


def convolution_key(function: str, t: Tensor, weight: Tensor, g: ConvGeometry) -> str:
    """A convolution's size, as measurements are kept by; t is x, or dz for a gradient."""
    tf32 = measures(t.device) and takes_tf32(t)
    dtype = "tf32" if tf32 else str(t.dtype).removeprefix("torch.")
    shapes = " ".join("x".join(map(str, each.shape)) for each in (t, weight))
    numbers = ",".join(str(v) for pair in g[:3] for v in pair)
    return f"{function} {dtype} {shapes} {numbers}"


_measured: set[str] = set()

# Replacing a library's convolution pays from about 74 % of its speed on: the norms' passes beside
# it are gone.
WORTH = 0.74


def known_engine(key: str, device: torch.device) -> bool | None:
    """Whether resfast's own kernel was measured to be worth while, None where nothing is known."""
    if not measures(device):
        return None
    found = tiles_of(_name(device.index)).known.get(f"{key} own")
    return None if found is None else bool(found[0])


def compare_engines(
    key: str, own: Callable[[], Any], library: Callable[[], Any], device: torch.device
) -> None:
    """While retuning on CUDA, measure the two once and remember whether ``own`` is worth while."""
    name = f"{key} own"
    if not _retuning or not measures(device) or name in _measured:
        return
    _measured.add(name)
    share = time_on_cuda(library, REPETITIONS) / time_on_cuda(own, REPETITIONS)
    tiles_of(_name(device.index)).remember(name, [int(share >= WORTH)])


def choose(
    key: str,
    candidates: Sequence[Any],
    run: Callable[[Any], Any],
    device: torch.device,
) -> Any:
    """The tile for ``key``: remembered, else the fastest of ``candidates``, else the first.

    ``run`` launches the kernel with a candidate. Measures on CUDA only, and never while a graph is
    captured.
    """
    if not measures(device):
        return candidates[0]
    return _recall(
        key,
        candidates,
        lambda: fastest(key, candidates, run, time_on_cuda),
        tiles_of(_name(device.index)),
        lambda: not torch.cuda.is_current_stream_capturing(),
    )


def _recall(
    key: str,
    candidates: Sequence[Any],
    measure: Callable[[], Any],
    tiles: Tiles,
    may_measure: Callable[[], bool],
) -> Any:
    """What ``tiles`` has for ``key``, else what ``measure`` finds, else the first candidate.

    What it finds is remembered, unless it is None.
    """
    kind = type(candidates[0])
    anew = _retuning and key not in _measured
    if key in tiles.known and not anew:
        return kind(*tiles.known[key])
    if (mode() == "never" and not anew) or not may_measure():
        return candidates[0]
    with _lock:
        if key in tiles.known and not anew:
            return kind(*tiles.known[key])
        best = measure()
        if best is None:
            return candidates[0]
        tiles.remember(key, best)
        _measured.add(key)
    return best


class _Position(NamedTuple):
    """Of a name, in their alphabetical order: a choice as it is remembered."""

    number: int


def choose_name(key: str, runs: dict[str, Callable[[], Any]], device: torch.device) -> str:
    """``choose`` among runs by their names, the first being taken where nothing is known."""
    names = sorted(runs)
    candidates = [_Position(names.index(name)) for name in runs]
    best: _Position = choose(
        f"{key} {'/'.join(names)}", candidates, lambda p: runs[names[p.number]](), device
    )
    return names[best.number]


def chosen_name(key: str, choice: Sequence[int]) -> str:
    """What a remembered choice of ``choose_name`` means."""
    return key.rsplit(" ", 1)[1].split("/")[choice[0]]


def choose_on_cpu(key: str, names: Sequence[str], measure: Callable[[], str | None]) -> str:
    """The name for ``key``: remembered, else what ``measure`` finds, else the first.

    One measurement at a time. ``measure`` finds None where the machine is too busy.
    """
    ordered = sorted(names)
    candidates = [_Position(ordered.index(name)) for name in names]

    def position() -> _Position | None:
        name = measure()
        return None if name is None else _Position(ordered.index(name))

    with _lock:  # threads that call it first together would read the file each
        tiles = cpu_tiles()
    best: _Position = _recall(
        f"{key} {'/'.join(ordered)}", candidates, position, tiles, lambda: True
    )
    return ordered[best.number]


def fastest(
    key: str,
    candidates: Sequence[Any],
    run: Callable[[Any], Any],
    timer: Callable[[Callable[[], Any], int], float],
) -> Any:
    """The candidate of least time; one that does not run is left out.

    Raises:
        RuntimeError: none runs.
    """
    times: dict[Any, float] = {}
    errors = []
    for i, tile in enumerate(candidates):
        _progress(f"resfast: measuring {key}: candidate {i + 1} of {len(candidates)}")

        def candidate(tile: Any = tile) -> Any:
            return run(tile)

        try:
            first = timer(candidate, 2)
            if times and first > HOPELESS * min(times.values()):
                continue
            times[tile] = timer(candidate, REPETITIONS)
        except Exception as error:  # out of resources: which types those are is the driver's matter
            errors.append(f"{tuple(tile)}: {type(error).__name__}: {error}".splitlines()[0])
    _progress("")
    if not times:
        raise RuntimeError(f"no tile runs for {key}: {'; '.join(errors)}")
    return min(times, key=lambda t: times[t])


def time_on_cuda(run: Callable[[], Any], repetitions: int) -> float:
    """Median milliseconds of ``run`` on the current stream, after one run to warm up."""
    run()
    samples = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return statistics.median(samples)


def _progress(text: str) -> None:
    """One line that replaces itself, where someone looks."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()

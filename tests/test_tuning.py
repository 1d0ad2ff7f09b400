"""Measured tiles: the fastest wins, is remembered per device, and damaged files are noticed."""

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from resfast import cli
from resfast.backends import tuning
from resfast.backends.tuning import Tiles, fastest

pytest.importorskip("triton")

from resfast.kernels.tiles import CONV_TILES, H100, ConvTile, likely, ranked

VERSIONS = {"torch": "1", "triton": "2"}
SMALL, LARGE, WIDE = (
    ConvTile(16, 16, 16, 4, 2),
    ConvTile(128, 128, 64, 8, 3),
    ConvTile(8, 256, 16, 4, 2),
)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("RESFAST_CACHE_DIR", str(tmp_path))
    return tmp_path


def _timer(milliseconds):
    def timer(run, repetitions):
        return milliseconds[run()]

    return timer


def test_the_fastest_tile_wins():
    times = {SMALL: 3.0, LARGE: 1.0, WIDE: 2.0}
    assert fastest("k", list(times), lambda tile: tile, _timer(times)) == LARGE


def test_a_tile_that_does_not_run_is_left_out():
    def run(tile):
        if tile == LARGE:
            raise MemoryError("out of shared memory")
        return tile

    assert fastest("k", [LARGE, SMALL], run, _timer({SMALL: 1.0})) == SMALL
    with pytest.raises(RuntimeError, match=r"no tile runs for k.*out of shared memory"):
        fastest("k", [LARGE], run, _timer({}))


def test_a_hopeless_tile_is_measured_once():
    seen = []

    def timer(run, repetitions):
        seen.append((run(), repetitions))
        return {LARGE: 1.0, SMALL: 9.0}[run()]

    assert fastest("k", [LARGE, SMALL], lambda tile: tile, timer) == LARGE
    assert [tile for tile, _ in seen] == [LARGE, LARGE, SMALL]


def test_tiles_are_remembered_on_disk(folder):
    Tiles("NVIDIA H100 80GB HBM3", VERSIONS).remember("conv 1", LARGE)
    (path,) = folder.glob("*.json")
    assert path.name == "tiles-nvidia-h100-80gb-hbm3.json"
    assert Tiles("NVIDIA H100 80GB HBM3", VERSIONS).known == {"conv 1": list(LARGE)}
    assert Tiles("another", VERSIONS).known == {}


def test_tiles_of_other_versions_are_measured_anew(folder):
    Tiles("gpu", VERSIONS).remember("conv 1", LARGE)
    assert Tiles("gpu", VERSIONS | {"triton": "3"}).known == {}


def test_a_rebuilt_kernel_is_measured_anew(folder, monkeypatch, tmp_path):
    """A checkout changes its kernels and keeps its version."""
    kernel = tmp_path / "kernel"
    monkeypatch.setattr(tuning.native, "library_path", lambda: kernel)
    monkeypatch.setattr(tuning, "_cuda_kernels", lambda: [kernel])
    for tiles_of in (tuning.cpu_tiles.__wrapped__, lambda: tuning.tiles_of.__wrapped__("gpu")):
        kernel.write_text("before")
        tiles_of().remember("conv 1", LARGE)
        assert tiles_of().known
        kernel.write_text("after")
        assert not tiles_of().known


def test_every_triton_kernel_counts_as_one():
    folder = Path(__file__).parents[1] / "kernels"
    assert {path.name for path in folder.glob("*.py")} <= {p.name for p in tuning._cuda_kernels()}


def test_what_two_processes_measure_at_once_is_kept_of_both(folder):
    def measured(number):
        return threading.Thread(
            target=lambda: [tiles[number].remember(f"{number} {i}", LARGE) for i in range(20)]
        )

    tiles = [Tiles("gpu", VERSIONS) for _ in range(4)]
    threads = [measured(number) for number in range(len(tiles))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Tiles("gpu", VERSIONS).known) == 20 * len(tiles)


def test_a_file_that_stays_locked_is_no_error(folder, monkeypatch):
    monkeypatch.setattr(tuning, "PATIENCE", 0)
    tiles = Tiles("gpu", VERSIONS)
    lock = FileLock(folder / f".{tuning.file_name('gpu')}.lock")
    with lock, pytest.warns(UserWarning, match="not kept"):
        tiles.remember("conv 1", LARGE)
    assert tiles.known == {"conv 1": list(LARGE)}
    assert not Tiles("gpu", VERSIONS).known


def test_a_file_of_another_format_is_not_used(folder):
    """Format 1 did not tell TF32 from exact products."""
    Tiles("gpu", VERSIONS).remember("conv 1", LARGE)
    path = folder / tuning.file_name("gpu")
    path.write_text(path.read_text().replace(f'"format": {tuning.FORMAT}', '"format": 1'))
    with warnings.catch_warnings(action="error"):
        assert Tiles("gpu", VERSIONS).known == {}


HEAD = f'{{"format": {tuning.FORMAT}'


@pytest.mark.parametrize("text", ["", "{", "[]", HEAD + "}", HEAD + ', "tiles": 3}'])
def test_a_damaged_file_is_named_and_not_used(folder, text):
    (folder / tuning.file_name("gpu")).write_text(text)
    with pytest.warns(UserWarning, match=r"tiles-gpu\.json is not read"):
        assert Tiles("gpu", VERSIONS).known == {}


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESFAST_CACHE_DIR", str(tmp_path / "file" / "below"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiles = Tiles("gpu", VERSIONS)
    with pytest.warns(UserWarning, match="not kept"):
        tiles.remember("conv 1", LARGE)
    assert tiles.known == {"conv 1": list(LARGE)}


def test_without_a_gpu_nothing_is_measured():
    def run(tile):
        raise AssertionError("measured")

    assert tuning.choose("k", [LARGE, SMALL], run, torch.device("cpu")) == LARGE
    assert tuning.known_engine("k", torch.device("meta")) is None


def test_an_unknown_mode_is_named(monkeypatch):
    monkeypatch.setenv("RESFAST_TUNE", "always")
    with pytest.raises(ValueError, match="RESFAST_TUNE must be one of first, never"):
        tuning.mode()


def test_tune_needs_a_gpu(capsys):
    assert cli.main(["tune", "--device", "cpu"]) == 2
    assert "tune measures on a GPU" in capsys.readouterr().err


def test_large_products_take_large_tiles_and_narrow_ones_no_padding():
    pool = [SMALL, LARGE, ConvTile(128, 64, 64, 4, 3)]
    assert ranked(pool, 256 * 14 * 14, 256, 9 * 256, 2, H100)[0] == LARGE
    assert ranked(pool, 256 * 56 * 56, 16, 64, 2, H100)[0] == SMALL
    # one image of 7 × 7: a large tile would leave most of the chip idle
    assert ranked([*pool, ConvTile(64, 32, 64, 4, 3)], 49, 512, 2048, 2, H100)[0] != LARGE


@pytest.mark.parametrize("function", CONV_TILES)
def test_steps_are_no_deeper_than_the_channels_and_odd_ones_are_not_pipelined(function):
    x = torch.empty(1, dtype=torch.bfloat16)
    for tile in likely(function, (4096, 64, 147), 3, x, "ieee", False):
        assert tile.stages == 1
        assert function == "conv_wgrad" or tile.block_k == 16
    wide = likely(function, (4096, 256, 256), 256, x, "ieee", False)
    assert set(wide) == set(CONV_TILES[function]["half"])
    normed = likely(function, (4096, 256, 256), 256, x.float(), "tf32x3", True)
    assert set(normed) == set(CONV_TILES[function]["exact normed"])


def test_every_shipped_tile_is_a_power_of_two_and_listed_once():
    for tiles in (tiles for kinds in CONV_TILES.values() for tiles in kinds.values()):
        assert len(set(tiles)) == len(tiles)
        for tile in tiles:
            assert all(n & (n - 1) == 0 and n >= 16 for n in tile[:3])
            assert tile.warps in (4, 8)


def test_remembered_tiles_are_json_anyone_can_read(folder):
    Tiles("gpu", VERSIONS).remember("conv 1", SMALL)
    record = json.loads((folder / "tiles-gpu.json").read_text())
    assert record == {
        "format": tuning.FORMAT,
        "device": "gpu",
        "versions": VERSIONS,
        "tiles": {"conv 1": list(SMALL)},
    }

"""The suites under bench/: their ratios reach pytest-benchmark, and its comparison can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import needs
import pytest

from resfast.benchmark import report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu-amd-epyc-2-cores"
BASELINE = RESULTS / "baseline.json"
SUITE = "bench/test_memory.py::test_saved[resnet18-resfast]"

pytestmark = needs.native_library


def _run(tmp_path: Path, *options: str) -> tuple[int, str, dict]:
    pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "-q", SUITE, "--benchmark-only", "--device=cpu"]
    command += [f"--benchmark-json={out}", "-p", "no:cacheprovider", *options]
    # as a worker of pytest-xdist, pytest-benchmark would measure nothing
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr, json.loads(out.read_text())


def test_the_ratio_is_what_pytest_benchmark_reports(tmp_path):
    status, text, record = _run(tmp_path)
    assert status == 0, text
    assert "time in peer's bytes" in text
    (entry,) = record["benchmarks"]
    mib = entry["extra_info"]["mib_per_image"]
    assert entry["stats"]["median"] == pytest.approx(mib["resfast"] / mib["eager-nhwc"], rel=1e-2)
    assert record["machine_info"]["node"] == ""
    assert record["machine_info"]["device"]["name"]


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (0.5, 1)])
def test_comparison_with_the_baseline_fails_on_a_worse_ratio(tmp_path, factor, status):
    """Saved bytes are the same everywhere: the committed ratio holds, half of it does not."""
    baseline = json.loads(BASELINE.read_text())
    for entry in baseline["benchmarks"]:
        for key in ("min", "max", "mean", "median"):
            entry["stats"][key] *= factor
    changed = tmp_path / "baseline.json"
    changed.write_text(json.dumps(baseline))
    options = [f"--benchmark-compare={changed}", "--benchmark-compare-fail=median:10%"]
    code, text, _ = _run(tmp_path, *options)
    assert (code != 0) == bool(status), text
    assert ("Performance has regressed" in text) == bool(status)


@pytest.mark.parametrize(
    "folder",
    sorted({p.parent for p in RESULTS.parent.glob("*/resnet*.json")}),
    ids=lambda p: p.name,
)
def test_the_figures_in_the_readme_are_those_of_the_committed_records(folder):
    text = (ROOT / "README.md").read_text()
    for line in report.markdown(report.read(sorted(folder.glob("*.json")))).splitlines():
        assert line in text


def test_committed_results_name_no_machine():
    for path in (ROOT / "bench" / "results").rglob("*.json"):
        text = path.read_text()
        assert "/work/" not in text
        assert '"node": ""' in text or '"node"' not in text

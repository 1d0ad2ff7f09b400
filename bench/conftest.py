"""Options and fixtures of the benchmark suites; see `ratios` for what their numbers mean."""

from __future__ import annotations

import functools

import pytest
import torch
from ratios import TOLD

from resfast import native
from resfast.benchmark.floor import measure_ceilings
from resfast.benchmark.peers import forget_compiled
from resfast.diagnostics.environment import device_info, versions

# by the word before a group's colon: what the table's "time" is counted in
UNITS = {"memory": "peer's byte", "scaling": "linear law'"}


def pytest_addoption(parser):
    group = parser.getgroup("resfast")
    group.addoption("--peers", default="default", help="default, all, or names with commas")
    group.addoption("--dtypes", default="", help="dtypes with commas; empty: the device's usual")
    group.addoption("--device", default="", help="cpu or cuda; empty: cuda where there is one")
    group.addoption("--floor", action="store_true", help="also each op's share of the roofline")
    group.addoption("--budget", type=float, default=1.0, help="seconds of timing per contender")


def pytest_configure(config):
    if not config.getoption("--device"):
        config.option.device = "cuda" if torch.cuda.is_available() else "cpu"
    given = " ".join(config.invocation_params.args)
    if "--benchmark-columns" not in given:
        config.option.benchmark_columns = ["median", "iqr", "min", "max", "rounds"]


def pytest_benchmark_scale_unit(config, unit, benchmarks, best, worst, sort):
    """ "time in peer's times": the values are ratios, whatever the table calls them."""
    if unit == "seconds":
        return UNITS.get(str(benchmarks[0]["group"]).split(":")[0], "peer's time"), 1.0
    return "", 1.0


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["node"] = ""  # a name says nothing of a machine's speed
    machine_info["device"] = device_info(torch.device(config.getoption("--device")))
    machine_info["versions"] = versions()
    machine_info["isa"] = native.cpu_isa()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["commit_info"].pop("project", None)
    for entry in output_json["benchmarks"]:
        entry["options"].pop("timer", None)


def pytest_terminal_summary(terminalreporter):
    """Times and errors beside the ratios: milliseconds, and each contender's error in float64."""
    rows = [(name, extra) for name, extra in TOLD if "relative_errors" in extra]
    if not rows:
        return
    terminalreporter.section("milliseconds, and relative errors against float64 (output, gradient)")
    width = max(len(name) for name, _ in rows)
    for name, extra in rows:
        errors = "  ".join(
            f"{who} " + ", ".join(f"{e:.1e}" for e in found.values() if e is not None)
            for who, found in extra["relative_errors"].items()
        )
        times = f"{extra['resfast_ms']:9.3f} {extra['peer_ms']:9.3f}"
        terminalreporter.write_line(f"{name:<{width}} {times}  {errors}")


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def budget(request) -> float:
    return request.config.getoption("--budget")


@pytest.fixture(scope="session")
def ceilings(request, device):
    """What the machine can do in a dtype, measured once; None without ``--floor``."""
    if not request.config.getoption("--floor"):
        return lambda dtype: None
    return functools.cache(lambda dtype: measure_ceilings(device, dtype))


@pytest.fixture(autouse=True)
def _no_code_of_others():
    forget_compiled()

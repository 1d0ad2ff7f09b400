"""bench/gpu_run.py: what becomes of commands that fail, hang or leave something behind."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from resfast.benchmark import peers

ROOT = Path(__file__).resolve().parent.parent
FACTS = {"device": {"type": "cuda", "capability": "9.0"}, "native": {"available": True}}


@pytest.fixture(scope="module")
def gpu_run():
    spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "bench" / "gpu_run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_run"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_run"]


@pytest.fixture
def options(gpu_run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    return gpu_run.Options(out, facts=dict(FACTS), timeout=60)


@pytest.fixture
def stage(gpu_run, monkeypatch):
    """Put a stage of these jobs in place of all others."""

    def put(name, *jobs):
        put.stages[name] = gpu_run.Stage(lambda options: list(jobs))

    put.stages = {}
    monkeypatch.setattr(gpu_run, "STAGES", put.stages)
    return put


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-S", "-c", code, *arguments]


def summary(options) -> dict:
    return json.loads((options.out / "summary.json").read_text())["stages"]


def has_gone(pid: int) -> bool:
    """Within a few seconds: a killed process takes a moment to go."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.read_text()


# A parent that ignores a polite end, and its child; both would stay for a minute.
FAMILY = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(str(child.pid))
if sys.argv[2] == "stay":
    time.sleep(60)
"""


@pytest.mark.parametrize("leader", ["stay", "leave"])
def test_a_command_leaves_no_process_behind(gpu_run, monkeypatch, tmp_path, leader):
    monkeypatch.setattr(gpu_run, "GRACE_SECONDS", 0.2)
    pid_file = tmp_path / "pid"
    start = time.monotonic()
    command = python(FAMILY, str(pid_file), leader)
    done = gpu_run.run_command(command, tmp_path / "log", 2.0, os.environ)
    assert done.status == (None if leader == "stay" else 0)
    assert time.monotonic() - start < 20
    assert has_gone(int(pid_file.read_text()))


def test_output_is_shown_and_kept_also_of_a_command_that_is_ended(gpu_run, capfd, tmp_path):
    log = tmp_path / "log"
    log.write_text("before\n")
    code = "import time; print('one\\ntwo', flush=True); time.sleep(60)"
    done = gpu_run.run_command(python(code), log, 1.0, os.environ)
    assert done == (None, "two")
    assert log.read_text() == "before\none\ntwo\n"
    assert capfd.readouterr().out == "one\ntwo\n"


def test_stages_are_chosen_by_commas_repeats_and_all_in_their_order(gpu_run):
    assert gpu_run.chosen(["models,build", "check"]) == ["build", "check", "models"]
    assert gpu_run.chosen(["all"]) == list(gpu_run.STAGES)
    with pytest.raises(ValueError, match="unknown stage tests; known: build, test"):
        gpu_run.chosen(["build,tests"])


def test_an_unknown_stage_and_a_missing_gpu_are_refused(gpu_run, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_run, "make_importable", lambda: None)
    out = ["--out", str(tmp_path / "new")]
    with pytest.raises(SystemExit) as stop:
        gpu_run.main([*out, "--stage", "tests"])
    assert stop.value.code == 2
    assert "unknown stage tests" in capsys.readouterr().err

    def no_gpu(device):
        raise gpu_run.NotRun(f"--device {device}: no GPU is visible")

    monkeypatch.setattr(gpu_run, "ask_facts", no_gpu)
    with pytest.raises(SystemExit) as stop:
        gpu_run.main(out)
    assert stop.value.code == 2
    assert "--device cuda: no GPU is visible" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_failing_stage_makes_the_exit_status_and_the_others_still_run(gpu_run, options, stage):
    code = "import sys; print('so it goes'); sys.exit(3)"
    stage("good", gpu_run.Job("g", python("")))
    assert gpu_run.run(["good"], options) == 0
    stage("bad", gpu_run.Job("b", python(code)), gpu_run.Job("c", python("")))
    assert gpu_run.run(["bad", "good"], options) == 1
    bad, good = summary(options)["bad"], summary(options)["good"]
    assert (bad["status"], bad["reason"]) == ("failed", "b: exit status 3: so it goes")
    assert [job["status"] for job in bad["jobs"]] == ["failed", "ok"]
    assert bad["files"] == ["bad.log"]
    assert good["status"] == "ok"


def test_a_stage_ends_in_its_time_and_says_what_it_left_out(gpu_run, options, stage):
    options = gpu_run.Options(options.out, facts=FACTS, timeout=1.5)
    stage(
        "slow",
        gpu_run.Job("long", python("import time; time.sleep(60)"), limit=0.5),
        gpu_run.Job("last", python(""), needs=30),
    )
    start = time.monotonic()
    assert gpu_run.run(["slow"], options) == 1
    assert time.monotonic() - start < 15
    entry = summary(options)["slow"]
    assert entry["status"] == "timeout"
    assert [job["status"] for job in entry["jobs"]] == ["timeout", "not run"]
    assert "last: no time left" in entry["reason"]


def test_work_left_over_is_no_failure_but_a_stage_that_did_nothing_was_skipped(gpu_run):
    def verdict(*statuses):
        jobs = [{"name": s, "status": s, "reason": None} for s in statuses]
        return gpu_run.verdict(jobs)["status"]

    assert verdict("ok", "not run") == "ok"
    assert verdict("not run", "not run") == "skipped"
    assert verdict("timeout", "failed", "ok") == "failed"
    assert verdict() == "ok"


WRITE = "import sys; open(sys.argv[1], 'a').write('x'); sys.exit(int(sys.argv[2]))"


def test_resume_keeps_results_and_does_again_what_failed(gpu_run, options, stage):
    out = options.out

    def put(status):
        jobs = [
            gpu_run.Job(n, python(WRITE, str(out / f"w-{n}.json"), s), f"w-{n}.json")
            for n, s in (("a", "0"), ("b", status))
        ]
        stage("w", *jobs)

    def found():
        return {p.name: p.read_text() for p in sorted(out.glob("w-*"))}

    put("1")
    assert gpu_run.run(["w"], options) == 1
    assert found() == {"w-a.json": "x", "w-b.failed.json": "x"}
    put("0")
    again = gpu_run.Options(out, resume=True, facts=FACTS)
    (out / "w-a.json").write_text("kept")
    assert gpu_run.run(["w"], again) == 0
    assert found() == {"w-a.json": "kept", "w-b.json": "x"}
    assert [job["status"] for job in summary(options)["w"]["jobs"]] == ["kept", "ok"]
    assert gpu_run.run(["w"], options) == 0
    assert found() == {"w-a.json": "x", "w-b.json": "x"}, "without --resume all is done anew"


def test_a_later_call_keeps_the_stages_of_an_earlier_one(gpu_run, options, stage):
    stage("one", gpu_run.Job("j", python("")))
    gpu_run.run(["one"], options)
    first = summary(options)["one"]
    stage("two", gpu_run.Job("j", python("")))
    gpu_run.run(["two"], options)
    assert summary(options)["one"] == first
    (options.out / "summary.json").write_text('{"stages": {"cut o')
    gpu_run.run(["two"], options)
    assert list(summary(options)) == ["two"]


def test_the_summary_is_whole_or_the_old_one(gpu_run, monkeypatch, tmp_path):
    path = tmp_path / "summary.json"
    gpu_run.write_json(path, {"old": 1})

    def half(path, text):
        path.write_bytes(text.encode()[:5])
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(gpu_run.Path, "write_text", half)
        with pytest.raises(OSError, match="disk full"):
            gpu_run.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_the_archive_holds_the_summary_and_every_file_of_the_stages(gpu_run, options, stage):
    (options.out / "private.txt").write_text("not ours")
    argv = python(WRITE, str(options.out / "w-a.json"), "0")
    stage("w", gpu_run.Job("a", argv, "w-a.json"))
    target = options.out.parent / "new" / "results.tar.gz"
    gpu_run.run(["w"], options, target)
    with tarfile.open(target) as archive:
        assert sorted(archive.getnames()) == ["summary.json", "w-a.json", "w.log"]


def test_a_terminated_run_ends_its_command_and_says_so(tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "bench")!r})
import gpu_run
gpu_run.ask_facts = lambda device: {{}}
family = [sys.executable, "-S", "-c", sys.argv[2], sys.argv[3], "stay"]
gpu_run.GRACE_SECONDS = 0.2
gpu_run.STAGES = {{"s": gpu_run.Stage(lambda options: [gpu_run.Job("j", family)])}}
sys.exit(gpu_run.main(["--out", sys.argv[1]]))
"""
    out, pid_file = tmp_path / "out", tmp_path / "pid"
    process = subprocess.Popen([sys.executable, "-c", script, str(out), FAMILY, str(pid_file)])
    try:
        child = int(wait_for(pid_file))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert has_gone(child)
    entry = json.loads((out / "summary.json").read_text())["stages"]["s"]
    assert (entry["status"], entry["reason"]) == ("failed", "interrupted")


def test_a_build_is_for_the_gpu_that_is_there_unless_told_otherwise(gpu_run, options, monkeypatch):
    monkeypatch.setattr(gpu_run, "missing_for_build", list)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert gpu_run.build(options)[0].env == {"TORCH_CUDA_ARCH_LIST": "9.0a"}
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert gpu_run.build(options)[0].env == {}


@pytest.mark.parametrize(("built", "status"), [(True, "skipped"), (False, "failed")])
def test_without_build_tools_only_a_built_library_will_do(
    gpu_run, options, monkeypatch, built, status
):
    monkeypatch.setattr(gpu_run, "missing_for_build", lambda: ["pybind11"])
    options.facts["native"] = {"available": built}
    assert gpu_run.run(["build"], options) == (not built)
    entry = summary(options)["build"]
    assert (entry["status"], entry["reason"]) == (status, "not installed: pybind11")


def test_failed_tests_are_counted_and_named(gpu_run, options):
    (options.out / "test-quick.xml").write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">'
        '<testcase classname="tests.test_a" name="test_b[c]"><failure/></testcase>'
        '<testcase classname="tests.test_a" name="test_d"/></testsuite></testsuites>'
    )
    entry = {}
    gpu_run.report_test(options, entry)
    record = json.loads((options.out / "test.json").read_text())
    assert (record["tests"], record["failures"], record["skipped"]) == (3, 1, 1)
    assert record["failed"] == ["tests.test_a.test_b[c]"]
    assert "1 of 3 failed: tests.test_a.test_b[c]" in entry["reason"]


def test_models_start_with_the_most_important_and_are_valid_commands(gpu_run, options):
    from resfast.cli import build_parser

    jobs = gpu_run.models(options)
    assert jobs[0].name == "train-resnet50-b256-bfloat16"
    assert len({job.result for job in jobs}) == len(jobs)
    for job in jobs:
        assert job.argv[1:3] == ["-m", "resfast.cli"]
        parsed = build_parser().parse_args(job.argv[3:])
        assert parsed.save == options.out / job.result
        assert (parsed.train, parsed.infer) == (job.name[:5] == "train", job.name[:5] == "infer")


def test_every_peer_of_a_gpu_is_raced(gpu_run):
    on_cpu = {"onnxruntime", "openvino"}
    raced = {*gpu_run.PEERS, *gpu_run.TUNED_PEERS, peers.OURS}
    assert raced | on_cpu == set(peers.PEERS)


def test_races_of_fusion_steps_share_the_measured_tiles(gpu_run, tmp_path):
    options = gpu_run.Options(tmp_path)
    jobs = {job.name: job for job in gpu_run.models(options)}
    assert next(iter(jobs)) == "train-resnet50-b256-bfloat16"
    assert {job.env["RESFAST_CACHE_DIR"] for job in jobs.values()} == {str(tmp_path)}
    job = jobs["train-resnet50-b256-bfloat16-c0-own"]
    assert job.env["RESFAST_FUSION_STEP"] == "c0"
    assert job.env["RESFAST_CONVOLUTIONS"] == "own"
    assert "RESFAST_FUSION_STEP" not in jobs["train-resnet50-b256-bfloat16-tuned"].env
    assert [job.name for job in gpu_run.tiles(options)] == ["resnet50-bfloat16", "resnet50-float16"]
    (tmp_path / "tiles-gpu.json").write_text("{}")
    with pytest.raises(gpu_run.NotRun, match="tiles already"):
        gpu_run.tiles(gpu_run.Options(tmp_path, resume=True))


def test_memory_is_checked_through_cudnn_where_its_package_is(gpu_run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run.shutil, "which", lambda *arguments, **options: "sanitizer")
    for found in (None, object()):
        monkeypatch.setattr(gpu_run.importlib.util, "find_spec", lambda name, found=found: found)
        forced = {
            job.name: job.env.get("RESFAST_BACKEND")
            for job in gpu_run.sanitize(gpu_run.Options(tmp_path))
        }
        assert forced.pop("memcheck-cudnn", None) == ("cudnn" if found else None)
        assert set(forced.values()) == {None, "cuda"}

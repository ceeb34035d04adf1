"""What `make gpu` does with its time, on small stand-ins for its steps."""

import json
import sys

import pytest
import torch

from fastattn.tools import gpu, runner, workloads


def python(text):
    return sys.executable, "-c", text


def test_steps_run_in_order_and_end_in_one_file(tmp_path):
    todo = [
        gpu.Step("one", python("print('first line')"), 0.9),
        gpu.Step("two", python("raise SystemExit(3)"), 0.9),
        gpu.Step("three", python("print('last')"), 0.9),
    ]
    results = gpu.run_all(todo, 60, tmp_path, lambda: {"line": "a machine"})
    assert [(r.name, r.outcome, r.code) for r in results] == [
        ("one", "passed", 0),
        ("two", "failed", 3),
        ("three", "passed", 0),
    ]
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["machine"] == {"line": "a machine"}
    assert [step["outcome"] for step in written["steps"]] == ["passed", "failed", "passed"]
    assert (tmp_path / "one.log").read_text() == "first line\n"


def test_a_step_that_takes_too_long_is_cut_short_and_the_next_one_runs(tmp_path):
    child = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    slow = f"import subprocess, sys; print('kept', flush=True); subprocess.run({child})"
    todo = [gpu.Step("slow", python(slow), 0.1), gpu.Step("next", python("pass"), 0.9)]
    results = gpu.run_all(todo, 15, tmp_path)
    assert [r.outcome for r in results] == ["cut short", "passed"]
    assert results[0].seconds < 10
    assert "kept" in (tmp_path / "slow.log").read_text()


def test_no_time_left_and_a_failed_install_end_the_run(tmp_path):
    todo = [
        gpu.Step("install", python("raise SystemExit(1)"), 0.9, needed=True),
        gpu.Step("rest", python("pass"), 1),
    ]
    assert [r.outcome for r in gpu.run_all(todo, 60, tmp_path)] == ["failed"]
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [step["outcome"] for step in written["steps"]] == ["failed", "not run"]
    assert gpu.run_all(todo, 0.5, tmp_path) == []


def test_steps_name_tests_and_suites_that_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "compute_sanitizer", lambda: None)
    todo = {step.name: step for step in gpu.steps(tmp_path)}
    for test in ("test_triton_attention_backward", "test_cuda_card", "test_twin"):
        assert f"tests/{test}.py" in todo["tests"].command
    for name in todo.keys() - {"install", "tests"}:
        assert name in workloads.SUITES and str(tmp_path / f"{name}.json") in todo[name].command
    assert "--no-index" in todo["install"].command and "--no-build-isolation" in todo["install"].command


def test_the_sanitizer_runs_a_few_tests_where_it_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert gpu.compute_sanitizer() is None
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    # It runs what it is given, reports a race, and its own exit code says so.
    tool.write_text('#!/bin/sh\ntest "$2" = racecheck && exit "$4"; exit 0\n')
    tool.chmod(0o755)
    assert gpu.compute_sanitizer() == str(tool)
    names = [step.name for step in gpu.steps(tmp_path)]
    assert names[:4] == ["install", "tests", "memcheck", "racecheck"]
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    todo = [step for step in gpu.steps(tmp_path) if step.name in ("memcheck", "racecheck")]
    results = gpu.run_all(todo, 60, tmp_path)
    assert [(r.outcome, r.code) for r in results] == [("passed", 0), ("failed", 9)]
    (file,) = {part for step in todo for part in step.command if part.endswith(".py")}
    assert "def test_sanitized" in (gpu.ROOT / file).read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "sees no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_step_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--only", "tests,benchs"])
    assert "no step 'benchs'" in capsys.readouterr().err


def test_a_bench_keeps_every_row_as_it_comes(monkeypatch):
    """A run that is stopped in its third row has written two."""
    rows = workloads.select("cpu-rows", quick=True)[:3]
    kept = []
    monkeypatch.setattr(runner, "machine", lambda device: {"line": "a machine"})

    def run_row(row, threads, ceilings, options):
        if row is rows[2]:
            raise KeyboardInterrupt
        return {"suite": row.suite, "name": row.name, "threads": threads}

    monkeypatch.setattr(runner, "run_row", run_row)
    with pytest.raises(KeyboardInterrupt):
        runner.run_suite(
            rows, runner.Options(threads=(1,)), keep=lambda bench: kept.append(len(bench["rows"]))
        )
    assert kept == [1, 2]


def test_variants_may_be_timed_by_another_clock():
    calls = []

    def elapsed_by(call, count):
        call()
        calls.append(count)
        return 0.5 * count

    timing = runner.measure({"ours": lambda: None}, budget=0.01, rounds=(3, 3), elapsed_by=elapsed_by)["ours"]
    assert timing.samples == (0.5, 0.5, 0.5) and calls == [1, 1, 1, 1]

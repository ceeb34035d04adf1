"""Time the suites on this machine: ours beside torch and the rivals that are installed, interleaved in one
process, with the share of the ceiling measured in the same run.

  fastattn bench --list
  fastattn bench cpu-forward --quick
  fastattn bench masks --json masks.json --plot masks.png
  fastattn bench cpu-forward --compare old.json
  fastattn bench --from masks.json --plot masks.png

Ratios of one run can be trusted; times of two runs cannot. --compare therefore compares ratios over torch,
and says "faster" only after `verify --quick` has passed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import report, runner, workloads
from .machine import instruction_set, introspection, machine, machine_line
from .progress import Progress

_MARKDOWN = {"full": report.bench_markdown, "summary": report.bench_summary, "missed": report.bench_missed}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="which suites to run; see --list")
    parser.add_argument(
        "--list", action="store_true", help="list the suites, or the rows of those named, and stop"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few rows of each suite, a shorter time for each"
    )
    parser.add_argument(
        "--only", metavar="PATTERN", help="rows whose name contains, or as a pattern matches, this"
    )
    parser.add_argument(
        "--threads",
        metavar="N[,N]",
        type=_threads,
        help="thread counts, one pass each (default 1,2 or what there is)",
    )
    parser.add_argument(
        "--budget", metavar="SECONDS", type=float, help="time for a row (default 1.5, quick 0.4)"
    )
    parser.add_argument(
        "--rivals",
        action=argparse.BooleanOptionalAction,
        help="also run installed rivals; some compile for seconds a row (default: unless --quick)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument(
        "--json", metavar="FILE", help="write the results, after every row; - is standard output, at the end"
    )
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="draw the results as PNG (needs matplotlib)"
    )
    parser.add_argument(
        "--markdown",
        choices=tuple(_MARKDOWN),
        help="print markdown: every column, ratios by mask, or the floors that were missed",
    )
    parser.add_argument(
        "--isa",
        metavar="NAME",
        help="hold fastattn and torch to an instruction set, both in a process of its own",
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="instead of time, measure the peak memory of each call, in a process of its own",
    )
    parser.add_argument(
        "--compare", metavar="OLD.json", type=Path, help="say what changed since an earlier run"
    )
    parser.add_argument(
        "--from", dest="source", metavar="FILE", type=Path, help="read results instead of measuring"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a floor was missed")


def _threads(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"must be whole numbers from 1 on, like 1,2, got {text!r}")
    return counts


def run(arguments: argparse.Namespace) -> int:
    from .cli import CommandError

    _check(arguments)
    if arguments.list:
        _list(arguments)
        return 0
    if arguments.isa and os.environ.get("FASTATTN_ISA") != arguments.isa:
        return _held_to(arguments.isa, arguments.argv)
    if arguments.memory:
        return _memory(arguments)
    old = _load(arguments.compare) if arguments.compare else None
    bench = _load(arguments.source) if arguments.source else _measure(arguments)
    if arguments.json and arguments.json != "-":
        runner.save(bench, arguments.json)
    _show(bench, arguments, sys.stderr if arguments.json == "-" else sys.stdout)
    if arguments.json == "-":
        print(json.dumps(bench, indent=1, sort_keys=True))
    if arguments.plot:
        try:
            for path in report.plot(bench, arguments.plot):
                print(f"drawn: {path}", file=sys.stderr)
        except (RuntimeError, ValueError) as error:
            raise CommandError(str(error)) from error
    failed = any("failed" in row for row in bench["rows"])
    code = 1 if failed or (arguments.check and report.missed(bench)) else 0
    if old is not None:
        code = max(code, _compare(old, bench, arguments))
    return code


def _check(arguments: argparse.Namespace) -> None:
    from .cli import CommandError

    unknown = [name for name in arguments.suites if name not in workloads.SUITES]
    if unknown:
        raise CommandError(f"there is no suite {unknown[0]!r}; the suites are {', '.join(workloads.SUITES)}")
    if not arguments.suites and not arguments.list and not arguments.source:
        raise CommandError(
            f"name a suite: {', '.join(workloads.SUITES)} (`fastattn bench --list` explains them)"
        )
    if arguments.suites and arguments.source:
        raise CommandError("--from reads results, and no suite is run: give one or the other")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise CommandError(f"--device {arguments.device}: this torch ({torch.__version__}) sees no GPU")
    if not arguments.device.startswith(("cpu", "cuda")):
        raise CommandError(f"--device must be cpu, cuda or cuda:N, got {arguments.device!r}")
    if arguments.budget is not None and arguments.budget <= 0:
        raise CommandError(f"--budget must be more than 0 seconds, got {arguments.budget:g}")
    for name in ("json", "plot"):
        path = getattr(arguments, name)
        if path and str(path) != "-" and not Path(path).resolve().parent.is_dir():
            raise CommandError(f"--{name}: there is no folder {Path(path).parent}")


# What holds torch and its libraries to as little as ours.
HOLD_TORCH = {
    "scalar": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
}


def _held_to(isa: str, argv: list[str]) -> int:
    """Run the same command again with the variables set that torch reads once, when it is loaded."""
    from .cli import CommandError

    info = introspection()
    available = list(info.available_isas()) if info else []
    if isa not in available:
        raise CommandError(f"--isa must be one of {', '.join(available) or 'none'}, got {isa!r}")
    variables = {"FASTATTN_ISA": isa}
    if isa in HOLD_TORCH:
        names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
        variables |= dict(zip(names, HOLD_TORCH[isa], strict=True))
    command = [sys.executable, "-m", "fastattn", *argv]
    return subprocess.run(command, env={**os.environ, **variables}).returncode


def _memory(arguments: argparse.Namespace) -> int:
    """Print, and write as JSON, the peak memory of each row's sides; 1 where a limit is passed."""
    from . import memory

    rows = _rows(arguments)
    progress, results = Progress(len(rows)), []
    for row in rows:
        progress.begin(f"{row.suite} {row.name}")
        results.append(memory.measure(row))
        progress.step(f"{row.suite} {row.name}")
    progress.close()
    outcome = {"schema": runner.SCHEMA, "machine": machine(), "memory": results}
    stream = sys.stderr if arguments.json == "-" else sys.stdout
    print(machine_line(outcome["machine"]), file=stream)
    report.table("", memory.COLUMNS, [memory.cells(result) for result in results], stream)
    for result in results:
        for side, why in result["why"].items():
            if side == "ours":
                print(f"not measured: {result['suite']} {result['name']}: {why[:200]}", file=stream)
    text = json.dumps(outcome, indent=1, sort_keys=True) + "\n"
    if arguments.json == "-":
        sys.stdout.write(text)
    elif arguments.json:
        Path(arguments.json).write_text(text)
    return 1 if any(result["met"] is False for result in results) else 0


def _load(path: Path) -> dict[str, Any]:
    from .cli import CommandError

    try:
        return runner.load(path)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error


def _list(arguments: argparse.Namespace) -> None:
    if arguments.suites:
        for suite in arguments.suites:
            for row in workloads.select(suite, quick=arguments.quick, only=arguments.only):
                floors = ", ".join(f"{limit.floor:.2f} over {limit.against}" for limit in row.limits)
                print(f"{suite}  {row.name}" + (f"  (floor {floors})" if floors else ""))
        return
    for suite in workloads.SUITES.values():
        print(f"{suite.name:<14} {suite.title} ({len(suite.rows)} rows)")


def _rows(arguments: argparse.Namespace) -> list[workloads.Workload]:
    from .cli import CommandError

    rows = []
    for suite in arguments.suites:
        rows += workloads.select(suite, quick=arguments.quick, only=arguments.only)
    if not rows:
        raise CommandError(
            f"no row of {', '.join(arguments.suites)} matches --only {arguments.only!r}; see --list"
        )
    return rows if arguments.device.startswith("cuda") else workloads.held_to(rows, instruction_set())


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = _rows(arguments)
    on_gpu = arguments.device.startswith("cuda")
    threads = (
        arguments.threads
        or (torch.get_num_threads(),) * on_gpu
        or tuple(range(1, min(2, torch.get_num_threads()) + 1))
    )
    quick = arguments.quick
    options = runner.Options(
        threads=threads,
        budget=arguments.budget or (0.4 if quick else 1.5),
        device=arguments.device,
        rivals=not quick if arguments.rivals is None else arguments.rivals,
    )
    progress = Progress(len(rows) * len(threads))

    def tell(done, total, what):
        if isinstance(what, workloads.Workload):
            progress.begin(f"{what.suite} {what.name}")
        else:
            row = f"{what['suite']} {what['name']}, {report.count_of(what['threads'], 'thread')}"
            progress.step(f"{row}: {_one_line(what)}")

    def keep(bench):
        if arguments.json and arguments.json != "-":
            runner.save(bench, arguments.json)

    try:
        return runner.run_suite(rows, options, tell, keep)
    finally:
        progress.close()


def _one_line(result: dict[str, Any]) -> str:
    if "missing" in result:
        return f"not available: {result['missing']}"
    if "failed" in result:
        return f"FAILED: {result['failed']}"
    text = report.seconds(result["times"]["ours"]["median"])
    if "torch" in result["ratios"]:
        text += f", {result['ratios']['torch']['median']:.2f} x torch"
    return text + "".join("" if limit["met"] is not False else ", floor missed" for limit in result["limits"])


def _show(bench: dict[str, Any], arguments: argparse.Namespace, stream) -> None:
    if arguments.markdown:
        stream.write(_MARKDOWN[arguments.markdown](bench))
        return
    print(machine_line(bench["machine"]), file=stream)
    rows = [report.bench_cells(row) for row in bench["rows"]]
    report.table("", report.COLUMNS, rows, stream)
    reasons = dict.fromkeys(row["missing"] for row in bench["rows"] if "missing" in row)
    for reason in reasons:
        print(f"not available: {reason}", file=stream)
    for row in bench["rows"]:
        if "failed" in row:
            print(f"FAILED {row['suite']} {row['name']}: {row['failed']}", file=stream)
    if any(row.get("noisy") for row in bench["rows"]):
        print("~ other work on this machine disturbed the row: its times scatter", file=stream)
    for name, seconds in report.setup_times(bench).items():
        print(f"{name}: {seconds} a row before its second call, compiling included", file=stream)
    missed, judged = report.missed(bench), len(report.judged(bench))
    if judged:
        print(f"{judged - len(missed)} of {judged} floors reached", file=stream)
    for line in missed:
        print(f"  missed: {line}", file=stream)


def _compare(old: dict[str, Any], new: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Print what changed; 1 where the results are wrong, and then nothing is called faster."""
    from . import verify

    changes = runner.compare(old, new)
    stream = sys.stderr if arguments.json == "-" else sys.stdout
    failed = verify.failures(quick=True, device=arguments.device)
    if failed:
        for change in changes:
            if change["verdict"] == "faster":
                change["verdict"] = "not judged"
    rows = [
        (
            f"{change['suite']} {change['name']}",
            str(change["threads"]),
            f"{change['change']:.2f} x",
            f"{100 * change['noise']:.0f} %",
            change["verdict"],
            change["basis"],
        )
        for change in changes
    ]
    report.table(
        f"since {machine_line(old['machine'])}",
        ("row", "threads", "change", "noise", "verdict", "by"),
        rows,
        stream,
    )
    if not changes:
        print("the two runs share no measured row", file=stream)
    if failed:
        print(f"`fastattn verify --quick` fails ({failed[0]}): nothing is called faster", file=stream)
        return 1
    return 0

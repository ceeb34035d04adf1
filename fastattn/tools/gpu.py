"""Everything that only a GPU can show, in one command and within minutes: `make gpu`.

    python fastattn/tools/gpu.py [--seconds 520] [--out FOLDER] [--only STEP,STEP]

For a machine with torch, Triton, pytest and g++, and no network. It installs the package from this tree (with the CUDA
library where there is an nvcc, or a fastattn/_cuda.so built elsewhere), runs the tests marked gpu, a few of the CUDA
library's under compute-sanitizer where that is found, then the GPU suites of the bench. Results go into the folder that
OUT names, else into benches/results/: gpu.json, rewritten after every step (the machine's line, and how each step
ended), a log a step, and a JSON a suite, rewritten after every row: a run that is cut short keeps what it has. Every
step has a share of the time; what the earlier ones leave, the later ones may use.

Exit code 0 where every step passed, 1 where one failed or was cut short, 2 where there is no GPU.

No import of fastattn: this file installs it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A GPU machine's Python is often the system's, which pip would leave alone.
ENVIRONMENT = {**os.environ, "PIP_BREAK_SYSTEM_PACKAGES": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Step:
    """name: of its log and line. command: run in the root of the tree. share: of the seconds left when it starts.
    needed: nothing after it makes sense if it fails."""

    name: str
    command: tuple[str, ...]
    share: float
    needed: bool = False


@dataclass
class Outcome:
    """outcome: "passed", "failed", "cut short" or "not run"."""

    name: str
    outcome: str
    seconds: float
    code: int | None = None


def steps(out: Path) -> list[Step]:
    """What `make gpu` runs, in order."""
    python, sanitizer = sys.executable, compute_sanitizer()
    pip = (python, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index")
    tests = ("-m", "gpu and not slow", "--maxfail=20", "-p", "no:cacheprovider", "--durations=5")
    files = sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py") if _on_gpu(path)
    )

    def bench(suite: str) -> tuple[str, ...]:
        target = str(out / f"{suite}.json")
        flags = ("--device", "cuda", "--rivals", "--budget", "0.3", "--json", target)
        return (python, "-m", "fastattn", "bench", suite, *flags)

    def sanitized(tool: str) -> Step:
        few = ("-m", "gpu", "-k", "test_sanitized", "-p", "no:cacheprovider", "tests/test_cuda_card.py")
        # Memory that torch kept from earlier tensors would be as good as allocated.
        plain = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")
        check = (str(sanitizer), "--tool", tool, "--error-exitcode", "9")
        return Step(tool, (*plain, *check, python, "-m", "pytest", *few), 0.2)

    return [
        Step("install", (*pip, "-e", "."), 0.35, needed=True),
        Step("tests", (python, "-m", "pytest", *tests, *files), 0.4),
        *([sanitized("memcheck"), sanitized("racecheck")] if sanitizer else []),
        Step("gpu-attention", bench("gpu-attention"), 0.45),
        Step("gpu-masks", bench("gpu-masks"), 0.6),
        Step("gpu-rows", bench("gpu-rows"), 0.75),
        Step("gpu-decode", bench("gpu-decode"), 0.95),
    ]


def compute_sanitizer() -> str | None:
    """NVIDIA's checker of memory accesses and races, if this machine has it."""
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(folder))


def _on_gpu(test: Path) -> bool:
    """Whether a test file has tests that a GPU changes: collecting the others would only cost time."""
    text = test.read_text()
    return "triton_device" in text or "mark.gpu" in text


def _stop(process: subprocess.Popen) -> None:
    """End a step and what it started: asked first, then made to."""
    for sign, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run_step(step: Step, seconds: float, log: Path) -> Outcome:
    """Run a step for at most `seconds`, its output in `log` and its last lines here."""
    start = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(seconds)
            outcome = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            _stop(process)
            code, outcome = None, "cut short"
        except BaseException:
            _stop(process)
            raise
    return Outcome(step.name, outcome, round(time.monotonic() - start, 1), code)


def run_all(
    todo: Sequence[Step], seconds: float, out: Path, facts: Callable[[], dict] = dict
) -> list[Outcome]:
    """Run steps one after another within `seconds`, writing gpu.json after each; facts: the machine's, once known."""
    deadline = time.monotonic() + seconds
    results: list[Outcome] = []
    described: dict = {}

    def write() -> None:
        done = {one.name for one in results}
        rest = [asdict(Outcome(one.name, "not run", 0.0)) for one in todo if one.name not in done]
        text = {"machine": described, "seconds": seconds, "steps": [asdict(one) for one in results] + rest}
        (out / "gpu.json").write_text(json.dumps(text, indent=1, sort_keys=True) + "\n")

    write()
    for step in todo:
        left = deadline - time.monotonic()
        if left < 1:
            break
        print(f"{step.name}: up to {left * step.share:.0f} s", flush=True)
        log = out / f"{step.name}.log"
        results.append(run_step(step, left * step.share, log))
        last = results[-1]
        tail = log.read_text(errors="replace").splitlines()[-12:]
        print("\n".join(f"  {line}" for line in tail))
        print(f"{last.name}: {last.outcome} after {last.seconds} s", flush=True)
        if not described:
            described = facts()
        write()
        if step.needed and last.outcome != "passed":
            break
    return results


def machine_facts() -> dict:
    """The machine as fastattn's benches describe it, read in a process of its own: this one cannot import it yet."""
    program = (
        "import json; from fastattn.tools.machine import machine, machine_line as line;"
        "facts = machine('cuda'); print(json.dumps(facts | {'line': line(facts)}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr.strip()[-300:]}


def no_gpu() -> str | None:
    """Why there is no GPU to run on, or None."""
    program = "import torch; print(torch.__version__, torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return f"torch does not import: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    version, found = done.stdout.split()[-2:]
    return None if found == "True" else f"this torch ({version}) sees no GPU"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=520.0, help="for everything (default 520)")
    parser.add_argument("--out", type=Path, help="folder for results (default $OUT, else benches/results)")
    parser.add_argument("--only", help="steps to run, by name, separated by commas")
    arguments = parser.parse_args(argv)
    out = (arguments.out or Path(os.environ.get("OUT") or ROOT / "benches" / "results")).resolve()
    todo = steps(out)
    if arguments.only:
        wanted = arguments.only.split(",")
        unknown = [name for name in wanted if name not in {step.name for step in todo}]
        if unknown:
            parser.error(
                f"--only: there is no step {unknown[0]!r}; there are {', '.join(s.name for s in todo)}"
            )
        todo = [step for step in todo if step.name in wanted]
    reason = no_gpu()
    if reason is not None:
        print(f"make gpu needs a GPU: {reason}. Nothing was run.", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    if compute_sanitizer() is None:
        print("memcheck and racecheck are left out: no compute-sanitizer on the PATH or in CUDA_HOME")
    results = run_all(todo, arguments.seconds, out, machine_facts)
    passed = len(results) == len(todo) and all(one.outcome == "passed" for one in results)
    print(f"results: {out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

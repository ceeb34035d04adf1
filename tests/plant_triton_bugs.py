"""Plants one bug at a time in the Triton kernels and reports which the tests do not notice.

  python tests/plant_triton_bugs.py [--bugs NAME_START ...] [--whole] [--write]

Each bug is a change of the text of kernels/ in a copy of the tree. The tests that it names run, in Triton's
interpreter; with --whole what they do not notice goes through their whole files. --write writes
planted_triton_bugs.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from planted_triton import BUGS, Bug
from planted_triton_backward import BUGS as BACKWARD_BUGS

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


def plant(bug: Bug, tree: Path) -> tuple[Path, str]:
    """Writes the bug; returns the file and the text it had."""
    path = tree / "kernels" / f"{bug.module}.py"
    text = path.read_text()
    if text.count(bug.old) != 1:
        raise SystemExit(f"{bug.name}: the text is {text.count(bug.old)} times in {path.name}")
    path.write_text(text.replace(bug.old, bug.new))
    return path, text


def attempt(tree: Path, tests: list[str], only: str) -> str | None:
    """The first test that fails, or nothing."""
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-x", "-rfE", "-p", "no:cacheprovider"]
    command += [f"tests/{name}.py" for name in tests] + (["-k", only] if only else [])
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    try:
        result = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=900
        )
    except subprocess.TimeoutExpired:
        return "does not end"
    if result.returncode == 0:
        return None
    failed = re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", result.stdout, re.MULTILINE)
    if result.returncode != 1 and not failed:
        if result.returncode < 0:
            return f"the tests die of signal {-result.returncode}"
        raise SystemExit(
            f"pytest ends with {result.returncode}:\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
        )
    return failed[0] if failed else "a test fails"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bugs", nargs="+", default=[""])
    parser.add_argument("--whole", action="store_true", help="whole files for what the named tests miss")
    parser.add_argument("--write", action="store_true", help="write planted_triton_bugs.md")
    args = parser.parse_args()
    rows, missed = [], []
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        for folder in ("fastattn", "kernels", "tests"):
            shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        for bug in [*BUGS, *BACKWARD_BUGS]:
            if not bug.name.startswith(tuple(args.bugs)):
                continue
            path, text = plant(bug, tree)
            found = attempt(tree, bug.tests, bug.only)
            if found is None and args.whole and bug.old != bug.new:
                found = attempt(tree, bug.tests, "")
            if found is None and bug.old != bug.new:
                missed.append(bug.name)
            path.write_text(text)
            rows.append((bug.name, found or "not noticed"))
            print(f"{bug.name}: {rows[-1][1]}", flush=True)
    planted = sum(not name.startswith("control") for name, _ in rows)
    summary = f"{planted} bugs planted, {planted - len(missed)} noticed."
    print(summary, *missed, sep="\n  ")
    if args.write:
        table = "\n".join(f"| {name} | {found} |" for name, found in rows)
        head = "# Planted bugs\n\nThe last report of `plant_triton_bugs.py`. "
        text = f"{head}{summary}\n\n| bug | the first test that fails |\n|---|---|\n{table}\n"
        (TESTS / "planted_triton_bugs.md").write_text(text)
    return int(any(name.startswith("control") and found != "not noticed" for name, found in rows))


if __name__ == "__main__":
    sys.exit(main())

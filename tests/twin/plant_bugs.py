"""Plants one bug at a time in the CUDA kernels and reports which are not noticed.

  python tests/twin/plant_bugs.py [FAMILY ...] [--bugs NAME_START ...] [--jobs N] [--write]

Each bug is a change of the text of csrc/cuda in a copy of the tree (tests/twin/bugs has them). The family's program,
built plainly, runs under eight schedules; what they do not notice runs once more under ThreadSanitizer. `--write`
renews their rows of planted_bugs.md. Exits with 1 where a bug is not noticed, or something without a bug is.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import repeat
from pathlib import Path

TWIN = Path(__file__).resolve().parent
ROOT = TWIN.parents[1]
REPORT = TWIN / "planted_bugs.md"
SCHEDULES = {"plain": range(8), "tsan": (0, 5)}

sys.path.insert(0, str(TWIN.parent))

from twin import build  # noqa: E402
from twin.bugs import Bug, changed  # noqa: E402

FAMILIES = {
    name: import_module(f"twin.bugs.{name}") for name in ("sm80_forward", "sm80_backward", "sm90", "rows")
}
CONTROL = Bug("control: no bug", "", "", "")


def complaint(result: subprocess.CompletedProcess) -> str:
    """The first line that says what is wrong, or the signal that ended the program."""
    if result.returncode < 0:
        return signal.Signals(-result.returncode).name
    said = [line for line in result.stdout.splitlines() if not line.endswith(" ok")]
    said += [line for line in result.stderr.splitlines() if "SUMMARY" in line]
    if not said:
        return f"exit {result.returncode}"
    text = re.sub(r"\S*/", "", said[0].replace(" FAILED", ":").replace("|", "/")).rstrip("; ")
    return text if len(text) <= 90 else text[:87] + "..."


def attempt(family, bug: Bug, tree: Path, kind: str) -> str | None:
    """What is noticed, or nothing."""
    program = tree / kind
    flags = [f.replace(str(ROOT), str(tree)) for f in build.FLAGS if not f.startswith(("-W", "-g"))]
    flags += ["-O1"] if kind == "plain" else build.KINDS[kind]
    flags += family.FLAGS if bug.flags is None else bug.flags
    source = tree / "tests" / "twin" / family.PROGRAM
    command = ["g++", *flags, "-w", "-x", "c++", str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{bug.name}: does not compile\n{done.stderr[:2000]}")
    env = dict(os.environ, TSAN_OPTIONS="halt_on_error=1")
    for schedule in SCHEDULES[kind]:
        command = [
            str(program),
            str(schedule),
            *getattr(family, f"ARGUMENTS_{kind.upper()}", family.ARGUMENTS),
        ]
        try:
            result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            return f"schedule {schedule}: does not end" if kind == "plain" else None
        if result.returncode:
            return f"schedule {schedule}: {complaint(result)}"
    return None


def noticed(family, bug: Bug) -> str | None:
    """By what, if at all."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        shutil.copytree(ROOT / "csrc", tree / "csrc")
        shutil.copytree(TWIN, tree / "tests" / "twin", ignore=shutil.ignore_patterns("__pycache__", "*.py"))
        if bug is not CONTROL:
            path = tree / "csrc" / "cuda" / bug.file
            path.write_text(changed(bug, path.read_text()))
        found = attempt(family, bug, tree, "plain")
        if found is None and bug is not CONTROL:
            found = attempt(family, bug, tree, "tsan")
            found = found and f"ThreadSanitizer, {found}"
    return found


def write(sections: dict[str, list[tuple[str, str]]]) -> None:
    """Renews rows of the report; those of bugs that are no more go."""
    parts = re.split(r"^## (\w+)\n", REPORT.read_text(), flags=re.M)[1:] if REPORT.exists() else []
    texts = dict(zip(parts[::2], parts[1::2], strict=True))
    for name, new in sections.items():
        known = dict(re.findall(r"^\| (.*?) \| (.*) \|$", texts.get(name, ""), flags=re.M)) | dict(new)
        rows = [(bug.name, known[bug.name]) for bug in FAMILIES[name].BUGS if bug.name in known]
        missed = sum(found == "not noticed" for _, found in rows)
        lines = [f"| {bug} | {found} |" for bug, found in rows]
        left = len(FAMILIES[name].BUGS) - len(rows)
        head = f"{len(rows)} bugs planted, {len(rows) - missed} noticed, by `{FAMILIES[name].PROGRAM}`."
        head += f" {left} more are in the list and were not planted." if left else ""
        texts[name] = f"\n{head}\n\n| bug | noticed by |\n|---|---|\n" + "\n".join(lines) + "\n\n"
    counts = [re.search(r"(\d+) bugs planted, (\d+) noticed", text) for text in texts.values()]
    planted, found = (sum(int(count[i]) for count in counts) for i in (1, 2))
    head = "# Planted bugs\n\n"
    head += f"The last report of `plant_bugs.py`: {planted} bugs planted, {found} noticed.\n\n"
    body = "".join(f"## {name}\n{texts[name]}" for name in FAMILIES if name in texts)
    REPORT.write_text((head + body).rstrip("\n") + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--bugs", nargs="+", default=[""], metavar="NAME_START")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write planted_bugs.md")
    args = parser.parse_args()
    if unknown := [name for name in args.families if name not in FAMILIES]:
        parser.error(f"no such family: {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    failed, sections = False, {}
    for name in args.families or FAMILIES:
        family = FAMILIES[name]
        bugs = [CONTROL, *(bug for bug in family.BUGS if bug.name.startswith(tuple(args.bugs)))]
        rows = []
        with ThreadPoolExecutor(args.jobs) as pool:
            for bug, found in zip(bugs, pool.map(noticed, repeat(family), bugs)):
                print(f"{name}: {bug.name}: {found or 'not noticed'}", flush=True)
                failed |= (found is None) != (bug is CONTROL)
                if bug is not CONTROL:
                    rows.append((bug.name, found or "not noticed"))
        sections[name] = rows
    if args.write:
        write(sections)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""What nvcc made of the CUDA kernels: registers, spills, and the instructions that matter, as a committed table.

    python -m fastattn.tools.cuda_resources [--check] [--write] [--build FOLDER]

Reads a build made with FASTATTN_CUDA=1: what ptxas said, kept beside each object, and the machine code, where
cuobjdump is found (the toolkit's, or that in Triton's wheel). No GPU is needed. Exit code 1 where a kernel spills or
nvcc warned of anything else; with --check also where one takes more registers than csrc/cuda/resources.json says, lost
matrix or copy instructions, or is not in it. Figures are one compiler's: another
release's are not compared. Shared memory is what a kernel takes statically; those here ask for theirs at the launch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "csrc" / "cuda" / "resources.json"
# What is counted, by the names of the machine code: mma.sync, wgmma, TMA loads, cp.async, ldmatrix.
COUNTED = {"HMMA": "mma", "HGMMA": "wgmma", "UTMALDG": "tma", "LDGSTS": "cp_async", "LDSM": "ldmatrix"}
# nvcc of the same release differs by a few registers between hosts' standard libraries at most.
SLACK = 0

_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<spills>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass
class Resources:
    """registers: a thread's. spills: bytes stored and loaded. shared: static bytes. The others: instructions."""

    registers: int
    spills: int
    shared: int
    mma: int = 0
    wgmma: int = 0
    tma: int = 0
    cp_async: int = 0
    ldmatrix: int = 0


def demangle(names: list[str]) -> dict[str, str]:
    """Short names: without the namespaces, the parameters and what the compiler adds."""
    if shutil.which("c++filt") is None:
        return {name: name for name in names}
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    short = {}
    for name, full in zip(names, text.splitlines()):
        full = re.sub(r"fastattn::cuda::|\(anonymous namespace\)::", "", full).removeprefix("void ")
        full = re.sub(r"\((?:int|bool|MaskForm)\)", "", full)
        short[name] = re.sub(r"\((?!.*<).*\)$", "", full)
    return short


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin:
        inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(inside) if inside.exists() else None
    return found


def count_instructions(tool: str, objects: list[Path]) -> dict[tuple[str, str], Counter]:
    """(mangled name, architecture) -> how many of each counted instruction."""
    counts: dict[tuple[str, str], Counter] = {}
    pattern = re.compile(r"\b(" + "|".join(COUNTED) + r")\b")
    for path in objects:
        process = subprocess.Popen([tool, "-sass", str(path)], stdout=subprocess.PIPE, text=True)
        arch, current = "", Counter()
        for line in process.stdout:
            if line.startswith("arch = ") or line.lstrip().startswith("code for "):
                arch = line.split()[-1]
            elif "Function : " in line:
                current = counts.setdefault((line.split()[-1], arch), Counter())
            elif (match := pattern.search(line)) is not None:
                current[COUNTED[match.group(1)]] += 1
        if process.wait():
            sys.exit(f"{tool} does not read {path}")
    return counts


def read(build: Path) -> tuple[dict[str, Resources], list[str], bool]:
    """({"kernel sm_90a": resources}, what nvcc warned of, whether instructions were counted) of a build's folder."""
    logs = sorted(build.glob("*.cu.o.log"))
    if not logs:
        sys.exit(f"no CUDA build in {build}: FASTATTN_CUDA=1 python setup.py build_ext --inplace")
    tool = cuobjdump()
    counts = count_instructions(tool, [log.with_suffix("") for log in logs]) if tool else {}
    found, warned = [], []
    for log in logs:
        text = log.read_text()
        found += [match.groupdict() for match in _KERNEL.finditer(text)]
        lines = [line for line in text.splitlines() if re.search(r"warning|C75\d\d", line)]
        warned += [f"{log.stem}: {line}" for line in lines if "spilled" not in line]  # those are counted
    names = demangle(sorted({kernel["name"] for kernel in found}))
    table = {}
    for kernel in found:
        shared = re.search(r"(\d+) bytes smem", kernel["rest"])
        table[f"{names[kernel['name']]} {kernel['arch']}"] = Resources(
            int(kernel["registers"]),
            int(kernel["spills"]) + int(kernel["loads"]),
            int(shared.group(1)) if shared else 0,
            **counts.get((kernel["name"], kernel["arch"]), {}),
        )
    return dict(sorted(table.items())), warned, tool is not None


def complaints(found: dict[str, Resources], committed: dict[str, dict], counted: bool) -> list[str]:
    """Where a build is worse than the committed table."""
    said = []
    for name, now in found.items():
        before = committed.get(name)
        if before is None:
            said.append(f"{name} is not in {TABLE.name}")
            continue
        if now.registers > before["registers"] + SLACK:
            said.append(f"{name} takes {now.registers} registers, the table says {before['registers']}")
        for kind in COUNTED.values() if counted else ():
            if getattr(now, kind) < before[kind]:
                said.append(
                    f"{name} has {getattr(now, kind)} {kind} instructions, the table says {before[kind]}"
                )
    return said


def markdown(release: str, kernels: dict[str, Resources]) -> str:
    lines = [
        "# What nvcc made of the CUDA kernels",
        "",
        f"`make cuda-resources` compares a build with these figures of nvcc {release}.",
        "Registers are a thread's, spills bytes; the others count instructions in the code, loops once.",
        "",
        "| kernel | card | registers | spills | mma | wgmma | TMA loads | cp.async | ldmatrix |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in kernels.items():
        kernel, arch = name.rsplit(" ", 1)
        counts = " | ".join(str(n or "") for n in (r.mma, r.wgmma, r.tma, r.cp_async, r.ldmatrix))
        lines.append(f"| `{kernel}` | {arch} | {r.registers} | {r.spills or ''} | {counts} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastattn.tools.cuda_resources")
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--write", action="store_true", help="make this build the committed table")
    parser.add_argument(
        "--build", type=Path, help="the folder of the objects; by default the last one in build/"
    )
    given = parser.parse_args(arguments)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("cuda-resources: skipped, no nvcc on the PATH")
        return 0
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"V(\d+\.\d+)", version).group(1)
    folders = sorted(ROOT.glob("build/temp.*"), key=lambda folder: folder.stat().st_mtime)
    build = given.build or (folders[-1] if folders else ROOT / "build")
    found, warned, counted = read(build)
    said = [f"nvcc warns: {line}" for line in warned]
    said += [f"{name} spills {r.spills} bytes" for name, r in found.items() if r.spills]
    if given.write:
        content = {"nvcc": release, "kernels": {name: asdict(r) for name, r in found.items()}}
        TABLE.write_text(json.dumps(content, indent=1) + "\n")
        TABLE.with_suffix(".md").write_text(markdown(release, found))
    committed = json.loads(TABLE.read_text())
    if given.check:
        if committed["nvcc"] == release:
            said += complaints(found, committed["kernels"], counted)
        else:
            print(f"the table is of nvcc {committed['nvcc']}, this is {release}: not compared")
    for line in said:
        print(line)
    print(
        f"{len(found)} kernels, {'' if counted else 'instructions not counted (no cuobjdump), '}{len(said)} complaints"
    )
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())

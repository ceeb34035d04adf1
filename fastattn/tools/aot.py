"""Compiles every Triton kernel ahead of time, for GPUs that need not be here, and checks what it costs.

    python -m fastattn.tools.aot [--only TEXT] [--target NAME] [--jobs N] [--check] [--write]

Each module of kernels/ yields its cases (`aot_cases()`, see kernels/aot_case.py): a row of the launch table with
dtypes. Each is compiled for NVIDIA sm_80, sm_90, sm_100, sm_120 and AMD gfx942, and its registers, spills, shared
memory and matrix instructions are read from the machine code. Exit code 1 where a kernel

- does not compile, spills, or takes more shared (or tensor) memory than its architecture has;
- was to use the tensor cores and does not;
- with --check: takes more registers or memory, or has fewer matrix instructions, than the committed table
  kernels/resources.json says, or is not in it. Tables are kept by Triton version: another version's are not compared.

--write puts this run's figures into that table and into kernels/resources.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

from .. import _triton

TABLE = Path(__file__).resolve().parents[2] / "kernels" / "resources.json"

TENSOR_MEMORY_LIMIT = 512  # columns, sm_100

# The instructions of the matrix units: mma and wgmma, Blackwell's tcgen05, AMD's.
_MATRIX = re.compile(r"\b(HMMA|IMMA|DMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA|v_mfma\w*)\b")


@dataclass(frozen=True)
class Resources:
    """registers: a thread. spills, shared: bytes (AMD's spills: of private memory). matrix: instructions in the code.
    error: the compiler's, first line, where there is no code."""

    registers: int = 0
    spills: int = 0
    shared: int = 0
    matrix: int = 0
    tensor_memory: int = 0
    error: str = ""


def modules() -> list[str]:
    """The modules of kernels/ with a function aot_cases, in order."""
    folder = Path(_triton.module("aot_case").__file__).parent
    return [path.stem for path in sorted(folder.glob("*.py")) if "def aot_cases(" in path.read_text()]


@cache
def cases(module: str) -> dict:
    """The cases of a module by name and target. Raises ValueError where two have the same."""
    found = {}
    for case in _triton.module(module).aot_cases():
        for target in case.targets:
            if (case.name, target) in found:
                raise ValueError(f"kernels/{module}.py yields {case.name!r} twice for {target}")
            found[case.name, target] = case
    return found


def compile_case(case, target: str) -> Resources:
    """What the machine code of a case takes on a target. Raises what Triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.fn.arg_names
    unknown = (set(case.signature) | set(case.constexprs)) ^ set(names)
    if unknown:
        raise ValueError(f"case {case.name!r} does not cover the arguments of the kernel: {sorted(unknown)}")
    # ASTSource takes arguments in the order of the kernel's.
    signature = {n: "constexpr" if n in case.constexprs else case.signature[n] for n in names}
    constants = {(i,): case.constexprs[n] for i, n in enumerate(names) if n in case.constexprs}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in case.divisible_by_16}
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    compiled = triton.compile(
        ASTSource(case.fn, signature, constants, attributes),
        target=gpu,
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    shared = compiled.metadata.shared
    if amd:
        return _read_amd(compiled.asm["amdgcn"], shared)
    return _read_nvidia(compiled.asm["cubin"], shared, getattr(compiled.metadata, "tmem_size", None) or 0)


def _read_amd(assembly: str, shared: int) -> Resources:
    def number(key: str) -> int:
        return max((int(n) for n in re.findall(rf"\.{key}:\s+(\d+)", assembly)), default=0)

    # vgpr_count holds both the vector registers and the accumulators, which share one file.
    spills = max(number("private_segment_fixed_size"), 4 * number("vgpr_spill_count"))
    return Resources(number("vgpr_count"), spills, shared, len(_MATRIX.findall(assembly)))


def _read_nvidia(cubin: bytes, shared: int, tensor_memory: int) -> Resources:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def dump(tool: str, *flags: str) -> str:
            command = [str(tools / tool), *flags, str(path)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage = dump("cuobjdump", "-res-usage")
        code = dump("nvdisasm", "-c")

    def number(key: str) -> int:
        return max((int(n) for n in re.findall(rf"\b{key}:(\d+)", usage)), default=0)

    # Nothing of ours needs a stack but a spill; some kernels get one of 8 bytes that no instruction touches.
    spills = number("STACK") + number("LOCAL") if re.search(r"\b(STL|LDL)\b", code) else 0
    return Resources(number("REG"), spills, shared, len(_MATRIX.findall(code)), tensor_memory)


def faults(case, target: str, r: Resources) -> list[str]:
    """What makes a kernel unfit for a target, whatever it took before."""
    if r.error:
        return [f"does not compile: {r.error}"]
    found = []
    if r.spills:
        found.append(f"spills {r.spills} bytes")
    limit = _triton.module("launch").SHARED[target]
    if r.shared > limit:
        found.append(f"takes {r.shared} bytes of shared memory, {target} has {limit}")
    if r.tensor_memory > TENSOR_MEMORY_LIMIT:
        found.append(f"takes {r.tensor_memory} columns of tensor memory, {target} has {TENSOR_MEMORY_LIMIT}")
    if case.tensor_cores and not r.matrix:
        found.append("has no matrix instruction")
    return found


def regressions(now: Resources, before: dict | None) -> list[str]:
    """What a kernel takes more of than the committed table says."""
    if now.error:
        return []
    if before is None:
        return ["is not in the committed table"]
    found = []
    for name in ("registers", "shared", "tensor_memory"):
        if getattr(now, name) > before.get(name, 0):
            found.append(f"takes {getattr(now, name)} {name.replace('_', ' ')}, before {before.get(name, 0)}")
    if now.matrix < before.get("matrix", 0):
        found.append(f"has {now.matrix} matrix instructions, before {before['matrix']}")
    return found


def _measure(work: tuple[str, str, str]) -> Resources:
    module, name, target = work
    try:
        return compile_case(cases(module)[name, target], target)
    except Exception as error:  # every kernel is reported, whatever one does
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        return Resources(error=f"{type(error).__name__}: {lines[-1].strip():.200}")


def _results(work: Sequence[tuple[str, str, str]], jobs: int) -> Iterator[Resources]:
    if jobs == 1 or len(work) == 1:
        yield from map(_measure, work)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_measure, work)


def _read_table() -> dict:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _figures(r: dict) -> str:
    parts = [f"{r['registers']}r"]
    parts += [f"{r['shared']}s"] if r.get("shared") else []
    parts += [f"{r['matrix']}m"] if r.get("matrix") else []
    parts += [f"{r['tensor_memory']}t"] if r.get("tensor_memory") else []
    return " ".join(parts)


def _markdown(table: dict) -> str:
    version = max(table, key=_version)
    targets = _triton.module("aot_case").TARGETS
    lines = [
        "# What each kernel takes",
        "",
        f"Written by `python -m fastattn.tools.aot --write`, Triton {version}; `make aot` compares. r: registers a",
        "thread, s: bytes of shared memory a block, m: matrix instructions in the code, t: columns of tensor memory.",
        "Nothing spills.",
        "",
        "| kernel | " + " | ".join(targets) + " |",
        "|---|" + "---|" * len(targets),
    ]
    for name, row in sorted(table[version].items()):
        cells = (_figures(row[t]) if t in row else "" for t in targets)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _write(version: str, results: dict, whole: bool) -> None:
    """`whole`: kernels that are not among the results are gone."""
    table = _read_table()
    rows = {} if whole else table.get(version, {})
    for (kernel, target), r in results.items():
        rows.setdefault(kernel, {})[target] = {n: v for n, v in asdict(r).items() if v}
    table[version] = dict(sorted(rows.items()))
    lines = []
    for v in sorted(table, key=_version):
        kernels = [f"    {json.dumps(k)}: {json.dumps(row)}" for k, row in table[v].items()]
        lines.append(f"  {json.dumps(v)}: {{\n" + ",\n".join(kernels) + "\n  }")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    TABLE.with_suffix(".md").write_text(_markdown(table))


def run(arguments: argparse.Namespace) -> int:
    """Compiles, prints a line each and, at the end, what is wrong; returns the exit code."""
    import triton

    version = triton.__version__
    work = [
        (module, name, target)
        for module in modules()
        for name, target in cases(module)
        if arguments.only in f"{module}/{name}" and (not arguments.target or target in arguments.target)
    ]
    if not work:
        print("no case matches", file=sys.stderr)
        return 2
    ours = [w for w in work if _version(version) >= cases(w[0])[w[1:]].oldest]
    if len(ours) < len(work):
        print(f"{len(work) - len(ours)} left out: dispatch refuses them with Triton {version}")
        work = ours
    before = _read_table().get(version)
    if arguments.check and before is None:
        print(f"no table of Triton {version} is committed: only the rules are checked")
    results, wrong = {}, []
    for (module, name, target), r in zip(work, _results(work, arguments.jobs)):
        kernel = f"{module}/{name}"
        results[kernel, target] = r
        found = faults(cases(module)[name, target], target, r)
        if arguments.check and before is not None and not found:
            found = regressions(r, before.get(kernel, {}).get(target))
        wrong += [f"{kernel} on {target} {reason}" for reason in found]
        print(f"{kernel:<48} {target:<7} {_figures(asdict(r)):<24}", "; ".join(found), flush=True)
    print(f"{len(work)} compiled by Triton {version}, {len(wrong)} wrong")
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    if arguments.write and not wrong:
        _write(version, results, whole=not arguments.only and not arguments.target)
        print(f"written: {TABLE}")
    return 1 if wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastattn.tools.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose module/name contains it")
    parser.add_argument(
        "--target", action="append", choices=_triton.module("aot_case").TARGETS, help="may be given again"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--write", action="store_true", help="put the figures into the committed table")
    arguments = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
    if importlib.util.find_spec("triton") is None:
        print("the ahead-of-time compilation needs triton: pip install triton", file=sys.stderr)
        return 2
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())

"""The ahead-of-time compilation: what it measures, and that it refuses what spills, does not fit or got worse."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fastattn import _triton
from fastattn.tools import aot

CASE = _triton.module("aot_case").AotCase("planted", None, {}, {}, 4, 1, tensor_cores=True)


KERNELS = Path(_triton.module("aot_case").__file__).parent


def entry_kernels() -> set[tuple[str, str]]:
    """(module, name) of the kernels: what triton.jit makes and none of its functions uses."""
    made, used = set(), set()
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            if any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                made.add((path.stem, node.name))
                used |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return {(module, name) for module, name in made if name not in used}


def test_every_kernel_is_compiled(triton_device):  # decorates the kernels as the other tests want them
    compiled = set()
    for module in aot.modules():
        compiled |= {
            (module, getattr(case.fn, "fn", case.fn).__name__) for case in aot.cases(module).values()
        }
    kernels = entry_kernels()
    assert ("attention", "attention_kernel") in kernels and len(kernels) > 10
    assert kernels == compiled


def run(*command):
    """In a process of its own: this one interprets its kernels."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def test_one_case_on_one_target():
    result = run(
        "-m", "fastattn.tools.aot", "--only", "softmax/whole", "--target", "sm_90", "--check", "--jobs", "1"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "softmax/whole_longest" in result.stdout and "0 wrong" in result.stdout
    assert run("-m", "fastattn.tools.aot", "--only", "no such kernel").returncode == 2


def test_a_planted_kernel_that_spills(tmp_path):
    (tmp_path / "planted.py").write_text(
        textwrap.dedent(
            """
            import triton
            import triton.language as tl
            from fastattn import _triton
            from fastattn.tools import aot

            @triton.jit
            def centred(x, y, N: tl.constexpr):
                o = tl.arange(0, N)
                b = tl.load(x + o)
                tl.store(y + o, b - tl.sum(b, 0))

            case = _triton.module("aot_case").AotCase(
                "planted", centred, {"x": "*fp32", "y": "*fp32"}, {"N": 16384}, 1, 1, tensor_cores=True
            )
            for target in ("sm_90", "gfx942"):
                r = aot.compile_case(case, target)
                print(target, "; ".join(aot.faults(case, target, r)))
            """
        )
    )
    result = run(str(tmp_path / "planted.py"))
    lines = result.stdout.splitlines()
    assert len(lines) == 2, result.stdout + result.stderr
    assert "spills" in lines[0] and "no matrix instruction" in lines[0]
    assert "no matrix instruction" in lines[1]


def test_rules():
    def faults(target="sm_120", **figures):
        return aot.faults(CASE, target, aot.Resources(registers=64, **{"matrix": 8, **figures}))

    assert faults() == [] and faults(shared=99 << 10) == []
    assert faults(spills=8) == ["spills 8 bytes"]
    assert faults(shared=(99 << 10) + 1)[0].startswith("takes 101377 bytes of shared memory")
    assert faults("sm_90", shared=(99 << 10) + 1) == []
    assert faults("sm_100", tensor_memory=1024)[0].startswith("takes 1024 columns")
    assert faults(matrix=0) == ["has no matrix instruction"]
    assert faults(error="PTXASError: no")[0].startswith("does not compile")


def test_regressions():
    before = {"registers": 64, "shared": 1024, "matrix": 8}
    assert aot.regressions(aot.Resources(64, 0, 1024, 8), before) == []
    assert aot.regressions(aot.Resources(60, 0, 0, 9), before) == []
    assert aot.regressions(aot.Resources(65, 0, 1024, 8), before) == ["takes 65 registers, before 64"]
    assert aot.regressions(aot.Resources(64, 0, 2048, 7), before) == [
        "takes 2048 shared, before 1024",
        "has 7 matrix instructions, before 8",
    ]
    assert aot.regressions(aot.Resources(64), None) == ["is not in the committed table"]

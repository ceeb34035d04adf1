"""What `make cuda-resources` reads of a build, and what it refuses, on a build that is a page of ptxas's words."""

import json
import subprocess

import pytest

from fastattn.tools import cuda_resources

KERNEL = """ptxas info    : Compiling entry function '{name}' for 'sm_80'
ptxas info    : Function properties for {name}
    0 bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 16 bytes smem, 400 bytes cmem[0]
"""


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """check(*arguments, *kernels): the exit code and what is said of a build, with nvcc 13.0."""
    monkeypatch.setattr(cuda_resources.shutil, "which", lambda name: "nvcc" if name == "nvcc" else None)
    monkeypatch.setattr(cuda_resources, "cuobjdump", lambda: None)
    monkeypatch.setattr(cuda_resources, "TABLE", tmp_path / "resources.json")
    answer = subprocess.CompletedProcess([], 0, stdout="Cuda compilation tools, release 13.0, V13.0.88")
    monkeypatch.setattr(cuda_resources.subprocess, "run", lambda *a, **k: answer)

    def run(*arguments, kernels=(("scan", 40, 0),), extra=""):
        log = "".join(KERNEL.format(name=n, registers=r, spills=s) for n, r, s in kernels)
        (tmp_path / "one.cu.o.log").write_text(log + extra)
        code = cuda_resources.main([*arguments, "--build", str(tmp_path)])
        return code, capsys.readouterr().out

    assert run("--write") == (0, "1 kernels, instructions not counted (no cuobjdump), 0 complaints\n")
    return run


def test_the_table_is_what_the_build_says(check):
    table = json.loads(cuda_resources.TABLE.read_text())
    assert table["nvcc"] == "13.0"
    (row,) = table["kernels"].items()
    assert row[0] == "scan sm_80" and (row[1]["registers"], row[1]["spills"], row[1]["shared"]) == (40, 0, 16)
    assert "| `scan` | sm_80 | 40 |" in cuda_resources.TABLE.with_suffix(".md").read_text()
    assert check("--check")[0] == 0


@pytest.mark.parametrize("arguments", [(), ("--check",), ("--write",)], ids=str)
def test_a_spill_is_refused_whatever_the_table_says(check, arguments):
    spilling = (("scan", 40, 8),)
    for _ in range(2):  # writing it into the table excuses nothing
        code, said = check(*arguments, kernels=spilling)
        assert code == 1 and "scan sm_80 spills 16 bytes" in said


def test_other_complaints(check):
    assert "takes 41 registers, the table says 40" in check("--check", kernels=(("scan", 41, 0),))[1]
    code, said = check("--check", kernels=(("scan", 39, 0), ("fresh", 10, 0)))
    assert code == 1 and "fresh sm_80 is not in resources.json" in said and "1 complaints" in said
    code, said = check(extra="ptxas info : (C7512) Potential Performance Loss: wgmma is serialized\n")
    assert code == 1 and "nvcc warns: one.cu.o: ptxas info : (C7512)" in said


def test_figures_of_another_compiler_are_not_compared(check):
    text = cuda_resources.TABLE.read_text()
    cuda_resources.TABLE.write_text(text.replace('"13.0"', '"12.9"'))
    code, said = check("--check", kernels=(("scan", 99, 0),))
    assert code == 0 and "the table is of nvcc 12.9, this is 13.0: not compared" in said
    assert check("--check", kernels=(("scan", 40, 4),))[0] == 1

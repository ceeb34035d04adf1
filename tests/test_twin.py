"""The host twin itself: it runs what is right and reports what is wrong. And every PTX wrapper's meaning, on the
twin and, under `make gpu`, on a card.
"""

import shutil
import subprocess

import pytest
import torch
from twin import build

pytestmark = pytest.mark.skipif(build.missing is not None, reason=str(build.missing))

# What is planted -> what each build says of it; None where it cannot know.
RACES = {
    "fine": {"plain": None, "asan": None, "tsan": None},
    "blocks": {"plain": None, "asan": None, "tsan": "data race"},
    "lanes": {"plain": None, "asan": None, "tsan": "data race"},
    "deadlock": dict.fromkeys(build.KINDS, "deadlock: 32 threads at named_barrier_sync"),
    "divergence": dict.fromkeys(build.KINDS, "warp diverged"),
    "unfinished": dict.fromkeys(build.KINDS, "never waited for"),
    "bounds": {"plain": "write outside shared memory", "asan": "out of bounds", "tsan": "write outside"},
}


@pytest.mark.parametrize("kind", build.KINDS)
def test_the_twin_reports_what_is_wrong(kind):
    program = build.program("race.cpp", kind)
    for name, said in RACES.items():
        result = build.run(program, name)
        report = result.stdout + result.stderr
        assert (result.returncode == 0) == (said[kind] is None), (name, report)
        assert said[kind] is None or said[kind] in report, (name, report)


def failures(result):
    return [
        line for line in result.stdout.splitlines() if not line.endswith(" ok")
    ] + result.stderr.splitlines()


@pytest.mark.parametrize("seed", range(8))
def test_wrappers_on_the_twin(seed):
    result = build.run(build.program("conformance.cu"), seed)
    assert result.returncode == 0, failures(result)
    assert result.stdout.count(" ok") >= 12, result.stdout


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_wrappers_under_the_sanitizers(kind):
    result = build.run(build.program("conformance.cu", kind), 3)
    assert result.returncode == 0, failures(result)


@pytest.mark.gpu
def test_wrappers_on_a_card(tmp_path):
    if not torch.cuda.is_available() or shutil.which("nvcc") is None:
        pytest.skip("needs a CUDA device and nvcc")
    major, minor = torch.cuda.get_device_capability()
    arch = "90a" if (major, minor) == (9, 0) else "80"
    code = (
        f"arch=compute_{arch},code=[sm_{arch},compute_{arch}]"
        if arch == "80"
        else f"arch=compute_{arch},code=sm_{arch}"
    )
    program = tmp_path / "conformance"
    command = [
        "nvcc",
        "-std=c++20",
        "-O2",
        "-gencode",
        code,
        f"-I{build.ROOT / 'csrc'}",
        f"-I{build.ROOT / 'tests'}",
    ]
    subprocess.run([*command, str(build.TWIN / "conformance.cu"), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, failures(result)

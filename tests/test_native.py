"""The kernels without torch: tests/native/selftest.cpp for each instruction set, the ones of this machine run as
they are, NEON's cross-compiled and run under an emulator.
"""

import ast
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastattn import _info

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cpu"
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def build_flags():
    """COMMON_FLAGS and TARGETS of setup.py, which cannot be imported without building."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    tree.body = [
        n
        for n in tree.body
        if isinstance(n, (ast.Assign, ast.AugAssign))
        and {name.id for name in ast.walk(n) if isinstance(name, ast.Name)}
        <= {"COMMON_FLAGS", "AVX512", "TARGETS"}
    ]
    names = {}
    exec(compile(tree, "setup.py", "exec"), names)
    return names["COMMON_FLAGS"], names["TARGETS"]


def built_objects(names):
    """Those of the objects that `build_ext --inplace` left and that ninja finds up to date."""
    ninja = shutil.which("ninja") or shutil.which("ninja", path=Path(sys.executable).parent)
    for folder in (ROOT / "build").glob("temp*") if ninja else ():
        for name in names:
            ask = subprocess.run([ninja, "-C", folder, "-n", f"{name}.o"], capture_output=True, text=True)
            if "no work to do" in ask.stdout:
                yield folder / f"{name}.o"


def build(machine, compiler, folder, link_flags=(), ready=()):
    """The self-test of a machine with all of its targets; `ready` are objects not to compile again."""
    common, targets = build_flags()
    launcher = ["ccache"] if shutil.which("ccache") else []
    jobs = {SOURCES / "targets" / f"{name}.cpp": flags for name, flags in targets[machine].items()}
    jobs |= {SOURCES / "targets" / f"{name}.cpp": [] for name in ("targets", "select")}
    # Lightly optimised: the plain loops, whose time to compile counts too.
    jobs[ROOT / "tests" / "native" / "selftest.cpp"] = ["-O1"]
    done = {o.stem: o for o in ready}

    def compile_one(job):
        source, flags = job
        if source.stem in done:
            return done[source.stem]
        out = folder / f"{source.stem}.o"
        command = [*launcher, compiler, *common, "-Werror", *flags, "-c", str(source), "-o", str(out)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr[-3000:]}"
        return out

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, jobs.items()))
    program = folder / "selftest"
    subprocess.check_call([compiler, *map(str, objects), "-o", str(program), *link_flags])
    return program


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler: {compiler} is not on the path")
    _, targets = build_flags()
    if platform.machine() not in targets:
        pytest.skip(f"no kernels but the scalar ones for {platform.machine()}")
    ready = built_objects([*targets[platform.machine()], "targets", "select"])
    return build(platform.machine(), compiler, tmp_path_factory.mktemp("native"), ready=ready)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    for tool, package in ((CROSS_COMPILER, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user")):
        if shutil.which(tool) is None:
            pytest.skip(f"NEON is not tested: {tool} is not on the path (apt-get install {package})")
    return build("aarch64", CROSS_COMPILER, tmp_path_factory.mktemp("aarch64"), ["-static"])


def assert_passes(*command):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-1000:]}"
    assert "0 failed" in result.stdout


@pytest.mark.parametrize("isa", _info.available_isas())
def test_native(native, isa):
    assert_passes(native, isa)


@pytest.mark.parametrize("isa", ["scalar", "neon"])
def test_aarch64_under_emulation(emulated, isa):
    assert_passes(EMULATOR, emulated, isa)


def test_the_self_test_can_fail(native):
    """An instruction set that is not there is an error, not a pass of nothing."""
    result = subprocess.run([str(native), "avx1024"], capture_output=True, text=True)
    assert result.returncode == 2 and "avx1024" in result.stdout

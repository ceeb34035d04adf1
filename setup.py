"""Builds the op library (LibTorch stable ABI) and the introspection module (pybind11) with ninja.

torch is never imported and never asked for as a build requirement: its headers are found on disk, so a build,
isolated or not, uses the torch that is already installed and downloads none.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "fastattn" / "version.py").read_text()).group(1)

# The oldest torch that the library loads on: no symbol newer than this is used.
TORCH_TARGET = "0x020b000000000000ULL"

COMMON_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-fno-math-errno"]
# GCC 12 reports its own AVX-512 intrinsics as uninitialised (GCC bug 105593).
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
TARGETS = {
    "x86_64": {
        "scalar": ["-ffp-contract=off"],
        "avx2": ["-mavx2", "-mfma", "-mf16c", "-ffp-contract=off"],
        "avx512": [*AVX512, "-ffp-contract=off"],
        "avx512_bf16": [*AVX512, "-mavx512bf16", "-ffp-contract=off"],
        "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-ffp-contract=off"],
        "amx_emulated": [*AVX512, "-mavx512bf16", "-ffp-contract=off"],
    },
    "aarch64": {"scalar": ["-ffp-contract=off"], "neon": ["-ffp-contract=off"]},
}


def find_torch() -> Path:
    """The folder of the installed torch: FASTATTN_TORCH_DIR, this interpreter's, or the one pip's isolation hides."""
    candidates = [os.environ.get("FASTATTN_TORCH_DIR")]
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        candidates.append(Path(spec.origin).parent)
    candidates += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    for candidate in candidates:
        if candidate and (Path(candidate) / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return Path(candidate)
    sys.exit(
        "fastattn: building needs torch 2.11 or newer, and none was found for this Python.\n"
        "Install it first (CPU build: pip install torch==2.13.0), then install fastattn again; or point\n"
        "FASTATTN_TORCH_DIR at the folder of a torch that is installed elsewhere."
    )


def torch_version(torch: Path) -> str:
    match = re.search(r"__version__ = '(.+?)'", (torch / "version.py").read_text())
    return match.group(1) if match else "unknown"


class NinjaBuild(build_ext):
    """One build.ninja for both libraries: flags a file, parallel, an edit rebuilds one object."""

    def run(self):
        torch, out = find_torch(), Path(self.build_temp).resolve()
        if self.inplace:
            # An editable install is given a folder that does not last: take the one that keeps the objects.
            out = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        if importlib.util.find_spec("ninja") is None and shutil.which("ninja") is None:
            sys.exit("fastattn: building needs ninja: pip install ninja")
        import pybind11

        out.mkdir(parents=True, exist_ok=True)
        package = ROOT / "fastattn" if self.inplace else Path(self.build_lib).resolve() / "fastattn"
        package.mkdir(parents=True, exist_ok=True)
        libraries = {
            "ops": package / "_ops.so",
            "info": package / f"_info{sysconfig.get_config_var('EXT_SUFFIX')}",
        }
        (out / "build.ninja").write_text(self.ninja_file(torch, Path(pybind11.get_include()), libraries))
        command = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        jobs = os.environ.get("MAX_JOBS")
        subprocess.check_call([*command, "-C", str(out), *(["-j", jobs] if jobs else [])])

    def ninja_file(self, torch: Path, pybind: Path, libraries: dict) -> str:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which("ccache"):
            compiler = f"ccache {compiler}"
        machine = platform.machine()
        targets = TARGETS.get(machine, {"scalar": ["-ffp-contract=off"]})
        extra = os.environ.get("CXXFLAGS", "")
        lines = [
            f"cxx = {compiler}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            "  command = $cxx -shared $in -o $out $ldflags",
            "  description = link $out",
        ]

        def compile_one(source: str, name: str, flags: list) -> str:
            joined = " ".join([*COMMON_FLAGS, extra, *flags]).replace("$", "$$")
            lines.append(f"build {name}.o: compile {ROOT / source}\n  flags = {joined}")
            return f"{name}.o"

        stable = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-isystem {torch / 'include'}"]
        stable += [f"-isystem {torch / 'include/torch/csrc/api/include'}"]
        bindings = sorted((ROOT / "csrc").glob("ops*.cpp"))
        ops = [compile_one(f"csrc/{source.name}", source.stem, stable) for source in bindings]
        ops += [compile_one(f"csrc/cpu/targets/{t}.cpp", t, flags) for t, flags in targets.items()]
        ops += [compile_one("csrc/cpu/targets/targets.cpp", "targets", [])]
        select = compile_one("csrc/cpu/targets/select.cpp", "select", [])
        facts = {
            "FASTATTN_VERSION": VERSION,
            "FASTATTN_TORCH_VERSION": torch_version(torch),
            "FASTATTN_BUILD_FLAGS": " ".join(COMMON_FLAGS),
        }
        defines = [f"'-D{key}=\"{value}\"'" for key, value in facts.items()]
        include = [f"-isystem {sysconfig.get_path('include')}", f"-isystem {pybind}"]
        info = compile_one("csrc/info.cpp", "info", [*defines, *include])
        link_ops = f"-L{torch / 'lib'} -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10"
        lines.append(f"build {libraries['ops']}: link {' '.join([*ops, select])}\n  ldflags = {link_ops}")
        lines.append(f"build {libraries['info']}: link {info} {select}\n  ldflags =")
        lines.append(f"default {libraries['ops']} {libraries['info']}\n")
        return "\n".join(lines)

    def get_outputs(self):
        package = Path(self.build_lib) / "fastattn"
        return [str(package / "_ops.so"), str(package / f"_info{sysconfig.get_config_var('EXT_SUFFIX')}")]


setup(
    ext_modules=[Extension("fastattn._info", ["csrc/info.cpp"])],
    cmdclass={"build_ext": NinjaBuild},
)

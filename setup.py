"""Builds the op library (LibTorch stable ABI), the introspection module (pybind11) and, asked for or on a CUDA torch,
the CUDA library with ninja.

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

# The CUDA library, built elsewhere and carried into the tree for a machine without nvcc.
PREBUILT = ROOT / "fastattn" / "_cuda.so"

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
        "amx": [*AVX512, "-mavx512bf16", "-mavx512vbmi", "-mamx-tile", "-mamx-bf16", "-ffp-contract=off"],
        "amx_emulated": [*AVX512, "-mavx512bf16", "-mavx512vbmi", "-ffp-contract=off"],
    },
    "aarch64": {"scalar": ["-ffp-contract=off"], "neon": ["-ffp-contract=off"]},
}

NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra",
    "-Xptxas -v,-warn-spills",
]


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


class Nvcc:
    """The CUDA compiler and the architectures to build for: "80" is code for 8.0, 8.6 and 8.9, "90a" Hopper's own.

    The highest architecture without a suffix leaves its PTX too, for later cards.
    """

    def __init__(self, path: str):
        self.path = path
        text = (
            subprocess.run([path, "--dryrun", "none.cu"], capture_output=True, text=True, cwd=ROOT).stderr
            + subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        )
        top, release = re.search(r"#\$ TOP=(.+)", text), re.search(r"release (\d+)\.(\d+)", text)
        if top is None or release is None:
            sys.exit(f"fastattn: {path} does not answer like nvcc: {text[:200]}")
        self.top = Path(top.group(1).strip()).resolve()
        self.version = int(release.group(1)) * 1000 + int(release.group(2)) * 10
        asked = os.environ.get("FASTATTN_CUDA_ARCHS", "80;90a")
        self.archs = [arch for arch in re.split(r"[;, ]+", asked) if arch]
        if not self.archs or not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in self.archs):
            sys.exit(f"fastattn: FASTATTN_CUDA_ARCHS must be like 80;90a, got {asked!r}")

    @classmethod
    def wanted(cls, torch: Path) -> "Nvcc | None":
        """FASTATTN_CUDA=1 or 0 decides; else a CUDA torch with an nvcc beside it. None: a library in the tree stays."""
        choice = os.environ.get("FASTATTN_CUDA", "")
        if choice not in ("", "0", "1"):
            sys.exit(f"fastattn: FASTATTN_CUDA must be 0 or 1, got {choice!r}")
        has_cuda = re.search(r"^cuda\b.*= '", (torch / "version.py").read_text(), re.MULTILINE)
        if choice == "0" or (not choice and not has_cuda):
            return None
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        path = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
        if path is not None:
            return cls(path)
        missing = "fastattn: no nvcc on the PATH, in CUDA_HOME or named by CUDACXX"
        if choice == "1":
            sys.exit(
                f"{missing}, which FASTATTN_CUDA=1 needs. Install the CUDA toolkit, or leave FASTATTN_CUDA unset; a "
                f"fastattn/_cuda.so that was built elsewhere is then taken as it is."
            )
        what = (
            "taking fastattn/_cuda.so as it is" if PREBUILT.exists() else "building without the CUDA library"
        )
        print(f"{missing}: {what}", file=sys.stderr)
        return None

    def flags(self, source: Path) -> list[str]:
        """Code for every architecture that a source serves: one named _sm90 only for Hopper's."""
        archs = [arch for arch in self.archs if "_sm90" not in source.stem or arch == "90a"]
        plain = [int(arch) for arch in self.archs if arch.isdigit()]
        flags = []
        for arch in archs:
            code = f"[sm_{arch},compute_{arch}]" if plain and arch == str(max(plain)) else f"sm_{arch}"
            flags.append(f"-gencode arch=compute_{arch},code={code}")
        return flags


class NinjaBuild(build_ext):
    """One build.ninja for all libraries: flags a file, parallel, an edit rebuilds one object."""

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
            "cuda": package / "_cuda.so",
        }
        nvcc = Nvcc.wanted(torch)
        if nvcc is None and not self.inplace and PREBUILT.exists():
            shutil.copy2(PREBUILT, libraries["cuda"])
        lines = self.ninja_file(torch, Path(pybind11.get_include()), libraries, nvcc)
        (out / "build.ninja").write_text(lines)
        command = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        jobs = os.environ.get("MAX_JOBS")
        subprocess.check_call([*command, "-C", str(out), *(["-j", jobs] if jobs else [])])

    def ninja_file(self, torch: Path, pybind: Path, libraries: dict, nvcc: Nvcc | None) -> str:
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
        if nvcc is not None:
            bindings = sorted((ROOT / "csrc" / "cuda").glob("ops*.cpp"))
            define = [
                f"-DFASTATTN_CUDA_VERSION={nvcc.version}",
                f"'-DFASTATTN_CUDA_ARCHS=\"{' '.join(nvcc.archs)}\"'",
            ]
            define += ["-DFASTATTN_CUDA_SM90"] * ("90a" in nvcc.archs)
            flags = [*stable, "-DUSE_CUDA", *define]
            objects = [compile_one(f"csrc/cuda/{b.name}", f"cuda_{b.stem}", flags) for b in bindings]
            objects += self.cuda_kernels(nvcc, lines)
            link_cuda = f"-L{nvcc.top / 'lib64'} -lcudart_static -ldl -lrt -lpthread -Wl,--exclude-libs,ALL {link_ops}"
            lines.append(f"build {libraries['cuda']}: link {' '.join(objects)}\n  ldflags = {link_cuda}")
            lines.append(f"default {libraries['cuda']}")
        lines.append(f"default {libraries['ops']} {libraries['info']}\n")
        return "\n".join(lines)

    @staticmethod
    def cuda_kernels(nvcc: Nvcc, lines: list) -> list:
        """The objects of csrc/cuda/*.cu. What ptxas says of each kernel stays beside its object, for the table."""
        lines += [
            f"nvcc = {nvcc.path}",
            "rule nvcc",
            "  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out >$out.log 2>&1 "
            "|| (cat $out.log; rm -f $out; exit 1)",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in for $archs",
        ]
        objects = []
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            archs = nvcc.flags(source)
            if archs:
                flags = " ".join([*NVCC_FLAGS, *archs])
                lines.append(
                    f"build {source.stem}.cu.o: nvcc {source}\n  flags = {flags}\n  archs = {' '.join(nvcc.archs)}"
                )
                objects.append(f"{source.stem}.cu.o")
        return objects

    def get_outputs(self):
        package = Path(self.build_lib) / "fastattn"
        names = ["_ops.so", f"_info{sysconfig.get_config_var('EXT_SUFFIX')}", "_cuda.so"]
        return [str(package / name) for name in names if name != "_cuda.so" or (package / name).exists()]


setup(
    ext_modules=[Extension("fastattn._info", ["csrc/info.cpp"])],
    cmdclass={"build_ext": NinjaBuild},
)

"""Builds and drives host-twin libraries and programs: CUDA kernels as C++ for g++.

    lib = build.library("attention_sm80.cpp")         # a ctypes.CDLL; built when its sources changed
    build.call(lib.attention_forward, seed, args)     # raises TwinError with the twin's message

A source lies in tests/twin, includes what it needs of csrc/cuda and <twin/binding.h>, and exports functions
`TWIN_EXPORT const char* name(uint64_t seed, ...)` whose body runs in `twin::guarded`. Tensors go over as
`tensor.data_ptr()`; a library runs on the calling thread.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

TWIN = Path(__file__).resolve().parent
ROOT = TWIN.parents[1]
FOLDER = Path(os.environ.get("FASTATTN_TWIN_BUILD", ROOT / "build" / "twin"))

# AVX2 and F16C for the twin's own arithmetic; no contraction, so that sums do not depend on the compiler's mood.
FLAGS = [
    "-std=c++20",
    "-DFASTATTN_HOST_TWIN",
    "-march=x86-64-v3",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-g1", f"-I{ROOT / 'tests'}", f"-I{ROOT / 'csrc'}"]
KINDS = {
    "plain": ["-O2"],
    "asan": ["-O1", "-fsanitize=address,undefined"],
    "tsan": ["-O1", "-fsanitize=thread"],
}

missing = None
if platform.machine() != "x86_64":
    missing = "the host twin switches stacks on x86-64 only"
elif shutil.which("g++") is None:
    missing = "no g++ on this machine"


class TwinError(RuntimeError):
    """What the twin found wrong: a deadlock, an access out of bounds, divergence."""


def _fingerprint(source: Path, flags: list[str]) -> str:
    digest = hashlib.sha256(repr(flags).encode())
    suffixes = (".h", ".cuh", ".cpp")
    headers = [p for folder in (TWIN, ROOT / "csrc") for p in folder.rglob("*") if p.suffix in suffixes]
    for path in [source, *sorted(headers)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _build(source: str | Path, kind: str, extra: tuple[str, ...], link: list[str], suffix: str) -> Path:
    source = TWIN / source
    flags = [*FLAGS, *KINDS[kind], *extra]
    name = f"{source.stem}-{kind}-{_fingerprint(source, flags)}"
    target = FOLDER / (name + suffix)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes ask for the same library at once
        if not target.exists():
            launcher = ["ccache"] if shutil.which("ccache") else []
            fresh = target.with_suffix(".new")
            fresh_object = target.with_suffix(".o")
            position = ["-fPIC", "-fvisibility=hidden"]
            compile_ = [
                *launcher,
                "g++",
                *flags,
                *position,
                "-x",
                "c++",
                "-c",
                str(source),
                "-o",
                str(fresh_object),
            ]
            sanitizers = [f for f in flags if f.startswith("-fsanitize")]
            for command in (compile_, ["g++", *sanitizers, str(fresh_object), *link, "-o", str(fresh)]):
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            fresh_object.unlink()
            fresh.replace(target)
    return target


def library(source: str | Path, *extra: str, link: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library of a source in tests/twin, with extra flags; every exported function gives text."""
    return ctypes.CDLL(str(_build(source, "plain", extra, ["-shared", *link], ".so")))


def program(source: str | Path, kind: str = "plain", *extra: str) -> Path:
    """The executable of a source: `kind` is plain, asan (with UBSan) or tsan."""
    return _build(source, kind, extra, [], "")


def run(program: Path, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess:
    """Runs a program; sanitizers stop at their first report."""
    env = dict(os.environ, TSAN_OPTIONS="halt_on_error=1", UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1")
    env["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


def call(function, seed: int, *arguments) -> None:
    """Calls an exported function under a schedule; structures go by reference."""
    function.restype = ctypes.c_char_p
    given = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments]
    error = function(ctypes.c_uint64(seed), *given)
    if error:
        raise TwinError(error.decode())

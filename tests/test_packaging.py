"""The installing routes, each into a fresh environment that sees an installed torch: marked packaging.

What is installed must work away from the checkout, and building must neither import nor download a torch. One
route compiles as a user's does; the others check what is installed, for which unoptimised kernels will do.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
import fastattn, torch
q = torch.randn(2, 4, 33, 16)
out = fastattn.scaled_dot_product_attention(q, q, q, is_causal=True)
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
from fastattn import kernels, masks, tools, _info
print(fastattn.__file__, _info.isa())
"""
UNOPTIMISED = {"CXXFLAGS": "-O0"}


def run(*command, cwd, **environment):
    result = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture
def tree(tmp_path):
    """A copy of what git tracks: nothing built, nothing ignored."""
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "tree" / name)
    return tmp_path / "tree"


@pytest.fixture
def python(tmp_path):
    """A fresh environment that finds this one's torch through a .pth file, and has no build tools of its own."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    own = sysconfig.get_path("purelib")
    for name in ("torch", "functorch", "torchgen"):
        if (Path(own) / name).exists():
            (Path(site) / name).symlink_to(Path(own) / name)
    for name in Path(own).glob("torch-*.dist-info"):
        (Path(site) / name.name).symlink_to(name)
    (Path(site) / "needs_of_torch.pth").write_text(f"import sys; sys.path.append({own!r})\n")
    return python


def installed_works(python, tmp_path):
    where = run(python, "-c", CHECK, cwd=tmp_path)
    assert "fastattn" in where
    return where


def without_isolation(python, tmp_path):
    # Reinstalled: pip sees those of the environment that torch is taken from, whose programs are not on the PATH.
    tools = ("setuptools>=77", "pybind11>=3.0", "ninja")
    run(python, "-m", "pip", "install", "--force-reinstall", *tools, cwd=tmp_path)
    return "--no-build-isolation"


def assert_no_torch_was_fetched(output):
    assert "Downloading torch" not in output and "Collecting torch" not in output, output


isolations = pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "not isolated"])


@pytest.mark.packaging
@isolations
@pytest.mark.parametrize("editable", [False, True], ids=["plain", "editable"])
def test_pip_install(tree, python, tmp_path, isolated, editable):
    command = [python, "-m", "pip", "install"]
    if not isolated:
        command.append(without_isolation(python, tmp_path))
    if editable:
        command.append("-e")
    optimised = isolated and not editable
    out = run(*command, tree, cwd=tmp_path, **({} if optimised else UNOPTIMISED))
    assert_no_torch_was_fetched(out)
    assert (str(tree) in installed_works(python, tmp_path)) == editable


@pytest.mark.packaging
@isolations
def test_pip_wheel(tree, python, tmp_path, isolated):
    command = [python, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path]
    if not isolated:
        command.append(without_isolation(python, tmp_path))
    assert_no_torch_was_fetched(run(*command, tree, cwd=tmp_path, **UNOPTIMISED))
    wheel = next(tmp_path.glob("fastattn-*.whl"))
    assert "abi3" not in wheel.name and "none-any" not in wheel.name
    assert_no_torch_was_fetched(run(python, "-m", "pip", "install", wheel, cwd=tmp_path))
    installed_works(python, tmp_path)


@pytest.mark.packaging
@isolations
def test_sdist(tree, python, tmp_path, isolated):
    """It holds every tracked source, needs no torch to be made, and installs."""
    options = ["--sdist", "--outdir", tmp_path, *([] if isolated else ["--no-isolation"])]
    run(sys.executable, "-m", "build", *options, tree, cwd=tmp_path)
    sdist = next(tmp_path.glob("fastattn-*.tar.gz"))
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "fastattn", "kernels", "benches", "tests", "docs"):
        wanted = {str(f.relative_to(tree)) for f in (tree / folder).rglob("*") if f.is_file()}
        built = {name for name in wanted if name.endswith((".so", ".pyc"))}
        assert wanted - built <= names, sorted(wanted - built - names)
    command = [python, "-m", "pip", "install"]
    if not isolated:
        command.append(without_isolation(python, tmp_path))
    assert_no_torch_was_fetched(run(*command, sdist, cwd=tmp_path, **UNOPTIMISED))
    installed_works(python, tmp_path)


# What setup.py asks of a CUDA toolkit, and objects with nothing in them: the way of the library is to be seen here, not
# minutes of nvcc.
NVCC = """#!/bin/sh
case "$1" in
  --dryrun) echo '#$ TOP={top}' >&2 ;;
  --version) echo 'release 13.0' ;;
  *) while [ "$1" != -o ]; do shift; done; g++ -x c++ -c /dev/null -o "$2" ;;
esac
"""


@pytest.fixture
def toolkit(tmp_path):
    """The path of a compiler that answers like nvcc."""
    top = tmp_path / "toolkit"
    for folder in ("bin", "lib64"):
        (top / folder).mkdir(parents=True)
    subprocess.run(["ar", "rcs", top / "lib64" / "libcudart_static.a"], check=True)
    nvcc = top / "bin" / "nvcc"
    nvcc.write_text(NVCC.format(top=top))
    nvcc.chmod(0o755)
    return nvcc


def packaged(python, tmp_path):
    """The CUDA library of the package that is installed, which a CPU torch leaves out with its reason."""
    text = "import fastattn; from fastattn import _cuda_library as c; print(c.PATH); print(c.LIBRARY)"
    path, reason = run(python, "-c", text, cwd=tmp_path).splitlines()[-2:]
    assert reason == "this torch is built without CUDA"
    return Path(path)


@pytest.mark.packaging
def test_the_cuda_library_is_built_into_wheel_install_and_tree(tree, python, tmp_path, toolkit):
    plain = without_isolation(python, tmp_path)
    build = {**UNOPTIMISED, "FASTATTN_CUDA": "1", "CUDACXX": str(toolkit)}
    pip = [python, "-m", "pip"]
    run(*pip, "wheel", "--no-deps", "-w", tmp_path, plain, tree, cwd=tmp_path, **build)
    wheel = next(tmp_path.glob("fastattn-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        assert "fastattn/_cuda.so" in archive.namelist()
    assert not (tree / "fastattn" / "_cuda.so").exists()
    run(*pip, "install", "--no-deps", wheel, cwd=tmp_path)
    installed = packaged(python, tmp_path)
    symbols = subprocess.run(["nm", "-D", installed], capture_output=True, text=True, check=True).stdout
    assert "start_attention_bwd_sm80" in symbols and tree not in installed.parents
    run(*pip, "install", "--no-deps", plain, "-e", tree, cwd=tmp_path, **build)
    assert packaged(python, tmp_path) == tree / "fastattn" / "_cuda.so"


@pytest.mark.packaging
@pytest.mark.parametrize("editable", [False, True], ids=["plain", "editable on a CUDA torch"])
def test_a_cuda_library_in_the_tree_is_taken_as_it_is(tree, python, tmp_path, editable):
    """On a machine without nvcc, and so `make gpu` on one."""
    plain = without_isolation(python, tmp_path)
    prebuilt = tree / "fastattn" / "_cuda.so"
    prebuilt.write_bytes(b"built elsewhere")
    tools = tmp_path / "bin"  # a PATH without nvcc
    tools.mkdir()
    for name in ("g++", "gcc", "ld", "as", "ar", "sh", "ccache"):
        if shutil.which(name):
            (tools / name).symlink_to(shutil.which(name))
    env = {**UNOPTIMISED, "PATH": f"{python.parent}:{tools}", "CUDA_HOME": "/nowhere"}
    if editable:
        own = Path(sysconfig.get_path("purelib")) / "torch"
        torch = tmp_path / "torch"
        torch.mkdir()
        for name in ("include", "lib"):
            (torch / name).symlink_to(own / name)
        (torch / "version.py").write_text("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\n")
        env["FASTATTN_TORCH_DIR"] = str(torch)
    options = ["--no-deps", *(["-e"] if editable else [])]
    run(python, "-m", "pip", "install", plain, *options, tree, cwd=tmp_path, **env)
    where = packaged(python, tmp_path)
    assert where.read_bytes() == b"built elsewhere" and (where == prebuilt) == editable


@pytest.mark.packaging
def test_without_torch_the_build_says_what_to_do(tree, tmp_path):
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    result = subprocess.run(
        [python, "-m", "pip", "install", "--no-deps", tree],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "building needs torch 2.11 or newer" in result.stdout + result.stderr
    assert "pip install torch==2.13.0" in result.stdout + result.stderr


def test_an_edit_rebuilds_one_object():
    """Every source has a rule of its own with a depfile; checked on the file, not by building."""
    build = next(ROOT.glob("build/temp*/build.ninja"), None)
    if build is None:
        pytest.skip("not built in place")
    text = build.read_text()
    assert "depfile = $out.d" in text
    for target in ("scalar", "avx2", "avx512", "avx512_bf16"):
        if (ROOT / f"csrc/cpu/targets/{target}.cpp").exists() and f"{target}.o" in text:
            assert f"build {target}.o: compile" in text


def test_an_unknown_instruction_set_is_an_error():
    result = subprocess.run(
        [sys.executable, "-c", "import fastattn"],
        cwd=ROOT,
        env={**os.environ, "FASTATTN_ISA": "mmx"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "instruction set 'mmx' is unknown" in result.stderr and "scalar" in result.stderr


def test_isa_units_hold_no_torch_and_no_stl():
    """A function of theirs compiled for AVX-512 could become the copy that every machine runs."""
    seen, todo = set(), [ROOT / "csrc/cpu/targets/kernels.inc", *ROOT.glob("csrc/cpu/simd/*.h")]
    while todo:
        source = todo.pop().resolve()
        if source in seen:
            continue
        seen.add(source)
        for line in source.read_text().splitlines():
            if line.startswith('#include "'):
                todo.append(source.parent / line.split('"')[1])
            elif line.startswith("#include <"):
                header = line.split("<")[1].split(">")[0]
                allowed = header.endswith(".h") or header in ("cstdint", "cstring")
                assert allowed and not header.startswith(("torch/", "ATen/", "c10/")), f"{source}: {line}"
    assert {"attention.h", "matmul.h", "softmax.h"} <= {source.name for source in seen}

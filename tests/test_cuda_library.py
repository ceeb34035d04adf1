"""The CUDA library: when it is loaded, what it refuses and what is said of it, on made-up cards."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastattn import _cuda_library, _triton, dispatch, rows
from fastattn._cuda_library import Library
from fastattn.problem import attention_problem
from fastattn.row_problem import norm_problem, softmax_problem

ROOT = Path(__file__).resolve().parents[1]


class Card:
    """A tensor that says it is on a card."""

    def __new__(cls, t: torch.Tensor):
        class OnCard(torch.Tensor):
            device = torch.device("cuda", 0)

        return t.as_subclass(OnCard)


@pytest.fixture
def card(monkeypatch):
    """card(major, minor, archs): a CUDA torch with the library and a card of this capability, and no Triton."""

    def make(major=9, minor=0, archs=("80", "90a"), triton="triton is not installed"):
        monkeypatch.setattr(_cuda_library, "LIBRARY", Library(13000, archs, 13000))
        monkeypatch.setattr(_cuda_library, "_capability", lambda device: (major, minor))
        monkeypatch.setattr(_triton, "unusable", lambda device: triton)
        monkeypatch.setattr(_triton, "unusable_attention", lambda device: None)
        return Card(torch.randn(3, 64))

    return make


def why(explanation, kernel="cuda"):
    return dict(explanation.refusals).get(kernel)


def test_left_out_of_a_torch_without_cuda():
    if torch.version.cuda is None:
        assert not _cuda_library.loaded() and _cuda_library.LIBRARY == "this torch is built without CUDA"
    x = torch.randn(3, 8)
    assert why(rows.explain(rows.softmax, x)) == "x is on cpu, not on a CUDA or ROCm device"
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run this call: x is on cpu"):
        rows.softmax(x, backend="cuda")


@pytest.mark.parametrize(
    "cuda, hip, library, driver, said",
    [
        ("13.0", "7.1", True, 13000, "for NVIDIA's cards, this torch is built for ROCm"),
        ("13.0", None, False, 13000, "not built: install with FASTATTN_CUDA=1 on a machine with nvcc"),
        ("13.0", None, True, 0, "no NVIDIA driver"),
        ("12.8", None, True, 12080, "built with CUDA 13.0, the driver runs up to 12.8"),
        ("13.0", None, True, 13000, None),
        ("12.8", None, True, 14010, None),
    ],
)
def test_loading(monkeypatch, tmp_path, cuda, hip, library, driver, said):
    path = tmp_path / "_cuda.so"
    if library:
        path.touch()

    class Ops:
        _built_for, _driver = staticmethod(lambda: 13000), staticmethod(lambda: driver)
        _architectures = staticmethod(lambda: "80 90a")

    monkeypatch.setattr(_cuda_library, "PATH", path)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.ops, "fastattn_cuda", Ops, raising=False)
    state = _cuda_library._load()
    assert state == Library(13000, ("80", "90a"), driver) if said is None else said in state
    if said is not None:
        monkeypatch.setattr(_cuda_library, "LIBRARY", state)
        assert said in _cuda_library.refuse("x", torch.device("cuda"))


def test_a_library_that_does_not_load_is_left_out(monkeypatch, tmp_path):
    path = tmp_path / "_cuda.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(_cuda_library, "PATH", path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert _cuda_library._load().startswith("the CUDA library does not load (")


@pytest.mark.parametrize(
    "archs, capability, served",
    [
        (("80", "90a"), (8, 0), True),
        (("80", "90a"), (8, 9), True),  # code for 8.0
        (("80", "90a"), (9, 0), True),
        (("80", "90a"), (12, 0), True),  # PTX of 8.0
        (("80", "90a"), (7, 5), False),
        (("90a",), (9, 0), True),
        (("90a",), (8, 0), False),
        (("90a",), (10, 0), False),
        (("120f",), (12, 1), True),
    ],
)
def test_architectures(archs, capability, served):
    reason = Library(13000, archs, 13000).refuse(*capability)
    assert (reason is None) == served
    if not served:
        assert f"this card is sm_{capability[0]}{capability[1]}" in reason and f"sm_{archs[0]}" in reason


def test_a_driver_that_cannot_compile_the_librarys_ptx(card, monkeypatch):
    """Code for the card itself runs on every driver of the major version; PTX needs one as new as the toolkit."""
    card()
    monkeypatch.setattr(_cuda_library, "LIBRARY", Library(13020, ("80", "90a"), 13000))
    assert rows.explain(rows.softmax, Card(torch.randn(3, 64))).kernel == "cuda"
    monkeypatch.setattr(_cuda_library, "_capability", lambda device: (12, 0))
    said = why(rows.explain(rows.softmax, Card(torch.randn(3, 64))))
    assert said.startswith("this card is sm_120, for which the driver would have to compile PTX of CUDA 13.2")
    assert "it knows CUDA up to 13.0" in said and "FASTATTN_CUDA_ARCHS=120" in said
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run this call: this card is sm_120"):
        rows.softmax(Card(torch.randn(3, 64)), backend="cuda")


def test_triton_comes_first_until_a_measurement_says_otherwise(card, monkeypatch):
    x = card(triton=None)

    def chosen(problem):
        return dispatch.choose(problem, dispatch.ROW_KERNELS)

    found = chosen(softmax_problem(x))
    assert found.kernel.name == "triton"
    assert "no committed measurement shows the CUDA kernel of softmax ahead of Triton's" in why(found)
    assert chosen(softmax_problem(x, backend="cuda")).kernel.name == "cuda"
    monkeypatch.setattr(_cuda_library, "AHEAD_OF_TRITON", frozenset({"softmax"}))
    assert chosen(softmax_problem(x)).kernel.name == "cuda"
    assert chosen(norm_problem("rms_norm", x, 64)).kernel.name == "triton"


def test_without_triton_the_library_runs(card):
    x = card(8, 6)
    assert rows.explain(rows.softmax, x).kernel == "cuda"
    assert rows.explain(rows.layer_norm, x, 64).kernel == "cuda"
    assert "copied once" in str(rows.explain(rows.layer_norm, x.t(), 3))


def test_refusals_of_rows(card):
    x = card(7, 5)
    assert "this card is sm_75" in why(rows.explain(rows.softmax, x))
    with pytest.raises(
        RuntimeError, match="backend='cuda' cannot run this call: the CUDA library has code for sm_80"
    ):
        rows.softmax(x, backend="cuda")
    x = card()
    assert (
        why(rows.explain(rows.softmax, Card(x.double())))
        == "x is float64, which is computed by the reference"
    )
    wide = Card(torch.empty(1, dtype=torch.float16).expand(2, 2**30 + 1))
    assert (
        why(rows.explain(rows.softmax, wide)) == f"rows of {2**30 + 1} entries, the kernel takes up to 2^30"
    )
    deep = Card(torch.zeros([1] * 10))
    assert why(rows.explain(rows.softmax, deep)) == "x has 10 dimensions, the kernel takes up to 9"
    assert {kernel.name for kernel in dispatch.ROW_KERNELS} == {"cuda", "triton", "cpu", "reference"}


def test_refusals_of_attention(card, monkeypatch):
    card()

    def refused(D=64, Dv=64, dtype=torch.bfloat16, **arguments):
        q, k, v = (Card(torch.zeros(1, 2, 8, size, dtype=dtype)) for size in (D, D, Dv))
        try:
            return why(dispatch.choose(attention_problem(q, k, v, **arguments)))
        except RuntimeError as error:
            return str(error)

    assert refused() is None
    assert refused(dtype=torch.float32) == "q is float32, the CUDA kernels take bfloat16 and float16"
    assert refused(D=257) == "D is 257, the CUDA kernels take head sizes up to 256"
    assert refused(Dv=320) == "Dv is 320, the CUDA kernels take head sizes up to 256"
    assert "backend='cuda' cannot run this call: D is 257" in refused(D=257, backend="cuda")
    bias = Card(torch.zeros(1, 2, 8, 8)).requires_grad_()
    monkeypatch.setattr(_cuda_library, "shared_kib", lambda device: 227)
    assert refused(bias=bias) is None and refused(D=256, Dv=256, bias=bias) is None
    monkeypatch.setattr(_cuda_library, "shared_kib", lambda device: 99)  # sm_86, sm_89, sm_120
    assert refused(D=128, bias=bias) is None and refused(D=256) is None
    assert refused(D=136, bias=bias) == (
        "gradients of head sizes above 128 need 160 KiB of shared memory a block, cuda:0 has 99 KiB"
    )
    card(triton=None)
    assert "no committed measurement shows the CUDA kernel of attention ahead of Triton's" in refused()
    assert refused(backend="cuda") is None


def build(monkeypatch_env, *arguments):
    """What setup.py says; it stops before it compiles."""
    import os

    env = {**os.environ, **monkeypatch_env}
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", *arguments],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "env, said",
    [
        (
            {"FASTATTN_CUDA": "1", "CUDACXX": "", "CUDA_HOME": "/nowhere"},
            "no nvcc on the PATH.*FASTATTN_CUDA=1 needs",
        ),
        ({"FASTATTN_CUDA": "yes"}, "FASTATTN_CUDA must be 0 or 1, got 'yes'"),
    ],
)
def test_a_build_that_cannot_be_is_an_error(env, said, tmp_path):
    # A PATH with the interpreter's ninja and no nvcc.
    tools = str(Path(sys.executable).parent)
    result = build({"PATH": tools, **env})
    assert result.returncode != 0 and re.search(said, result.stderr, re.DOTALL), result.stderr[-500:]

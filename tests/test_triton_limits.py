"""What Triton's kernels take without a look at the card: grids of any length and their order, one device for all
tensors, torch's word on TF32."""

import functools
import subprocess
import sys

import pytest
import torch

import fastattn
from fastattn import _triton

pytest.importorskip("triton")
attend = functools.partial(fastattn.attention, backend="triton")

# 2**17 heads of one row each: more than a grid's second and third dimension hold on CUDA (65535).
HEADS = 2**17


@pytest.fixture(autouse=True)
def device(triton_device):
    return triton_device


class Recorder:
    """In the place of a kernel: the grids that are asked for, nothing run."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *arguments, **options: None


@pytest.fixture
def recorded(monkeypatch):
    def record(module, name):
        recorder = Recorder()
        monkeypatch.setattr(_triton.module(module), name, recorder)
        return recorder.grids

    return record


def test_a_grid_of_attention_has_one_dimension(recorded, device):
    q = torch.empty(1, HEADS, 1, 8, device=device, requires_grad=True)
    forward = recorded("attention", "attention_kernel")
    rows, passes = recorded("attention_bwd", "row_kernel"), recorded("attention_bwd", "backward_kernel")
    torch.autograd.grad(attend(q, q, q).sum(), q)
    assert forward == rows == [(HEADS,)]
    assert passes == [(HEADS,), (HEADS,)]


def test_a_grid_of_rows_has_one_dimension(recorded, device):
    x = torch.empty(HEADS * 4, 8, device=device)
    softmax, norm = recorded("softmax", "_softmax"), recorded("norm", "_norm")
    fastattn.softmax(x, -1, backend="triton")
    fastattn.layer_norm(x, (8,), backend="triton")
    for ((blocks,),) in (softmax, norm):
        assert 1 <= blocks <= len(x)


@pytest.mark.parametrize("name", ["k", "mask", "bias", "alibi_slopes", "sinks"])
def test_tensors_of_two_devices(name, device):
    q = torch.randn(1, 2, 4, 16, device=device)
    away = {
        "k": torch.empty(1, 2, 4, 16, device="meta"),
        "mask": torch.empty(4, 4, dtype=torch.bool, device="meta"),
        "bias": torch.empty(2, 4, 4, device="meta"),
        "alibi_slopes": torch.empty(2, device="meta"),
        "sinks": torch.empty(2, device="meta"),
    }
    given = {"q": q, "k": q, "v": q, name: away[name]}
    with pytest.raises(ValueError, match=f"{name}.* on .*meta"):
        attend(**given)


def test_rows_of_two_devices(device):
    x, weight = torch.randn(4, 16, device=device), torch.empty(16, device="meta")
    with pytest.raises(ValueError, match="weight must be on .* like x, got meta"):
        fastattn.layer_norm(x, (16,), weight, backend="triton")
    with pytest.raises(ValueError, match="bias must be on .* like x, got meta"):
        fastattn.softmax(x, -1, bias=weight, backend="triton")


@pytest.mark.parametrize("n_blocks, planes, section", [(5, 7, 3), (1, 4, 2), (4, 3, 8)])
def test_the_longest_blocks_of_rows_run_first(n_blocks, planes, section, device):
    """Under a causal mask, within a section of planes; every block of every plane once."""
    import triton
    import triton.language as tl

    place = _triton.module("attention").place

    @triton.jit
    def places(out, n_blocks, planes, section, DESCENDING: tl.constexpr):
        pid = tl.program_id(0)
        m_block, plane = place(pid, n_blocks, planes, section, DESCENDING)
        tl.store(out + 2 * pid, m_block)
        tl.store(out + 2 * pid + 1, plane)

    globals()["place"] = place  # where a kernel looks for what it calls
    out = torch.full((n_blocks * planes, 2), -1, dtype=torch.int32, device=device)
    for descending in (True, False):
        places[(n_blocks * planes,)](out, n_blocks, planes, section, DESCENDING=descending)
        order = [tuple(pair) for pair in out.tolist()]
        assert sorted(order) == [(m, p) for m in range(n_blocks) for p in range(planes)]
        if descending:
            assert order == sorted(order, key=lambda pair: (pair[1] // section, -pair[0], pair[1]))


def test_float32_products_are_ieee_until_torch_allows_tf32():
    """By its old and its new setting, which cannot be read once the other has been written."""
    script = """
import torch
from fastattn import _triton
precision, matmul = _triton.module("attention_call").precision, torch.backends.cuda.matmul
told = [precision()]
matmul.allow_tf32 = True
told.append(precision())
matmul.allow_tf32 = False
told.append(precision())
matmul.fp32_precision = "tf32"
told.append(precision())
print(*told)
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert result.stdout.split() == ["ieee", "tf32", "ieee", "tf32"], result.stderr

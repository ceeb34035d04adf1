"""The mask ops as torch sees them: compiled whole, checked, and within their memory."""

import subprocess
import sys

import pytest
import torch
from mask_checks import additive, bools

from fastattn import attention
from fastattn.masks import (
    BigBird,
    Causal,
    CausalLowerRight,
    Chunked,
    Documents,
    KeyPadding,
    Longformer,
    Not,
    Predicate,
    SlidingWindow,
    Strided,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ([], "one tree"),
        ([5, 3, 5, 3], "one tree"),
        ([0, 2], "not there"),
        ([5], "ends early"),
        ([5, 0], "must be positive"),
        ([99], "no node 99"),
        ([4, 0], "no tensor 0"),
    ],
)
def test_the_op_checks_its_program(program, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastattn.mask_build(program, [], 1, 1, 64, 64)


COMPILED = {
    "big bird": lambda q, k, v: attention(q, k, v, mask=BigBird(16, per_head=True)),
    "algebra": lambda q, k, v: attention(q, k, v, mask=Not(Documents([0, 50, 130])) & Strided(10) | Causal()),
    "predicate": lambda q, k, v: attention(q, k, v, mask=Predicate(lambda b, h, i, j: (i + j) % 3 == 0)),
    "lengths": lambda q, k, v: attention(q, k, v, mask=KeyPadding((q[:, 0, 0, 0] * 0 + 70).int()) & Causal()),
    "bool": lambda q, k, v: attention(q, k, v, mask=q[..., :1].detach() + k[:, :1, :, 0].unsqueeze(2) > 0),
    "keys": lambda q, k, v: attention(q, k, v, mask=k[:, :1, :, 0].unsqueeze(2).detach() > 0),
    "additive": lambda q, k, v: attention(q, k, v, mask=k[:, :1, :, 0].detach().relu().unsqueeze(2).log()),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiles_whole(case):
    """Lowering stands in the graph, sizes that depend on the data included; gradients too."""
    torch._dynamo.reset()
    q = torch.randn(2, 4, 130, 16, requires_grad=True)
    k, v = (torch.randn(2, 2, 130, 16).abs_().sub_(0.1).requires_grad_() for _ in range(2))
    call = COMPILED[case]
    expected, out = call(q, k, v), torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(out, expected)
    for grad, wanted in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, expected))):
        torch.testing.assert_close(grad, wanted)


def test_opcheck():
    mask = bools(2, 1, 130, 70, share=0.9)
    torch.library.opcheck(torch.ops.fastattn.mask_scan, (mask,))
    torch.library.opcheck(torch.ops.fastattn.mask_scan, (additive(mask).mT,))
    offsets, blocks, *_ = torch.ops.fastattn.mask_scan(mask)
    torch.library.opcheck(torch.ops.fastattn.mask_transpose, (offsets, blocks, 2))
    torch.library.opcheck(torch.ops.fastattn.mask_build, ([5, 3], [], 1, 1, 100, 200))
    keys = bools(2, 1, 1, 200, share=0.5)[:, :, 0].contiguous()
    torch.library.opcheck(torch.ops.fastattn.mask_build, ([4, 0], [keys], 2, 1, 100, 200))
    offsets, blocks, tiles, _ = torch.ops.fastattn.mask_scan(mask)
    torch.library.opcheck(torch.ops.fastattn.mask_rows, (offsets, blocks, tiles, 5, 120, 70))


@pytest.mark.parametrize(("first", "last"), [(0, 130), (0, 1), (63, 65), (64, 128), (129, 130), (7, 7)])
def test_rows_of_bits(first, last):
    """Any rows of what was scanned are the rows that were given."""
    mask = bools(2, 3, 130, 70, share=0.9)
    offsets, blocks, tiles, _ = torch.ops.fastattn.mask_scan(mask)
    seen = torch.ops.fastattn.mask_rows(offsets, blocks, tiles, first, last, 70)
    assert torch.equal(seen, mask[:, :, first:last])
    with pytest.raises(RuntimeError, match="no rows 0..193"):
        torch.ops.fastattn.mask_rows(offsets, blocks, tiles, 0, 193, 70)


EXPORTED = {
    "lower right": CausalLowerRight(),
    "window": SlidingWindow(5, 2, lower_right=True),
    "union of bands": Causal() | SlidingWindow(5, 9, lower_right=True),
    "no window": Not(SlidingWindow(5, 2)),
    "strided": Strided(3),
    "longformer": Longformer(8, [0]),
    "chunks": Chunked(16) & Causal(),
    "lengths": KeyPadding([3, 2]) & Causal(),
    "predicate": Predicate(lambda b, h, i, j: (i + j) % 3 == 0),
}


class Attention(torch.nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, q, k):
        return attention(q, k, k, mask=self.mask)


@pytest.mark.parametrize("mask", EXPORTED.values(), ids=EXPORTED)
def test_export_with_dynamic_sizes(mask):
    """No size is fixed by the mask: neither the granules nor the bounds that hide nothing in the example."""
    model, any_size = Attention(mask), torch.export.Dim.DYNAMIC
    example = torch.randn(2, 2, 40, 8), torch.randn(2, 2, 50, 8)
    program = torch.export.export(model, example, dynamic_shapes=({2: any_size}, {2: any_size})).module()
    for rows, keys in ((50, 40), (130, 200), (3, 70), (70, 3)):
        q, k = torch.randn(2, 2, rows, 8), torch.randn(2, 2, keys, 8)
        torch.testing.assert_close(program(q, k), model(q, k), atol=1e-5, rtol=1e-4)


# Peak memory of building each family at S = 131072, above what the process holds before. The kernel counts pages
# touched, torch's own included; the peak is reset first.
_PEAK = """
import ctypes, torch
from fastattn.masks import *
S = 131072
trim = getattr(ctypes.CDLL(None), "malloc_trim", bool)

def status(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])

torch.set_num_threads(1)
ids = torch.arange(S) // 5000 % 7
masks = dict(
    causal=Causal(), window=SlidingWindow(255, 0), padding=KeyPadding([S // 2]),
    gaps=KeyPadding(torch.rand(1, S) < 0.5), documents=Documents([0, 1000, 50000, S]), ids=Documents(ids=ids),
    prefix=PrefixLM(1000), chunked=Causal() & Chunked(8192), longformer=Longformer(512, 64),
    positions=Longformer(512, [0, 70000]), bigbird=BigBird(), bigbird16=BigBird(16), strided=Strided(128),
    strided100=Strided(100), fixed=Fixed(128, 8), blocks=BlockSparse(torch.rand(S // 64, S // 64) < 0.25),
    blocks32=BlockSparse(torch.rand(S // 32, S // 32) < 0.5, 32), union=Documents([0, 1000, S]) | Strided(64),
    complement=~Documents([0, 1000, 50000, S]),
)
lower(Strided(100) | Longformer(10, [3]), 1, 1, 1, 4096, 4096, "cpu")
for name, mask in masks.items():
    trim(0)  # else what was freed before would serve unseen
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    lowered = lower(mask, 1, 16, 16, S, S, "cpu")
    print(name, (status("VmHWM") - before) / 1024)
    del lowered
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_building_at_131072_stays_below_64_mib():
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("the kernel does not let a process reset its peak")
    lines = subprocess.run(
        [sys.executable, "-c", _PEAK], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    peaks = {name: float(peak) for name, peak in map(str.split, lines)}
    assert len(peaks) == 19
    assert {name: peak for name, peak in peaks.items() if peak >= 64} == {}
    # What is ranges holds at most two numbers a row.
    for name in ("causal", "window", "padding", "documents", "prefix", "chunked"):
        assert peaks[name] < 6, name

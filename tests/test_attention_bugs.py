"""Bugs that other attention kernels had, each as it showed there. Those of one feature stand in its own file."""

import subprocess
import sys

import pytest
import torch

import fastattn
from fastattn import masks, reference
from fastattn.tools.memory import _status

BF16 = torch.bfloat16
S = 70
LOWER = torch.ones(S, S, dtype=torch.bool).tril()
HIDING = torch.zeros(S, S).masked_fill(~LOWER, float("-inf"))


def sdpa(q, k, v, **arguments):
    return fastattn.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[-3] != k.shape[-3], **arguments)


CAUSAL = {
    "is_causal": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    "is_causal, rank 5": lambda q, k, v: sdpa(q[None], k[None], v[None], is_causal=True),
    "is_causal, scale": lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=0.3),
    "is_causal, views": lambda q, k, v: sdpa(
        *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)), is_causal=True
    ),
    "bool": lambda q, k, v: sdpa(q, k, v, attn_mask=LOWER),
    "additive": lambda q, k, v: sdpa(q, k, v, attn_mask=HIDING),
    "mask": lambda q, k, v: fastattn.attention(q, k, v, mask=masks.Causal()),
    "lower right": lambda q, k, v: fastattn.attention(q, k, v, mask=masks.CausalLowerRight()),
    "padding too": lambda q, k, v: fastattn.attention(
        q, k, v, mask=masks.Causal() & masks.KeyPadding([S, 60])
    ),
    "bits": lambda q, k, v: fastattn.attention(q, k, v, mask=masks.BigBird(16) & masks.Causal()),
    "bias": lambda q, k, v: fastattn.attention(q, k, v, bias=HIDING),
    "causal and bias": lambda q, k, v: fastattn.attention(
        q, k, v, mask=masks.Causal(), bias=torch.ones(S)[None]
    ),
    "terms": lambda q, k, v: fastattn.attention(
        q, k, v, mask=masks.Causal(), softcap=3.0, sinks=torch.zeros(4), alibi_slopes=torch.ones(4)
    ),
    "dropout": lambda q, k, v: fastattn.attention(
        q, k, v, mask=masks.Causal(), dropout_p=0.2, dropout_seed=3
    ),
    "last rows": lambda q, k, v: torch.cat(
        [q[:, :, :-4] * 0, fastattn.attention(q[:, :, -4:], k, v, mask=masks.CausalLowerRight())], 2
    ),
    "reference": lambda q, k, v: sdpa(q, k, v, is_causal=True, backend="reference"),
}


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("Hkv", [4, 2])
@pytest.mark.parametrize("way", CAUSAL)
def test_a_future_token_does_not_reach_the_past(way, Hkv, trained, dtype):
    """Non-causal by accident (transformers #48748): whatever way a call takes, and in the gradients."""
    torch.manual_seed(0)
    changed = S - 3
    q, k, v = (torch.randn(2, h, S, 16).to(dtype) for h in (4, Hkv, Hkv))
    k2, v2 = k.clone(), v.clone()
    k2[:, :, changed], v2[:, :, changed] = 3, 5
    leaves = [[t.detach().requires_grad_(trained) for t in operands] for operands in ((q, k, v), (q, k2, v2))]
    before, after = (CAUSAL[way](*operands) for operands in leaves)
    assert torch.equal(before[..., :changed, :], after[..., :changed, :])
    assert not torch.equal(before[..., changed:, :], after[..., changed:, :])
    if trained:
        (dk,) = torch.autograd.grad(after[..., :changed, :].sum(), leaves[1][1])
        assert (dk[:, :, changed:] == 0).all() and (dk[:, :, changed - 5 : changed] != 0).any()


def spread(t, room, dim):
    """t with more than 2^31 elements between its neighbours along a dimension; the memory between is not touched."""
    strides = list(torch.empty(t.shape).stride())
    strides[dim] = (2**31 + 1000) // (t.shape[dim] - 1) + 1
    assert (t.shape[dim] - 1) * strides[dim] > 2**31 > t.numel()
    return room.as_strided(t.shape, strides).copy_(t)


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout", "bias"])
def test_strides_past_2_31(name, dim, rows):
    """int32 offsets (pytorch #190857, SageAttention #386), in the forward, in decode and in the backward."""
    room = torch.empty(2**31 + 2**20, dtype=BF16)
    operands = {
        "q": torch.randn(2, 4, rows, 16),
        "k": torch.randn(2, 2, S, 16),
        "v": torch.randn(2, 2, S, 16),
        "dout": torch.randn(2, 4, rows, 16),
        "bias": torch.randn(2, 4, rows, S),
    }
    operands = {n: t.to(BF16) for n, t in operands.items()}

    def results(given):
        leaves = {n: t.detach().requires_grad_(n != "dout") for n, t in given.items()}
        dout = leaves.pop("dout")
        out = fastattn.attention(**leaves, mask=masks.CausalLowerRight())
        return out, *torch.autograd.grad(out, leaves.values(), dout)

    expected = results(operands)
    apart = operands | {name: spread(operands[name], room, dim)}
    for ours, wanted in zip(results(apart), expected):
        assert torch.equal(ours, wanted)


def test_a_square_of_more_than_2_31_scores():
    """Rows and keys beyond the 46341st, whose scores an int32 would not count; a window sees few of them."""
    length, tail = 70000, 300
    q, k, v, dout = (torch.randn(1, 1, length, 8) for _ in range(4))
    window = masks.Causal() & masks.SlidingWindow(40, 0)

    def run(first, **arguments):
        leaves = [t[:, :, first:].detach().requires_grad_() for t in (q, k, v)]
        out = fastattn.attention(*leaves, mask=window, **arguments)
        return out, *torch.autograd.grad(out, leaves, dout[:, :, first:])

    for arguments in ({}, dict(alibi_slopes=torch.tensor([0.1]))):
        for whole, end in zip(run(0, **arguments), run(length - tail, **arguments)):
            torch.testing.assert_close(whole[:, :, -tail + 41 :], end[:, :, 41:])
    kept = fastattn.attention(q, k, v, mask=window, dropout_p=0.5, dropout_seed=3)[:, :, -9:]
    places = torch.arange(length - 9, length), torch.arange(length - 60, length)
    keep = reference.dropout_keep(3, 1, 1, *places, 0.5)
    near = (places[1] <= places[0][:, None]) & (places[1] >= places[0][:, None] - 40)
    weights = reference.attention(q[:, :, -9:], k[:, :, -60:], v[:, :, -60:], mask=near, return_weights=True)[
        1
    ]
    torch.testing.assert_close(kept, (weights * keep * 2) @ v[:, :, -60:])


@pytest.mark.slow
def test_a_result_of_more_than_2_31_elements():
    q = torch.randn(1, 1, 1, 128, dtype=BF16).expand(1, 1, 2**24 + 3, 128)
    k = torch.randn(1, 1, 2, 128, dtype=BF16)
    out = fastattn.attention(q, k, k)
    assert out.numel() > 2**31
    assert torch.equal(out[0, 0, -1], fastattn.attention(q[:, :, :64], k, k)[0, 0, -1])


def test_more_rows_than_positions_have_numbers():
    """Short ways and the long one leave such a call to the reference alike, and a forced kernel says why."""
    q = torch.zeros(1, 1, 1, 8).expand(1, 1, 2**31 - 1, 8)
    assert "2147483647 query rows" in dict(fastattn.explain(q, q, q).refusals)["cpu"]
    with pytest.raises(RuntimeError, match="cannot run this call: 2147483647 query rows.*fewer than"):
        fastattn.attention(q, q, q, backend="cpu")
    for trained in (False, True):
        with pytest.raises(RuntimeError, match="overflow"):  # of the reference's scores
            sdpa(q.detach().requires_grad_(trained), q, q)
    with pytest.raises(RuntimeError, match="fewer than 2.31 - 1 rows, got 2147483647 and 2147483647"):
        torch.ops.fastattn.attention_plain(q, q, q, 1.0, False)


REPEATED = {
    "plain": (64, {}),
    "ranges": (130, dict(mask=masks.CausalLowerRight())),
    "bits and dropout": (130, dict(mask=torch.rand(130, 1200) < 0.6, dropout_p=0.1, dropout_seed=3)),
    "decode in splits": (3, dict(mask=torch.rand(3, 1200) < 0.6)),
}


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("case", REPEATED)
def test_fifty_repeats_give_the_same_bits(case, dtype, threads):
    """In turns with a call of the same shapes and other data, with cold caches and fresh results full of NaN."""
    threads(3)
    rows, arguments = REPEATED[case]
    calls = []
    for _ in "ab":
        q = torch.randn(2, 4, rows, 16).to(dtype)
        calls.append((q, *(torch.randn(2, 2, 1200, 16).to(dtype) for _ in "kv")))
    cold = torch.ones(1 << 20)
    expected = []
    for n in range(100):
        cold.mul_(-1)
        results = fastattn.attention(*calls[n % 2], return_lse=True, **arguments)
        if n < 2:
            expected.append([t.clone() for t in results])
        for ours, wanted in zip(results, expected[n % 2]):
            assert torch.equal(ours, wanted)
            ours.fill_(float("nan"))
    for given, wanted in zip(calls, expected):
        mask = arguments.get("mask")
        dense = mask.to_dense(rows, 1200) if isinstance(mask, masks.Mask) else mask
        exact = reference.attention(*(t.double() for t in given), **arguments | {"mask": dense})
        assert (wanted[0] - exact).abs().max() < 0.05


# The first calls of a process, from several threads at once: nothing is chosen, allocated or looked up yet.
COLD = """
import threading, torch, fastattn
torch.manual_seed(0)
q, k, v = (torch.randn(2, n, s, 16, dtype=torch.bfloat16) for n, s in ((4, 130), (2, 700), (2, 700)))
seen = torch.rand(130, 700) < 0.5
CALLS = [
    lambda: fastattn.attention(q, k, v),
    lambda: fastattn.attention(q, k, v, mask=seen),
    lambda: fastattn.attention(q[:, :, :2], k, v, mask=fastattn.masks.BigBird(16)),
    lambda: fastattn.attention(q, k, v, mask=fastattn.masks.Causal(), dropout_p=0.3, dropout_seed=2),
]

def run(call):
    leaf = q.detach().requires_grad_()
    out = fastattn.attention(leaf, k, v, mask=seen)
    return call(), *torch.autograd.grad(out.float().sum(), leaf)

results = {}
ready = threading.Barrier(8)

def thread(n):
    ready.wait()
    results[n] = run(CALLS[n % 4])

threads = [threading.Thread(target=thread, args=(n,)) for n in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
assert len(results) == 8
for count in (1, 3):
    torch.set_num_threads(count)
    for n in range(8):
        assert all(torch.equal(a, b) for a, b in zip(results[n], run(CALLS[n % 4]))), (n, count)
print("same bits")
"""


def test_the_first_calls_of_a_process_from_several_threads():
    done = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True)
    assert done.stdout == "same bits\n", done.stderr


MASKED = {
    "padding": masks.KeyPadding([6000]),
    "bool": (torch.arange(8192) < 6000)[None, None, None],
    "bool rows": torch.ones(64, 8192, dtype=torch.bool).tril(4000),
    "additive": torch.zeros(1, 1, 64, 8192).masked_fill(torch.arange(8192) >= 6000, float("-inf")),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize("mask", MASKED)
def test_a_masked_call_of_grouped_heads_expands_nothing(mask, rows, threads):
    """K and V for each of 32 query heads would be 64 MiB each, the scores 64 MiB, a mask for each head 16."""
    threads(1)  # each has scratch of its own
    mask = MASKED[mask]
    if isinstance(mask, torch.Tensor) and mask.shape[-2] == 64:
        mask = mask[..., -rows:, :]
    q = torch.randn(1, 32, rows, 64, requires_grad=True)
    k, v = (torch.randn(1, 1, 8192, 64, requires_grad=True) for _ in "kv")
    sdpa(q[:, :, :1], k[:, :, :9], v[:, :, :9]).sum().backward()  # what only a first call loads
    fastattn.empty_cache()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("the kernel does not let a process reset its peak")
    before = _status("VmRSS")
    with torch.no_grad():
        sdpa(q, k, v, attn_mask=mask)
    sdpa(q, k, v, attn_mask=mask).sum().backward()
    assert (_status("VmHWM") - before) / 2**20 < 14

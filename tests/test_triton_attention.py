"""The Triton attention forward against the reference: numbers, masks to the key, dropout to the bit."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures.make import MASKS as FIXTURE_MASKS
from pairwise import name_of, pairwise
from test_contract import DROPOUT, expected_keep

import fastattn
from fastattn import masks, reference
from fastattn.tools.equivalence import check_visible, error_rule

HALVES = [torch.float16, torch.bfloat16]

# B, Hq, Hkv, Sq, Sk, D, Dv: ones, primes, either side of a tile, odd heads, heads in two parts and padded ones.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 3, 63, 64, 64, 64),
    (1, 4, 2, 64, 65, 32, 96),
    (1, 2, 1, 127, 131, 40, 72),
    (1, 3, 1, 129, 33, 111, 7),
    (1, 2, 2, 31, 97, 128, 128),
    (1, 1, 1, 70, 70, 256, 192),
    (2, 8, 2, 5, 191, 80, 160),
]


@pytest.fixture(autouse=True)
def device(triton_device):
    with torch.device(triton_device):
        yield triton_device


def inputs(B, Hq, Hkv, Sq, Sk, D, Dv, dtype=torch.float32):
    return (
        torch.randn(B, Hq, Sq, D).to(dtype),
        torch.randn(B, Hkv, Sk, D).to(dtype),
        torch.randn(B, Hkv, Sk, Dv).to(dtype),
    )


def attention(*arguments, **keywords):
    return fastattn.attention(*arguments, backend="triton", **keywords)


def assert_right(actual, exact, v=None):
    magnitude = None if v is None or not v.numel() else v.abs().max().item()
    verdict = error_rule(actual, exact, None, magnitude=magnitude)
    assert verdict, verdict.reason


def exact(q, k, v, **arguments):
    return reference.attention(*(t.double() for t in (q, k, v)), **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(dtype, shape):
    q, k, v = inputs(*shape, dtype)
    out, lse = attention(q, k, v, return_lse=True)
    right, right_lse = exact(q, k, v, return_lse=True)
    assert_right(out, right, v)
    assert out.dtype == dtype and (lse - right_lse).abs().max() < 1e-5


FEATURES = {
    "softcap": {"softcap": 5.0},
    "loose softcap": {"softcap": 50.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "alibi by batch": {"alibi_slopes": torch.arange(8.0).view(2, 4) / 9},
    "sinks": {"sinks": torch.tensor([0.0, 3.0, -2.0, 1.0])},
    "no scale": {"scale": 0.0},
    "negative scale": {"scale": -0.3},
    "dropout": {"dropout_p": 0.3, "dropout_seed": -7},
    "all": {
        "softcap": 2.0,
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
        "sinks": torch.tensor([0.0, 3.0, -2.0, 1.0]),
        "scale": 0.4,
        "dropout_p": 0.1,
        "dropout_seed": 2**40 + 3,
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("Sq", [67, 3], ids=["tile", "packed"])
def test_score_terms(device, dtype, features, Sq):
    q, k, v = inputs(2, 4, 2, Sq, 133, 64, 40, dtype)
    given = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in FEATURES[features].items()}
    right = exact(q, k, v, mask=masks.CausalLowerRight().to_dense(Sq, 133).to(device), **given)
    assert_right(attention(q, k, v, mask=masks.CausalLowerRight(), **given), right, 2 * v)


BIASES = {
    "full": lambda: torch.randn(2, 4, 67, 133),
    "keys": lambda: torch.randn(2, 1, 1, 133),
    "rows": lambda: torch.randn(1, 4, 67, 1),
    "transposed": lambda: torch.randn(133, 67).T,
    "strided": lambda: torch.randn(67, 266)[:, ::2],
    "expanded": lambda: torch.randn(1, 1, 133).expand(4, 67, 133),
    "infinite": lambda: torch.where(torch.rand(67, 133) > 0.5, torch.randn(67, 133), -math.inf),
}


@pytest.mark.parametrize("bias_dtype", ["same", "float32"])
@pytest.mark.parametrize("bias", BIASES)
def test_bias(bias_dtype, bias):
    q, k, v = inputs(2, 4, 2, 67, 133, 64, 64, torch.float16)
    bias = BIASES[bias]().to(torch.float16 if bias_dtype == "same" else torch.float32)
    right = exact(q, k, v, bias=bias.double())
    assert_right(attention(q, k, v, bias=bias), right, v)
    assert_right(attention(q, k, v, mask=bias), right, v)


def test_a_block_of_minus_infinity_and_nan_beside_it(device):
    """What a bias of -inf hides stays hidden whatever the score, in rows that see nothing else too."""
    q, k, v = inputs(1, 1, 1, 70, 140, 32, 32)
    bias = torch.zeros(70, 140)
    bias[:, 60:] = -math.inf
    bias[5] = -math.inf
    clean = attention(q, k, v, bias=bias)
    k[:, :, 64:], v[:, :, 64:] = math.nan, math.inf
    out, lse = attention(q, k, v, bias=bias, return_lse=True)
    torch.testing.assert_close(out, clean)
    assert (out[0, 0, 5] == 0).all() and lse[0, 0, 5] == -math.inf


MASKS = {
    "none": lambda B, Sq, Sk: None,
    "causal": lambda B, Sq, Sk: masks.Causal(),
    "lower right": lambda B, Sq, Sk: masks.CausalLowerRight(),
    "window": lambda B, Sq, Sk: masks.SlidingWindow(20, 3),
    "padding": lambda B, Sq, Sk: masks.KeyPadding(torch.arange(B) * Sk // max(B, 1)),
    "left padding": lambda B, Sq, Sk: masks.KeyPadding(torch.arange(1, B + 1) % (Sk + 1), side="left"),
    "prefix": lambda B, Sq, Sk: masks.PrefixLM(torch.arange(B) * 7 % (Sk + 1)),
    "chunked": lambda B, Sq, Sk: masks.Chunked(48),
    "causal and padding": lambda B, Sq, Sk: (
        masks.Causal() & masks.KeyPadding(torch.arange(B) * Sk // max(B, 1))
    ),
    "longformer": lambda B, Sq, Sk: masks.Longformer(32, 2),
    "strided": lambda B, Sq, Sk: masks.Strided(24),
    "complement": lambda B, Sq, Sk: ~masks.SlidingWindow(20, 3),
    "big bird by head": lambda B, Sq, Sk: masks.BigBird(16, random=2, per_head=True),
    "dense": lambda B, Sq, Sk: torch.rand(Sq, Sk) > 0.7,
    "dense by batch": lambda B, Sq, Sk: torch.rand(B, 1, Sq, Sk) > 0.7,
    "dense by head": lambda B, Sq, Sk: torch.rand(1, 4, Sq, Sk) > 0.7,
    "dense and causal": lambda B, Sq, Sk: masks.Dense(torch.rand(Sq, Sk) > 0.3) & masks.Causal(),
    "almost nothing": lambda B, Sq, Sk: torch.rand(Sq, Sk) > 0.999,
}


def dense(mask, B, Hq, Sq, Sk):
    if mask is None:
        return torch.ones(B, Hq, Sq, Sk, dtype=torch.bool)
    if isinstance(mask, torch.Tensor):
        return mask.expand(B, Hq, Sq, Sk)
    return mask.to_dense(Sq, Sk, B, Hq)


@pytest.mark.parametrize("sizes", [(70, 150), (65, 64), (5, 131)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_every_row_sees_exactly_its_keys(device, mask, sizes):
    Sq, Sk = sizes
    mask = MASKS[mask](2, Sq, Sk)
    result = check_visible(
        lambda q, k, v: attention(q, k, v, mask=mask, return_lse=True),
        dense(mask, 2, 4, Sq, Sk).to(device), 2, 4, 2, device=device, D=16, Dv=32,
    )  # fmt: skip
    assert result, str(result)


@pytest.mark.parametrize("name", FIXTURE_MASKS)
def test_the_committed_masks(device, name):
    mask, (B, H, Sq, Sk) = FIXTURE_MASKS[name]
    result = check_visible(
        lambda q, k, v: attention(q, k, v, mask=mask, return_lse=True),
        mask.to_dense(Sq, Sk, B, H).to(device), B, H, H, torch.float16, device, D=16, Dv=64,
    )  # fmt: skip
    assert result, str(result)


def test_the_mask_check_sees_one_wrong_key(device):
    """What the tests above would miss if `check_visible` were blind: the mask of a call, less one key."""
    shown = torch.rand(1, 1, 70, 150) > 0.5
    told = shown.clone()
    told[0, 0, 69, 149] ^= True
    result = check_visible(
        lambda q, k, v: attention(q, k, v, mask=shown, return_lse=True), told, 1, 1, 1, device=device
    )
    assert not result and int(result.wrong.sum()) == 1


@pytest.mark.parametrize(
    "case", [c for c in DROPOUT if c["call"][6:] == [0, 0]], ids=lambda c: f"seed{c['call'][0]}"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_committed_dropout(device, case, dtype):
    """Equal scores and values that pick a key each: an output is not 0 exactly where its weight was kept."""
    seed, p, B, H, Sq, Sk, _, _ = case["call"]
    q, k = torch.zeros(B, H, Sq, 16, dtype=dtype), torch.zeros(B, H, Sk, 16, dtype=dtype)
    v = torch.eye(Sk, dtype=dtype).expand(B, H, Sk, Sk).contiguous()
    out = attention(q, k, v, dropout_p=p, dropout_seed=seed)
    assert torch.equal(out != 0, expected_keep(case).to(device))


# Positions are 32 bits wide in the op; one case of the fixture runs past them.
WITHIN_32_BITS = [c for c in DROPOUT if c["call"][7] + c["call"][5] < 2**31]


@pytest.mark.parametrize("case", WITHIN_32_BITS, ids=lambda c: f"seed{c['call'][0]}")
@pytest.mark.parametrize("in_a_row", [True, False])
def test_the_committed_dropout_by_positions(device, case, in_a_row):
    """The op with q_pos and k_pos, the keys in order or shuffled."""
    seed, p, B, H, Sq, Sk, first_q, first_k = case["call"]
    order = torch.arange(Sk) if in_a_row else torch.randperm(Sk)
    q, k = torch.zeros(B, H, Sq, 16), torch.zeros(B, H, Sk, 16)
    v = torch.eye(Sk).expand(B, H, Sk, Sk).contiguous()
    q_pos = torch.arange(first_q, first_q + Sq, dtype=torch.int64).to(torch.int32)[None]
    k_pos = (first_k + order).to(torch.int32)[None]
    nothing = [None] * 9
    out, _ = torch.ops.fastattn_triton.attention_fwd(
        q, k, v, 1.0, *nothing, 0.0, p, torch.tensor(seed), q_pos, k_pos, *[None] * 5, False
    )
    assert torch.equal(out != 0, expected_keep(case).to(device)[..., order])


def test_alibi_by_positions(device):
    q, k, v = inputs(2, 2, 2, 20, 70, 16, 16)
    slopes = torch.tensor([[0.3, 0.1]])
    q_pos = torch.randint(0, 100, (2, 20), dtype=torch.int32)
    k_pos = torch.randint(0, 100, (1, 70), dtype=torch.int32)
    out, _ = torch.ops.fastattn_triton.attention_fwd(
        q, k, v, 0.25, *[None] * 8, slopes, 0.0, 0.0, None, q_pos, k_pos, *[None] * 5, False
    )
    right = exact(q, k, v, scale=0.25, alibi_slopes=slopes[0], q_pos=q_pos, k_pos=k_pos.expand(2, 70))
    assert_right(out, right, v)


@pytest.fixture
def short_splits(monkeypatch):
    """Few rows take splits of 64 keys: short caches are cut too."""
    from fastattn import _triton

    monkeypatch.setattr(_triton.module("launch"), "DECODE_SPLIT", 64)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("Sq", [70, 2, 20], ids=["tile", "packed", "splits"])
def test_hidden_numbers_stay_hidden(device, dtype, poison, Sq, short_splits):
    """Keys that no row may see hold NaN, or infinities in the second part of v: nothing of it comes out."""
    Sk = 150
    q, k, v = inputs(2, 2, 1, Sq, Sk, 64, 48, dtype)
    columns = slice(32 if poison == math.inf else 0, None)
    some = torch.rand(2, 1, Sq, Sk) > 0.3
    some[:, :, :, 11] = False
    for mask, hidden in (
        (masks.KeyPadding(torch.tensor([100, 3])), lambda b: slice((100, 3)[b], None)),
        (some, lambda b: slice(11, 12)),
    ):
        clean = attention(q, k, v, mask=mask)
        k2, v2 = k.clone(), v.clone()
        for b in range(2):
            k2[b, :, hidden(b)] = poison
            v2[b, :, hidden(b), columns] = poison
        torch.testing.assert_close(attention(q, k2, v2, mask=mask), clean)


NOTHING_SEEN = {  # of 2 batch items: the mask, and which rows see nothing
    "item": lambda Sq, Sk: masks.KeyPadding([Sk - 30, 0]),
    "rows by ranges": lambda Sq, Sk: masks.CausalLowerRight() & masks.KeyPadding([40, 1], side="left"),
    "rows by bits": lambda Sq, Sk: (torch.rand(Sq, Sk) > 0.3) & (torch.arange(Sq) % 3 > 0)[:, None],
    "rows by both": lambda Sq, Sk: (
        masks.Dense((torch.arange(Sk) < 64).expand(Sq, Sk)) & masks.KeyPadding([0, 20])
    ),
}


@pytest.mark.parametrize("terms", [False, True], ids=["plain", "terms"])
@pytest.mark.parametrize("mask", NOTHING_SEEN)
@pytest.mark.parametrize("Sq", [66, 3], ids=["tile", "splits"])
def test_rows_that_see_nothing_give_zeros_whatever_they_hold(device, Sq, mask, terms, short_splits):
    """NaN in their q, in the slopes of an item that sees nothing, and in the bias wherever it is hidden."""
    Sk = 130
    q, k, v = inputs(2, 2, 1, Sq, Sk, 32, 48, torch.float16)
    mask = NOTHING_SEEN[mask](Sq, Sk)
    shown = dense(mask, 2, 2, Sq, Sk).to(device)
    unseen = ~shown.any(-1)
    given = {}
    if terms:
        given = {"bias": torch.randn(2, 2, Sq, Sk), "alibi_slopes": torch.rand(2, 2), "softcap": 4.0}
    clean, clean_lse = attention(q, k, v, mask=mask, return_lse=True, **given)
    assert_right(clean, exact(q, k, v, mask=shown, **given), v)
    q[unseen] = math.nan
    if terms:
        given["bias"].masked_fill_(~shown, math.nan)
        given["alibi_slopes"].masked_fill_(unseen.all(-1), math.nan)
    out, lse = attention(q, k, v, mask=mask, return_lse=True, **given)
    assert unseen.any() and (out[unseen] == 0).all() and (lse[unseen] == -math.inf).all()
    torch.testing.assert_close(out, clean)
    torch.testing.assert_close(lse, clean_lse)
    if not terms:
        assert (attention(q, k, torch.full_like(v, math.nan), mask=mask)[unseen] == 0).all()


@pytest.mark.parametrize(
    "dtype, bias_dtype",
    [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("Sq", [70, 3], ids=["tile", "splits"])
def test_the_lowest_finite_bias_hides_nothing(dtype, bias_dtype, Sq, short_splits):
    """In units of log2 it would be -inf; rows of nothing else weigh their keys equally."""
    Sk = 150
    q, k, v = inputs(1, 2, 1, Sq, Sk, 32, 32, dtype)
    lowest = torch.finfo(bias_dtype).min
    bias = torch.where(torch.rand(Sq, Sk) < 0.5, 0.0, lowest)
    bias[1] = lowest
    bias[1, Sk // 2 :] = -math.inf
    bias[2] = lowest
    bias = bias.to(bias_dtype)
    out, lse = attention(q, k, v, bias=bias, return_lse=True)
    right, right_lse = exact(q, k, v, bias=bias.double(), return_lse=True)
    assert_right(out, right, v)
    torch.testing.assert_close(lse, right_lse.float(), rtol=1e-5, atol=1e-4)


def test_visible_nan_comes_out():
    q, k, v = inputs(1, 1, 1, 70, 150, 16, 16)
    v[0, 0, 64] = math.nan
    out = attention(q, k, v, mask=masks.Causal())
    assert torch.isfinite(out[0, 0, :64]).all() == (out[0, 0, 64:].isnan().all())


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_same_bits_alone_and_in_a_batch(device, rows):
    q, k, v = inputs(3, 4, 2, rows, 133, 64, 64)
    lengths = torch.tensor([133, 1, 65])
    whole = attention(q, k, v, mask=masks.KeyPadding(lengths))
    for b in range(3):
        alone = attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], mask=masks.KeyPadding(lengths[b : b + 1]))
        assert torch.equal(alone[0], whole[b])


VIEWS = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "sliced": lambda t: torch.cat([t, t[..., :3]], -1)[..., : t.shape[-1]],
    "last stride 2": lambda t: torch.stack([t, t], -1)[..., 0],
    "every other row": lambda t: torch.stack([t, t], 3).flatten(2, 3)[:, :, ::2],
    "stride 0 batch": lambda t: t[:1].expand_as(t),
    "stride 0 heads": lambda t: t[:, :1].expand_as(t),
    "stride 0 rows": lambda t: t[:, :, :1].expand_as(t),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    q, k, v = (VIEWS[view](t) for t in inputs(2, 4, 4, 67, 97, 32, 32))
    assert torch.equal(attention(q, k, v), attention(q.contiguous(), k.contiguous(), v.contiguous()))


def test_the_output_keeps_the_order_of_heads_and_rows():
    qkv = torch.randn(2, 67, 3, 4, 32)
    q, k, v = (qkv[:, :, n].transpose(1, 2) for n in range(3))
    assert attention(q, k, v).transpose(1, 2).is_contiguous()


def test_strides_past_two_to_the_31(device):
    """A huge stride over few elements: the memory between them is never touched."""
    room = torch.empty(3 * (2**30 + 1000) + 4096, dtype=torch.float16)
    q = room.as_strided((1, 4, 3, 32), (0, 2**30 + 8, 32, 1))
    q.copy_(torch.randn(1, 4, 3, 32))
    k = torch.randn(1, 4, 5, 32).half()
    assert torch.equal(attention(q, k, k), attention(q.clone(memory_format=torch.contiguous_format), k, k))
    assert torch.equal(
        attention(k, q, q), attention(k, *[q.clone(memory_format=torch.contiguous_format)] * 2)
    )


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_empty(shape):
    q = torch.randn(shape)
    assert attention(q, q, q).shape == shape


def test_no_keys_and_no_features():
    q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 0, 4), torch.randn(1, 2, 0, 5)
    out, lse = attention(q, k, v, return_lse=True)
    assert torch.equal(out, torch.zeros(1, 2, 3, 5)) and (lse == -math.inf).all()
    q, k, v = torch.randn(1, 2, 3, 0), torch.randn(1, 2, 6, 0), torch.randn(1, 2, 6, 5)
    torch.testing.assert_close(attention(q, k, v), v.mean(2, keepdim=True).expand(1, 2, 3, 5))


def test_large_logits():
    """Rows whose scores differ by thousands, and fp16 logits past 65504."""
    q, k, v = (t * 60 for t in inputs(1, 2, 2, 70, 130, 64, 64, torch.float16))
    assert_right(attention(q, k, v), exact(q, k, v), v)


CASES = pairwise(
    dtype=(torch.float32, torch.float16),
    group=(1, 3),
    sizes=((1, 65), (17, 128), (64, 63), (130, 97)),
    heads=((16, 16), (96, 40), (24, 192)),
    mask=("none", "lower right", "window", "longformer", "dense by batch", "dense and causal"),
    bias=(None, "keys", "full"),
    softcap=(None, 3.0),
    alibi=(False, True),
    dropout=(0.0, 0.4),
    sinks=(False, True),
)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_features_together(device, case):
    Sq, Sk = case["sizes"]
    Hq = 2 * case["group"]
    q, k, v = inputs(2, Hq, 2, Sq, Sk, *case["heads"], case["dtype"])
    mask = MASKS[case["mask"]](2, Sq, Sk)
    given = {
        "softcap": case["softcap"],
        "dropout_p": case["dropout"],
        "dropout_seed": 11 if case["dropout"] else None,
    }
    if case["bias"]:
        given["bias"] = torch.randn(2, Hq, Sq if case["bias"] == "full" else 1, Sk)
    if case["alibi"]:
        given["alibi_slopes"] = torch.rand(Hq)
    if case["sinks"]:
        given["sinks"] = torch.randn(Hq)
    out, lse = attention(q, k, v, mask=mask, return_lse=True, **given)
    right, right_lse = exact(q, k, v, mask=dense(mask, 2, Hq, Sq, Sk).to(device), return_lse=True, **given)
    assert_right(out, right, 2 * v)
    assert torch.equal(lse == -math.inf, right_lse == -math.inf)
    assert torch.where(lse == -math.inf, 0.0, lse - right_lse).abs().max() < 2e-5


@pytest.mark.parametrize("mask", ["none", "causal", "dense by head"])
def test_sections_of_heads(device, mask, monkeypatch):
    """Heads whose K and V share the cache run together, the last section with fewer of them."""
    from fastattn import _triton

    q, k, v = inputs(1, 5, 5, 130, 70, 16, 16, torch.float16)
    monkeypatch.setattr(_triton.module("launch"), "SECTION_BYTES", 2 * k[0, 0].nbytes * 2)
    mask = torch.rand(1, 5, 130, 70) > 0.4 if mask == "dense by head" else MASKS[mask](1, 130, 70)
    assert_right(attention(q, k, v, mask=mask), exact(q, k, v, mask=dense(mask, 1, 5, 130, 70).to(device)), v)


@pytest.mark.parametrize(
    "arch, dtype",
    [
        ("sm_80", torch.float32),  # every architecture's
        ("sm_80", torch.float16),
        ("sm_90", torch.float16),
        ("gfx942", torch.float16),
    ],
)
@pytest.mark.parametrize("mask", ["lower right", "dense by head"])
def test_the_tiles_of_each_architecture(device, arch, dtype, mask, monkeypatch):
    """The interpreter has a tile of its own; here it runs those of the launch table."""
    from fastattn import _triton

    if device.type == "cuda":
        pytest.skip("a GPU runs its own row")
    monkeypatch.setattr(_triton.module("launch"), "architecture", lambda device: arch)
    q, k, v = inputs(1, 4, 2, 34, 70, 96, 40, dtype)
    mask = MASKS[mask](1, 34, 70)
    right = exact(q, k, v, mask=dense(mask, 1, 4, 34, 70))
    assert_right(attention(q, k, v, mask=mask), right, v)
    v[:, :, 69] = math.nan
    shown = masks.KeyPadding([69])
    right = exact(q, k, v, mask=shown.to_dense(34, 70, 1, 4), softcap=3.0, dropout_p=0.1, dropout_seed=3)
    assert_right(
        attention(q, k, v, mask=shown, softcap=3.0, dropout_p=0.1, dropout_seed=3), right, 2 * v[:, :, :69]
    )


def test_explain_names_the_launch(device):
    q = torch.randn(1, 4, 3, 64)
    k = torch.randn(1, 2, 1100, 64)
    text = str(fastattn.explain(q, k, k, backend="triton"))
    assert "kernel   triton: attention, 16 x 64 tiles" in text
    assert "2 heads packed into 6 rows, 3 splits of 512 keys" in text


REFUSALS = {
    "float64 is computed by the reference": lambda d: torch.randn(1, 1, 2, 8, dtype=torch.float64),
    "D is 257, the Triton kernels take head sizes up to 256": lambda d: torch.randn(1, 1, 2, 257),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals(device, reason):
    q = REFUSALS[reason](device)
    with pytest.raises(RuntimeError, match=f"backend='triton' cannot run this call: {reason}"):
        attention(q, q, q)


def test_forward_mode_ad_is_refused():
    q = torch.randn(1, 1, 2, 8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(RuntimeError, match="forward-mode AD"):
            attention(dual, q, q)


def test_a_missing_or_old_triton_is_a_reason(device, monkeypatch):
    import triton

    from fastattn import _triton

    q = torch.randn(1, 1, 2, 8)
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    _triton.unusable.cache_clear()
    with pytest.raises(RuntimeError, match="triton is 3.5.1, the kernels need 3.6 or newer"):
        attention(q, q, q)
    monkeypatch.setattr(_triton.importlib.util, "find_spec", lambda name: None)
    _triton.unusable.cache_clear()
    with pytest.raises(RuntimeError, match="triton is not installed"):
        attention(q, q, q)
    monkeypatch.undo()
    _triton.unusable.cache_clear()


def test_the_default_on_the_cpu_is_the_cpu(device):
    if device.type == "cuda":
        pytest.skip("a machine with a GPU has no interpreter")
    q = torch.randn(1, 1, 2, 8)
    told = fastattn.explain(q, q, q)
    assert told.kernel == "cpu"
    assert (
        dict(told.refusals)["triton"]
        == 'q is on cpu, where Triton\'s interpreter runs only for backend="triton"'
    )


def test_a_new_length_compiles_nothing():
    """Nor does another mask of a form. Many lengths and batches, by what Triton's launcher would look up; few rows take
    tiles of 16, 32 or 64."""
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_compilations.py")
    root = str(script.parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout.splitlines()[-1])
    masks = ("plain", "windows", "narrow", "padding", "bits")
    one = {"forward": dict.fromkeys(masks, [1, 0]), "backward": dict.fromkeys(masks, [1, 2])}
    assert told == {**one, "decode": [1, 1], "prefill": told["prefill"]}
    assert told["prefill"][0] <= 5

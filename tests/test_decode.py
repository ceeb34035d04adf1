"""The decode kernel, few query rows against many keys: its route, numbers, splits, masks and its bits."""

import itertools
import math

import pytest
import torch

import fastattn
from fastattn import masks, reference
from fastattn.tools.equivalence import check_visible, error_rule

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STORAGE = {dtype: number for number, dtype in enumerate(DTYPES)}
SPLIT = 512  # keys, DecodePlan::kSplit
MOST_ROWS = 8  # kMaxDecodeRows


def route(Sq, group=1, D=64, Dv=64, dtype=torch.float32):
    return torch.ops.fastattn.attention_route(Sq, group, D, Dv, STORAGE[dtype])


def inputs(B, Hq, Hkv, Sq, Sk, D, Dv, dtype):
    assert route(Sq, Hq // Hkv, D, Dv, dtype) == "decode"
    return (
        torch.randn(B, Hq, Sq, D).to(dtype),
        torch.randn(B, Hkv, Sk, D).to(dtype),
        torch.randn(B, Hkv, Sk, Dv).to(dtype),
    )


def assert_like_reference(q, k, v, mask=None, lse_tolerance=2e-5, **arguments):
    out, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True, **arguments)
    dense = mask
    if isinstance(mask, masks.Mask):
        dense = mask.to_dense(q.shape[2], k.shape[2], q.shape[0], q.shape[1])
    wide = {
        n: a.double() if torch.is_tensor(a) and a.is_floating_point() else a for n, a in arguments.items()
    }
    exact, exact_lse = reference.attention(
        q.double(), k.double(), v.double(), mask=dense, return_lse=True, **wide
    )
    scale = 2.0 if arguments.get("dropout_p") else 1.0
    verdict = error_rule(out, exact, magnitude=scale * v[v.isfinite()].abs().max().item())
    assert verdict, verdict.reason
    empty = exact_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty) and (out[empty] == 0).all()
    assert ((lse - exact_lse)[~empty].abs() < lse_tolerance).all()


def test_the_route_is_a_rule_of_shapes():
    for dtype, group, D in itertools.product(DTYPES, (1, 4, 71), (1, 64, 256)):
        for rows in range(1, MOST_ROWS + 1):
            assert route(rows, group, D, D, dtype) == "decode"
        assert route(MOST_ROWS + 1, group, D, D, dtype) == "attention"
    with pytest.raises(RuntimeError, match="storage must be 0"):
        torch.ops.fastattn.attention_route(1, 1, 64, 64, 3)


# B, Hq, Hkv, Sq, Sk, D, Dv: one row and several, groups that fill no tile and more than a task, head sizes that
# fill no register, one key.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 8, 8, 1, 130, 64, 64),
    (2, 8, 2, 1, 200, 128, 128),
    (1, 9, 3, 1, 600, 64, 64),
    (1, 7, 1, 3, 97, 80, 40),
    (1, 71, 1, 1, 150, 64, 64),
    (1, 32, 2, 8, 65, 32, 72),
    (2, 3, 3, 5, 77, 33, 17),
    (1, 2, 1, 7, 63, 256, 256),
    (1, 4, 2, 2, 40, 2, 300),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(isa, dtype, shape):
    assert_like_reference(*inputs(*shape, dtype))


@pytest.mark.parametrize("Sk", [SPLIT - 1, SPLIT, SPLIT + 1, 3 * SPLIT + 7])
def test_split_boundaries(isa, Sk):
    for dtype, rows in ((torch.float32, 1), (torch.bfloat16, 3)):
        q, k, v = inputs(1, 4, 2, rows, Sk, 64, 64, dtype)
        assert_like_reference(q, k, v)
        # The largest score in each split in turn: the merge has to rescale the others.
        for split in range(-(-Sk // SPLIT)):
            spiked = k.clone()
            spiked[:, :, min(split * SPLIT + 5, Sk - 1)] = 4 * q[:, ::2, 0]
            assert_like_reference(q, spiked, v)


FEATURES = {
    "softcap": lambda: {"softcap": 3.0},
    "alibi": lambda: {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "alibi a batch": lambda: {"alibi_slopes": torch.rand(2, 4)},
    "sinks": lambda: {"sinks": torch.tensor([0.0, 3.0, -2.0, 1.0])},
    "scale 0": lambda: {"scale": 0.0},
    "scale below 0": lambda: {"scale": -0.3},
    "bias": lambda: {"bias": torch.randn(2, 4, 3, 700)},
    "bias of keys": lambda: {"bias": torch.randn(2, 1, 1, 700)},
    "bias of rows": lambda: {"bias": torch.randn(1, 4, 3, 1)},
    "strided bias": lambda: {"bias": torch.randn(1, 1, 3, 1400)[..., ::2]},
    "bias of -inf": lambda: {"bias": torch.where(torch.rand(1, 4, 3, 700) > 0.6, 0.5, -math.inf)},
    "bias hides blocks": lambda: {"bias": torch.where(torch.arange(700) % 256 > 190, 0.5, -math.inf)[None]},
    "lowest bias": lambda: {"bias": torch.full((1, 1, 3, 700), torch.finfo(torch.float32).min)},
    "dropout": lambda: {"dropout_p": 0.3, "dropout_seed": torch.tensor(-7)},
    "all": lambda: {
        "softcap": 2.0,
        "bias": torch.randn(4, 3, 700),
        "alibi_slopes": torch.rand(4),
        "sinks": torch.randn(4),
        "scale": 0.4,
        "dropout_p": 0.1,
        "dropout_seed": 3,
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FEATURES)
def test_score_terms(isa, dtype, name):
    q, k, v = inputs(2, 4, 2, 3, 700, 64, 40, dtype)
    features = FEATURES[name]()
    # A bias of 3e38 leaves the natural units of the LSE no decimals.
    tolerance = 1e35 if name == "lowest bias" else 2e-5
    assert_like_reference(q, k, v, lse_tolerance=tolerance, **features)
    if dtype != torch.float32 and "bias" in features and name != "lowest bias":
        features["bias"] = features["bias"].to(dtype)
    assert_like_reference(q, k, v, masks.CausalLowerRight(), lse_tolerance=tolerance, **features)


def test_positions():
    """Logical positions of rows and keys feed ALiBi and dropout, not the mask."""
    q, k, v = inputs(2, 4, 2, 3, 130, 32, 32, torch.float32)
    q_pos = torch.tensor([[7, 1, 900], [0, 0, 3]], dtype=torch.int32)
    k_pos = torch.randperm(2 * 130, dtype=torch.int32).view(2, 130)
    slopes, seed = torch.rand(1, 4), torch.tensor([11])
    none = [None] * 4
    out, lse = torch.ops.fastattn.attention_fwd(
        q, k, v, 0.2, None, 2, None, None, None, None, None, None, slopes, 0.0, 0.25, seed, q_pos, k_pos,
        *none, None, False,
    )  # fmt: skip
    exact, exact_lse = reference.attention(
        q, k, v, scale=0.2, mask=torch.ones(3, 130, dtype=torch.bool).tril(2), alibi_slopes=slopes[0],
        dropout_p=0.25, dropout_seed=11, q_pos=q_pos, k_pos=k_pos, return_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(lse, exact_lse)


MASKS = {
    "causal": lambda B, H, Sq, Sk: masks.Causal(),
    "lower right": lambda B, H, Sq, Sk: masks.CausalLowerRight(),
    "window": lambda B, H, Sq, Sk: masks.CausalLowerRight() & masks.SlidingWindow(90, 0, lower_right=True),
    "padding": lambda B, H, Sq, Sk: masks.KeyPadding(torch.arange(B) * Sk // max(B - 1, 1)),
    "left padding": lambda B, H, Sq, Sk: masks.KeyPadding(torch.arange(1, B + 1) % (Sk + 1), side="left"),
    "nothing": lambda B, H, Sq, Sk: torch.zeros(Sq, Sk, dtype=torch.bool),
    "a row of nothing": lambda B, H, Sq, Sk: (torch.arange(Sq) % 3 > 0)[:, None].expand(Sq, Sk),
    "random": lambda B, H, Sq, Sk: torch.rand(B, 1, Sq, Sk) > 0.7,
    "random heads": lambda B, H, Sq, Sk: torch.rand(1, H, Sq, Sk) > 0.5,
    "blocks of heads": lambda B, H, Sq, Sk: (
        (torch.rand(B, H, 1, -(-Sk // 64)) > 0.8).repeat_interleave(64, 3)[..., :Sk].expand(B, H, Sq, Sk)
    ),
    "random, padding": lambda B, H, Sq, Sk: (
        masks.Dense(torch.rand(Sq, Sk) > 0.3) & masks.KeyPadding(torch.arange(B) * Sk // max(B, 1))
    ),
}


@pytest.mark.parametrize("shape", [(2, 4, 2, 1, 70), (3, 6, 1, 5, 601), (1, 3, 3, 8, SPLIT + 1)])
@pytest.mark.parametrize("name", MASKS)
def test_masks_exactly(isa, name, shape):
    """Every row of every mask sees its keys and no other: with q = 0, exp(lse) is their number."""
    B, Hq, Hkv, Sq, Sk = shape
    mask = MASKS[name](B, Hq, Sq, Sk)
    dense = mask.to_dense(Sq, Sk, B, Hq) if isinstance(mask, masks.Mask) else mask
    dtypes = [torch.float32] if isa == "scalar" else [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        result = check_visible(
            lambda q, k, v: fastattn.attention(q, k, v, mask=mask, return_lse=True),
            dense, B, Hq, Hkv, dtype,
        )  # fmt: skip
        assert result, str(result)
    q, k, v = inputs(B, Hq, Hkv, Sq, Sk, 40, 24, torch.float32)
    assert_like_reference(q, k, v, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_hidden_numbers_stay_hidden(isa, dtype, poison):
    """Keys that no row, or only some rows of the group, may see hold NaN: the others keep their bits."""
    q, k, v = inputs(2, 4, 2, 3, 601, 64, 48, dtype)
    lengths = torch.tensor([600, 65])
    padding = masks.KeyPadding(lengths)
    some = torch.rand(2, 4, 3, 601) > 0.3
    some[..., 11] = False
    for mask, hidden in ((padding, lambda b: slice(int(lengths[b]), None)), (some, lambda b: slice(11, 12))):
        clean = fastattn.attention(q, k, v, mask=mask)
        k2, v2 = k.clone(), v.clone()
        for b in range(2):
            k2[b, :, hidden(b)] = v2[b, :, hidden(b)] = poison
        assert torch.equal(fastattn.attention(q, k2, v2, mask=mask), clean)
    bias = torch.where(some, 0.25, -math.inf)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 11] = v2[:, :, 11] = poison
    for extra in ({}, {"mask": padding}):
        clean = fastattn.attention(q, k, v, bias=bias, **extra)
        assert torch.equal(fastattn.attention(q, k2, v2, bias=bias, **extra), clean)
    # Seen by head 1's row 2 alone.
    some[..., 577], some[:, 1, 2, 577] = False, True
    v2 = v.clone()
    v2[:, :, 577] = poison
    out, clean = (fastattn.attention(q, k, x, mask=some) for x in (v2, v))
    reached = torch.zeros(2, 4, 3, dtype=torch.bool)
    reached[:, 1, 2] = True
    assert torch.equal(out[~reached], clean[~reached])
    assert not out[reached].isfinite().any()


def test_visible_nan_comes_out(isa):
    q, k, v = inputs(1, 4, 2, 2, 600, 16, 16, torch.float32)
    k[0, 0, 550] = math.nan
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    assert out[0, :2].isnan().all() and lse[0, :2].isnan().all() and out[0, 2:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_at_every_thread_count_and_order(isa, threads, task_order, dtype):
    q, k, v = inputs(2, 8, 2, 2, 1700, 64, 64, dtype)
    arguments = dict(mask=masks.CausalLowerRight(), dropout_p=0.2, dropout_seed=5, return_lse=True)
    threads(1)
    expected = fastattn.attention(q, k, v, **arguments)
    for n, order in itertools.product((1, 2, 3, 5, 7), (0, 1, 17)):
        threads(n)
        task_order(order)
        for a, b in zip(fastattn.attention(q, k, v, **arguments), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_alone_and_in_a_batch(isa, dtype):
    q, k, v = inputs(5, 6, 2, 1, 1100, 64, 64, dtype)
    lengths = torch.tensor([1100, 1, 512, 513, 700])
    whole = fastattn.attention(q, k, v, mask=masks.KeyPadding(lengths), return_lse=True)
    for b in range(5):
        one = slice(b, b + 1)
        alone = fastattn.attention(
            q[one], k[one], v[one], mask=masks.KeyPadding(lengths[one]), return_lse=True
        )
        assert all(torch.equal(a[0], w[b]) for a, w in zip(alone, whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_caches(isa, dtype):
    """Views of a cache: [B, S, H, D], longer than what is used, and with room for NaN behind it."""
    B, Hq, Hkv, used, room, D = 2, 8, 2, 530, 600, 64
    q, k, v = inputs(B, Hq, Hkv, 1, used, D, D, dtype)
    expected = fastattn.attention(q, k, v, return_lse=True)
    for layout in ("bhsd", "bshd", "packed kv", "stride 0 batch"):
        if layout == "bhsd":
            caches = [torch.full((B, Hkv, room, D), math.nan, dtype=dtype) for _ in "kv"]
        elif layout == "bshd":
            caches = [torch.full((B, room, Hkv, D), math.nan, dtype=dtype).transpose(1, 2) for _ in "kv"]
        elif layout == "packed kv":
            both = torch.full((B, room, 2, Hkv, D), math.nan, dtype=dtype)
            caches = [both[:, :, n].transpose(1, 2) for n in range(2)]
        else:
            k, v = k[:1].expand(B, -1, -1, -1), v[:1].expand(B, -1, -1, -1)
            expected = fastattn.attention(q, k.contiguous(), v.contiguous(), return_lse=True)
            caches = None
        if caches is None:
            views = [k, v]
        else:
            views = [cache.narrow(2, 3, used) for cache in caches]
            for view, data in zip(views, (k, v), strict=True):
                view.copy_(data)
        actual = fastattn.attention(q, *views, return_lse=True)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True)), layout


def test_layout_follows_q():
    q = torch.randn(2, 3, 4, 16).transpose(1, 2)
    k = torch.randn(2, 2, 50, 16)
    out = fastattn.attention(q, k, k)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, reference.attention(q, k, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_partials_of_a_sequence_merge(dtype):
    """out_fp32 and the LSE of parts of the keys, merged as one chunk of many would be."""
    q, k, v = inputs(1, 4, 2, 2, 900, 64, 64, dtype)

    def part(keys):
        none = [None] * 19
        none[9], none[10] = 0.0, 0.0  # softcap, dropout_p
        return torch.ops.fastattn.attention_fwd(q, k[:, :, keys], v[:, :, keys], 0.125, *none, True)

    out, lse = part(slice(None))
    assert out.dtype == torch.float32
    merged, merged_lse = reference.merge(*part(slice(0, 333)), *part(slice(333, 900)))
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    assert (merged - out).abs().max() < tolerance and (merged_lse - lse).abs().max() < 2e-5


def test_no_keys_and_no_features(isa):
    q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 0, 4), torch.randn(1, 2, 0, 5)
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    assert torch.equal(out, torch.zeros(1, 2, 3, 5)) and (lse == -math.inf).all()
    q, k, v = torch.randn(1, 2, 3, 0), torch.randn(1, 2, 6, 0), torch.randn(1, 2, 6, 5)
    torch.testing.assert_close(fastattn.attention(q, k, v), v.mean(2, keepdim=True).expand(1, 2, 3, 5))
    k, v = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 0)
    assert fastattn.attention(torch.randn(1, 2, 3, 4), k, v).shape == (1, 2, 3, 0)

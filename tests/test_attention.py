"""The attention forward: numbers under the error rule, masks to the key, and the same bits whoever runs it."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import masks, reference
from fastattn.tools.equivalence import check_visible, error_rule

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# B, Hq, Hkv, Sq, Sk, D, Dv: ones, primes, one either side of a granule, odd heads, the head sizes of the bug lists.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 3, 63, 64, 64, 64),
    (1, 4, 2, 64, 65, 32, 32),
    (2, 6, 3, 65, 63, 64, 96),
    (1, 2, 1, 127, 131, 40, 72),
    (1, 5, 5, 17, 257, 104, 104),
    (1, 3, 1, 129, 33, 111, 7),
    (1, 2, 2, 31, 97, 128, 128),
    (1, 1, 1, 70, 70, 256, 256),
    (3, 8, 2, 5, 191, 64, 64),
]


def inputs(B, Hq, Hkv, Sq, Sk, D, Dv, dtype):
    return (
        torch.randn(B, Hq, Sq, D).to(dtype),
        torch.randn(B, Hkv, Sk, D).to(dtype),
        torch.randn(B, Hkv, Sk, Dv).to(dtype),
    )


def exact_and_torch(q, k, v, bias=None, **arguments):
    """The float64 reference, and torch's own math in q's dtype on the same call where it has one."""
    wide = [t.double() for t in (q, k, v)]
    exact = reference.attention(*wide, bias=None if bias is None else bias.double(), **arguments)
    if set(arguments) - {"mask", "scale"}:
        return exact, None
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    attn_mask = arguments.get("mask")
    if bias is not None:
        hidden = 0.0 if attn_mask is None else torch.where(attn_mask, 0.0, -math.inf)
        attn_mask = (bias.float() + hidden).to(q.dtype)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=arguments.get("scale"))
    return exact, theirs


def assert_right(actual, exact, theirs=None, v=None):
    magnitude = None if v is None or not v.numel() else v.abs().max().item()
    verdict = error_rule(actual, exact, theirs, magnitude=magnitude)
    assert verdict, verdict.reason


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_rule(isa, dtype, shape):
    q, k, v = inputs(*shape, dtype)
    exact, theirs = exact_and_torch(q, k, v)
    assert_right(fastattn.attention(q, k, v), exact, theirs, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "features",
    [
        {"softcap": 5.0},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
        {"alibi_slopes": torch.rand(2, 4)},
        {"sinks": torch.tensor([0.0, 3.0, -2.0, 1.0])},
        {"scale": 0.0},
        {"scale": -0.3},
        {"scale": 0.7131},
        {"dropout_p": 0.3, "dropout_seed": torch.tensor(-7)},
        {
            "softcap": 2.0,
            "sinks": torch.randn(4),
            "scale": 0.4,
            "dropout_p": 0.1,
            "dropout_seed": torch.tensor(3),
        },
    ],
    ids=lambda f: "+".join(f),
)
def test_score_terms(isa, dtype, features):
    q, k, v = inputs(2, 4, 2, 67, 133, 64, 40, dtype)
    lowered = dict(features)
    mask = masks.CausalLowerRight()
    exact, _ = exact_and_torch(q, k, v, mask=mask.to_dense(67, 133), **lowered)
    actual = fastattn.attention(q, k, v, mask=mask, **features)
    assert_right(actual, exact, None, 2 * v)


BIASES = {
    "full": lambda: torch.randn(2, 4, 67, 133),
    "heads": lambda: torch.randn(1, 4, 67, 133),
    "keys": lambda: torch.randn(2, 1, 1, 133),
    "rows": lambda: torch.randn(1, 4, 67, 1),
    "matrix": lambda: torch.randn(67, 133),
    "transposed": lambda: torch.randn(133, 67).T,
    "strided": lambda: torch.randn(67, 266)[:, ::2],
    "sliced": lambda: torch.randn(67, 200)[:, 7:140],
    "expanded": lambda: torch.randn(1, 1, 133).expand(4, 67, 133),
    "infinite": lambda: torch.where(torch.rand(67, 133) > 0.5, torch.randn(67, 133), -math.inf),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", ["same", "float32"])
@pytest.mark.parametrize("bias", BIASES)
def test_bias(isa, dtype, bias_dtype, bias):
    q, k, v = inputs(2, 4, 2, 67, 133, 64, 64, dtype)
    bias = BIASES[bias]().to(dtype if bias_dtype == "same" else torch.float32)
    exact, theirs = exact_and_torch(q, k, v, bias=bias)
    comparator = theirs if bias.dtype == dtype else None
    assert_right(fastattn.attention(q, k, v, bias=bias), exact, comparator, v)
    assert_right(
        fastattn.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True), exact, comparator, v
    )


MASKS = {
    "none": lambda B, Sq, Sk: None,
    "causal": lambda B, Sq, Sk: masks.Causal(),
    "lower right": lambda B, Sq, Sk: masks.CausalLowerRight(),
    "window": lambda B, Sq, Sk: masks.SlidingWindow(20, 3),
    "causal window": lambda B, Sq, Sk: (
        masks.CausalLowerRight() & masks.SlidingWindow(20, 0, lower_right=True)
    ),
    "padding": lambda B, Sq, Sk: masks.KeyPadding(torch.arange(B) * Sk // max(B, 1)),
    "left padding": lambda B, Sq, Sk: masks.KeyPadding(torch.arange(1, B + 1) % (Sk + 1), side="left"),
    "prefix": lambda B, Sq, Sk: masks.PrefixLM(torch.arange(B) * 7 % (Sk + 1)),
    "chunked": lambda B, Sq, Sk: masks.Chunked(48),
    "causal and padding": lambda B, Sq, Sk: (
        masks.Causal() & masks.KeyPadding(torch.arange(B) * Sk // max(B, 1))
    ),
    "longformer": lambda B, Sq, Sk: masks.Longformer(17, [0, Sk - 1]),
    "random": lambda B, Sq, Sk: torch.rand(B, 1, Sq, Sk) > 0.7,
    "random heads": lambda B, Sq, Sk: torch.rand(1, 4, Sq, Sk) > 0.5,
    "random and causal": lambda B, Sq, Sk: masks.Dense(torch.rand(Sq, Sk) > 0.3) & masks.Causal(),
    "nothing": lambda B, Sq, Sk: torch.zeros(Sq, Sk, dtype=torch.bool),
    "a row of nothing": lambda B, Sq, Sk: (torch.arange(Sq) % 3 > 0)[:, None].expand(Sq, Sk),
}


def dense_of(mask, B, H, Sq, Sk):
    if mask is None:
        return torch.ones(Sq, Sk, dtype=torch.bool)
    return mask if isinstance(mask, torch.Tensor) else mask.to_dense(Sq, Sk, B, H)


@pytest.mark.parametrize("lengths", [(130, 130), (65, 200), (200, 67), (1, 129), (64, 64)])
@pytest.mark.parametrize("name", MASKS)
def test_masks_exactly(isa, name, lengths):
    """Every row of every mask sees its keys and no other, on every instruction set."""
    Sq, Sk = lengths
    mask = MASKS[name](2, Sq, Sk)
    for dtype in (torch.float32, torch.bfloat16):
        if dtype is torch.bfloat16 and isa == "scalar":
            continue  # one pass in float32 reads the whole mask; the slow target needs no second one
        result = check_visible(
            lambda q, k, v: fastattn.attention(q, k, v, mask=mask, return_lse=True),
            dense_of(mask, 2, 4, Sq, Sk),
            2,
            4,
            2,
            dtype,
        )
        assert result, str(result)


def test_exact_test_can_fail():
    wrong = torch.ones(70, 300, dtype=torch.bool)
    wrong[69, 299] = False
    result = check_visible(
        lambda q, k, v: fastattn.attention(q, k, v, mask=wrong, return_lse=True),
        torch.ones(70, 300, dtype=torch.bool),
        1,
        1,
        1,
    )
    assert not result and int(result.wrong.sum()) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_lse(isa, dtype):
    q, k, v = inputs(2, 4, 2, 67, 133, 64, 64, dtype)
    mask = masks.KeyPadding(torch.tensor([0, 100]))
    out, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True)
    _, exact = reference.attention(
        q.double(), k.double(), v.double(), mask=mask.to_dense(67, 133, 2, 4), return_lse=True
    )
    assert lse.dtype == torch.float32 and lse.shape == (2, 4, 67)
    assert (lse[0] == -math.inf).all() and (out[0] == 0).all()
    assert (lse[1] - exact[1]).abs().max() < (3e-6 if dtype == torch.float32 else 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1, 40])
@pytest.mark.parametrize(
    "mask", [None, masks.Causal(), masks.SlidingWindow(100, 30), masks.KeyPadding([333])]
)
def test_scores_that_outgrow_their_pivots(isa, mask, factor, dtype):
    """A row's pivot comes from the keys it met first; what is much larger later takes another, in any granule."""
    q, k, v = inputs(1, 2, 2, 130, 400, 64, 64, dtype)
    k *= torch.logspace(-2, 0, 400, 10.0)[:, None].to(dtype) * factor
    k[0, 0, 320] = 10 * q[0, 0, 100]  # one row, late
    k[0, 1, 330] = 40 * q[0, 1, 110]  # by more than fp32 has exponents
    dense = None if mask is None else mask.to_dense(130, 400, 1, 2)
    exact, theirs = exact_and_torch(q, k, v, mask=dense)
    out, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True)
    assert_right(out, exact, theirs)
    exact_lse = reference.attention(q.double(), k.double(), v.double(), mask=dense, return_lse=True)[1]
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [16, 64, 70])
def test_first_keys_of_minus_infinity(isa, hidden, dtype):
    """They tell no pivot, and weigh nothing."""
    q, k, v = inputs(1, 2, 2, 40, 150, 64, 64, dtype)
    q[..., 0] = 1
    k[:, :, :hidden, 0] = -math.inf
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    exact, exact_lse = reference.attention(
        *(t.double() for t in (q, k[:, :, hidden:], v[:, :, hidden:])), return_lse=True
    )
    assert_right(out, exact)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-6)
    assert_right(fastattn.attention(q, k, v), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_outgrows_its_pivot_leaves_its_neighbours_bits(isa, dtype):
    q, k, v = inputs(1, 1, 1, 64, 200, 64, 64, dtype)
    k[:, :, 64:] *= 3  # many rows come to weights over 1, which are no reason for a new pivot
    others = torch.arange(64) != 20
    before = fastattn.attention(q, k, v, return_lse=True)
    q[0, 0, 20] = 30 * k[0, 0, 150]
    after = fastattn.attention(q, k, v, return_lse=True)
    for x, y in zip(before, after):
        assert torch.equal(x[:, :, others], y[:, :, others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_hidden_numbers_stay_hidden(isa, dtype, poison):
    """Keys that no row, or only some rows, may see hold NaN: nothing of it comes out."""
    q, k, v = inputs(2, 2, 2, 70, 150, 64, 48, dtype)
    some = torch.rand(2, 1, 70, 150) > 0.3
    some[:, :, :, 11] = False
    some[:, :, 5, 77], some[:, :, 6:, 77] = True, False
    some[:, :, :5, 77] = False
    for mask, hidden in (
        (masks.KeyPadding(torch.tensor([100, 3])), lambda b: slice((100, 3)[b], None)),
        (some, lambda b: slice(11, 12)),
    ):
        clean = fastattn.attention(q, k, v, mask=mask)
        k2, v2 = k.clone(), v.clone()
        for b in range(2):
            k2[b, :, hidden(b)] = poison
            v2[b, :, hidden(b)] = poison
        assert torch.isfinite(fastattn.attention(q, k2, v2, mask=mask)).all()
        torch.testing.assert_close(fastattn.attention(q, k2, v2, mask=mask), clean)
    # Seen by row 5 alone: the others must not change.
    v2 = v.clone()
    v2[:, :, 77] = poison
    out, clean = (fastattn.attention(q, k, x, mask=some) for x in (v2, v))
    rows = torch.arange(70) != 5
    torch.testing.assert_close(out[:, :, rows], clean[:, :, rows])
    assert not torch.isfinite(out[:, :, 5]).any()


def test_visible_nan_comes_out():
    q, k, v = inputs(1, 1, 1, 70, 70, 16, 16, torch.float32)
    v[0, 0, 3] = math.nan
    out = fastattn.attention(q, k, v, mask=masks.Causal())
    assert torch.isfinite(out[0, 0, :3]).all() and out[0, 0, 3:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_at_every_thread_count_and_order(isa, dtype, threads, task_order):
    q, k, v = inputs(2, 6, 2, 200, 333, 64, 64, dtype)
    arguments = dict(mask=masks.CausalLowerRight(), dropout_p=0.2, dropout_seed=5, return_lse=True)
    threads(1)
    expected = fastattn.attention(q, k, v, **arguments)
    for n in (2, 3, 5, 7):
        threads(n)
        for seed in (0, 1, 17):
            task_order(seed)
            for a, b in zip(fastattn.attention(q, k, v, **arguments), expected):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_same_bits_alone_and_in_a_batch(isa, dtype, rows):
    q, k, v = inputs(5, 4, 2, rows, 133, 64, 64, dtype)
    lengths = torch.tensor([133, 1, 64, 65, 100])
    whole = fastattn.attention(q, k, v, mask=masks.KeyPadding(lengths))
    for b in range(5):
        alone = fastattn.attention(
            q[b : b + 1], k[b : b + 1], v[b : b + 1], mask=masks.KeyPadding(lengths[b : b + 1])
        )
        assert torch.equal(alone[0], whole[b])


VIEWS = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "last stride 2": lambda t: torch.stack([t, t], -1)[..., 0],
    "every other row": lambda t: torch.stack([t, t], 3).flatten(2, 3)[:, :, ::2],
    "stride 0 batch": lambda t: t[:1].expand_as(t),
    "stride 0 heads": lambda t: t[:, :1].expand_as(t),
    "stride 0 rows": lambda t: t[:, :, :1].expand_as(t),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_views(isa, view, dtype, threads):
    """Of all operands, and of each beside contiguous ones; for a tile of rows and for decode's few."""
    threads(1)
    for rows, mask in ((67, masks.KeyPadding([97, 40])), (3, None)):
        plain = inputs(2, 4, 4, rows, 97, 64, 64, dtype)
        seen = [VIEWS[view](t) for t in plain]
        for at in (slice(3), slice(0, 1), slice(1, 2), slice(2, 3)):
            given = list(plain)
            given[at] = seen[at]
            expected = fastattn.attention(*(t.contiguous() for t in given), mask=mask)
            assert torch.equal(fastattn.attention(*given, mask=mask), expected)


def test_fused_qkv_view():
    qkv = torch.randn(2, 67, 3, 4, 32)
    q, k, v = (qkv[:, :, n].transpose(1, 2) for n in range(3))
    out = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert out.transpose(1, 2).is_contiguous(), "the output keeps q's order of heads and rows"


def test_strides_past_two_to_the_31():
    """A huge stride over few elements: the memory between them is never touched."""
    room = torch.empty(2 * (2**31 + 1000), dtype=torch.bfloat16)
    q = room.as_strided((1, 2, 3, 32), (0, 2**31 + 500, 32, 1))
    q.normal_()
    k = torch.randn(1, 2, 5, 32).bfloat16()
    torch.testing.assert_close(fastattn.attention(q, k, k), fastattn.attention(q.clone(), k, k))


def test_batch_of_65536():
    q = torch.randn(65536, 1, 1, 8)
    torch.testing.assert_close(fastattn.attention(q, q, q), q)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty(shape):
    q = torch.randn(shape)
    assert fastattn.attention(q, q, q).shape == shape
    assert fastattn.scaled_dot_product_attention(q, q, q, is_causal=True).shape == shape


def test_no_keys_and_no_features():
    q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 0, 4), torch.randn(1, 2, 0, 5)
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    assert torch.equal(out, torch.zeros(1, 2, 3, 5)) and (lse == -math.inf).all()
    q, k, v = torch.randn(1, 2, 3, 0), torch.randn(1, 2, 6, 0), torch.randn(1, 2, 6, 5)
    torch.testing.assert_close(fastattn.attention(q, k, v), v.mean(2, keepdim=True).expand(1, 2, 3, 5))


def test_real_activations_and_large_logits():
    """Rows whose scores differ by thousands, and fp16 logits past 65504."""
    q, k, v = (t * 60 for t in inputs(1, 2, 2, 70, 130, 64, 64, torch.float16))
    exact, _ = exact_and_torch(q, k, v)
    out = fastattn.attention(q, k, v)
    assert torch.isfinite(out).all()
    assert_right(out, exact, None, v)
    q = q.float() * 1e3
    exact, theirs = exact_and_torch(q, k.float(), v.float())
    assert_right(fastattn.attention(q, k.float(), v.float()), exact, theirs, v)


def test_float64_goes_to_the_reference():
    q = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    assert fastattn.explain(q, q, q).kernel == "reference"
    torch.testing.assert_close(fastattn.attention(q, q, q), F.scaled_dot_product_attention(q, q, q))


def test_out_argument():
    q = torch.randn(2, 2, 5, 8)
    out = torch.full_like(q, math.nan)
    assert fastattn.attention(q, q, q, out=out) is out
    assert torch.equal(out, fastattn.attention(q, q, q))


def test_return_weights():
    q, k, v = inputs(2, 4, 2, 9, 11, 16, 16, torch.float32)
    out, lse, weights = fastattn.attention(
        q, k, v, mask=masks.Causal(), return_lse=True, return_weights=True, dropout_p=0.2, dropout_seed=1
    )
    assert weights.shape == (2, 4, 9, 11) and lse.shape == (2, 4, 9)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), out)


def test_dropout_follows_the_generators():
    q = torch.randn(1, 2, 33, 16)
    torch.manual_seed(3)
    a = fastattn.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    b = fastattn.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(a, fastattn.scaled_dot_product_attention(q, q, q, dropout_p=0.5))
    assert not torch.equal(a, b)
    draws = [
        fastattn.attention(q, q, q, dropout_p=0.5, generator=torch.Generator().manual_seed(9)) for _ in "ab"
    ]
    assert torch.equal(*draws)
    assert torch.equal(
        fastattn.attention(q, q, q, dropout_p=0.5, dropout_seed=2**40 + 1),
        fastattn.attention(q, q, q, dropout_p=0.5, dropout_seed=torch.tensor(2**40 + 1)),
    )

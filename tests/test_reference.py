"""The reference against torch in float64, hand formulas and finite differences."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn import reference
from fastattn.tools.equivalence import error_rule

F64 = torch.float64


def rand(*shape, dtype=F64, grad=False, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=F64).to(dtype).requires_grad_(grad)


def qkv(B=2, Hq=4, Hkv=2, Sq=5, Sk=7, D=6, Dv=3, dtype=F64, grad=False):
    return (
        rand(B, Hq, Sq, D, dtype=dtype, grad=grad, seed=1),
        rand(B, Hkv, Sk, D, dtype=dtype, grad=grad, seed=2),
        rand(B, Hkv, Sk, Dv, dtype=dtype, grad=grad, seed=3),
    )


def torch_math(*args, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def random_mask(*shape, seed=0):
    """A boolean mask with every kind of row: mixed, empty (the first) and full (the second)."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[..., 0, :] = False
    mask[..., 1, :] = True
    return mask


# Attention: torch's own features


@pytest.mark.parametrize("scale", [None, 0.0, -0.7])
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float", "head mask", "key padding"])
def test_sdpa_is_torchs(kind, scale):
    q, k, v = qkv(grad=True)
    kwargs = {"scale": scale, "enable_gqa": True}
    if kind == "causal":
        kwargs["is_causal"] = True
    elif kind == "float":
        kwargs["attn_mask"] = rand(2, 1, 5, 7, grad=True)
    elif kind != "none":
        shape = {"bool": (5, 7), "head mask": (4, 5, 7), "key padding": (2, 1, 1, 7)}[kind]
        kwargs["attn_mask"] = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.7
    inputs = [q, k, v] + [t for t in (kwargs.get("attn_mask"),) if t is not None and t.requires_grad]
    ours, theirs = reference.scaled_dot_product_attention(q, k, v, **kwargs), torch_math(q, k, v, **kwargs)
    close(ours, theirs)
    dout = rand(*ours.shape, seed=9)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, dout), torch.autograd.grad(theirs, inputs, dout), strict=True
    ):
        close(a, b)


@pytest.mark.parametrize(
    "q_shape, k_shape, v_shape",
    [
        ((5, 6), (7, 6), (7, 3)),
        ((3, 5, 6), (1, 7, 6), (3, 7, 3)),
        ((2, 1, 5, 6), (1, 3, 7, 6), (2, 3, 7, 3)),
        ((2, 1, 3, 5, 6), (1, 4, 3, 7, 6), (2, 4, 1, 7, 3)),
    ],
)
def test_sdpa_takes_any_rank_and_broadcasts(q_shape, k_shape, v_shape):
    q, k, v = rand(*q_shape), rand(*k_shape), rand(*v_shape)
    close(
        reference.scaled_dot_product_attention(q, k, v, is_causal=True), torch_math(q, k, v, is_causal=True)
    )
    bias = rand(5, 7)
    close(reference.scaled_dot_product_attention(q, k, v, bias), torch_math(q, k, v, bias))


# Attention: every feature together, against loops over scalars


def scalar_philox(seed, counter):
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    c = list(counter)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ key[0], b % 2**32, (a >> 32) ^ c[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return c


def scalar_attention(q, k, v, mask, bias, slopes, softcap, sinks, scale, p, seed, q_pos, k_pos):
    B, Hq, Sq, _ = q.shape
    out, lse = torch.zeros(B, Hq, Sq, v.shape[-1], dtype=F64), torch.full((B, Hq, Sq), -math.inf, dtype=F64)
    for b, h, i in itertools.product(range(B), range(Hq), range(Sq)):
        g = h // (Hq // k.shape[1])
        scores = {}
        for j in range(k.shape[2]):
            if mask[b, h, i, j] and bias[b, h, i, j] != -math.inf:
                s = softcap * math.tanh(scale * float(q[b, h, i] @ k[b, g, j]) / softcap)
                distance = abs(int(q_pos[b, i]) - int(k_pos[b, j]))
                scores[j] = s + float(bias[b, h, i, j]) - float(slopes[b, h]) * distance
        if scores:
            lse[b, h, i] = math.log(sum(math.exp(s) for s in scores.values()))
        for j, s in scores.items():
            position = int(k_pos[b, j])
            word = scalar_philox(seed, (b, h, int(q_pos[b, i]), position // 4))[position % 4]
            if word >= int(p * 2**32):
                weight = math.exp(s - float(lse[b, h, i])) / (1 - p)
                weight /= 1 + math.exp(float(sinks[h]) - float(lse[b, h, i]))
                out[b, h, i] += weight * v[b, g, j]
    return out, lse


def everything(B=2, Hq=4, Sq=5, Sk=7):
    bias = rand(B, Hq, Sq, Sk, seed=4)
    bias[:, :, 2, ::2] = -math.inf
    return {
        "mask": random_mask(B, Hq, Sq, Sk),
        "bias": bias,
        "alibi_slopes": rand(B, Hq, seed=5).abs() / 4,
        "softcap": 1.5,
        "sinks": rand(Hq, seed=6),
        "scale": 0.6,
        "dropout_p": 0.3,
        "dropout_seed": -(2**40) - 12345,
        "q_pos": torch.tensor([[3, 0, 9, 4, 100], [5, 6, 7, 8, 9]]),
        "k_pos": torch.tensor([[0, 1, 2, 3, 4, 5, 6], [90, 8, 7, 5, 13, 2, 1]], dtype=torch.int32),
    }


def test_all_features_together_by_hand():
    q, k, v = qkv()
    features = everything()
    out, lse, weights = reference.attention(q, k, v, **features, return_lse=True, return_weights=True)
    expected = scalar_attention(q, k, v, *features.values())
    close(out, expected[0])
    close(lse, expected[1])
    close(weights @ v.repeat_interleave(2, 1), out)
    assert (weights == 0).sum() > (~features["mask"]).sum()  # dropout and -inf entries took some as well


def test_a_sink_is_one_more_key_of_value_zero():
    q, k, v = qkv(Hkv=4)
    sinks = rand(4)
    logits = torch.cat([q @ k.mT / math.sqrt(6), sinks[:, None, None].expand(2, 4, 5, 1)], -1)
    close(reference.attention(q, k, v, sinks=sinks), logits.softmax(-1)[..., :-1] @ v)


def test_an_infinite_negative_sink_is_none():
    q, k, v = qkv()
    mask = random_mask(5, 7)
    sinks = torch.full((4,), -math.inf, dtype=F64, requires_grad=True)
    ours = reference.attention(q, k, v, mask=mask, sinks=sinks, return_weights=True)
    close(ours, reference.attention(q, k, v, mask=mask, return_weights=True), 0)
    assert (torch.autograd.grad(ours[0].sum(), sinks)[0] == 0).all()


def test_a_score_of_minus_infinity_weighs_nothing():
    q, k, v = qkv()
    q = q.abs()
    k[:, :, ::2] = -math.inf
    seen = torch.arange(7) % 2 == 1
    close(reference.attention(q, k, v), reference.attention(q, k, v, mask=seen), 0)
    out, lse = reference.attention(q, k, v, mask=~seen, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()


# Attention: derivatives


FEATURES = everything(1, 2, 4, 4) | {"q_pos": None, "k_pos": None}


def finite_results(q, k, v, bias, slopes, sinks):
    """Out, and the LSE of the rows that see something: finite differences cannot take -inf."""
    features = FEATURES | {"bias": bias, "alibi_slopes": slopes, "sinks": sinks}
    out, lse = reference.attention(q, k, v, **features, return_lse=True)
    return out, lse[..., 1:]


def leaves():
    q, k, v = qkv(1, 2, 1, 4, 4, 2, 2, grad=True)
    return q, k, v, rand(1, 1, 4, 4, grad=True), rand(2, grad=True), rand(2, grad=True)


def test_first_derivatives():
    assert gradcheck(
        finite_results,
        leaves(),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


def test_second_derivatives():
    q, k, v, bias, slopes, sinks = leaves()
    assert gradgradcheck(
        lambda q, k, bias: finite_results(q, k, v, bias, slopes, sinks), (q, k, bias), check_fwd_over_rev=True
    )
    assert gradgradcheck(
        lambda v, slopes, sinks: finite_results(q, k, v, bias, slopes, sinks), (v, slopes, sinks)
    )


def test_func_transforms_agree_with_loops():
    q, k, v = qkv()
    mask = random_mask(2, 1, 5, 7)

    def loss(q, k, v, mask):
        return reference.attention(q[None], k[None], v[None], mask=mask).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(q, k, v, mask)
    for b in range(2):
        for whole, one in zip(
            grads, torch.func.grad(loss, (0, 1, 2))(q[b], k[b], v[b], mask[b]), strict=True
        ):
            close(whole[b], one)
    tangents = tuple(rand(*t.shape, seed=7) for t in (q, k, v))
    _, tangent = torch.func.jvp(
        lambda *t: reference.attention(*t, mask=mask).square().sum(), (q, k, v), tangents
    )
    close(tangent, sum((g * t).sum() for g, t in zip(grads, tangents, strict=True)))


def test_compiles_whole():
    q, k, v = qkv(grad=True)
    mask = random_mask(5, 7)

    def run(q, k, v):
        return reference.attention(q, k, v, mask=mask, softcap=2.0, dropout_p=0.2, dropout_seed=5)

    ours, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), run(q, k, v)
    close(ours, expected)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), (q, k, v)),
        torch.autograd.grad(expected.sum(), (q, k, v)),
        strict=True,
    ):
        close(a, b)


# Attention: rows that see nothing, and what is hidden


@pytest.mark.parametrize("how", ["bool mask", "-inf bias", "both", "no keys"])
def test_a_row_that_sees_nothing_is_zero_with_zero_gradients(how):
    q, k, v = qkv(Sk=0 if how == "no keys" else 7, grad=True)
    hidden = torch.zeros(2, 1, 5, k.shape[2], dtype=torch.bool)
    hidden[:, :, 1:3] = True
    first = hidden & (torch.arange(k.shape[2]) < 3)
    mask, bias = None, torch.zeros(hidden.shape, dtype=F64)
    if how == "bool mask":
        mask = ~hidden
    elif how == "-inf bias":
        bias = bias.masked_fill(hidden, -math.inf)
    else:
        mask, bias = ~first, bias.masked_fill(hidden & ~first, -math.inf)
    bias.requires_grad_()
    sinks = rand(4, grad=True)
    out, lse = reference.attention(q, k, v, mask=mask, bias=bias, sinks=sinks, return_lse=True)
    rows = slice(None) if how == "no keys" else slice(1, 3)
    assert (out[:, :, rows] == 0).all() and (lse[:, :, rows] == -math.inf).all()
    grads = torch.autograd.grad(
        [out[:, :, rows], lse[:, :, rows]],
        (q, k, v, bias, sinks),
        [rand(*out[:, :, rows].shape), rand(*lse[:, :, rows].shape)],
    )
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "bias", "dout"])
def test_poison_stays_with_those_who_see_it(where, poison):
    """Two packed documents, the poison in the second one: the first must not notice it in any way."""
    document = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    mask = document[:, None] == document
    mask[6] = False  # a padding query besides: it sees nothing, and is poisoned too
    clean = {n: t.requires_grad_() for n, t in zip("qkv", qkv(Sq=7), strict=True)}
    clean |= {"bias": rand(2, 1, 7, 7, grad=True), "dout": rand(2, 4, 7, 3)}
    dirty = {n: t.detach().clone() for n, t in clean.items()}
    if where == "bias":
        dirty["bias"][:, :, :3, 3:] = poison
        dirty["bias"][:, :, 6] = poison
    else:
        dirty[where][:, :, 4] = poison
        dirty[where][:, :, 6] = poison
    results = []
    for inputs in (clean, dirty):
        leaf = [inputs[n].requires_grad_() for n in ("q", "k", "v", "bias")]
        out, lse = reference.attention(*leaf[:3], mask=mask, bias=leaf[3], return_lse=True)
        grads = torch.autograd.grad(out, leaf, inputs["dout"], create_graph=True)
        second = torch.autograd.grad([g[:, :, :3].sin().sum() for g in grads], leaf[:3])
        results.append([t[:, :, :3] for t in (out, lse, *grads[:3], *second)] + [grads[3][:, :, :3, :3]])
        assert (out[:, :, 6] == 0).all() and (grads[0][:, :, 6] == 0).all() and (grads[3][:, :, 6] == 0).all()
    assert all(t.isfinite().all() for t in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_visible_infinity_or_nan_is_not_hidden(poison):
    q, k, v = qkv()
    v[0, 0, 3, 1] = poison
    out = reference.attention(q, k, v, mask=torch.arange(7) <= torch.arange(5)[:, None])
    expected = torch.zeros(2, 4, 5, 3, dtype=F64)
    expected[0, :2, 3:, 1] = poison
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())
    assert (out[0, :2, 3:, 1].sign() == expected[0, :2, 3:, 1].sign()).all() or math.isnan(poison)
    k[0, 0, 3, 1] = math.nan
    out = reference.attention(q, k, v, mask=torch.arange(7) <= torch.arange(5)[:, None])
    assert out[0, :2, 3:].isnan().all() and out[0, :2, :3].isfinite().all()


def test_the_lowest_finite_bias_does_not_hide():
    q, k, v = qkv(dtype=torch.float32)
    bias = torch.full((5, 7), torch.finfo(torch.float32).min)
    close(
        reference.attention(q, k, v, bias=bias),
        v.mean(2, True).repeat_interleave(2, 1).expand(2, 4, 5, 3),
        1e-6,
    )


# Attention: dtypes, sizes, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(dtype):
    q, k, v = qkv(dtype=dtype)
    half = reference.attention(q, k, v, return_lse=True, return_weights=True)
    full = reference.attention(q.float(), k.float(), v.float(), return_lse=True, return_weights=True)
    assert [t.dtype for t in half] == [dtype, torch.float32, dtype]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(half, full, strict=True))
    with torch.autocast("cpu", dtype):
        assert torch.equal(reference.attention(q.float(), k.float(), v.float()), full[0])


@pytest.mark.parametrize("zero", ["B", "Hq", "Sq", "Sk", "D", "Dv"])
def test_sizes_of_zero(zero):
    sizes = {"B": 2, "Hq": 4, "Hkv": 2, "Sq": 5, "Sk": 7, "D": 6, "Dv": 3} | {zero: 0}
    if zero == "Hq":
        sizes["Hkv"] = 0
    q, k, v = qkv(**sizes, grad=True)
    out, lse = reference.attention(q, k, v, dropout_p=0.1, dropout_seed=0, return_lse=True)
    assert out.shape == (sizes["B"], sizes["Hq"], sizes["Sq"], sizes["Dv"]) and lse.shape == out.shape[:3]
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    if zero == "D":
        close(reference.attention(q, k, v), v.mean(2, True).repeat_interleave(2, 1).expand(2, 4, 5, 3))


def test_errors_name_the_argument():
    q, k, v = qkv(Hkv=3)
    with pytest.raises(ValueError, match="k has 3 heads.* 4 heads of q"):
        reference.attention(q, k, v)
    q, k, v = qkv()
    with pytest.raises(ValueError, match="dropout_seed"):
        reference.attention(q, k, v, dropout_p=0.5)
    with pytest.raises(ValueError, match="attn_mask.*is_causal"):
        reference.scaled_dot_product_attention(
            q, k, v, torch.ones(5, 7, dtype=torch.bool), is_causal=True, enable_gqa=True
        )
    with pytest.raises(ValueError, match="causal.*dim is 0"):
        reference.softmax(rand(3, 3), 0, causal=True)
    with pytest.raises(ValueError, match=r"normalized_shape is \(4,\).*\(3, 3\)"):
        reference.layer_norm(rand(3, 3), 4)


# Dropout


@pytest.mark.parametrize(
    "key, counter, words",
    [
        ("00000000 00000000", "00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff", "ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("a4093822 299f31d0", "243f6a88 85a308d3 13198a2e 03707344", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(key, counter, words):
    """The vectors published with Random123."""
    low, high = (int(w, 16) for w in key.split())
    seed = high << 32 | low
    counter = [torch.tensor(int(w, 16)) for w in counter.split()]
    expected = [int(w, 16) for w in words.split()]
    signed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    assert [int(w) for w in reference.philox(seed, *counter)] == expected
    assert [int(w) for w in reference.philox(signed, *counter)] == expected


def test_dropout_depends_on_seed_and_place_only():
    q_pos, k_pos = torch.arange(64), torch.arange(64)
    keep = reference.dropout_keep(7, 3, 4, q_pos, k_pos, 0.25)
    assert abs(keep.double().mean().item() - 0.75) < 0.01
    assert torch.equal(
        keep[:2, :3, 5:9, 10:31], reference.dropout_keep(7, 2, 3, q_pos[5:9], k_pos[10:31], 0.25)
    )
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep[..., order], reference.dropout_keep(7, 3, 4, q_pos, k_pos[order], 0.25))
    assert torch.equal(
        keep, reference.dropout_keep(torch.tensor([7]), 3, 4, q_pos, k_pos.expand(3, 1, 64), 0.25)
    )
    for other in (reference.dropout_keep(s, 3, 4, q_pos, k_pos, 0.25) for s in (8, 7 + 2**32, -7)):
        assert 0.3 < (other != keep).double().mean() < 0.45  # 2 * 0.25 * 0.75
    assert reference.dropout_keep(7, 1, 1, q_pos, k_pos, 0.0).all()
    assert not reference.dropout_keep(7, 1, 1, q_pos, k_pos, 1 - 2**-53).any()


def test_sdpa_dropout_follows_torchs_generator():
    q, k, v = qkv(Hkv=4)
    torch.manual_seed(3)
    first, second = (reference.scaled_dot_product_attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, reference.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert not torch.equal(first, second)


# Merging


def test_merge_joins_parts_in_any_order():
    q, k, v = qkv(Sk=9, grad=True)
    mask = random_mask(2, 4, 5, 9)
    mask[:, :, 2, :6] = False  # nothing in the first two parts
    mask[:, :, 3, 3:] = False  # nothing in the last two
    whole = reference.attention(q, k, v, mask=mask, return_lse=True)
    parts = [
        reference.attention(q, k[:, :, c], v[:, :, c], mask=mask[..., c], return_lse=True)
        for c in (slice(0, 3), slice(3, 6), slice(6, 9))
    ]
    expected = torch.autograd.grad(whole[0].square().sum(), (q, k, v))
    for a, b, c in itertools.permutations(parts):
        merged = reference.merge(*reference.merge(*a, *b), *c)
        close(merged, whole)
        grads = torch.autograd.grad(merged[0].square().sum(), (q, k, v), retain_graph=True)
        for ours, theirs in zip(grads, expected, strict=True):
            close(ours, theirs)


def test_merge_survives_extremes():
    out = rand(2, 4, dtype=torch.bfloat16)
    lse = torch.tensor([1e4, -1e4])
    merged, total = reference.merge(out, lse, -out, -lse)
    assert merged.dtype == torch.float32
    close(merged, torch.stack([out[0], -out[1]]).float(), 0)
    close(total, lse.abs(), 0)


# Softmax


def test_softmax_is_torchs():
    x = rand(3, 4, 5, grad=True)
    for dim in (0, 1, -1):
        close(reference.softmax(x, dim), x.softmax(dim))
    assert gradcheck(lambda x: reference.softmax(x, 1), (x,), check_forward_ad=True)
    assert gradgradcheck(reference.softmax, (x,))
    half = rand(3, 4, dtype=torch.bfloat16)
    assert reference.softmax(half).dtype == torch.bfloat16
    close(reference.softmax(half, dtype=torch.float32), half.softmax(-1, dtype=torch.float32), 1e-6)
    close(reference.softmax(rand(6, 6) * 1e3 - 1e7), (rand(6, 6) * 1e3 - 1e7).softmax(-1))
    assert reference.softmax(torch.empty(2, 0)).shape == (2, 0)
    assert reference.softmax(torch.tensor(3.0)) == 1


def test_softmax_with_mask_bias_scale_and_causal():
    x, bias, mask = rand(2, 5, 5, grad=True), rand(5, 5, grad=True), random_mask(5, 5)
    ours = reference.softmax(x, mask=mask, bias=bias, scale=0.5, causal=True)
    seen = mask.tril()
    theirs = (0.5 * x + bias).masked_fill(~seen, -math.inf).softmax(-1)
    some = seen.any(-1)
    close(ours[:, some], theirs[:, some])
    assert (ours[:, ~some] == 0).all() and (~some).any()
    x_poisoned = torch.where(seen, x, math.nan).detach().requires_grad_()
    grads = torch.autograd.grad(
        reference.softmax(x_poisoned, mask=mask, bias=bias, scale=0.5, causal=True),
        (x_poisoned, bias),
        rand(2, 5, 5),
    )
    expected = torch.autograd.grad(ours, (x, bias), rand(2, 5, 5))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert (grads[0][:, ~some] == 0).all()


def test_softmax_of_nothing_and_of_minus_infinity():
    nothing = torch.full((2, 3), -math.inf)
    assert reference.softmax(nothing).isnan().all()  # as torch
    assert (reference.softmax(torch.zeros(2, 3), bias=nothing) == 0).all()
    assert (reference.softmax(nothing, mask=torch.zeros(3, dtype=torch.bool)) == 0).all()


# Norms


@pytest.mark.parametrize("shape", [(5,), (4, 5)])
def test_norms_are_torchs(shape):
    x, weight, bias = (
        rand(3, 4, 5, grad=True),
        rand(*shape, grad=True, seed=1),
        rand(*shape, grad=True, seed=2),
    )
    close(reference.layer_norm(x, shape, weight, bias, 1e-3), F.layer_norm(x, shape, weight, bias, 1e-3))
    close(reference.layer_norm(x, shape), F.layer_norm(x, shape))
    close(reference.rms_norm(x, shape, weight, 1e-3), F.rms_norm(x, shape, weight, 1e-3))
    close(reference.rms_norm(x, shape, weight, weight_offset=1.0), F.rms_norm(x, shape, weight + 1))
    close(
        reference.layer_norm(x, shape, weight, bias, weight_offset=1.0),
        F.layer_norm(x, shape, weight + 1, bias),
    )
    for norm, inputs in ((reference.layer_norm, (x, weight, bias)), (reference.rms_norm, (x, weight))):
        assert gradcheck(lambda x, *rest, norm=norm: norm(x, shape, *rest), inputs, check_forward_ad=True)
        assert gradgradcheck(lambda x, *rest, norm=norm: norm(x, shape, *rest), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_norm_eps_none_is_torchs(dtype):
    x = rand(3, 8).mul(1e-4).to(dtype)
    close(reference.rms_norm(x, 8).float(), F.rms_norm(x, (8,)).float(), torch.finfo(dtype).eps)


def test_norms_keep_xs_dtype_beside_float32_weights():
    x, weight, bias = (
        rand(3, 8, dtype=torch.bfloat16),
        rand(8, dtype=torch.float32),
        rand(8, dtype=torch.float32, seed=1),
    )
    expected = F.layer_norm(x.float(), (8,), weight, bias).bfloat16()
    assert error_rule(
        reference.layer_norm(x, 8, weight, bias),
        F.layer_norm(x.double(), (8,), weight.double(), bias.double()),
        expected,
    )
    assert reference.rms_norm(x, 8, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_a_large_mean_does_not_cancel(mean):
    x = (rand(8, 1001) + mean).float()
    close(reference.layer_norm(x, 1001).double(), F.layer_norm(x.double(), (1001,)), 1e-5)


@pytest.mark.parametrize("size", [1e30, 3e38, 1e-30])
def test_extreme_values_stay_finite(size):
    x = (rand(4, 8).clamp(-1, 1) * size).float().requires_grad_()
    for ours, theirs in ((reference.layer_norm, F.layer_norm), (reference.rms_norm, F.rms_norm)):
        y, exact = ours(x, 8, eps=1e-5), theirs(x.double(), (8,), eps=1e-5)
        close(y.double() / exact.abs().max(), exact / exact.abs().max(), 1e-6)
        assert torch.autograd.grad(y.square().sum(), x)[0].isfinite().all()
    constant = torch.full((2, 8), size, requires_grad=True)
    y = reference.layer_norm(constant, 8)
    assert (y == 0).all() and torch.autograd.grad(y.sum(), constant)[0].isfinite().all()


def test_layer_norm_of_width_one_is_bias():
    x, weight, bias = rand(7, 1, grad=True), rand(1, grad=True), rand(1, grad=True)
    y = reference.layer_norm(x, 1, weight, bias)
    assert torch.equal(y, bias.expand(7, 1))
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert (dx == 0).all() and dweight == 0 and dbias == 7


def test_norms_of_nothing():
    weight = torch.ones(8, requires_grad=True)
    y = reference.layer_norm(torch.empty(0, 8), 8, weight)
    assert y.shape == (0, 8) and (torch.autograd.grad(y.sum(), weight)[0] == 0).all()
    assert (
        reference.layer_norm(torch.empty(3, 0), 0).shape
        == reference.rms_norm(torch.empty(3, 0), 0).shape
        == (3, 0)
    )


@pytest.mark.parametrize(
    "x_dtype, residual_dtype", [(torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (F64, F64)]
)
def test_add_and_norm_is_add_then_norm(x_dtype, residual_dtype):
    x, residual, weight, bias = (
        rand(3, 8, dtype=x_dtype),
        rand(3, 8, dtype=residual_dtype, seed=1),
        rand(8, seed=2),
        rand(8, seed=3),
    )
    y, total = reference.add_layer_norm(x, residual, 8, weight, bias, 1e-3, weight_offset=1.0)
    assert torch.equal(total, x + residual) and total.dtype == residual_dtype
    assert torch.equal(y, reference.layer_norm(total, 8, weight, bias, 1e-3, weight_offset=1.0).to(x_dtype))
    y, total = reference.add_rms_norm(x, residual, 8, weight)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, reference.rms_norm(total, 8, weight).to(x_dtype))

"""The attention backward: gradients under the error rule, masks to the key, and the same bits whoever runs it."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import masks, reference
from fastattn.ops import _FWD
from fastattn.tools.equivalence import error_rule

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# B, Hq, Hkv, Sq, Sk, D, Dv: ones, primes, one either side of a granule, odd heads, groups with Dv != D.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 1, 1, 63, 64, 64, 64),
    (1, 4, 2, 64, 65, 32, 32),
    (1, 6, 3, 65, 63, 64, 96),
    (1, 2, 1, 127, 131, 40, 72),
    (1, 1, 1, 17, 193, 104, 104),
    (1, 3, 1, 129, 33, 111, 7),
    (1, 2, 2, 31, 97, 128, 128),
    (2, 4, 1, 5, 130, 16, 8),
]

route = torch.ops.fastattn._attention_bwd_route


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def inputs(B, Hq, Hkv, Sq, Sk, D, Dv, dtype=torch.float32):
    """q, k, v and the gradient of out."""
    shapes = (B, Hq, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, Dv), (B, Hq, Sq, Dv)
    return tuple(randn(*shape, dtype=dtype) for shape in shapes)


def gradients(attend, leaves, dout, dlse=None, dtype=None):
    """The gradients of out and LSE by those of `leaves` (arguments by name) that are floating, masks apart."""

    def leaf(name, t):
        if name == "mask" or not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        return t.detach().to(dtype or t.dtype).requires_grad_()

    given = {name: leaf(name, t) for name, t in leaves.items()}
    q, k, v = (given.pop(name) for name in "qkv")
    results = attend(q, k, v, **given, return_lse=dlse is not None)
    out, lse = results if dlse is not None else (results, None)
    loss = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        loss = loss + (torch.where(lse == -math.inf, 0.0, lse) * dlse.to(lse.dtype)).sum()
    given = {"q": q, "k": k, "v": v} | given
    wanted = {n: t for n, t in given.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(loss, wanted.values()), strict=True))


def eager(q, k, v, mask=None, bias=None, alibi_slopes=None, softcap=None, sinks=None, scale=None, **rest):
    """What a model without a kernel computes, each step in q's dtype: how much that loses is the yardstick."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.to(s.dtype)
    if alibi_slopes is not None:
        i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
        s = s - alibi_slopes.to(s.dtype)[..., None, None] * (i[:, None] - j).abs()
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf)
    lse = s.logsumexp(-1)
    seen = (lse != -math.inf).unsqueeze(-1)
    p = torch.where(seen, s, 0.0).softmax(-1).to(s.dtype) * seen
    if rest.get("dropout_p"):
        i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
        keep = reference.dropout_keep(rest["dropout_seed"], *q.shape[:2], i, j, rest["dropout_p"])
        p = torch.where(keep, p / (1 - rest["dropout_p"]), 0.0)
    if sinks is not None:
        p = p * torch.sigmoid(torch.where(seen, lse.unsqueeze(-1), 0.0) - sinks.to(s.dtype)[:, None, None])
    return (p @ v, lse) if rest.get("return_lse") else p @ v


def check(leaves, dout, dlse=None, sums=(), attend=fastattn.attention):
    """Ours against float64 under the error rule, beside eager math in the same dtype.

    A gradient named in `sums` adds up, for each row, terms that cancel but for the rounding of out: its errors
    are measured by those terms.
    """
    ours = gradients(attend, leaves, dout, dlse)
    exact = gradients(reference.attention, leaves, dout, dlse, dtype=torch.float64)
    theirs = gradients(eager, leaves, dout, dlse)
    terms = (reference.attention(**leaves).abs() * dout.abs()).float().sum(-1).norm().item()
    distance = max(dout.shape[2], leaves["k"].shape[2])
    for name, gradient in ours.items():
        assert gradient.dtype == leaves[name].dtype and gradient.shape == leaves[name].shape
        magnitude = terms * (distance if name == "alibi_slopes" else 1) if name in sums else None
        # A float32 bias of half-precision scores has no better a gradient than they have.
        dtype = dout.dtype
        verdict = error_rule(gradient.to(dtype), exact[name], theirs[name].to(dtype), magnitude=magnitude)
        assert verdict, f"d{name}: {verdict.reason}"
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_rule(isa, dtype, shape):
    q, k, v, dout = inputs(*shape, dtype)
    check({"q": q, "k": k, "v": v}, dout)


FEATURES = {
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "alibi of a batch": {"alibi_slopes": torch.rand(2, 4)},
    "sinks": {"sinks": torch.tensor([0.0, 3.0, -2.0, 1.0])},
    "scale 0": {"scale": 0.0},
    "scale negative": {"scale": -0.3},
    "scale odd": {"scale": 0.7131},
    "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor(-7)},
    "everything": {
        "softcap": 4.0,
        "alibi_slopes": torch.tensor([0.1, 0.2, 0.05, 0.0]),
        "sinks": torch.tensor([-1.0, 0.5, 2.0, -math.inf]),
        "scale": -0.2,
        "dropout_p": 0.2,
        "dropout_seed": torch.tensor(2**40 + 3),
    },
}


def check_features(dtype, features):
    q, k, v, dout = inputs(2, 4, 2, 66, 70, 24, 40, dtype)
    leaves = {"q": q, "k": k, "v": v} | FEATURES[features]
    leaves["bias"] = randn(2, 1, 66, 70)
    leaves["mask"] = torch.rand(66, 70) < 0.7
    leaves["mask"][11] = False
    check(leaves, dout, randn(2, 4, 66), sums=("alibi_slopes", "sinks"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", FEATURES)
def test_features(dtype, features):
    check_features(dtype, features)


@pytest.mark.parametrize("dtype", DTYPES)
def test_features_of_each_instruction_set(isa, dtype):
    check_features(dtype, "everything")


# Bias: every way to broadcast, in q's dtype and in float32, with entries that hide.

BIASES = [
    (1, 4, 70, 93),
    (2, 4, 70, 93),
    (1, 1, 70, 93),
    (2, 1, 70, 93),
    (70, 93),
    (1, 4, 1, 93),
    (2, 1, 1, 93),
    (1, 1, 1, 93),
    (2, 4, 70, 1),
    (1, 1, 70, 1),
    (1, 4, 1, 1),
]


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_bias_gradient(shape, bias_dtype):
    q, k, v, dout = inputs(2, 4, 2, 70, 93, 16, 16, torch.bfloat16)
    bias = randn(*shape, dtype=bias_dtype)
    if shape[-1] > 1:
        bias[..., 7::11] = -math.inf
    leaves = {"q": q, "k": k, "v": v, "bias": bias}
    check(leaves | {"mask": torch.rand(70, 93) < 0.8}, dout, sums=("bias",))

    def learned_mask(q, k, v, bias, **rest):
        return fastattn.attention(q, k, v, mask=bias, **rest)

    check(leaves, dout, sums=("bias",), attend=learned_mask)


@pytest.mark.parametrize("shape", [(1, 2, 130, 70), (3, 2, 130, 70), (1, 2, 1, 70), (3, 1, 130, 70)], ids=str)
def test_bias_gradient_routes_agree_to_the_bit(shape, threads):
    q, k, v, dout = inputs(3, 2, 2, 130, 70, 16, 16)
    leaves = {"q": q, "k": k, "v": v, "bias": randn(*shape)}
    results, routes = [], set()
    for count in (1, 2, 7):
        threads(count)
        results.append(gradients(fastattn.attention, leaves, dout))
        routes.add(route())
    threads(2)
    alone = {"q": q, "k": k, "v": v, "bias": leaves["bias"]}
    bias = alone["bias"].clone().requires_grad_()
    out = fastattn.attention(q, k, v, bias=bias)
    results.append({**results[0], "bias": torch.autograd.grad(out, bias, dout)[0]})
    for other in results[1:]:
        assert all(torch.equal(results[0][n], other[n]) for n in other)
    assert ("heads with bias" in routes) == (shape[1] == 2 and shape[2] > 1)


# Masks: each as ranges or bits, in both passes.

S = 150


def dense(Sq, Sk):
    mask = torch.rand(Sq, Sk) < 0.5
    mask[: Sq // 2, 64:128] = False
    mask[64:128, :64] = True
    mask[3] = False
    mask[:, 5] = False
    return mask


def grid(Sq=S, Sk=S):
    return torch.arange(Sq)[:, None], torch.arange(Sk)[None]


MASKS = {
    "causal": (lambda: masks.Causal(), lambda i, j: j <= i),
    "window": (lambda: masks.SlidingWindow(20, 0) & masks.Causal(), lambda i, j: (j <= i) & (j >= i - 20)),
    "lengths": (lambda: masks.KeyPadding(torch.tensor([77, 0])), None),
    "documents": (lambda: masks.Documents(ids=torch.arange(S) // 60), lambda i, j: i // 60 == j // 60),
    "strided": (lambda: (torch.arange(S) % 7 == 0)[None, :] | (grid()[0] == grid()[1]), None),
    "dense": (lambda: dense(S, S), None),
    "dense of heads": (lambda: torch.stack([dense(S, S) for _ in range(4)]), None),
    "additive": (lambda: torch.where(dense(S, S), 0.0, -math.inf), None),
}


def both_forms(name):
    """The mask as it is given, and as a boolean tensor."""
    make, rule = MASKS[name]
    given = make()
    if rule is not None:
        return given, rule(*grid())
    if isinstance(given, torch.Tensor):
        return given, given if given.dtype == torch.bool else given == 0
    lengths = torch.tensor([77, 0])
    return given, (torch.arange(S) < lengths[:, None])[:, None, None, :].expand(2, 1, S, S)


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, count, threads):
    threads(count)
    torch.manual_seed(1)
    given, visible = both_forms(name)
    q, k, v, dout = inputs(2, 4, 2, S, S, 32, 32)
    exact = gradients(
        reference.attention, {"q": q, "k": k, "v": v, "mask": visible}, dout, dtype=torch.float64
    )
    by_given = gradients(fastattn.attention, {"q": q, "k": k, "v": v, "mask": given}, dout)
    by_tensor = gradients(fastattn.attention, {"q": q, "k": k, "v": v, "mask": visible}, dout)
    for n, gradient in exact.items():
        assert error_rule(by_given[n], gradient)
        assert torch.equal(by_given[n], by_tensor[n])
    assert route() == ("heads" if count == 1 else "queries and keys")
    empty = ~visible.expand(2, 4, S, S).any(-1)
    unseen = ~visible.expand(2, 4, S, S).any(-2).unflatten(1, (2, 2)).any(2)
    assert (by_given["q"][empty] == 0).all()
    assert (by_given["k"][unseen] == 0).all() and (by_given["v"][unseen] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("name", MASKS)
def test_masks_to_the_key(name, count, dtype, threads):
    """With q = 0 every visible key weighs 1/n, so dV adds up one number for each row that sees the key."""
    threads(count)
    torch.manual_seed(1)
    given, visible = both_forms(name)
    visible = visible.expand(2, 2, S, S) if visible.dim() != 3 else visible[::2].expand(2, 2, S, S)
    if name == "dense of heads":
        given = given[::2]
    n = visible.sum(-1, keepdim=True)
    code = (1 + torch.arange(S)[:, None] >> torch.arange(8) & 1).to(dtype)
    # Sums of 0 and 1, at most 24 of them in one column: exact however they are rounded to bfloat16 before.
    code = code.repeat(1, 8) * (torch.arange(S)[:, None] // 24 == torch.arange(64) // 8)
    q, k, v, _ = inputs(2, 2, 2, S, S, 8, 64, dtype)
    prepared = masks.prepare(given, q, k)
    v.requires_grad_()
    out = fastattn.attention(torch.zeros_like(q), k, v, mask=prepared)
    (dv,) = torch.autograd.grad(out, v, (code * n).to(dtype))
    torch.testing.assert_close(dv.float().round(), visible.float().mT @ code.float(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_lowest_finite_bias(dtype):
    """Nothing else is visible to them, so their weights are equal; an LSE of fp32 cannot say of how many."""
    q, k, v, dout = inputs(1, 2, 1, 70, 130, 16, 16, dtype)
    bias = torch.where(torch.rand(70, 130) < 0.5, 0.0, torch.finfo(torch.float32).min)
    bias[:9] = torch.finfo(torch.float32).min
    bias[3, 50:] = -math.inf
    leaves = {"q": q, "k": k, "v": v, "bias": bias}
    ours = gradients(fastattn.attention, leaves, dout)
    exact = gradients(reference.attention, leaves, dout, dtype=torch.float64)
    for name in "qkv":
        verdict = error_rule(ours[name], exact[name])
        assert verdict, verdict.reason


# The call's surface: layouts of dout, sizes of 0, each input alone, chunks of many.


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_dout(dtype):
    q, k, v, dout = inputs(2, 4, 2, 33, 65, 16, 24, dtype)
    want = gradients(fastattn.attention, {"q": q, "k": k, "v": v}, dout)
    layouts = {
        "heads last": dout.transpose(1, 2).contiguous().transpose(1, 2),
        "columns last but one": dout.mT.contiguous().mT,
        "every other column": dout.repeat_interleave(2, -1)[..., ::2],
        "offset": F.pad(dout, (1, 3))[..., 1:-3],
        "rows backwards": dout.flip(2).flip(2),
    }
    for layout in layouts.values():
        before = layout.clone()
        got = gradients(fastattn.attention, {"q": q, "k": k, "v": v}, layout)
        assert all(torch.equal(want[n], got[n]) for n in want)
        assert torch.equal(layout, before)
    expanded = torch.ones((), dtype=dtype).expand_as(dout)
    want = gradients(fastattn.attention, {"q": q, "k": k, "v": v}, expanded.contiguous())
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    got = torch.autograd.grad(fastattn.attention(q, k, v).sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(want.values(), got, strict=True))


@pytest.mark.parametrize("order", ["heads last", "fused qkv", "offset of one"])
def test_layouts_of_inputs(order):
    packed = torch.randn(2, 33, 3, 4, 16)
    if order == "fused qkv":
        leaves = [packed[:, :, i].transpose(1, 2) for i in range(3)]
    elif order == "heads last":
        leaves = [packed[:, :, i].contiguous().transpose(1, 2) for i in range(3)]
    else:
        leaves = [torch.randn(2 * 4 * 33 * 16 + 1)[1:].view(2, 4, 33, 16) for _ in range(3)]
    dout = torch.randn(2, 4, 33, 16)
    views = [t.detach().requires_grad_() for t in leaves]
    plain = [t.detach().contiguous().requires_grad_() for t in leaves]
    got = torch.autograd.grad(fastattn.attention(*views), views, dout)
    want = torch.autograd.grad(fastattn.attention(*plain), plain, dout)
    for a, b, t in zip(got, want, leaves, strict=True):
        assert torch.equal(a, b)
        assert (a.stride(1) < a.stride(2)) == (t.stride(1) < t.stride(2))


@pytest.mark.parametrize(
    "shape",
    [
        (0, 2, 2, 5, 5, 8, 8),
        (2, 0, 0, 5, 5, 8, 8),
        (2, 2, 2, 0, 5, 8, 8),
        (2, 2, 1, 5, 0, 8, 8),
        (2, 2, 2, 5, 5, 0, 8),
        (2, 2, 2, 5, 5, 8, 0),
    ],
)
def test_zero_sizes(shape):
    q, k, v, dout = inputs(*shape)
    got = gradients(fastattn.attention, {"q": q, "k": k, "v": v}, dout)
    exact = gradients(reference.attention, {"q": q, "k": k, "v": v}, dout, dtype=torch.float64)
    for n in exact:
        torch.testing.assert_close(got[n].double(), exact[n], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 7])
def test_each_input_alone(count, threads):
    threads(count)
    q, k, v, dout = inputs(1, 4, 2, 70, 65, 16, 24, torch.bfloat16)
    rest = {"bias": randn(4, 70, 65), "alibi_slopes": torch.rand(4), "sinks": randn(4)}
    want = gradients(fastattn.attention, {"q": q, "k": k, "v": v} | rest, dout)
    for name in want:
        given = {"q": q, "k": k, "v": v} | rest
        given[name] = given[name].clone().requires_grad_()
        (got,) = torch.autograd.grad(fastattn.attention(**given), given[name], dout)
        assert torch.equal(got, want[name]), name


def backward_op(dout, q, k, v, out, lse, dlse=None, needs=(1, 1, 1, 0, 0, 0), grads_fp32=False, **changes):
    given = dict.fromkeys(_FWD[3:23]) | {"scale": q.shape[-1] ** -0.5, "softcap": 0.0, "dropout_p": 0.0}
    given |= changes
    arguments = [given[n] for n in _FWD[3:10]] + [None, None] + [given[n] for n in _FWD[10:23]]
    return torch.ops.fastattn.attention_bwd(
        dout, dlse, q, k, v, out, lse, *arguments, [bool(n) for n in needs], grads_fp32
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_many(dtype):
    """Each chunk of keys, given the out and LSE of all, adds its share."""
    q, k, v, dout = inputs(2, 4, 2, 70, 150, 16, 24, dtype)
    exact = gradients(reference.attention, {"q": q, "k": k, "v": v}, dout, dtype=torch.float64)
    out, lse = reference.attention(q.float(), k.float(), v.float(), return_lse=True)
    parts = []
    for first, last in ((0, 64), (64, 83), (83, 150)):
        chunk = k[:, :, first:last], v[:, :, first:last]
        parts.append(backward_op(dout.float(), q, *chunk, out, lse, grads_fp32=True)[:3])
    dq, dk, dv = zip(*parts, strict=True)
    for got, name in ((sum(dq), "q"), (torch.cat(dk, 2), "k"), (torch.cat(dv, 2), "v")):
        assert got.dtype == torch.float32
        verdict = error_rule(got.to(dtype), exact[name])
        assert verdict, verdict.reason


def check_lse_alone(attend=fastattn.attention, dtype=torch.float32):
    q, k, v, _ = inputs(1, 2, 2, 33, 65, 40, 40, dtype)
    dlse = torch.randn(1, 2, 33)
    for sinks in (None, torch.tensor([60.0, -3.0]), torch.tensor([200.0, -3.0])):
        q.requires_grad_(), k.requires_grad_()
        _, lse = attend(q, k, v, sinks=sinks, return_lse=True)
        got = torch.autograd.grad(lse, (q, k), dlse)
        wide = [t.detach().double().requires_grad_() for t in (q, k)]
        _, lse = reference.attention(*wide, v.double(), return_lse=True)
        for a, b in zip(got, torch.autograd.grad(lse, wide, dlse.double()), strict=True):
            assert error_rule(a, b)


def test_differentiable_lse_alone():
    check_lse_alone()


def test_opcheck():
    q, k, v, dout = inputs(2, 4, 2, 9, 11, 16, 8)
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    for needs in ((1, 1, 1, 0, 0, 0), (0, 1, 0, 0, 0, 0), (1, 1, 1, 1, 1, 1)):
        changes = {"bias": randn(1, 4, 1, 11), "alibi_slopes": torch.rand(1, 4), "sinks": randn(4)}
        given = dict.fromkeys(_FWD[3:23]) | {"scale": 0.3, "softcap": 0.0, "dropout_p": 0.0} | changes
        arguments = [given[n] for n in _FWD[3:10]] + [None, None] + [given[n] for n in _FWD[10:23]]
        for order in (q, q.transpose(1, 2).contiguous().transpose(1, 2)):
            everything = (dout, None, order, k, v, out, lse, *arguments, [bool(n) for n in needs], False)
            torch.library.opcheck(torch.ops.fastattn.attention_bwd.default, everything)


# Bits.


def all_gradients(shape, dtype, mask=None, dropout=0.0):
    q, k, v, dout = inputs(*shape, dtype)
    bias = randn(1, shape[1], 1, shape[4])
    leaves = {"q": q, "k": k, "v": v, "bias": bias, "sinks": torch.randn(shape[1]), "mask": mask}
    leaves |= {"dropout_p": dropout, "dropout_seed": torch.tensor(5)} if dropout else {}
    return lambda: gradients(fastattn.attention, leaves, dout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fifty_repeats_give_the_same_bits(dtype, threads):
    threads(3)
    run = all_gradients((2, 4, 2, 70, 130, 16, 16), dtype, torch.rand(70, 130) < 0.6, 0.1)
    want = run()
    for _ in range(50):
        got = run()
        assert all(torch.equal(want[n], got[n]) for n in want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 4, 2, 130, 200, 32, 16), (1, 2, 1, 200, 131, 16, 16)], ids=str)
@pytest.mark.parametrize("form", ["ranges", "bits", "none"])
def test_threads_and_order_do_not_change_bits(dtype, shape, form, threads, task_order):
    mask = {"ranges": masks.CausalLowerRight(), "bits": torch.rand(*shape[3:5]) < 0.6, "none": None}[form]
    run = all_gradients(shape, dtype, mask, 0.1 if form == "ranges" else 0.0)
    threads(1)
    want = run()
    routes = {route()}
    for count in (1, 2, 3, 5, 7):
        for seed in (0, 1, 5):
            threads(count)
            task_order(seed)
            got = run()
            routes.add(route())
            assert all(torch.equal(want[n], got[n]) for n in want), (count, seed)
    assert routes == {"heads", "queries and keys"}


def test_an_item_alone_has_the_bits_it_has_in_a_batch(threads):
    threads(3)
    q, k, v, dout = inputs(5, 2, 2, 100, 70, 16, 16, torch.bfloat16)
    lengths = torch.tensor([70, 3, 64, 0, 65])
    leaves = {"q": q, "k": k, "v": v, "mask": masks.KeyPadding(lengths)}
    want = gradients(fastattn.attention, leaves, dout)
    for b in range(5):
        one = {n: leaves[n][b : b + 1] for n in "qkv"} | {"mask": masks.KeyPadding(lengths[b : b + 1])}
        got = gradients(fastattn.attention, one, dout[b : b + 1])
        assert all(torch.equal(want[n][b : b + 1], got[n]) for n in got)


def test_memory_grows_with_the_length_only():
    """A score matrix would take 256 MiB here."""
    program = (
        "import resource, torch, fastattn\n"
        "torch.set_num_threads(2)\n"
        "def run(S):\n"
        "    q, k, v = (torch.randn(1, 1, S, 16, requires_grad=True) for _ in range(3))\n"
        "    fastattn.attention(q, k, v, mask=fastattn.masks.Causal()).sum().backward()\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "print(-run(128) + run(8192))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 48


@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (1, 2, 0, 5), (1, 2, 3, 0)], ids=str)
def test_nothing_to_attend_to(shape):
    """Whose gradient of out comes as one number, expanded."""
    n, h, sq, sk = shape
    q, k, v = (torch.randn(n, h, s, 40, requires_grad=True) for s in (sq, sk, sk))
    fastattn.attention(q, k, v).sum().backward()
    for t in (q, k, v):
        assert t.grad.shape == t.shape and (t.grad == 0).all()

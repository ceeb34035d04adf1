"""The Triton attention backward against the reference: numbers, masks to the key, dropout to the bit."""

import functools
import math

import pytest
import torch
from test_attention_backward import MASKS, S, both_forms, check_lse_alone, eager, gradients
from test_contract import DROPOUT, expected_keep

import fastattn
from fastattn import masks, reference
from fastattn.ops import _FWD
from fastattn.tools.equivalence import error_rule

# B, Hq, Hkv, Sq, Sk, D, Dv: ones, primes, one either side of a block, odd heads, groups with Dv != D.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 1, 1, 63, 64, 64, 64),
    (1, 4, 2, 64, 65, 32, 32),
    (1, 6, 3, 65, 63, 16, 40),
    (1, 1, 1, 127, 131, 40, 72),
    (1, 3, 1, 129, 33, 111, 7),
    (1, 2, 2, 31, 97, 128, 256),
    (1, 2, 1, 20, 33, 96, 192),
    (1, 1, 1, 33, 20, 192, 96),
]
attend = functools.partial(fastattn.attention, backend="triton")


@pytest.fixture(autouse=True)
def device(triton_device):
    with torch.device(triton_device):
        yield triton_device


def inputs(B, Hq, Hkv, Sq, Sk, D, Dv, dtype=torch.float32):
    shapes = (B, Hq, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, Dv), (B, Hq, Sq, Dv)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def check(leaves, dout, dlse=None, sums=(), mask=None):
    """Ours against float64 under the error rule, beside eager math; sums over rows by the size of their terms.

    mask: as ours is given it, where that is no tensor; `leaves` then hold the tensor."""
    ours = gradients(attend, leaves if mask is None else leaves | {"mask": mask}, dout, dlse)
    exact = gradients(reference.attention, leaves, dout, dlse, dtype=torch.float64)
    theirs = gradients(eager, leaves, dout, dlse)
    terms = (reference.attention(**leaves).abs() * dout.abs()).float().sum(-1).norm().item()
    distance = max(dout.shape[2], leaves["k"].shape[2])
    for name, gradient in ours.items():
        assert gradient.dtype == leaves[name].dtype and gradient.shape == leaves[name].shape
        magnitude = terms * (distance if name == "alibi_slopes" else 1) if name in sums else None
        dtype = dout.dtype
        verdict = error_rule(gradient.to(dtype), exact[name], theirs[name].to(dtype), magnitude=magnitude)
        assert verdict, f"d{name}: {verdict.reason}"
    return ours


def sparse(names, dtypes, fast):
    """Pairs of a name and a dtype; those not in `fast` are for `-m slow`, or a GPU."""
    marks = () if torch.cuda.is_available() else (pytest.mark.slow,)
    return [
        pytest.param(n, d, marks=() if (n, d) in fast else marks, id=f"{n}-{str(d).removeprefix('torch.')}")
        for n in names
        for d in dtypes
    ]


BOTH = [torch.float32, torch.float16]


@pytest.mark.parametrize(
    "shape,dtype", sparse(SHAPES, BOTH, [(s, BOTH[n % 2]) for n, s in enumerate(SHAPES)])
)
def test_error_rule(dtype, shape):
    q, k, v, dout = inputs(*shape, dtype)
    check({"q": q, "k": k, "v": v}, dout)


def test_bfloat16():
    q, k, v, dout = inputs(1, 4, 2, 70, 65, 32, 16, torch.bfloat16)
    check(
        {"q": q, "k": k, "v": v, "mask": torch.ones(70, 65, dtype=torch.bool).tril()},
        dout,
        mask=masks.Causal(),
    )


FEATURES = {
    "softcap": {"softcap": 3.0},
    "alibi of a batch": {"alibi_slopes": [[0.5, 0.25, 0.125, 0.0625], [0.1, 0.2, 0.3, 0.4]]},
    "sinks": {"sinks": [0.0, 3.0, -2.0, 1.0]},
    "dropout": {"dropout_p": 0.3, "dropout_seed": -7},
    "everything": {
        "softcap": 4.0,
        "alibi_slopes": [0.1, 0.2, 0.05, 0.0],
        "sinks": [-1.0, 0.5, 2.0, -math.inf],
        "scale": -0.2,
        "dropout_p": 0.2,
        "dropout_seed": 2**40 + 3,
    },
}


FAST = [("softcap", torch.float16), ("sinks", torch.float32), ("everything", torch.float32)]


@pytest.mark.parametrize("features,dtype", sparse(FEATURES, BOTH, FAST))
def test_features(dtype, features):
    q, k, v, dout = inputs(2, 4, 2, 66, 70, 24, 40, dtype)
    given = {n: torch.tensor(x) if isinstance(x, list) else x for n, x in FEATURES[features].items()}
    leaves = {"q": q, "k": k, "v": v} | given
    leaves["bias"] = torch.randn(2, 1, 66, 70)
    leaves["mask"] = torch.rand(66, 70) < 0.7
    leaves["mask"][11] = False
    check(leaves, dout, torch.randn(2, 4, 66), sums=("alibi_slopes", "sinks"))


@pytest.mark.parametrize("negative", [False, True])
def test_scales(negative):
    q, k, v, dout = inputs(1, 2, 2, 33, 40, 16, 16)
    check({"q": q, "k": k, "v": v, "scale": -0.3 if negative else 0.0}, dout)


BIASES = [(2, 1, 70, 93), (70, 93), (1, 4, 1, 93), (2, 4, 70, 1), (1, 4, 1, 1)]


@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_bias_gradient(shape):
    q, k, v, dout = inputs(2, 4, 2, 70, 93, 16, 16, torch.float16)
    bias = torch.randn(shape).to(torch.float16)
    if shape[-1] > 1:
        bias[..., 7::11] = -math.inf
    check({"q": q, "k": k, "v": v, "bias": bias, "mask": torch.rand(70, 93) < 0.8}, dout, sums=("bias",))


def on(device, given):
    """A mask of test_attention_backward's, made on the CPU, where the kernels run."""
    return given.to(device) if isinstance(given, torch.Tensor) else given


@pytest.mark.parametrize("name,dtype", sparse(MASKS, BOTH[:1], [("lengths", BOTH[0]), ("dense", BOTH[0])]))
def test_masks(name, dtype, device):
    given, visible = both_forms(name)
    given, visible = on(device, given), visible.to(device)
    q, k, v, dout = inputs(2, 4, 2, S, S, 32, 32, dtype)
    ours = check({"q": q, "k": k, "v": v, "mask": visible}, dout, mask=given)
    empty = ~visible.expand(2, 4, S, S).any(-1)
    unseen = ~visible.expand(2, 4, S, S).any(-2).unflatten(1, (2, 2)).any(2)
    assert (ours["q"][empty] == 0).all()
    assert (ours["k"][unseen] == 0).all() and (ours["v"][unseen] == 0).all()


@pytest.mark.parametrize("name", [*MASKS, "causal and dense", "prefix"])
def test_masks_to_the_key(name, device):
    """With q = 0 every visible key weighs 1/n, so dV adds up one number for each row that sees the key; and dS is
    P * dP, so that dQ and the gradient of a bias are not 0 at exactly the visible keys."""
    if name == "causal and dense":
        dense = torch.rand(S, S) < 0.5
        given, visible = masks.Causal() & masks.Dense(dense), dense.tril()
    elif name == "prefix":
        given = masks.PrefixLM(torch.tensor([70, 0]))
        visible = given.to_dense(S, S, B=2).to(device)
    else:
        given, visible = both_forms(name)
        given, visible = on(device, given), visible.to(device)
    visible = visible.expand(2, 2, S, S) if visible.dim() != 3 else visible[::2].expand(2, 2, S, S)
    if name == "dense of heads":
        given = given[::2]
    n = visible.sum(-1, keepdim=True)
    code = (1 + torch.arange(S)[:, None] >> torch.arange(8) & 1).float()
    code = code.repeat(1, 8) * (torch.arange(S)[:, None] // 24 == torch.arange(64) // 8)
    q, k, v, _ = inputs(2, 2, 2, S, S, 8, 64)
    v.requires_grad_()
    bias = torch.zeros(2, 2, S, S, requires_grad=True)
    out = attend(torch.zeros_like(q), k, v, mask=given)
    (dv,) = torch.autograd.grad(out, v, code * n)
    torch.testing.assert_close(dv.round(), visible.float().mT @ code, rtol=0, atol=0)
    out = attend(torch.zeros_like(q), k, torch.randn_like(v), mask=given, bias=bias)
    (dbias,) = torch.autograd.grad(out, bias, torch.randn_like(out))
    assert torch.equal(dbias != 0, visible & (n > 1)) or (dbias[~visible] == 0).all()
    assert ((dbias != 0) | ~visible | (n == 1)).float().mean() > 0.999  # a difference may round to 0


@pytest.mark.parametrize("left,right", [(30, 30), (31, 62), (62, 31), (63, 94)])
def test_windows_that_end_one_row_into_a_tile(left, right):
    """Which blocks are seen whole: one row or key more or less is another answer at these widths."""
    q, k, v, dout = inputs(1, 1, 1, 200, 200, 16, 16)
    i, j = torch.arange(200)[:, None], torch.arange(200)
    visible = (j >= i - left) & (j <= i + right)
    check({"q": q, "k": k, "v": v, "mask": visible}, dout, mask=masks.SlidingWindow(left, right))


@pytest.mark.parametrize("form", ["ranges", "bits", "bias"])
def test_keys_hidden_from_every_row_hold_anything(form):
    q, k, v, dout = inputs(2, 2, 1, 70, 100, 16, 16)
    seen = torch.arange(100) < 83
    if form == "bits":
        seen = seen & (torch.arange(100) % 9 != 4)
    given = {
        "ranges": {"mask": masks.KeyPadding(torch.tensor([83, 83]))},
        "bits": {"mask": seen & (torch.rand(70, 100) < 0.7)},
        "bias": {"bias": torch.where(seen, 0.5, -math.inf)[None]},
    }[form]
    clean = gradients(attend, {"q": q, "k": k, "v": v} | given, dout)
    k[:, :, ~seen], v[:, :, ~seen] = math.nan, math.inf
    poisoned = gradients(attend, {"q": q, "k": k, "v": v} | given, dout)
    assert all(torch.equal(clean[n], poisoned[n]) for n in clean)


@pytest.mark.parametrize("form", ["ranges", "bits", "both", "bias"])
def test_rows_that_see_nothing_hold_anything(form):
    q, k, v, dout = inputs(1, 2, 1, 70, 100, 16, 16)
    some = torch.ones(70, 1, dtype=torch.bool)
    some[[0, 33, 69]] = False
    dense = some & (torch.rand(70, 100) < 0.7)
    given = {
        "ranges": {"mask": masks.Dense(some) & masks.CausalLowerRight()},
        "bits": {"mask": dense},
        "both": {"mask": masks.Dense(dense) & masks.CausalLowerRight()},
        "bias": {"bias": torch.where(some, torch.randn(70, 100), -math.inf)},
    }[form]
    clean = gradients(attend, {"q": q, "k": k, "v": v} | given, dout)
    hidden = ~some[:, 0]
    q[:, :, hidden], dout[:, :, hidden] = math.nan, math.inf
    poisoned = gradients(attend, {"q": q, "k": k, "v": v} | given, dout)
    assert all(torch.equal(clean[n], poisoned[n]) and (clean[n] != 0).any() for n in clean)
    assert (clean["q"][:, :, hidden] == 0).all()


def test_rows_of_the_lowest_finite_bias():
    """Nothing else is visible to them, so their weights are equal; an LSE of fp32 cannot say of how many."""
    q, k, v, dout = inputs(1, 2, 1, 70, 130, 16, 16)
    bias = torch.where(torch.rand(70, 130) < 0.5, 0.0, torch.finfo(torch.float32).min)
    bias[:9] = torch.finfo(torch.float32).min
    bias[3, 50:] = -math.inf
    leaves = {"q": q, "k": k, "v": v, "bias": bias}
    exact = gradients(reference.attention, leaves, dout, dtype=torch.float64)
    out, lse = reference.attention(**leaves, return_lse=True)
    ours = backward_op(dout, q, k, v, out, lse, bias=bias[None, None])
    for name, gradient in zip("qkv", ours, strict=False):
        verdict = error_rule(gradient, exact[name])
        assert verdict, f"d{name}: {verdict.reason}"


@pytest.mark.parametrize(
    "case", [c for c in DROPOUT if c["call"][6:] == [0, 0]], ids=lambda c: f"seed{c['call'][0]}"
)
def test_drops_the_committed_bits(case, device):
    """dV[j] sums what dO says of the rows that kept key j."""
    seed, p, B, H, Sq, Sk, _, _ = case["call"]
    q, k = torch.zeros(B, H, Sq, 32), torch.zeros(B, H, Sk, 32)
    v = torch.zeros(B, H, Sk, Sq, requires_grad=True)
    out = attend(q, k, v, dropout_p=p, dropout_seed=seed)
    (dv,) = torch.autograd.grad(out, v, torch.eye(Sq).expand(B, H, Sq, Sq).contiguous())
    assert torch.equal((dv != 0).mT, expected_keep(case).to(device))


def backward_op(dout, q, k, v, out, lse, dlse=None, needs=(1, 1, 1, 0, 0, 0), grads_fp32=False, **changes):
    given = dict.fromkeys(_FWD[3:23]) | {"scale": q.shape[-1] ** -0.5, "softcap": 0.0, "dropout_p": 0.0}
    given |= changes
    arguments = [given[n] for n in _FWD[3:10]] + [None, None] + [given[n] for n in _FWD[10:23]]
    return torch.ops.fastattn_triton.attention_bwd(
        dout, dlse, q, k, v, out, lse, *arguments, [bool(n) for n in needs], grads_fp32
    )


def test_logical_places():
    """Of rows and keys, in ALiBi and in dropout's counter."""
    q, k, v, dout = inputs(2, 2, 1, 40, 50, 16, 16)
    places = {"q_pos": torch.randint(0, 90, (2, 40)).int(), "k_pos": torch.randint(0, 90, (1, 50)).int()}
    drop = {"dropout_p": 0.3, "dropout_seed": torch.tensor(7)}
    leaves = {n: t.double().requires_grad_() for n, t in zip("qkv", (q, k, v), strict=True)}
    leaves["alibi_slopes"] = torch.tensor([0.1, 0.05], dtype=torch.float64, requires_grad=True)
    out, lse = reference.attention(**leaves, **places, **drop, return_lse=True)
    exact = torch.autograd.grad(out, list(leaves.values()), dout.double())
    slopes = leaves["alibi_slopes"].detach().float()[None]
    ours = backward_op(
        dout, q, k, v, out.detach().float(), lse.detach().float(), needs=(1, 1, 1, 0, 1, 0), alibi_slopes=slopes,
        **places, **drop,
    )  # fmt: skip
    for name, got, right in zip(leaves, (*ours[:3], ours[4][0]), exact, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4, msg=name)


def test_many_blocks_of_rows():
    """More than the pass over keys reads the extents of at once."""
    q, k, v, dout = inputs(1, 1, 1, 4200, 20, 16, 16)
    visible = (torch.arange(20) < 17).expand(4200, 20)
    check({"q": q, "k": k, "v": v, "mask": visible}, dout, mask=masks.KeyPadding(torch.tensor([17])))


def test_chunks_of_many():
    """Each chunk of keys, given the out and LSE of all, adds its share."""
    q, k, v, dout = inputs(2, 4, 2, 70, 150, 16, 24, torch.float16)
    exact = gradients(reference.attention, {"q": q, "k": k, "v": v}, dout, dtype=torch.float64)
    out, lse = reference.attention(q.float(), k.float(), v.float(), return_lse=True)
    parts = []
    for first, last in ((0, 64), (64, 83), (83, 150)):
        chunk = k[:, :, first:last], v[:, :, first:last]
        parts.append(backward_op(dout.float(), q, *chunk, out, lse, grads_fp32=True)[:3])
    dq, dk, dv = zip(*parts, strict=True)
    for got, name in ((sum(dq), "q"), (torch.cat(dk, 2), "k"), (torch.cat(dv, 2), "v")):
        assert got.dtype == torch.float32
        verdict = error_rule(got.to(torch.float16), exact[name])
        assert verdict, verdict.reason


def test_each_input_alone():
    q, k, v, dout = inputs(1, 4, 2, 70, 65, 16, 24)
    rest = {"bias": torch.randn(4, 70, 65), "alibi_slopes": torch.rand(4), "sinks": torch.randn(4)}
    want = gradients(attend, {"q": q, "k": k, "v": v} | rest, dout)
    for name in want:
        given = {"q": q, "k": k, "v": v} | rest
        given[name] = given[name].clone().requires_grad_()
        (got,) = torch.autograd.grad(attend(**given), given[name], dout)
        assert torch.equal(got, want[name]), name


def test_layouts():
    """Heads last, and gradients of out that lie anywhere; gradients come in the order of their inputs."""
    packed = torch.randn(2, 33, 3, 4, 16)
    leaves = [packed[:, :, i].transpose(1, 2) for i in range(3)]
    dout = torch.randn(2, 4, 33, 16)
    plain = [t.contiguous().requires_grad_() for t in leaves]
    want = torch.autograd.grad(attend(*plain), plain, dout)
    for layout in (dout, dout.mT.contiguous().mT, dout.repeat_interleave(2, -1)[..., ::2]):
        views = [t.detach().requires_grad_() for t in leaves]
        got = torch.autograd.grad(attend(*views), views, layout)
        for a, b, t in zip(got, want, leaves, strict=True):
            assert torch.equal(a, b)
            assert (a.stride(1) < a.stride(2)) == (t.stride(1) < t.stride(2))


@pytest.mark.parametrize(
    "shape", [(0, 2, 2, 5, 5, 8, 8), (2, 2, 1, 5, 0, 8, 8), (2, 2, 2, 5, 5, 0, 8)], ids=str
)
def test_zero_sizes(shape):
    q, k, v, dout = inputs(*shape)
    got = gradients(attend, {"q": q, "k": k, "v": v}, dout)
    exact = gradients(reference.attention, {"q": q, "k": k, "v": v}, dout, dtype=torch.float64)
    for n in exact:
        torch.testing.assert_close(got[n].double(), exact[n], atol=1e-6, rtol=1e-6)


def test_the_same_bits_at_each_repeat_and_in_any_batch():
    q, k, v, dout = inputs(3, 4, 2, 100, 70, 16, 16, torch.float16)
    lengths = torch.tensor([70, 3, 65])
    leaves = {"q": q, "k": k, "v": v, "bias": torch.randn(1, 4, 1, 70), "sinks": torch.randn(4)}
    want = gradients(attend, leaves | {"mask": masks.KeyPadding(lengths)}, dout)
    again = gradients(attend, leaves | {"mask": masks.KeyPadding(lengths)}, dout)
    assert all(torch.equal(want[n], again[n]) for n in want)
    for b in range(3):
        one = (
            leaves | {n: leaves[n][b : b + 1] for n in "qkv"} | {"mask": masks.KeyPadding(lengths[b : b + 1])}
        )
        got = gradients(attend, one, dout[b : b + 1])
        assert all(torch.equal(want[n][b : b + 1], got[n]) for n in "qkv")


def test_strides_past_two_to_the_31():
    """A huge stride over few elements: the memory between them is never touched."""
    room = torch.empty(3 * (2**30 + 8) + 4096, dtype=torch.float16)
    room = room.as_strided((1, 4, 9, 32), (0, 2**30 + 8, 32, 1))
    q, k, v, dout = inputs(1, 4, 4, 9, 9, 32, 32, torch.float16)
    want = gradients(attend, {"q": q, "k": k, "v": v}, dout)
    for leaf in ("q", "k", "v", "dout"):
        leaves = {"q": q, "k": k, "v": v, "dout": dout}
        leaves[leaf] = room.copy_(leaves[leaf]).detach()
        far = leaves.pop("dout")
        leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
        out = attend(**leaves)
        for name, got in zip(leaves, torch.autograd.grad(out, list(leaves.values()), far), strict=True):
            assert torch.equal(got, want[name]), (leaf, name)


def test_lse_alone():
    check_lse_alone(attend)

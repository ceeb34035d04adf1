"""Second derivatives, vmap, checkpointing: the attention ops under torch's transforms, in float32."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import masks, reference

CASES = {
    "plain": {},
    "causal": {"mask": masks.Causal()},
    "bits": {"mask": masks.Longformer(3, [0])},
    "softcap and sinks": {"softcap": 3.0, "sinks": torch.tensor([0.5, -1.0])},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 11},
    "nothing seen": {"mask": masks.KeyPadding([0])},
}


def dense(arguments, S):
    arguments = dict(arguments)
    if "mask" in arguments:
        arguments["mask"] = arguments["mask"].to_dense(S, S, 1, 2)
    return arguments


@pytest.mark.parametrize("case", CASES)
def test_double_backward_is_the_reference_s(case):
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    up, *ups = (
        torch.randn(1, 2, 9, 8),
        torch.randn(1, 2, 9, 8),
        torch.randn(1, 2, 9, 8),
        torch.randn(1, 2, 9, 8),
    )

    def second(f, leaves, dtype):
        first = torch.autograd.grad(f(*leaves), leaves, up.to(dtype), create_graph=True)
        return torch.autograd.grad(first, leaves, [u.to(dtype) for u in ups])

    ours = second(lambda *x: fastattn.attention(*x, **CASES[case]), (q, k, v), torch.float32)
    wide = tuple(t.detach().double().requires_grad_() for t in (q, k, v))
    exact = second(lambda *x: reference.attention(*x, **dense(CASES[case], 9)), wide, torch.float64)
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-4)


def test_third_derivative_is_not_lost():
    q = torch.randn(1, 1, 4, 3, requires_grad=True)
    k = torch.randn(1, 1, 4, 3)

    def third(f, x):
        g = f(x).square().sum()
        for _ in range(2):
            g = torch.autograd.grad(g, x, create_graph=True)[0].square().sum()
        return torch.autograd.grad(g, x)[0]

    wide = q.detach().double().requires_grad_()
    exact = third(lambda x: reference.attention(x, k.double(), k.double()), wide)
    torch.testing.assert_close(
        third(lambda x: fastattn.attention(x, k, k), q).double(), exact, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("case", ["plain", "causal", "bits", "softcap and sinks"])
@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None), (2, 0, 1), (None, 0, 0)])
def test_vmap(case, dims):
    arguments = CASES[case]
    x = [
        torch.randn(2, 2, 9, 8) if d is None else torch.randn(2, 2, 9, 8)[None].repeat(3, 1, 1, 1, 1)
        for d in dims
    ]
    x = [t if d is None else (t * torch.rand(3, 1, 1, 1, 1)).movedim(0, d) for t, d in zip(x, dims)]
    f = lambda q, k, v: fastattn.attention(q, k, v, **arguments)  # noqa: E731
    mapped = torch.func.vmap(f, in_dims=dims)(*x)
    one_by_one = torch.stack(
        [f(*(t if d is None else t.select(d, i) for t, d in zip(x, dims))) for i in range(3)]
    )
    torch.testing.assert_close(mapped, one_by_one)


@pytest.mark.parametrize("with_bias", [False, True])
def test_vmap_of_grad(with_bias):
    q, k = torch.randn(3, 1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    bias = torch.randn(2, 9, 9)

    def loss(q, k, bias):
        return (
            fastattn.attention(q, k, k, bias=bias if with_bias else None, mask=masks.Causal()).square().sum()
        )

    argnums = (0, 1, 2) if with_bias else (0, 1)
    mapped = torch.func.vmap(torch.func.grad(loss, argnums=argnums), in_dims=(0, None, None))(q, k, bias)
    singles = [torch.func.grad(loss, argnums=argnums)(x, k, bias) for x in q]
    for a, b in zip(mapped, zip(*singles)):
        torch.testing.assert_close(a, torch.stack(b))


def test_mapped_calls_warn_of_no_slow_path(recwarn):
    q = torch.randn(3, 1, 2, 9, 8)
    torch.func.vmap(fastattn.attention)(q, q, q)
    assert not [w for w in recwarn if "performance drop" in str(w.message)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_dropout(reentrant):
    q = torch.randn(1, 2, 33, 8, requires_grad=True)

    def f(x):
        return fastattn.scaled_dot_product_attention(x, x, x, dropout_p=0.4)

    grads = []
    for call in (f, lambda x: checkpoint(f, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        q.grad = None
        call(q).square().sum().backward()
        grads.append(q.grad)
    assert torch.equal(*grads)


def test_in_place_change_of_a_saved_tensor_raises():
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    k = torch.randn(1, 2, 5, 8)
    out = fastattn.attention(q, k, k)
    k.add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("mode", ["default", "dynamic"])
def test_compiled_training(mode):
    def f(q, k, v):
        return fastattn.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=mode == "dynamic")
    for S in (9, 33):
        leaves = [torch.randn(2, 2, S, 8, requires_grad=True) for _ in range(3)]
        for a, b in zip(
            torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(f(*leaves), leaves)
        ):
            torch.testing.assert_close(a, b)


MAPPED = {
    "bool": lambda seen: {"mask": seen},
    "bool, a batch": lambda seen: {"mask": seen[0, 0]},
    "float": lambda seen: {"mask": torch.where(seen, 0.5, -torch.inf)},
    "bool and bias": lambda seen: {"mask": seen, "bias": torch.linspace(-1, 1, 9)[None]},
    "bias, a batch": lambda seen: {"bias": torch.where(seen[0, 0], 0.5, -torch.inf)},
    "slopes": lambda seen: {"alibi_slopes": seen[0, 0, 0, :2].float()},
    "padding": lambda seen: {"mask": masks.KeyPadding(seen[:, 0, 0])},
    "padding and causal": lambda seen: {"mask": masks.KeyPadding(seen[:, 0, 0]) & masks.Causal()},
    "lengths": lambda seen: {"mask": masks.KeyPadding(seen[:, 0, 0].sum(-1))},
    "dense": lambda seen: {"mask": masks.Not(masks.Dense(seen))},
}


@pytest.mark.parametrize("case", MAPPED)
def test_vmap_over_the_mask(case):
    """Nobody can look at a mask that vmap maps over: forward and gradients are those of the items one by one."""
    q, k = torch.randn(3, 2, 2, 9, 8), torch.randn(3, 2, 2, 9, 8)
    seen = torch.rand(3, 2, 1, 9, 9) > 0.5
    seen[1, 0] = False  # rows that see nothing
    k[0, 1].masked_fill_(~seen[0, 1, 0, 0, :, None], torch.nan)  # what padding hides may hold anything

    def loss(q, k, seen):
        out = fastattn.attention(q, k, k, **MAPPED[case](seen))
        return out.nan_to_num().square().sum(), out

    call = torch.func.grad(loss, argnums=(0, 1), has_aux=True)
    singles = [call(*item) for item in zip(q, k, seen)]
    (dq, dk), out = torch.func.vmap(call)(q, k, seen)
    for n, ((one_dq, one_dk), one) in enumerate(singles):
        for a, b in ((dq[n], one_dq), (dk[n], one_dk), (out[n], one)):
            torch.testing.assert_close(a, b, equal_nan=True)
    if case.startswith("padding"):
        assert out.isfinite().all() and dk.isfinite().all()


def test_explain_says_what_vmap_does_to_a_mask():
    notes = []

    def call(q, seen):
        notes.append(fastattn.explain(q, q, q, mask=seen))
        return fastattn.attention(q, q, q, mask=seen)

    q, seen = torch.randn(3, 1, 2, 9, 8), torch.rand(3, 9, 9) > 0.5
    torch.func.vmap(call)(q, seen)
    assert notes[0].kernel == "cpu" and "vmap maps over mask: it is added to the scores" in str(notes[0])
    torch.func.vmap(call, in_dims=(0, None))(q, seen[0])
    assert "vmap" not in str(notes[1])

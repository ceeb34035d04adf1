"""The short way of plain calls against the general one: the same bits, derivatives, layouts and errors."""

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import short

sdpa = fastattn.scaled_dot_product_attention
PADDING = (torch.arange(50) < torch.tensor([37, 0, 50])[:, None])[:, None, None]
# Heads and rows of q, heads and keys of k and v, and the call's arguments.
CALLS = {
    "none": ((4, 50), (4, 50), {}),
    "causal": ((4, 50), (4, 50), {"is_causal": True}),
    "other scale": ((4, 50), (4, 50), {"scale": 0.7}),
    "padding": ((4, 50), (4, 50), {"attn_mask": PADDING}),
    "padding of all alike": ((4, 50), (4, 50), {"attn_mask": PADDING[:1]}),
    "additive padding": (
        (4, 50),
        (4, 50),
        {"attn_mask": torch.zeros(3, 1, 1, 50).masked_fill(~PADDING, -torch.inf)},
    ),
    "more keys": ((4, 33), (4, 131), {}),
    "more rows": ((4, 131), (4, 33), {"is_causal": True}),
    "few rows": ((4, 3), (4, 70), {}),
    "padded memory": ((4, 70), (4, 50), {"attn_mask": PADDING}),
    "grouped": ((6, 70), (2, 70), {"enable_gqa": True}),
    "grouped, causal": ((6, 33), (1, 70), {"enable_gqa": True, "is_causal": True}),
    "grouped, padded": ((6, 33), (3, 50), {"enable_gqa": True, "attn_mask": PADDING}),
}
LAYOUTS = {
    "contiguous": lambda t: t,
    "heads last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "columns apart": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "columns first": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda t: t[:1].expand_as(t),
}


def operands(call, dtype=torch.float32, layout="contiguous", width=24):
    rows, keys, arguments = CALLS[call]
    shapes = (rows, keys, keys, rows)
    return [LAYOUTS[layout](torch.randn(3, *shape, width)).to(dtype) for shape in shapes], arguments


def close_the_short_way(monkeypatch):
    monkeypatch.setattr(short, "is_plain", lambda *operands: False)


def takes_it(out):
    return out.grad_fn.name().startswith("_Training")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", CALLS)
def test_inference_gives_the_bits_of_the_general_way(call, dtype, monkeypatch):
    (q, k, v, _), arguments = operands(call, dtype)
    out = sdpa(q, k, v, **arguments)
    close_the_short_way(monkeypatch)
    assert torch.equal(out, sdpa(q, k, v, **arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", ["qkv", "q", "k", "v", "kv"])
@pytest.mark.parametrize("call", CALLS)
def test_gradients_have_the_bits_of_the_general_way(call, needs, dtype, monkeypatch):
    base, arguments = operands(call, dtype)

    def run():
        leaves = [t.clone().requires_grad_(name in needs) for name, t in zip("qkv", base)]
        out = sdpa(*leaves, **arguments)
        return out, *torch.autograd.grad(out, [t for t in leaves if t.requires_grad], base[3])

    plainly = run()
    close_the_short_way(monkeypatch)
    generally = run()
    assert takes_it(plainly[0]) and not takes_it(generally[0])
    for got, want in zip(plainly, generally, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", ["none", "grouped, padded"])
def test_layouts(call, layout, monkeypatch):
    base, arguments = operands(call, layout=layout)

    def run():
        q, k, v = (LAYOUTS[layout](t.detach()).requires_grad_() for t in base[:3])
        out = sdpa(q, k, v, **arguments)
        return out, *torch.autograd.grad(out, (q, k, v), base[3])

    plainly = run()
    close_the_short_way(monkeypatch)
    for got, want in zip(plainly, run(), strict=True):
        assert torch.equal(got, want)
        if layout == "heads last":
            assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("call", ["causal", "padding", "grouped, causal"])
def test_second_derivatives(call):
    (q, k, v, up), arguments = operands(call, torch.float64, width=8)

    def second(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        given = {
            n: a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a
            for n, a in arguments.items()
        }
        first = torch.autograd.grad(function(*leaves, **given), leaves, up.to(dtype), create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)

    exact = second(sdpa, torch.float64)  # the reference
    for got, want in zip(second(sdpa, torch.float32), exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_batched_gradients():
    (q, k, v, _), arguments = operands("padding")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    ups = torch.randn(5, *q.shape)
    out = sdpa(*leaves, **arguments)
    together = torch.autograd.grad(out, leaves, ups, is_grads_batched=True, retain_graph=True)
    for i, up in enumerate(ups):
        for got, want in zip(together, torch.autograd.grad(out, leaves, up, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], want)


@pytest.mark.parametrize("which", range(3))
def test_an_operand_changed_in_place(which):
    (q, k, v, up), arguments = operands("causal")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    copies = [t.clone() for t in leaves]
    out = sdpa(*copies, **arguments)
    with torch.no_grad():
        copies[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(up)


def test_what_outlives_a_transform_is_still_its_tensor():
    q, leaked = torch.randn(1, 2, 16, 32), []
    torch.func.grad(lambda x: leaked.append(x) or x.square().sum())(q)
    w = torch.randn(1, 2, 16, 32, requires_grad=True)
    for x in (q, leaked[0]):
        w.grad = None
        out = sdpa(x, w, w)
        out.sum().backward()
        if x is q:
            want = out.detach(), w.grad
    assert torch.equal(out, want[0]) and torch.equal(w.grad, want[1])


def test_saved_tensors_hooks():
    (q, k, v, up), arguments = operands("causal")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        kept = sdpa(*leaves, **arguments)
    want = torch.autograd.grad(sdpa(*leaves, **arguments), leaves, up)
    for got, expected in zip(torch.autograd.grad(kept, leaves, up), want, strict=True):
        assert torch.equal(got, expected)


def test_opcheck():
    x, kv = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
    bounds = torch.zeros(2, 1, 1, dtype=torch.int32), torch.full((2, 1, 1), 7, dtype=torch.int32)
    for q in (x, LAYOUTS["heads last"](x), LAYOUTS["columns apart"](x)):
        for ranges in (bounds, (None, None)):
            forward = torch.ops.fastattn.attention_training.default
            torch.library.opcheck(forward, (q, kv, kv, 0.3, True, *ranges))
            out, lse = forward(q, kv, kv, 0.3, True, *ranges)
            backward = torch.ops.fastattn.attention_training_bwd.default
            for needs in ((True, True, True), (False, True, False)):
                torch.library.opcheck(backward, (out, q, kv, kv, out, lse, *ranges, 0.3, True, *needs))


def test_against_torch():
    for call in CALLS:
        (q, k, v, up), arguments = operands(call)
        results = []
        for function in (sdpa, F.scaled_dot_product_attention):
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            out = function(*leaves, **arguments)
            seen = torch.isfinite(out).all(-1, keepdim=True)  # torch's rows without a key are NaN or 0
            results.append((out, *torch.autograd.grad(out.where(seen, 0), leaves, up)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, equal_nan=True, msg=call)

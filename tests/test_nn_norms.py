"""fastattn.nn's LayerNorm, RMSNorm, Softmax and AddNorm."""

import copy
import pickle

import pytest
import torch

from fastattn import nn as fnn
from fastattn.nn.dropping import dropped

MODULES = {
    "layer_norm": (lambda ns: ns.LayerNorm(12), (3, 5, 12)),
    "layer_norm two dims": (lambda ns: ns.LayerNorm((5, 12), eps=1e-3), (3, 5, 12)),
    "layer_norm no bias": (lambda ns: ns.LayerNorm(12, bias=False), (4, 12)),
    "layer_norm plain": (lambda ns: ns.LayerNorm([12], elementwise_affine=False), (4, 12)),
    "rms_norm": (lambda ns: ns.RMSNorm(12), (3, 5, 12)),
    "rms_norm eps": (lambda ns: ns.RMSNorm((5, 12), eps=1e-2), (3, 5, 12)),
    "rms_norm plain": (lambda ns: ns.RMSNorm(12, elementwise_affine=False), (12,)),
    "softmax": (lambda ns: ns.Softmax(-1), (3, 5, 12)),
    "softmax dim": (lambda ns: ns.Softmax(1), (3, 5, 12)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_like_torch(name, dtype):
    make, shape = MODULES[name]
    theirs = make(torch.nn).to(dtype)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours = getattr(fnn, type(theirs).__name__).from_torch(theirs)
    assert repr(ours) == repr(theirs) and list(ours.state_dict()) == list(theirs.state_dict())
    assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters()))
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    dy = torch.randn(shape, dtype=dtype)
    # torch's own module in float64 is the oracle; in bfloat16 both round.
    wide = copy.deepcopy(theirs).double()
    x64 = x.detach().double().requires_grad_()
    expected = wide(x64)
    grads64 = torch.autograd.grad(expected, [x64, *wide.parameters()], dy.double())
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype]
    y = ours(x)
    assert y.dtype == theirs(x).dtype
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    for g, e in zip(torch.autograd.grad(y, [x, *ours.parameters()], dy), grads64):
        torch.testing.assert_close(g.double(), e, atol=3 * tolerance, rtol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).double(), expected, atol=tolerance, rtol=tolerance)
    for copied in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(copied) is type(ours) and torch.equal(copied(x), y)


def test_constructors_draw_and_store_as_torch():
    for name, (make, _) in MODULES.items():
        ours, theirs = make(fnn), make(torch.nn)
        assert repr(ours) == repr(theirs), name
        for (n, a), (m, b) in zip(ours.state_dict().items(), theirs.state_dict().items()):
            assert n == m and torch.equal(a, b)


def test_where_torch_itself_fails():
    """A width of 1 has a weight gradient of 0 (pytorch #188375); 1e30 has finite results."""
    norm = fnn.LayerNorm(1)
    x = torch.randn(9, 1, requires_grad=True)
    norm(x).square().sum().backward()
    assert norm.weight.grad.abs().max() < 1e-6
    assert fnn.LayerNorm(8)(torch.randn(2, 8) * 1e30).isfinite().all()


def test_softmax_guesses_dim_with_torch_s_warning():
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        y = fnn.Softmax()(x)
    assert torch.allclose(y, x.softmax(1))


def test_bad_input():
    with pytest.raises(ValueError, match="normalized_shape"):
        fnn.LayerNorm(4)(torch.randn(3, 5))
    with pytest.raises(TypeError, match="int"):
        fnn.RMSNorm(4)(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="bias=True and norm='rms_norm'"):
        fnn.AddNorm(4, "rms_norm", bias=True)
    with pytest.raises(ValueError, match="order must be"):
        fnn.AddNorm(4, order="after")
    with pytest.raises(ValueError, match="norm must be"):
        fnn.AddNorm(4, norm="batch_norm")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_add_norm(norm, order, dtype):
    module = fnn.AddNorm(16, norm, order, dtype=dtype)
    torch.nn.init.normal_(module.norm.weight)
    x, residual = (torch.randn(3, 7, 16, dtype=dtype, requires_grad=True) for _ in range(2))
    total = x + residual
    h = total.double()
    if norm == "layer_norm":
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        h = h * module.norm.weight.double() + module.norm.bias.double()
    else:
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        h = h / (h.square().mean(-1, keepdim=True) + eps).sqrt() * module.norm.weight.double()
    result = module(x, residual)
    y, s = result if order == "pre" else (result, total)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(y.double(), h, atol=tolerance, rtol=tolerance)
    assert torch.equal(s, total)
    grads = torch.autograd.grad(y.double().square().sum(), (x, residual))
    expected = torch.autograd.grad(h.square().sum(), (x, residual))
    for a, e in zip(grads, expected):
        torch.testing.assert_close(a, e, atol=20 * tolerance, rtol=3 * tolerance)


def test_add_norm_drops_the_sub_block_only():
    module = fnn.AddNorm(8, dropout=0.5)
    x, residual = torch.full((2, 400, 8), 3.0), torch.zeros(2, 400, 8)
    module.norm = torch.nn.Identity()
    y = module(x, residual)
    assert set(y.unique().tolist()) == {0.0, 6.0}
    assert torch.equal(module.eval()(x, residual), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_by_sixteen_bits(p, dtype):
    module = torch.nn.Dropout(p)
    x = torch.ones(501, 403, dtype=dtype, requires_grad=True)
    torch.manual_seed(7)
    y = dropped(module, x)
    torch.manual_seed(7)
    assert torch.equal(dropped(module, x), y)
    kept = (y != 0).double()
    n = x.numel()
    assert abs(kept.mean() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    # Neighbours, which share a random word, are independent.
    centred = (kept - kept.mean()).flatten()
    for lag in (1, 2, 3, 4):
        assert abs((centred[lag:] * centred[:-lag]).mean() / centred.square().mean()) < 5 / n**0.5
    assert abs(y.double().mean() - 1) < 0.02
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, y.detach())
    assert dropped(module.eval(), x) is x


def test_dropout_of_others_is_theirs():
    x = torch.ones(8, 8)
    seen = []
    module = torch.nn.Dropout(0.5)
    module.register_forward_hook(lambda *_: seen.append(1))
    dropped(module, x)
    assert seen == [1]
    for p in (1e-4, 1.0):
        torch.manual_seed(0)
        y = dropped(torch.nn.Dropout(p), x)
        torch.manual_seed(0)
        assert torch.equal(y, torch.nn.Dropout(p)(x))
    assert dropped(torch.nn.Identity(), x) is x


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("cls", [fnn.LayerNorm, fnn.RMSNorm])
def test_nested(cls, layout):
    module = cls(24)
    torch.nn.init.normal_(module.weight)
    parts = [torch.randn(n, 24, requires_grad=True) for n in (3, 5, 1)]
    y = module(torch.nested.as_nested_tensor(parts, layout=layout))
    assert y.is_nested and y.layout == layout
    expected = [module(part) for part in parts]
    for a, e in zip(y.unbind(), expected):
        torch.testing.assert_close(a, e)
    grads = torch.autograd.grad(sum(t.square().sum() for t in y.unbind()), parts)
    for a, e in zip(grads, torch.autograd.grad(sum(t.square().sum() for t in expected), parts)):
        torch.testing.assert_close(a, e)

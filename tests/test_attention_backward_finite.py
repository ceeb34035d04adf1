"""Numbers that are not finite in the attention backward: they reach the gradients of those who see them, and no other.

On tiles, which take such rows in a way of their own, more of it is in test_attention_backward_amx.py.
"""

import math

import pytest
import torch
from test_attention_backward import DTYPES, S, backward_op, both_forms, gradients, inputs, randn

import fastattn
from fastattn import masks, reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("name", ["causal", "lengths", "dense", "documents"])
def test_hidden_nan_stays_hidden(isa, name, count, dtype, threads):
    """A NaN reaches exactly the gradients of those who see it: a mask read back through the poison."""
    threads(count)
    torch.manual_seed(1)
    given, visible = both_forms(name)
    visible = visible.expand(2, 2, S, S)
    q, k, v, dout = inputs(2, 2, 2, S, S, 16, 16, dtype)
    prepared = masks.prepare(given, q, k)
    clean = gradients(fastattn.attention, {"q": q, "k": k, "v": v, "mask": prepared}, dout)
    for poisoned in (k, v):
        for key in (5, 70, 149):
            kept = poisoned[:, :, key].clone()
            poisoned[:, :, key] = math.nan
            sees = visible[..., key]
            reached = (visible & sees[..., None]).any(-2)
            reached[..., key] = sees.any(-1)
            got = gradients(fastattn.attention, {"q": q, "k": k, "v": v, "mask": prepared}, dout)
            assert torch.equal(got["q"].isnan().any(-1), sees)
            for n in "kv":
                # NaN in v leaves the probabilities whole, and with them dv.
                expected = reached if poisoned is k or n == "k" else torch.zeros_like(reached)
                assert torch.equal(got[n].isnan().any(-1), expected)
                assert torch.equal(got[n][~expected], clean[n][~expected])
            poisoned[:, :, key] = kept


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 64, 130])
def test_nan_of_rows_that_see_nothing(isa, width, dtype):
    q, k, v, dout = inputs(1, 2, 1, 70, 70, width, width, dtype)
    mask = torch.rand(70, 70) < 0.5
    mask[[0, 33, 69]] = False
    clean = gradients(fastattn.attention, {"q": q, "k": k, "v": v, "mask": mask}, dout)
    for row, column in zip((0, 33, 69), (0, width // 2, width - 1)):
        q[:, :, row, column] = math.nan
        dout[:, :, row, column] = math.inf
    poisoned = gradients(fastattn.attention, {"q": q, "k": k, "v": v, "mask": mask}, dout)
    assert all(torch.equal(clean[n], poisoned[n]) for n in clean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("case", ["q", "q of softcap", "dout", "dout of v = 0"])
def test_a_row_that_is_not_finite_reaches_only_what_it_sees(isa, case, poison, dtype):
    """Also where its lse and out are finite, or where its scores are all -inf."""
    q, k, v, dout = inputs(1, 2, 1, 70, 70, 64, 64, dtype)
    mask = torch.rand(70, 70) < 0.5
    k[..., 5] = k[..., 5].abs()
    if case == "dout of v = 0":
        v.zero_()
    leaves = {"q": q, "k": k, "v": v, "mask": mask}
    if case == "q of softcap":
        leaves["softcap"] = 20.0
    clean = gradients(fastattn.attention, leaves, dout)
    (q if case.startswith("q") else dout)[:, :, 37, 5] = poison
    got = gradients(fastattn.attention, leaves, dout)
    others = torch.arange(70) != 37
    assert torch.equal(got["q"][:, :, others], clean["q"][:, :, others])
    for name in "kv":
        assert torch.equal(got[name][:, :, ~mask[37]], clean[name][:, :, ~mask[37]])
    name, rows = ("k", mask[37]) if case.startswith("q") else ("v", mask[37])
    assert not torch.isfinite(got[name][:, :, rows]).all() or case == "q of softcap"


def test_nan_under_a_bias_of_minus_infinity(isa):
    q, k, v, dout = inputs(1, 2, 2, 70, 70, 16, 16)
    bias = randn(2, 70, 70)
    bias[:, :40, 10] = -math.inf
    for poisoned in (k, v):
        kept = poisoned.clone()
        poisoned[:, :, 10] = math.nan
        got = gradients(fastattn.attention, {"q": q, "k": k, "v": v, "bias": bias}, dout)
        for name, rows in (("q", got["q"]), ("bias", got["bias"].unsqueeze(0))):
            assert not rows[:, :, :40].isnan().any() and rows[:, :, 40:].isnan().any(-1).all(), name
        poisoned.copy_(kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_in_fp32_that_is_infinite_in_the_dtype_of_q(isa, dtype):
    q, k, v, dout = inputs(1, 2, 2, 70, 70, 64, 64, dtype)
    dout = dout.float()
    visible = masks.Causal().to_dense(70, 70, 1, 2)
    out, lse = reference.attention(q.float(), k.float(), v.float(), mask=visible, return_lse=True)
    out[:, :, 37, 5] = 0.5
    clean = backward_op(dout, q, k, v, out, lse, band_hi=0)
    dout[:, :, 37, 5] = torch.finfo(torch.float32).max
    got = backward_op(dout, q, k, v, out, lse, band_hi=0)
    assert torch.equal(got[0][:, :, :37], clean[0][:, :, :37])
    for ours, before in zip(got[1:3], clean[1:3]):
        assert torch.equal(ours[:, :, 38:], before[:, :, 38:])

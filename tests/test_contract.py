"""The committed fixture: one dropout stream and one lowered form for every backend, bit for bit."""

import json

import pytest
import torch
from fixtures.make import MASKS, PATH, lowered_form

import fastattn
from fastattn import reference
from fastattn.masks import native

CONTRACT = json.loads(PATH.read_text())
DROPOUT = CONTRACT["dropout"]


def expected_keep(case):
    _, _, B, H, Sq, Sk, _, _ = case["call"]
    rows = [[int(row, 16) >> n & 1 for n in range(Sk)] for row in case["keep"]]
    return torch.tensor(rows, dtype=torch.bool).view(B, H, Sq, Sk)


def positions(case, dim):
    length, first = case["call"][4 + dim], case["call"][6 + dim]
    return torch.arange(first, first + length)


@pytest.mark.parametrize("case", DROPOUT, ids=lambda c: f"seed{c['call'][0]}")
def test_the_reference_draws_the_committed_bits(case):
    seed, p, B, H = case["call"][:4]
    keep = reference.dropout_keep(seed, B, H, positions(case, 0), positions(case, 1), p)
    assert torch.equal(keep, expected_keep(case))


@pytest.mark.parametrize(
    "case", [c for c in DROPOUT if c["call"][6:] == [0, 0]], ids=lambda c: f"seed{c['call'][0]}"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set_drops_the_committed_bits(case, dtype, isa):
    """Equal scores and values that pick a key each: an output is not 0 exactly where its weight was kept."""
    seed, p, B, H, Sq, Sk, _, _ = case["call"]
    q, k = torch.zeros(B, H, Sq, 32, dtype=dtype), torch.zeros(B, H, Sk, 32, dtype=dtype)
    v = torch.eye(Sk, dtype=dtype).expand(B, H, Sk, Sk).contiguous()
    out = fastattn.attention(q, k, v, dropout_p=p, dropout_seed=seed, backend="cpu")
    assert torch.equal(out != 0, expected_keep(case))


@pytest.mark.parametrize(
    "case", [c for c in DROPOUT if c["call"][6:] == [0, 0]], ids=lambda c: f"seed{c['call'][0]}"
)
def test_the_backward_drops_the_same(case, isa):
    """dV[j] sums what dO says of the rows that kept key j."""
    seed, p, B, H, Sq, Sk, _, _ = case["call"]
    q, k = torch.zeros(B, H, Sq, 32), torch.zeros(B, H, Sk, 32)
    v = torch.zeros(B, H, Sk, Sq, requires_grad=True)
    out = fastattn.attention(q, k, v, dropout_p=p, dropout_seed=seed, backend="cpu")
    (dv,) = torch.autograd.grad(out, v, torch.eye(Sq).expand(B, H, Sq, Sq).contiguous())
    assert torch.equal((dv != 0).mT, expected_keep(case))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("built", ["native", "torch"])
def test_masks_lower_to_the_committed_form(name, built, monkeypatch):
    monkeypatch.setattr(native, "enabled", built == "native")
    form = lowered_form(name)
    committed = CONTRACT["masks"][name]
    if built == "torch" and "bit_tiles" in form:  # tiles may be numbered in another order: compare by content
        form, committed = by_content(form), by_content(committed)
    assert form == committed


def by_content(form):
    tiles = form["bit_tiles"]
    named = dict(form)
    for key in ("block_list", "block_list_t"):
        named[key] = [[at, tile if tile < 0 else tiles[tile]] for at, tile in form[key]]
    named["bit_tiles"] = sorted(tiles)
    return named

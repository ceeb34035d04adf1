"""The backward on tiles: what its own products add to the tests of test_attention_backward.py, which run on it too.

Every test runs on the emulated tiles, and on the real ones where the machine has them.
"""

import math

import pytest
import torch
from test_attention_backward import check, gradients, inputs, randn, route

import fastattn
from fastattn import _info, masks
from fastattn._library import force_isa

TILES = [name for name in _info.available_isas() if name.startswith("amx")]
HALF = 32  # a side of the blocks that are skipped


@pytest.fixture(params=TILES or [pytest.param(None, marks=pytest.mark.skip("needs AVX512_BF16"))])
def tiles(request):
    force_isa(request.param)
    yield request.param
    force_isa(_info.isa())


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def dtype(request):
    return request.param


def leaves_of(dtype, *shape):
    q, k, v, dout = inputs(*shape, dtype)
    return {"q": q, "k": k, "v": v}, dout


def assert_same(a, b):
    assert all(torch.equal(a[name], b[name]) for name in b)


# Multiples of 32 and their neighbours, odd ones, and more than one 32 x 32 block of products either way.
WIDTHS = [(32, 32), (64, 64), (128, 128), (256, 64), (64, 288), (1, 1), (7, 19), (33, 31), (80, 136), (97, 1)]


@pytest.mark.parametrize("widths", WIDTHS)
def test_widths(tiles, dtype, widths):
    check(*leaves_of(dtype, 1, 2, 1, 70, 200, *widths))
    leaves, dout = leaves_of(dtype, 1, 2, 2, 130, 131, *widths)
    check(leaves | {"mask": masks.Causal().to_dense(130, 131, 1, 2)}, dout)


@pytest.mark.parametrize("Sq", [1, 2, 31, 32, 33, 63, 64, 65, 97, 300])
def test_lengths(tiles, dtype, Sq):
    """Halves and granules that end early; 300 queries are more tiles than are summed up together."""
    for Sk in (31, 33, 64, 150):
        check(*leaves_of(dtype, 1, 2, 2, Sq, Sk, 64, 64))


@pytest.mark.parametrize("seed", range(6))
def test_blocks_that_see_nothing(tiles, dtype, seed, threads):
    """Blocks of 32 x 32 left out at random: one half of a tile after the same half of the one before, and so on."""
    torch.manual_seed(seed)
    live = torch.rand(1, 2, 11, 9) < (0.2, 0.5, 0.8)[seed % 3]
    mask = live.repeat_interleave(HALF, 2).repeat_interleave(HALF, 3)[:, :, :330, :270]
    if seed > 2:
        mask = mask & (torch.rand(mask.shape) < 0.3)
    leaves, dout = leaves_of(dtype, 2, 2, 1, 330, 270, 40, 64)
    want = check(leaves | {"mask": mask}, dout)
    for count in (2, 3, 7):
        threads(count)
        assert_same(gradients(fastattn.attention, leaves | {"mask": mask}, dout), want)


@pytest.mark.parametrize("shape", [(1, 4, 2, 200, 333, 64, 64), (3, 2, 2, 150, 140, 72, 33)], ids=str)
@pytest.mark.parametrize("features", ["none", "causal", "dropout and bias"])
def test_taskings_and_thread_counts_give_the_same_bits(tiles, dtype, shape, features, threads, task_order):
    leaves, dout = leaves_of(dtype, *shape)
    if features == "causal":
        leaves["mask"] = masks.CausalLowerRight()
    if features == "dropout and bias":
        leaves |= {
            "bias": randn(1, shape[1], shape[3], shape[4]),
            "dropout_p": 0.2,
            "dropout_seed": torch.tensor(3),
        }
    threads(1)
    want, routes = gradients(fastattn.attention, leaves, dout), {route()}
    for count in (1, 2, 3, 16):
        for seed in (0, 5):
            threads(count)
            task_order(seed)
            assert_same(gradients(fastattn.attention, leaves, dout), want)
            routes.add(route())
    assert len(routes) > 1


def test_an_item_alone_has_the_bits_it_has_in_a_batch(tiles, dtype):
    leaves, dout = leaves_of(dtype, 4, 4, 2, 130, 133, 64, 64)
    lengths = torch.tensor([133, 1, 64, 100])
    want = gradients(fastattn.attention, leaves | {"mask": masks.KeyPadding(lengths)}, dout)
    for b in range(4):
        one = {name: t[b : b + 1] for name, t in leaves.items()} | {
            "mask": masks.KeyPadding(lengths[b : b + 1])
        }
        got = gradients(fastattn.attention, one, dout[b : b + 1])
        assert all(torch.equal(want[name][b : b + 1], got[name]) for name in got)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("D", [64, 50])
def test_hidden_numbers_change_no_bit(tiles, dtype, poison, D):
    """A key and a query that nobody sees, and one of each that one other sees."""
    leaves, dout = leaves_of(dtype, 1, 2, 1, 140, 150, D, D)
    seen = torch.rand(140, 150) < 0.5
    seen[:, 11], seen[70] = False, False
    seen[:, 90], seen[33] = torch.arange(140) == 5, torch.arange(150) == 7
    clean = gradients(fastattn.attention, leaves | {"mask": seen}, dout)
    bad, bad_dout = {name: t.clone() for name, t in leaves.items()}, dout.clone()
    bad["q"][:, :, 70], bad_dout[:, :, 70] = poison, poison
    bad["k"][:, :, 11], bad["v"][:, :, 11] = poison, poison
    assert_same(gradients(fastattn.attention, bad | {"mask": seen}, bad_dout), clean)
    bad["k"][:, :, 90], bad_dout[:, :, 33] = poison, poison
    got = gradients(fastattn.attention, bad | {"mask": seen}, bad_dout)
    touched = seen[5] | (torch.arange(150) == 7)  # keys that row 5 sees, and the one that row 33 sees
    rows = (torch.arange(140) != 5) & (torch.arange(140) != 33)
    assert torch.equal(got["q"][:, :, rows], clean["q"][:, :, rows])
    for name in "kv":
        assert torch.equal(got[name][:, :, ~touched], clean[name][:, :, ~touched])
    assert not torch.isfinite(got["q"][:, :, 5]).any() and not torch.isfinite(got["v"][:, :, 7]).any()


def test_rows_in_place_and_copied_give_the_same_bits(tiles, dtype):
    leaves, dout = leaves_of(dtype, 2, 2, 2, 100, 150, 64, 64)
    want = gradients(fastattn.attention, leaves, dout)

    def apart(t):
        return torch.cat([t, torch.full_like(t, math.nan)], -1)[..., :64]

    assert_same(
        gradients(lambda q, k, v, **rest: fastattn.attention(apart(q), apart(k), apart(v)), leaves, dout),
        want,
    )
    assert_same(gradients(lambda q, k, v, **rest: fastattn.attention(q, k, v), leaves, apart(dout)), want)


def test_more_query_blocks_than_a_thread_keeps(tiles, dtype):
    check(*leaves_of(dtype, 1, 1, 1, 16500, 3, 256, 256))


def backward_on(isa, leaves, dout):
    """The backward of a forward on vectors: on tiles, that of float16 has NaN for an infinite key or query."""

    def attend(*qkv, **given):
        force_isa("avx512")
        out = fastattn.attention(*qkv, **given)
        force_isa(isa)
        return out

    return gradients(attend, leaves, dout)


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_a_number_that_is_not_finite_gives_what_vectors_give(tiles, dtype, name, poison):
    """Infinities of a sum in parts, where a part that is 0 times infinity must not become NaN."""
    leaves, dout = leaves_of(dtype, 1, 2, 1, 70, 100, 40, 40)
    (leaves | {"dout": dout})[name][:, :, 37, 5] = poison
    leaves["mask"] = masks.Causal().to_dense(70, 100, 1, 2)
    want, got = backward_on("avx512", leaves, dout), backward_on(tiles, leaves, dout)
    tolerance = 4e-3 if dtype == torch.float16 else 4e-2
    for leaf in want:
        torch.testing.assert_close(got[leaf], want[leaf], rtol=tolerance, atol=tolerance, equal_nan=True)


def test_weights_and_scores_of_every_magnitude(tiles, dtype):
    """Large logits, where the products of low parts count, and gradients from 2^-20 to 2^9 of a half."""
    leaves, dout = leaves_of(dtype, 1, 2, 1, 150, 130, 64, 64)
    leaves["q"] *= 12
    dout *= torch.logspace(-20, 9, 150, base=2).to(dtype)[:, None]
    check(leaves, dout)


@pytest.mark.parametrize("features", ["dropout", "causal"])
def test_rows_that_see_nothing_get_nothing(tiles, dtype, features):
    leaves, dout = leaves_of(dtype, 2, 2, 1, 130, 100, 40, 64)
    mask = torch.rand(130, 100) < 0.5
    mask[[0, 63, 64, 129]] = False
    mask[:, [0, 50, 99]] = False
    if features == "dropout":
        leaves |= {"dropout_p": 0.3, "dropout_seed": torch.tensor(3)}
    else:
        mask &= torch.ones(130, 100, dtype=torch.bool).tril()
    got = check(leaves | {"mask": mask}, dout)
    assert not got["q"][:, :, ~mask.any(1)].any()
    assert not got["k"][:, :, ~mask.any(0)].any() and not got["v"][:, :, ~mask.any(0)].any()

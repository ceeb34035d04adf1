"""Attention on tiles: what its own algorithm adds to the tests of test_attention.py, which run on it too.

Every test runs on the emulated tiles, and on the real ones where the machine has them.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import _info, masks, reference
from fastattn._library import force_isa
from fastattn.tools.equivalence import check_visible, error_rule

TILES = [name for name in _info.available_isas() if name.startswith("amx")]
HALVES = [torch.bfloat16, torch.float16]
GRANULE = 64


@pytest.fixture(params=TILES or [pytest.param(None, marks=pytest.mark.skip("needs AVX512_BF16"))])
def tiles(request):
    force_isa(request.param)
    yield request.param
    force_isa(_info.isa())


def inputs(B, Hq, Hkv, Sq, Sk, D, Dv, dtype):
    shapes = (B, Hq, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, Dv)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def attend(q, k, v, mask, integers=False):
    """out and lse. `integers`: out of a call that does not ask for lse, whose weights are made by integers."""
    out, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True)
    return (fastattn.attention(q, k, v, mask=mask) if integers else out), lse


# What makes the weights: fp32 in both, and integers in bf16.
WAYS = [(torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)]


def assert_right(q, k, v, mask=None, **features):
    """out by the error rule, beside torch's error where torch has the features; lse closely."""
    dense = mask if mask is None else mask.to_dense(q.shape[2], k.shape[2], *q.shape[:2])
    bias = features.get("bias")
    wide = dict(features, bias=None if bias is None else bias.double())
    exact, exact_lse = reference.attention(
        q.double(), k.double(), v.double(), mask=dense, return_lse=True, **wide
    )
    theirs = None
    if not features:
        heads = q.shape[1] // k.shape[1]
        k2, v2 = (t.repeat_interleave(heads, 1) for t in (k, v))
        theirs = F.scaled_dot_product_attention(q, k2, v2, attn_mask=dense)
    out, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True, **features)
    scale = 1 / (1 - features.get("dropout_p", 0))
    magnitude = scale * v.abs().max().item()
    for ours in [out] if features else [out, fastattn.attention(q, k, v, mask=mask)]:
        verdict = error_rule(ours, exact, theirs, magnitude=magnitude)
        assert verdict, verdict.reason
    seen = exact_lse != -math.inf
    assert torch.equal(lse != -math.inf, seen)
    assert (lse - exact_lse)[seen].abs().max() < 2e-5 * exact_lse[seen].abs().max().clamp(1)


# Multiples of 32 and their neighbours; 1 to 4 and more tile products at a step of the softmax.
WIDTHS = [(32, 32), (64, 64), (96, 96), (128, 128), (256, 256), (64, 256), (192, 32), (288, 320)]
WIDTHS += [(1, 1), (7, 19), (33, 31), (72, 40), (80, 136), (97, 1), (1, 130)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("widths", WIDTHS)
def test_widths(tiles, dtype, widths):
    assert_right(*inputs(1, 2, 1, 70, 200, *widths, dtype))
    assert_right(*inputs(1, 2, 2, 130, 131, *widths, dtype), mask=masks.Causal())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("Sq", [1, 15, 16, 17, 31, 32, 33, 48, 49, 63, 64, 65, 97])
def test_query_lengths(tiles, dtype, Sq):
    """One strip of 16 queries to four, one half of a task and both."""
    for Sk in (1, 31, 33, 64, 150):
        assert_right(*inputs(1, 2, 2, Sq, Sk, 64, 64, dtype))


FEATURES = {
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi_slopes": torch.tensor([[0.5, 0.25, 0.125, 0.0625]] * 2)},
    "bias of rows": {"bias": torch.randn(2, 4, 101, 1, generator=torch.Generator().manual_seed(1))},
    "bias of keys": {"bias": torch.randn(1, 1, 1, 170, generator=torch.Generator().manual_seed(2))},
    "bias": {"bias": torch.randn(1, 4, 101, 170, generator=torch.Generator().manual_seed(3))},
    "sinks": {"sinks": torch.tensor([0.0, 3.0, -2.0, 1.0])},
    "scale 0": {"scale": 0.0},
    "negative scale": {"scale": -0.3},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 11},
}
FEATURES["all"] = {
    k: v for name in ("softcap", "alibi", "bias", "sinks", "dropout") for k, v in FEATURES[name].items()
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("D", [64, 128, 200])
@pytest.mark.parametrize("features", FEATURES)
def test_features(tiles, dtype, D, features):
    q, k, v = inputs(2, 4, 2, 101, 170, D, 48, dtype)
    assert_right(q, k, v, **FEATURES[features])
    assert_right(q, k, v, mask=masks.CausalLowerRight() & masks.SlidingWindow(50, 9), **FEATURES[features])


def granules(seen):
    """A mask of 64 x 64 granules, given a letter each: full, empty, upper or lower half of the rows, one key.

    A task works through halves of granules, two halves at a time: a sequence that leaves one out takes
    another way.
    """
    rows = []
    for line in seen:
        blocks = []
        for letter in line:
            block = torch.zeros(GRANULE, GRANULE, dtype=torch.bool)
            block[
                {"f": slice(None), "u": slice(0, 32), "l": slice(32, 64), "e": slice(0, 0)}.get(letter, 3)
            ] = True
            if letter == "k":
                block[:] = False
                block[40, 50] = True
            blocks.append(block)
        rows.append(torch.cat(blocks, 1))
    return torch.cat(rows)


SEQUENCES = [
    "uuu",
    "lll",
    "ulul",
    "lulu",
    "ulfful",
    "fufl",
    "kkk",
    "ukkl",
    "eke",
    "fee",
    "eef",
    "leuel",
    "ffff",
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sequence", SEQUENCES)
def test_sequences_of_granules_exactly(tiles, way, sequence):
    whole = granules([sequence, sequence[::-1]])
    for Sq, Sk in (whole.shape, (100, whole.shape[1] - 9), (20, whole.shape[1])):
        mask = whole[:Sq, :Sk].contiguous()
        result = check_visible(
            lambda q, k, v, mask=mask: attend(q, k, v, mask, way[1]), mask, 1, 2, 1, way[0]
        )
        assert result, str(result)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("D", [32, 64, 128, 256])
def test_random_bits_exactly(tiles, way, D):
    """Whatever the tiles do meanwhile, and whatever runs of keys and halves fall away."""
    for share in (0.5, 0.02, 0.001):
        mask = torch.rand(2, 1, 150, 330) < share
        result = check_visible(
            lambda q, k, v, mask=mask: attend(q, k, v, mask, way[1]), mask, 2, 4, 2, way[0], D=D, Dv=96
        )
        assert result, str(result)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("D", [64, 80])
def test_hidden_numbers_change_no_bit(tiles, way, poison, D):
    dtype, integers = way
    q, k, v = inputs(2, 4, 2, 100, 200, D, 64, dtype)
    seen = torch.rand(100, 200) > 0.4
    seen[:, 11] = False
    seen[:, 77] = torch.arange(100) == 5
    clean, clean_lse = attend(q, k, v, seen, integers)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 11], v2[:, :, 11], v2[:, :, 77] = poison, poison, poison
    out, lse = attend(q, k2, v2, seen, integers)
    others = torch.arange(100) != 5
    assert torch.equal(out[:, :, others], clean[:, :, others]) and torch.equal(lse, clean_lse)
    assert not torch.isfinite(out[:, :, 5]).any()
    k2[:, :, 77, 3] = poison  # a score that is not finite, for one row
    out, lse = attend(q, k2, v2, seen, integers)
    assert torch.equal(out[:, :, others], clean[:, :, others])
    assert torch.equal(lse[:, :, others], clean_lse[:, :, others])


@pytest.mark.parametrize("dtype", HALVES)
def test_same_bits_at_every_thread_count_and_order(tiles, dtype, threads, task_order):
    """What a thread keeps of a head it has packed must not show."""
    q, k, v = inputs(2, 6, 2, 200, 333, 64, 64, dtype)
    for mask in (None, masks.CausalLowerRight()):

        def run(mask=mask):
            dropped = fastattn.attention(q, k, v, mask=mask, dropout_p=0.2, dropout_seed=5, return_lse=True)
            return *dropped, fastattn.attention(q, k, v, mask=mask)

        threads(1)
        expected = run()
        for n in (1, 2, 3):
            threads(n)
            for seed in (0, 1, 17):
                task_order(seed)
                for a, b in zip(run(), expected, strict=True):
                    assert torch.equal(a, b)
            task_order(0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("Sq", [3, 70])
def test_same_bits_alone_and_in_a_batch(tiles, dtype, Sq):
    q, k, v = inputs(5, 4, 2, Sq, 133, 64, 64, dtype)
    lengths = torch.tensor([133, 1, 64, 65, 100])
    whole = fastattn.attention(q, k, v, mask=masks.KeyPadding(lengths))
    for b in range(5):
        row = slice(b, b + 1)
        alone = fastattn.attention(q[row], k[row], v[row], mask=masks.KeyPadding(lengths[row]))
        assert torch.equal(alone, whole[row])


@pytest.mark.parametrize("dtype", HALVES)
def test_a_call_forgets_what_the_one_before_packed(tiles, dtype, threads):
    threads(1)
    q, k, v = inputs(1, 2, 1, 70, 150, 64, 64, dtype)
    first = fastattn.attention(q, k, v)
    k *= -1
    v += 1
    second = fastattn.attention(q, k, v)
    assert not torch.equal(first, second)
    assert torch.equal(second, fastattn.attention(q, k.clone(), v.clone()))


@pytest.mark.parametrize("dtype", HALVES)
def test_keys_in_place_and_copied_give_the_same_bits(tiles, dtype):
    """Adjacent rows of 64 numbers are read where they lie; rows further apart are packed."""
    q, k, v = inputs(2, 2, 2, 100, 150, 64, 64, dtype)
    expected = fastattn.attention(q, k, v)
    apart = torch.cat([k, torch.full_like(k, math.nan)], -1)[..., :64]
    assert not apart.is_contiguous()
    assert torch.equal(fastattn.attention(q, apart, v), expected)
    heads_last = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(fastattn.attention(*heads_last), expected)


def test_heads_longer_than_a_thread_keeps(tiles):
    """A head of 16384 keys, 256 wide, apart from each other, fills what is kept: the rest is packed again."""
    q, _, _ = inputs(1, 1, 1, 70, 1, 256, 256, torch.bfloat16)
    k, v = (torch.randn(1, 1, 17000, 264).bfloat16()[..., :256] for _ in "kv")
    exact = reference.attention(q.double(), k.double(), v.double())
    verdict = error_rule(fastattn.attention(q, k, v), exact, F.scaled_dot_product_attention(q, k, v))
    assert verdict, verdict.reason


def test_denormals_are_zero(tiles):
    """The tiles take bf16 denormals as 0, so the emulated ones have to."""
    q, k, v = inputs(1, 1, 1, 16, 64, 32, 32, torch.bfloat16)
    q = torch.full_like(q, 2.0**-127)
    lse = fastattn.attention(q, k * 2.0**126, v, return_lse=True)[1]
    assert torch.equal(lse, torch.full_like(lse, math.log(64)))


def test_emulation_is_never_chosen_by_itself():
    environment = {name: value for name, value in os.environ.items() if name != "FASTATTN_ISA"}

    def run(code, isa=None):
        extra = {"FASTATTN_ISA": isa} if isa else {}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment | extra, capture_output=True, text=True
        )

    code = "from fastattn import _info; print(_info.isa(), '|', _info.isa_reason())"
    chosen, reason = run(code).stdout.strip().split(" | ")
    assert chosen != "amx_emulated" and "amx_emulated" not in reason
    if "amx_emulated" in TILES:
        assert run(code, "amx_emulated").stdout.startswith("amx_emulated | forced")
    if "amx" in TILES:
        assert chosen == "amx"
    else:
        failed = run("import fastattn", "amx")
        assert failed.returncode != 0 and "lacks" in failed.stderr and "amx" in failed.stderr


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("factor", [1, 40])
def test_scores_that_outgrow_their_pivots(tiles, dtype, factor):
    """A row's pivot comes from the keys it met first; what is much larger later takes another, in any unit."""
    q, k, v = inputs(1, 2, 2, 130, 400, 64, 64, dtype)
    k *= torch.logspace(-2, 0, 400, 10.0)[:, None].to(dtype) * factor
    assert_right(q, k, v)
    assert_right(q, k, v, mask=masks.CausalLowerRight())
    k[0, 0, 390] = 10 * q[0, 0, 100]  # one row, in the last unit of the second pass of its task
    assert_right(q, k, v)


@pytest.mark.parametrize("where", [3, 70, 199])
def test_a_nan_that_is_seen_reaches_the_lse(tiles, where):
    """In the unit that sets the pivot, in later ones and at the end."""
    q, k, v = inputs(1, 2, 2, 70, 200, 64, 64, torch.bfloat16)
    k[0, 0, where] = math.nan
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    assert out[0, 0].isnan().all() and lse[0, 0].isnan().all()
    assert out[0, 1].isfinite().all() and lse[0, 1].isfinite().all()
    alone = fastattn.attention(q, k, v)
    assert alone[0, 0].isnan().all() and alone[0, 1].isfinite().all()


def plain_weights(q, k, mask=None):
    """The weights [Sq, Sk] that a call without lse gives 128 keys: its outputs, where values are unit vectors."""
    keys = k.shape[2]
    v = torch.eye(keys, dtype=torch.bfloat16)[None, None]
    return torch.cat([fastattn.attention(q, k, part, mask=mask, scale=1.0) for part in v.split(64, -1)], -1)[
        0, 0
    ]


def test_weights_by_integers_are_close(tiles):
    """Each to 1 % of itself, down to 2^-100 of the largest; their own rounding and that of the output count 4e-3."""
    q = torch.zeros(1, 1, 64, 32, dtype=torch.bfloat16)
    k = torch.zeros(1, 1, 128, 32, dtype=torch.bfloat16)
    q[..., 0], q[..., 1] = 1, torch.linspace(0.1, 120, 64).bfloat16()
    k[..., 0], k[..., 1] = torch.rand(128).bfloat16(), -torch.rand(128).bfloat16()
    ours = plain_weights(q, k).double()
    exact = (q.double() @ k.double().mT)[0, 0].softmax(-1)
    large = exact > 2.0**-100
    assert (ours / exact - 1)[large].abs().max() < 1e-2
    assert 0.7 < large.float().mean() < 0.99 and ours[~large].max() < 2.0**-98


def test_weights_by_integers_where_scores_are_extreme(tiles):
    """Equal keys share at any height; keys far below are 0, and one far above leaves nothing to the rest.

    Differences of more than 16384 octaves no integer holds: then fp32 makes the weights, to its rounding to bf16.
    """
    for height in (0.0, 1e3, -1e3, 8e3, -8e3, 3e4, -3e4, 1e6, -1e6):
        q = torch.ones(1, 1, 16, 32, dtype=torch.bfloat16)
        k = torch.full((1, 1, 128, 32), height / 32, dtype=torch.bfloat16)
        assert torch.equal(plain_weights(q, k), torch.full((16, 128), 1 / 128, dtype=torch.bfloat16))
        k[0, 0, 100, 0] += max(abs(height), 300.0)
        alone = (torch.arange(128) == 100).bfloat16().expand(16, 128)
        ours = plain_weights(q, k)
        assert torch.equal(ours, alone) if abs(height) < 1e4 else (ours - alone).abs().max() <= 2**-8
        hidden = torch.arange(128) != 100
        assert torch.equal(plain_weights(q, k, hidden[None]), (hidden / 127).bfloat16().expand(16, 128))


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.nan])
@pytest.mark.parametrize("where", [3, 70, 127])
def test_weights_by_integers_of_numbers_that_are_not_finite(tiles, score, where):
    """NaN of either sign and infinity are in no range: where they are seen the row is NaN."""
    q, k, v = inputs(1, 1, 1, 40, 128, 32, 32, torch.bfloat16)
    k[0, 0, where, 5] = score
    lost = torch.full((40,), math.isnan(score)) | (q[0, 0, :, 5] > 0)  # the others' score is -inf
    out = fastattn.attention(q, k, v)[0, 0]
    assert out[lost].isnan().all() and out[~lost].isfinite().all()
    hidden = torch.arange(128) != where
    assert fastattn.attention(q, k, v, mask=hidden[None]).isfinite().all()


def test_one_key_alone_is_its_value(tiles):
    q, k, v = inputs(2, 2, 2, 70, 70, 64, 64, torch.bfloat16)
    for integers in (False, True):
        assert torch.equal(attend(q, k, v, torch.eye(70, dtype=torch.bool), integers)[0], v)

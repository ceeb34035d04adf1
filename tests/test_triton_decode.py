"""Few query rows on Triton: keys in splits, packed heads, and the same bits whatever the batch."""

import math

import pytest
import torch

import fastattn
from fastattn import _triton, masks, reference
from fastattn.tools.equivalence import check_visible, error_rule


@pytest.fixture(autouse=True)
def device(triton_device):
    with torch.device(triton_device):
        yield triton_device


def inputs(B, Hq, Hkv, Sq, Sk, D, dtype=torch.float32):
    return (
        torch.randn(B, Hq, Sq, D).to(dtype),
        torch.randn(B, Hkv, Sk, D).to(dtype),
        torch.randn(B, Hkv, Sk, D).to(dtype),
    )


def attention(*arguments, **keywords):
    return fastattn.attention(*arguments, backend="triton", **keywords)


def splits_of(q, k, v):
    text = fastattn.explain(q, k, v, backend="triton").detail
    return int(text.split(" splits")[0].split()[-1]) if "splits" in text else 1


# Sq, heads of q and of k, Sk, and in how many splits.
ROUTES = [
    (1, 8, 2, 512, 1),
    (1, 8, 2, 513, 2),
    (1, 1, 1, 1100, 3),
    (3, 6, 2, 1025, 3),
    (64, 2, 2, 600, 2),
    (65, 2, 2, 600, 1),
    (33, 2, 1, 600, 1),  # packed into 66 rows: tiles of the attention kernel
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("Sq, Hq, Hkv, Sk, splits", ROUTES)
def test_routes(Sq, Hq, Hkv, Sk, splits, dtype):
    q, k, v = inputs(2, Hq, Hkv, Sq, Sk, 32, dtype)
    assert splits_of(q, k, v) == splits
    features = {
        "sinks": torch.randn(Hq),
        "dropout_p": 0.2,
        "dropout_seed": 5,
        "alibi_slopes": torch.rand(Hq) * 0.01,
    }
    mask = masks.CausalLowerRight()
    wide = [t.double() for t in (q, k, v)]
    dense = mask.to_dense(Sq, Sk).to(q.device)
    right, right_lse = reference.attention(*wide, mask=dense, return_lse=True, **features)
    out, lse = attention(q, k, v, mask=mask, return_lse=True, **features)
    verdict = error_rule(out, right, None, magnitude=2 * v.abs().max().item())
    assert verdict, verdict.reason
    assert (lse - right_lse).abs().max() < 1e-5


MASKS = {
    "padding": masks.KeyPadding([1000, 3]),
    "window": masks.SlidingWindow(40, 0, lower_right=True),
    "longformer": masks.Longformer(100, 2),
    "documents": masks.Documents([0, 2, 700, 1030]),
}


@pytest.mark.parametrize("mask", MASKS)
def test_every_row_sees_exactly_its_keys(device, mask):
    """Splits that see nothing, rows that see nothing, and bits cut at every split."""
    Sq, Sk = (1030, 1030) if mask == "documents" else (4, 1030)
    shown = MASKS[mask].to_dense(Sq, Sk, 2, 4)[:, :, :4]
    given = shown if mask == "documents" else MASKS[mask]
    result = check_visible(
        lambda q, k, v: attention(q, k, v, mask=given, return_lse=True), shown.to(device), 2, 4, 2, device=device,
        D=16, Dv=32,
    )  # fmt: skip
    assert result, str(result)


def test_random_bits_across_the_splits(device):
    shown = torch.rand(2, 1, 5, 1100) > 0.9
    shown[:, :, :, 512:1024] = False
    shown[1, :, 2] = False
    result = check_visible(
        lambda q, k, v: attention(q, k, v, mask=shown, return_lse=True),
        shown,
        2,
        4,
        2,
        device=device,
        D=16,
        Dv=32,
    )
    assert result, str(result)


@pytest.mark.parametrize("Hkv", [1, 4])
def test_same_bits_alone_and_in_a_batch(Hkv):
    q, k, v = inputs(4, 4, Hkv, 1, 1100, 32)
    lengths = torch.tensor([1100, 1, 600, 512])
    whole, whole_lse = attention(q, k, v, mask=masks.KeyPadding(lengths), return_lse=True)
    for b in range(4):
        one = [t[b : b + 1] for t in (q, k, v)]
        out, lse = attention(*one, mask=masks.KeyPadding(lengths[b : b + 1]), return_lse=True)
        assert torch.equal(out[0], whole[b]) and torch.equal(lse[0], whole_lse[b])


def test_a_longer_cache_leaves_full_splits_alone():
    """Keys that are hidden by their length change nothing, not to the bit; nor does a NaN among them come out."""
    q, k, v = inputs(1, 4, 2, 1, 1600, 32)
    exact = attention(q, k[:, :, :700], v[:, :, :700])
    assert torch.equal(attention(q, k, v, mask=masks.KeyPadding([700])), exact)
    k[:, :, 700:], v[:, :, 700:] = math.nan, math.nan
    torch.testing.assert_close(attention(q, k, v, mask=masks.KeyPadding([700])), exact)


def test_more_splits_than_a_step_of_the_merge(monkeypatch):
    launch = _triton.module("launch")
    monkeypatch.setattr(launch, "DECODE_SPLIT", 64)
    q, k, v = inputs(1, 2, 1, 1, 18 * 64 - 7, 16)
    assert splits_of(q, k, v) == 18 > _triton.module("decode").CHUNK
    right = reference.attention(*(t.double() for t in (q, k, v)))
    verdict = error_rule(attention(q, k, v), right, None, magnitude=v.abs().max().item())
    assert verdict, verdict.reason


def test_rows_of_two_blocks_in_splits(device, monkeypatch):
    """64 packed rows in tiles of 32, as the launch table has them for fp32."""
    if device.type == "cuda":
        pytest.skip("a GPU runs its own row")
    monkeypatch.setattr(_triton.module("launch"), "architecture", lambda device: "sm_80")
    q, k, v = inputs(2, 4, 2, 30, 600, 32)
    assert "32 x 16 tiles" in str(fastattn.explain(q, k, v, backend="triton"))
    verdict = error_rule(
        attention(q, k, v),
        reference.attention(*(t.double() for t in (q, k, v))),
        None,
        magnitude=v.abs().max().item(),
    )
    assert verdict, verdict.reason


def test_the_head_sizes_of_the_merge():
    for D in (8, 40, 96, 256):
        q, k, v = inputs(1, 2, 1, 2, 600, D)
        right = reference.attention(*(t.double() for t in (q, k, v)))
        verdict = error_rule(attention(q, k, v), right, None, magnitude=v.abs().max().item())
        assert verdict, verdict.reason

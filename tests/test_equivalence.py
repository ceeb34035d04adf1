"""The oracle itself: right results pass, and planted bugs are caught."""

import math

import pytest
import torch

from fastattn import reference
from fastattn.tools.equivalence import check_visible, error_rule

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_mask(*shape):
    """A boolean mask with every kind of row: mixed, empty (the first) and full (the second)."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 0, :] = False
    mask[..., 1, :] = True
    return mask


def attend_under(mask):
    return lambda q, k, v: reference.attention(q, k, v, mask=mask, return_lse=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Sk, Dv", [(1, 64), (65, 64), (1100, 40), (0, 8)])
def test_the_mask_check_passes_right_masks(dtype, Sk, Dv):
    mask = random_mask(2, 1, 5, Sk)
    assert check_visible(attend_under(mask), mask, 2, 4, 2, dtype, D=8, Dv=Dv)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bug", ["dropped", "gained", "swapped", "swapped pairs"])
def test_the_mask_check_catches_one_key_of_4096(dtype, bug):
    mask = torch.ones(1, 2, 3, 4096, dtype=torch.bool)
    mask[0, :, :, [100, 4000, 4002]] = False
    wrong = mask.clone()
    if bug in ("dropped", "swapped"):
        wrong[0, 1, 2, 101] = False
    if bug in ("gained", "swapped"):
        wrong[0, 1, 2, 100] = True
    if bug == "swapped pairs":  # 4000 + 4002 = 3999 + 4003: their indices have the same sum
        wrong[0, 1, 2, [4000, 4002]] = True
        wrong[0, 1, 2, [3999, 4003]] = False
    result = check_visible(attend_under(wrong), mask, 1, 2, 1, dtype, D=8, Dv=256)
    assert result.wrong.nonzero().tolist() == [[0, 1, 2]]
    assert "1 of 6 rows" in str(result) and "batch 0 head 1 row 2" in str(result)
    assert ("instead of other ones" in str(result)) == bug.startswith("swapped")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mask_check_catches_other_bugs(dtype):
    mask = random_mask(2, 4, 6, 70)

    def check(attend):
        return check_visible(attend, mask, 2, 4, 2, dtype, D=8, Dv=64)

    def heads_interleaved_wrongly(q, k, v):
        return reference.attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), mask=mask, return_lse=True)

    def batch_ignored(q, k, v):
        return reference.attention(q, k, v[:1].expand_as(v), mask=mask, return_lse=True)

    def empty_rows_of_lse_zero(q, k, v):
        out, lse = reference.attention(q, k, v, mask=mask, return_lse=True)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    def empty_rows_unwritten(q, k, v):
        out, lse = reference.attention(q, k, v, mask=mask, return_lse=True)
        return out.masked_fill((lse == -math.inf).unsqueeze(-1), math.nan), lse

    assert check(attend_under(mask))
    for bug in (
        heads_interleaved_wrongly,
        batch_ignored,
        empty_rows_of_lse_zero,
        empty_rows_unwritten,
        attend_under(None),
    ):
        assert not check(bug)


def test_the_mask_check_says_where_its_reading_ends():
    with pytest.raises(ValueError, match="131072"):
        check_visible(attend_under(None), torch.ones(1, 2**17 + 1, dtype=torch.bool), 1, 1, 1)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_error_rule_measures_against_torch(dtype):
    exact = randn(50, 20)
    theirs = exact.to(dtype)
    eps = torch.finfo(dtype).eps
    assert error_rule(theirs, exact, theirs) and error_rule(theirs, exact)
    one_off = theirs.clone()
    one_off[3, 4] += 40 * eps * exact.abs().max()
    for comparator in (theirs, None):
        verdict = error_rule(one_off, exact, comparator)
        assert not verdict and verdict.measure == "max" and verdict.ours > verdict.limit
    everywhere_off = theirs + 40 * eps * exact.square().mean().sqrt()
    assert not error_rule(everywhere_off.to(dtype), exact, theirs)
    worse = (exact + 60 * eps * randn(50, 20, seed=1)).to(dtype)
    assert error_rule((exact + 60 * eps * randn(50, 20, seed=2)).to(dtype), exact, worse)
    assert error_rule(one_off, exact, theirs, magnitude=100 * float(exact.abs().max()))


def test_the_error_rule_and_what_is_not_finite():
    exact = torch.tensor([1.0, math.nan, math.inf, -math.inf, 1e300], dtype=torch.float64)
    right = exact.float()
    assert right[-1] == math.inf and error_rule(right, exact, right)
    for i, value in ((0, math.nan), (1, 1.0), (2, -math.inf), (3, math.nan), (4, 1e38)):
        broken = right.clone()
        broken[i] = value
        verdict = error_rule(broken, exact, right)
        assert not verdict and f"at ({i},)" in verdict.reason
    unusable = right.clone()
    unusable[0] = math.nan
    verdict = error_rule(right, exact, unusable)
    assert verdict and math.isnan(verdict.theirs)
    assert error_rule(torch.empty(0), torch.empty(0, dtype=torch.float64))
    with pytest.raises(ValueError, match="shapes differ"):
        error_rule(right, exact[:3], right)
    with pytest.raises(ValueError, match="comparator"):
        error_rule(right, exact, right.half())

"""The state of a softmax over blocks of keys (arXiv:1805.02867): maximum m and sum l a row, in units of log2.

A row that has seen nothing has m = -inf and l = 0; the pivot is finite all the same, so that its weights are 0
and not NaN.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def update(m, l, b_s, factor):
    """One block of scores [M, N], times factor > 0 in units of log2; hidden ones are -inf.

    Returns m, l, the weights [M, N] against the new maximum, and what the rows' earlier sums are multiplied by.
    """
    new = tl.maximum(m, tl.max(b_s, 1) * factor)
    pivot = tl.where(new == float("-inf"), 0.0, new)
    b_p = tl.exp2(b_s * factor - pivot[:, None])
    alpha = tl.exp2(m - pivot)
    return new, l * alpha + tl.sum(b_p, 1), b_p, alpha


@triton.jit
def finish(m, l):
    """What a row's sum of weighted values is multiplied by, and its log-sum-exp, natural."""
    unseen = l == 0.0
    safe = tl.where(unseen, 1.0, l)
    lse = tl.where(unseen, float("-inf"), (m + tl.log2(safe)) * LN2)
    return tl.where(unseen, 0.0, 1.0 / safe), lse


@triton.jit
def weights(b_s, factor, lse):
    """The weights [M, N] of scores, as `update` takes them, from the rows' natural log-sum-exp [M]."""
    pivot = tl.where(lse == float("-inf"), 0.0, lse * LOG2E)
    return tl.exp2(b_s * factor - pivot[:, None])

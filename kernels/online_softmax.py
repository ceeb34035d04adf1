"""The state of a softmax over blocks of keys (arXiv:1805.02867): maximum m and sum l a row.

PLAIN: m is in units of log2, and scores are brought to them by `factor` as they meet it. Otherwise both are natural,
and their difference is what is brought to log2: the lowest finite bias times log2 e would be -inf, a hidden key.

A row that has seen nothing has m = -inf and l = 0; the pivot is finite all the same, so that its weights are 0
and not NaN.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def update(m, l, b_s, factor, PLAIN: tl.constexpr):
    """One block of scores [M, N], hidden ones -inf; factor > 0.

    Returns m, l, the weights [M, N] against the new maximum, and what the rows' earlier sums are multiplied by.
    """
    new = tl.max(b_s, 1)
    if PLAIN:
        new = new * factor
    new = tl.maximum(m, new)
    pivot = tl.where(new == float("-inf"), 0.0, new)
    if PLAIN:
        b_p = tl.exp2(b_s * factor - pivot[:, None])
        alpha = tl.exp2(m - pivot)
    else:
        b_p = tl.exp2((b_s - pivot[:, None]) * LOG2E)
        alpha = tl.exp2((m - pivot) * LOG2E)
    return new, l * alpha + tl.sum(b_p, 1), b_p, alpha


@triton.jit
def finish(m, l, unit):
    """What a row's sum of weighted values is multiplied by, and its log-sum-exp, natural; unit: of m."""
    unseen = l == 0.0
    safe = tl.where(unseen, 1.0, l)
    lse = tl.where(unseen, float("-inf"), m * unit + tl.log2(safe) * LN2)
    return tl.where(unseen, 0.0, 1.0 / safe), lse

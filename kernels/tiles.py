"""Blocks of rows between memory and registers: a head size in parts, rows and columns that may not exist."""

import triton
import triton.language as tl

from .online_softmax import finish


@triton.jit
def load_part(
    p, o, stride, m, FROM: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, BOUNDED: tl.constexpr
):
    """[len(o), WIDTH]: columns FROM.. of rows o; 0 past column D and, if BOUNDED, where m is false."""
    o_d = FROM + tl.arange(0, WIDTH)
    p = p + o[:, None] * stride + o_d[None, :]
    if FROM + WIDTH > D:
        m_d = (o_d < D)[None, :]
        if BOUNDED:
            m_d = m_d & m[:, None]
        b = tl.load(p, mask=m_d, other=0.0)
    elif BOUNDED:
        b = tl.load(p, mask=m[:, None], other=0.0)
    else:
        b = tl.load(p)
    return b


@triton.jit
def store_part(p, o, m, b, FROM: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Stores [M, WIDTH] as columns FROM.. of rows at offsets o, as far as they exist."""
    o_d = FROM + tl.arange(0, WIDTH)
    tl.store(p + o[:, None] + o_d[None, :], b.to(p.dtype.element_ty), mask=m[:, None] & (o_d < D)[None, :])


@triton.jit
def store_rows(acc0, acc1, m, l, unit, out, o_out, lse, o_lse, m_i, sink, keep_scale, DV0: tl.constexpr,
               DV1: tl.constexpr, DV: tl.constexpr):  # fmt: skip
    """out and LSE of rows from the state of their softmax, m in `unit`s of a natural logarithm; the sink applies
    here, once."""
    inverse, b_lse = finish(m, l, unit)
    tl.store(lse + o_lse, b_lse, mask=m_i)
    inverse = inverse * keep_scale
    if sink is not None:
        pivot = tl.where(b_lse == float("-inf"), 0.0, b_lse)
        inverse = inverse * tl.sigmoid(pivot - sink)
    seen = (l != 0.0)[:, None]
    store_part(out, o_out, m_i, tl.where(seen, acc0 * inverse[:, None], 0.0), 0, DV0, DV)
    if DV1 > 0:
        store_part(out, o_out, m_i, tl.where(seen, acc1 * inverse[:, None], 0.0), DV0, DV1, DV)

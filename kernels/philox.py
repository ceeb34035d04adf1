"""Dropout bits by counter: Philox4x32-10 (Salmon et al., SC '11), the stream of every backend.

Key = seed, counter = (b, h, q_pos, k_pos / 4), one 32-bit word a key, kept where the word is at least
min(int(p * 2^32), 2^32 - 1): `fastattn.reference.dropout_keep` is the specification.
"""

import triton
import triton.language as tl


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Four uint32 blocks for counters c0..c3, uint32 blocks of one shape; seed: an int64 scalar."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    a = tl.full([], 0xD2511F53, tl.uint32)
    b = tl.full([], 0xCD9E8D57, tl.uint32)
    step_low = tl.full([], 0x9E3779B9, tl.uint32)
    step_high = tl.full([], 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        old0, old2 = c0, c2
        c0 = tl.umulhi(old2, b) ^ c1 ^ low
        c2 = tl.umulhi(old0, a) ^ c3 ^ high
        c1 = old2 * b
        c3 = old0 * a
        low = low + step_low
        high = high + step_high
    return c0, c1, c2, c3


@triton.jit
def dropout_keep(seed, threshold, b, h, q_pos, first, k_pos, N: tl.constexpr):
    """bool [M, N]: which weights dropout keeps.

    b: scalar. h, q_pos: int32 [M]. threshold: int32 scalar, the bits of an unsigned one. k_pos: int32 [N], or
    None where the keys are first .. first + N - 1 and first is a multiple of 4: then one counter serves four keys.
    """
    limit = threshold.to(tl.uint32, bitcast=True)
    if k_pos is None:
        groups = first // 4 + tl.arange(0, N // 4)
    else:
        groups = k_pos >> 2
    # [M, N / 4] or [M, N]
    zero = (q_pos[:, None] * 0 + groups[None, :] * 0).to(tl.uint32)
    c0 = zero + b.to(tl.uint32)
    c1 = zero + h[:, None].to(tl.uint32)
    c2 = zero + q_pos[:, None].to(tl.uint32)
    c3 = zero + groups[None, :].to(tl.uint32)
    w0, w1, w2, w3 = philox(seed, c0, c1, c2, c3)
    if k_pos is None:
        word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        lane = (k_pos & 3)[None, :]
        word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return word >= limit

"""From q.k to a score, in the contract's order: scale, softcap, bias, ALiBi."""

import triton
import triton.language as tl

from .online_softmax import LOG2E


@triton.jit
def tanh(x):
    """To an ulp or two; 1 - 2 / (e^2x + 1) cancels near 0, where its series serves."""
    a = tl.abs(x)
    y = 1.0 - 2.0 / (tl.exp2(a * (2.0 * LOG2E)) + 1.0)
    y = tl.where(x < 0.0, -y, y)
    z = x * x
    series = x + x * z * (-1.0 / 3 + z * (2.0 / 15 + z * (-17.0 / 315 + z * (62.0 / 2835))))
    return tl.where(a < 0.25, series, y)


@triton.jit
def finish_scores(b_s, scale, softcap, b_bias, slope, q_pos, k_pos, HAS_SOFTCAP: tl.constexpr):
    """Scores [M, N] from q.k [M, N]; -inf where the bias is, whatever else the score would be.

    b_bias: [M, N] or None. slope: [M] or None. q_pos: int32 [M], k_pos: int32 [N].
    """
    b_s = b_s * scale
    if HAS_SOFTCAP:
        b_s = softcap * tanh(b_s / softcap)
    if b_bias is not None:
        b_bias = b_bias.to(tl.float32)
        b_s += b_bias
    if slope is not None:
        b_s -= slope[:, None] * tl.abs(q_pos[:, None] - k_pos[None, :]).to(tl.float32)
    if b_bias is not None:
        b_s = tl.where(b_bias == float("-inf"), float("-inf"), b_s)
    return b_s

"""The specification of fastattn, in plain PyTorch.

Every kernel of the package answers to the functions below: where a kernel and this file disagree beyond
rounding, the kernel is wrong. They run on any device, take every feature together, and differentiate:
backward, double backward, forward mode and ``torch.func``. They form the whole score matrix, so they are slow
and large, never wrong; the package falls back on them for what no kernel serves.

Precision: float64 inputs are computed in float64, all others in float32 and rounded once, at the end.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "dropout_keep",
    "layer_norm",
    "merge",
    "philox",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
]


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# The two products of attention. A pair (query, key) that the mask hides does not exist: it is left out of a
# sum, not multiplied by 0, since 0 * NaN is NaN. Each product is the other one's derivative, so the same
# holds for gradients of any order: what a query cannot see cannot touch its output, and what it sends back
# cannot touch a hidden key.


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if torch.amp.is_autocast_available(a.device.type):
        with torch.autocast(a.device.type, enabled=False):
            return a @ b
    return a @ b


class _PairDot(torch.autograd.Function):
    """a [.., M, D], b [.., N, D], seen [.., M, N] -> [.., M, N]: a_m . b_n for each seen pair, else 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b, seen):
        return torch.where(seen, _matmul(a, b.mT), 0.0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        a, b, seen = ctx.saved_tensors
        return _pair_sum(grad, b, seen), _pair_sum(grad.mT, a, seen.mT), None

    @staticmethod
    def jvp(ctx, a_dot, b_dot, _):
        a, b, seen = ctx.saved_tensors
        return _pair_dot(a_dot, b, seen) + _pair_dot(a, b_dot, seen)


class _PairSum(torch.autograd.Function):
    """w [.., M, N], b [.., N, D], seen [.., M, N] -> [.., M, D]: the sum over n seen by m of w_mn * b_n.

    A seen infinity or NaN in b counts whatever its weight: a weight is positive however far it underflows.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(w, b, seen):
        total = _matmul(torch.where(seen, w, 0.0), torch.where(b.isfinite(), b, 0.0))
        # Who sees an infinity of which sign. A NaN counts as both: inf - inf is NaN again.
        marks = torch.cat([b.isnan() | (b == infinity) for infinity in (math.inf, -math.inf)], -1)
        up, down = (_matmul(seen.to(b.dtype), marks.to(b.dtype)) > 0).chunk(2, -1)
        return total + torch.where(up, math.inf, 0.0) + torch.where(down, -math.inf, 0.0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        w, b, seen = ctx.saved_tensors
        return _pair_dot(grad, b, seen), _pair_sum(w.mT, grad, seen.mT), None

    @staticmethod
    def jvp(ctx, w_dot, b_dot, _):
        w, b, seen = ctx.saved_tensors
        return _pair_sum(w_dot, b, seen) + _pair_sum(w, b_dot, seen)


# torch.compile refuses a Function that defines jvp, and has no use for it.


class _CompiledPairDot(_PairDot):
    jvp = torch.autograd.Function.jvp


class _CompiledPairSum(_PairSum):
    jvp = torch.autograd.Function.jvp


def _pair_dot(a: Tensor, b: Tensor, seen: Tensor) -> Tensor:
    return (_CompiledPairDot if torch.compiler.is_compiling() else _PairDot).apply(a, b, seen)


def _pair_sum(w: Tensor, b: Tensor, seen: Tensor) -> Tensor:
    return (_CompiledPairSum if torch.compiler.is_compiling() else _PairSum).apply(w, b, seen)


def _softmax_and_lse(scores: Tensor, visible: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Probabilities over the visible entries along `dim`, and their log-sum-exp with that dimension kept.

    Hidden entries get 0 and a gradient of 0 whatever they hold; a row with none visible gets 0 and an LSE of
    -inf.
    """
    scores = torch.where(visible, scores, -math.inf)
    occupied = visible.any(dim, keepdim=True)
    # amax refuses rows without entries; their sum has the shape.
    peak = scores.detach().amax(dim, keepdim=True) if scores.numel() else scores.sum(dim, keepdim=True)
    pivot = torch.where(occupied, peak, 0.0)
    weights = torch.exp(scores - pivot)
    total = torch.where(occupied, weights.sum(dim, keepdim=True), 1.0)
    lse = torch.where(occupied, pivot + total.log(), -math.inf)
    return weights / total, lse


def _positions(positions: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Positions [S] or [B, S], by default 0..length-1, as int64 [S] or [B, 1, S] to broadcast over heads."""
    if positions is None:
        return torch.arange(length, device=device)
    return positions.long() if positions.dim() == 1 else positions.long().unsqueeze(1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of `q` [B, Hq, Sq, D] to `k` [B, Hkv, Sk, D] and `v` [B, Hkv, Sk, Dv].

    Returns out [B, Hq, Sq, Dv] in q's dtype, followed by the LSE and the weights if they are asked for. Query
    head h reads key head ``h // (Hq // Hkv)``. In this order::

        s   = scale * q . k                                 scale: 1/sqrt(D) unless given; 1 where D is 0
        s   = softcap * tanh(s / softcap)                   softcap: None or 0 leaves it out (Gemma 2)
        s  += bias
        s  -= alibi_slopes[h] * |q_pos - k_pos|             ALiBi, arXiv:2108.12409
        p   = softmax of s over the visible keys
        p   = p / (1 - dropout_p) where kept, else 0        see `dropout_keep`
        p  *= sigmoid(lse - sinks[h])                       a key of logit sinks[h] and value 0 (gpt-oss)
        out = p . v

    Args:
        mask: bool, broadcastable to [B, Hq, Sq, Sk]; True is visible.
        bias: float, q's dtype or float32, broadcastable to [B, Hq, Sq, Sk]. An entry of -inf hides like the
            mask; the lowest finite number does not.
        alibi_slopes: float, [Hq] or [B, Hq].
        sinks: float, [Hq].
        dropout_p: probability, in [0, 1), that a weight is dropped.
        dropout_seed: 64-bit integer, or an int64 tensor of one element; needed when `dropout_p` is not 0.
        q_pos, k_pos: logical positions, integer [Sq] and [Sk], or [B, Sq] and [B, Sk]; by default 0, 1, 2,
            ... They feed ALiBi and dropout, and nothing else.
        return_lse: also return the log-sum-exp of the visible scores: [B, Hq, Sq], natural logarithm, before
            dropout and sink, float64 for float64 inputs and else float32. Differentiable.
        return_weights: also return p as it multiplies v: [B, Hq, Sq, Sk] in q's dtype.

    A query that sees nothing (or scores only -inf) has an out of 0, an LSE of -inf and gradients of 0.
    Whatever a hidden key, value, bias entry or query holds, NaN too, reaches neither out nor a gradient of
    those it is hidden from. An infinity in a visible value reaches out whatever its weight.

    Raises:
        ValueError: Hq is not a multiple of Hkv, or `dropout_p` is not 0 and there is no seed.
    """
    (B, Hq, Sq, D), Hkv, Sk = q.shape, k.shape[1], k.shape[2]
    if Hq != Hkv and (Hkv == 0 or Hq % Hkv):
        raise ValueError(f"k has {Hkv} heads, which does not divide the {Hq} heads of q")
    if dropout_p and dropout_seed is None:
        raise ValueError(f"dropout_p is {dropout_p} and dropout_seed is None; dropout needs a seed")
    dtype, work = q.dtype, _work_dtype(q.dtype)
    q, k, v = q.to(work), k.to(work), v.to(work)
    if Hq != Hkv:
        k, v = k.repeat_interleave(Hq // Hkv, 1), v.repeat_interleave(Hq // Hkv, 1)

    visible = torch.ones((), dtype=torch.bool, device=q.device)
    if mask is not None:
        visible = visible & mask
    if bias is not None:
        visible = visible & (bias != -math.inf)
    visible = visible.expand(B, Hq, Sq, Sk)

    if scale is None:
        scale = D**-0.5 if D else 1.0
    scores = _pair_dot(q, k, visible) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + torch.where(visible, bias.to(work), 0.0)
    i, j = _positions(q_pos, Sq, q.device), _positions(k_pos, Sk, q.device)
    if alibi_slopes is not None:
        distance = (i.unsqueeze(-1) - j.unsqueeze(-2)).abs()
        scores = scores - alibi_slopes.to(work)[..., None, None] * distance

    weights, lse = _softmax_and_lse(scores, visible & (scores != -math.inf))
    if dropout_p:
        keep = dropout_keep(dropout_seed, B, Hq, i, j, dropout_p)
        weights = torch.where(keep, weights / (1.0 - dropout_p), 0.0)
    if sinks is not None:
        finite = torch.where(lse == -math.inf, 0.0, lse)
        weights = weights * torch.sigmoid(finite - sinks.to(work)[:, None, None])
    out = _pair_sum(weights, v, visible).to(dtype)

    extras = ([lse.squeeze(-1)] if return_lse else []) + ([weights.to(dtype)] if return_weights else [])
    return (out, *extras) if extras else out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, by this file's `attention`.

    `query` [..., Sq, D], `key` [..., Sk, D], `value` [..., Sk, Dv] -> [..., Sq, Dv]. Leading dimensions, any
    number from none on, broadcast. `attn_mask` broadcasts to [..., Sq, Sk], right-aligned: boolean (True is
    visible) or added to the scores. `is_causal` is upper-left: query i sees keys 0..i. With `enable_gqa` the
    third dimension from the end is heads, and each key and value head serves a run of neighbouring query
    heads. The dropout seed is drawn from torch's generator of query's device.

    Raises:
        ValueError: `attn_mask` together with `is_causal`.
    """
    if is_causal and attn_mask is not None:
        raise ValueError(
            "attn_mask is given and is_causal is True; one of them has to express the whole mask"
        )
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    B, H = math.prod(lead[:-1]), lead[-1] if lead else 1
    Sq, Sk = query.shape[-2], key.shape[-2]

    def four_dims(t: Tensor) -> Tensor:
        return t.expand(*lead, *t.shape[-2:]).reshape(B, H, *t.shape[-2:])

    mask = bias = seed = None
    if is_causal:
        mask = torch.ones(Sq, Sk, dtype=torch.bool, device=query.device).tril()
    elif attn_mask is not None:
        full = attn_mask.expand(*lead, Sq, Sk).reshape(B, H, Sq, Sk)
        mask, bias = (full, None) if attn_mask.dtype == torch.bool else (None, full)
    if dropout_p:
        seed = torch.randint(-(2**63), 2**63 - 1, (), device=query.device)
    q, k, v = four_dims(query), four_dims(key), four_dims(value)
    out = attention(q, k, v, mask=mask, bias=bias, scale=scale, dropout_p=dropout_p, dropout_seed=seed)
    return out.reshape(*lead, Sq, value.shape[-1])


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the union of two disjoint sets of keys, from the attention to each.

    `out_*` [..., S, Dv] and `lse_*` [..., S] are what `attention` returns, without sinks; returns the same
    pair, out in the wider dtype of out and LSE, so that chains of merges do not round to a half precision
    between steps. A part that saw nothing (LSE -inf) leaves the other as it is, to the bit.
    """
    both = (lse_a != -math.inf) & (lse_b != -math.inf)
    gap = torch.where(both, lse_b - lse_a, 0.0)
    share = torch.sigmoid(gap).unsqueeze(-1)  # of part b; the sigmoid of a difference cannot overflow
    only = torch.where((lse_a > lse_b).unsqueeze(-1), out_a, out_b)
    out = torch.where(both.unsqueeze(-1), out_a + share * (out_b - out_a), only)
    lse = torch.where(both, lse_a - torch.nn.functional.logsigmoid(-gap), torch.maximum(lse_a, lse_b))
    return out, lse


_WORD = 0xFFFFFFFF


def philox(
    seed: int | Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC '11): four random 32-bit words for each counter of four 32-bit words.

    `seed` is 64 bits, low word first: an int, or an int64 tensor that broadcasts with the counters. Counters
    and results are int64 tensors of values in [0, 2^32); counters broadcast.
    """
    low, high = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # A product of two 32-bit words wraps in int64, but its 64 bits are the right ones.
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ low, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ high, p0 & _WORD
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def dropout_keep(seed: int | Tensor, B: int, H: int, q_pos: Tensor, k_pos: Tensor, p: float) -> Tensor:
    """Which attention weights dropout keeps: bool [B, H, Sq, Sk], a function of seed and place only.

    Counter (b, h, q_pos, k_pos // 4) gives the random words of four neighbouring keys, key k_pos % 4 of them
    taking the word of that number; a weight is kept where its word is at least ``min(int(p * 2**32), 2**32 -
    1)``. `q_pos` and `k_pos`: integer, [Sq] and [Sk], or broadcastable to [B, H, Sq] and [B, H, Sk]; a
    negative position counts as its 32-bit two's complement, divided by 4 towards minus infinity.
    """
    b = torch.arange(B, device=q_pos.device)[:, None, None, None]
    h = torch.arange(H, device=q_pos.device)[:, None, None]
    i, j = q_pos.long().unsqueeze(-1), k_pos.long().unsqueeze(-2)
    w0, w1, w2, w3 = philox(seed, b, h, i & _WORD, (j >> 2) & _WORD)
    lane = j & 3
    word = torch.where(lane < 2, torch.where(lane == 0, w0, w1), torch.where(lane == 2, w2, w3))
    return word >= min(int(p * 2**32), 2**32 - 1)


def softmax(
    x: Tensor,
    dim: int = -1,
    dtype: torch.dtype | None = None,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Softmax of ``scale * x + bias`` along `dim` over the visible entries; 0 at the hidden ones.

    `mask` (bool, True is visible) and `bias` (float; -inf hides) broadcast to x's shape. `causal` lets row i
    of the last two dimensions see entries 0..i. `dtype` is what x is cast to first, and the result's dtype:
    x's by default. A row with nothing visible is 0, with a gradient of 0; visible entries that are all -inf
    give NaN, as in torch.

    Raises:
        ValueError: `causal` along another dimension than the last.
    """
    if causal and dim not in (-1, x.dim() - 1):
        raise ValueError(f"causal is True and dim is {dim}; a causal softmax runs along the last dimension")
    x = x if dtype is None else x.to(dtype)
    work = _work_dtype(x.dtype)
    scores = x.to(work) if scale is None else x.to(work) * scale
    visible = torch.ones((), dtype=torch.bool, device=x.device)
    if mask is not None:
        visible = visible & mask
    if causal:
        visible = visible & torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril()
    if bias is not None:
        visible = visible & (bias != -math.inf)
        scores = scores + bias.to(work)
    return _softmax_and_lse(scores, visible.expand(x.shape), dim)[0].to(x.dtype)


def _trailing_dims(x: Tensor, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"normalized_shape is {shape}; it has to be the last dimensions of x, which is {tuple(x.shape)}"
        )
    return tuple(range(-len(shape), 0))


def _tame(h: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor | float]:
    """Shrink rows whose squares could overflow float32, and eps with them: their norm stays what it is."""
    if h.numel() == 0:
        return h, eps
    peak = h.detach().abs().amax(dims, keepdim=True)
    factor = torch.where(peak.isfinite() & (peak > 2.0**48), 2.0**40 / peak, 1.0)
    # Not down to 0: a row without variance would be 0 / 0. Next to rounding in a row of 2^40 it is nothing.
    return h * factor, torch.where(factor < 1.0, (eps * factor.square()).clamp_min(1e-20), eps)


def _affine(h: Tensor, weight: Tensor | None, bias: Tensor | None, weight_offset: float) -> Tensor:
    if weight is not None:
        h = h * (weight.to(h.dtype) + weight_offset)
    return h if bias is None else h + bias.to(h.dtype)


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * (weight + weight_offset) + bias``, in x's dtype.

    `normalized_shape` is the shape of the last dimensions, which are normalized together, and of `weight` and
    `bias`, which may have a dtype of their own. Without weight the factor is 1. The variance is the biased
    one, of the centred values: a large mean does not cancel.

    Raises:
        ValueError: `normalized_shape` is not how x's shape ends.
    """
    dims = _trailing_dims(x, normalized_shape)
    h, eps = _tame(x.to(_work_dtype(x.dtype)), dims, eps)
    h = h - h.mean(dims, keepdim=True)
    h = h - h.mean(dims, keepdim=True)  # the first mean was rounded: next to a small variance that counts
    h = h * torch.rsqrt(h.square().mean(dims, keepdim=True) + eps)
    return _affine(h, weight, bias, weight_offset).to(x.dtype)


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (weight + weight_offset)`` over the last dimensions, in x's dtype.

    As `layer_norm`. `weight_offset` is 1 for zero-centred weights (Gemma). `eps` of None is, as in torch, the
    epsilon of the dtype that computes: float64's for float64 and float32's for all others.

    Raises:
        ValueError: `normalized_shape` is not how x's shape ends.
    """
    dims = _trailing_dims(x, normalized_shape)
    work = _work_dtype(x.dtype)
    h, eps = _tame(x.to(work), dims, torch.finfo(work).eps if eps is None else eps)
    h = h * torch.rsqrt(h.square().mean(dims, keepdim=True) + eps)
    return _affine(h, weight, None, weight_offset).to(x.dtype)


def _add(x: Tensor, residual: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The sum in `dtype`, or residual's, and that sum, rounded as it is, in the dtype that computes."""
    work = torch.promote_types(_work_dtype(x.dtype), _work_dtype(residual.dtype))
    total = (x.to(work) + residual.to(work)).to(residual.dtype if dtype is None else dtype)
    return total, total.to(work)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``s = x + residual``, and its `layer_norm`: (norm in x's dtype, s in `sum_dtype`, by default
    residual's dtype).

    The norm is that of s as returned, rounded to its dtype: the same as adding first and calling `layer_norm`.
    """
    total, h = _add(x, residual, sum_dtype)
    return layer_norm(h, normalized_shape, weight, bias, eps, weight_offset=weight_offset).to(x.dtype), total


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """As `add_layer_norm`, with `rms_norm`: (norm in x's dtype, ``s = x + residual`` in `sum_dtype`)."""
    total, h = _add(x, residual, sum_dtype)
    return rms_norm(h, normalized_shape, weight, eps, weight_offset=weight_offset).to(x.dtype), total

"""Attention weights on request: from q and k, a slab of rows of a few heads at a time.

The output of attention never waits for its weights, and any rows of them can be had without the others: they may be
averaged over heads or drawn while S x S memory is never held.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .functional import _lower, _total_bias
from .masks.lower import Lowered
from .masks.scan import unbroadcast
from .masks.words import GRANULE
from .problem import attention_problem
from .reference import dropout_keep
from .rows import softmax

# Rows of a slab are chosen so that all its scores of one head stay in the second-level cache of a core.
_SLAB_SCORES = 1 << 17


def visible_rows(m: Lowered, start: int, stop: int) -> Tensor | None:
    """What rows start..stop - 1 of a lowered mask see: bool, broadcastable to [B, Hq, stop - start, Sk]; None is
    everything."""
    i = torch.arange(start, stop, device=m.device).view(-1, 1)
    j = torch.arange(m.Sk, device=m.device)
    parts = []
    if m.band_lo is not None:
        parts.append((j >= i + m.band_lo)[None, None])
    if m.band_hi is not None:
        parts.append((j <= i + m.band_hi)[None, None])
    for bound, low in ((m.lo, True), (m.hi, False)):
        if bound is None:
            continue
        bound = unbroadcast(bound)
        bound = (bound[:, :, start:stop] if bound.shape[2] > 1 else bound).unsqueeze(3)
        parts.append(j >= bound if low else j < bound)
    if m.has_bits:
        parts.append(m.bit_rows(start, stop))
    if not parts:
        return None
    seen = parts[0]
    for part in parts[1:]:
        seen = seen & part
    return seen


def _part(t: Tensor, items: slice, heads: slice) -> Tensor:
    """Some batch items and heads of what broadcasts over both."""
    t = t[items] if t.shape[0] > 1 else t
    return t[:, heads] if t.shape[1] > 1 else t


class AttentionWeights:
    """The weights of one call of `fastattn.attention`, computed where they are asked for.

    Takes q, k and the keywords of `attention` that weights depend on: mask, bias, alibi_slopes, softcap, sinks, scale,
    and dropout_p with dropout_seed. Holds nothing of size Sq x Sk. Weights are float32 (float64 for float64 inputs),
    differentiable, and 0 where hidden. `shape` is [B, Hq, Sq, Sk].

    Raises:
        What `attention` raises.
    """

    def __init__(self, q: Tensor, k: Tensor, **arguments):
        p = attention_problem(q, k, k, **arguments)
        self._problem = p
        self._lowered = _lower(p)
        p.draw_seed()
        self._bias = _total_bias(p, self._lowered)
        self.shape = torch.Size((p.B, p.Hq, p.Sq, p.Sk))

    def rows(self, start: int, stop: int, heads: slice = slice(None), batch: int | None = None) -> Tensor:
        """Weights of query rows start..stop - 1 of some query heads: [B, heads, stop - start, Sk], or [1, ...] of one
        batch item."""
        p = self._problem
        if not 0 <= start <= stop <= p.Sq:
            raise ValueError(f"rows must lie in 0..{p.Sq}, got {start}..{stop}")
        work = torch.float64 if p.dtype == torch.float64 else torch.float32
        items = slice(None) if batch is None else slice(batch, batch + 1)
        q = p.q[items, heads, start:stop].to(work)
        group = p.Hq // max(p.Hkv, 1)
        k = p.k[items]
        k = k[:, heads] if group == 1 else k[:, [h // group for h in range(p.Hq)[heads]]]
        # What a hidden key holds, NaN too, is not to reach q's gradient.
        finite = k.to(work).nan_to_num(0.0, 0.0, 0.0) if k.requires_grad or q.requires_grad else k.to(work)
        scores = torch.matmul(q, finite.transpose(2, 3))
        scale = p.scale
        if p.softcap is not None:
            scores, scale = p.softcap * torch.tanh(scores * (scale / p.softcap)), 1.0
        if p.alibi_slopes is not None:
            slopes = _part(p.alibi_slopes.to(work).reshape(-1, p.Hq, 1, 1), items, heads)
            i = torch.arange(start, stop, device=p.device).view(-1, 1)
            scores = scores * scale - slopes * (i - torch.arange(p.Sk, device=p.device)).abs()
            scale = 1.0
        weights = self._softmax(scores, scale, start, stop, items, heads)
        if p.dropout_p:
            i, j = (torch.arange(n, device=p.device) for n in (p.Sq, p.Sk))
            keep = dropout_keep(p.dropout_seed, p.B, p.Hq, i[start:stop], j, p.dropout_p)[items, heads]
            weights = torch.where(keep, weights / (1.0 - p.dropout_p), 0.0)
        return weights

    def _softmax(
        self, scores: Tensor, scale: float, start: int, stop: int, items: slice, heads: slice
    ) -> Tensor:
        seen = visible_rows(self._lowered, start, stop)
        seen = None if seen is None else _part(seen, items, heads)
        bias = self._bias
        if bias is not None:
            bias = _part(bias, items, heads)
            bias = (bias[:, :, start:stop] if bias.shape[2] > 1 else bias).to(scores.dtype)
        sinks = self._problem.sinks
        if sinks is None:
            return softmax(scores, mask=seen, bias=bias, scale=scale)
        # A sink is one more key, which every row sees and whose weight is dropped.
        column = sinks.to(scores.dtype)[heads].view(-1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores * scale if bias is None else scores * scale + bias, column), 3)
        if seen is not None:
            seen = torch.nn.functional.pad(seen.expand(*seen.shape[:3], self.shape[3]), (0, 1), value=True)
        return softmax(scores, mask=seen)[..., :-1]

    def slabs(self, heads: slice = slice(None), batch: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yields (first row, weights [B, heads, rows, Sk]), a slab of rows after the other; of one batch item where
        `batch` is given."""
        B, H, Sq, Sk = self.shape
        planes = (B if batch is None else 1) * len(range(H)[heads])
        step = max(GRANULE, _SLAB_SCORES // max(planes * Sk, 1) // GRANULE * GRANULE)
        for start in range(0, Sq, step):
            yield start, self.rows(start, min(start + step, Sq), heads, batch)

    def mean(self) -> Tensor:
        """The mean over heads, [B, Sq, Sk]; heads are added one after the other."""
        total = self.rows(0, self.shape[2], slice(0, 1)).squeeze(1)
        for h in range(1, self.shape[1]):
            total = total + self.rows(0, self.shape[2], slice(h, h + 1)).squeeze(1)
        return total / self.shape[1]

    def all(self) -> Tensor:
        """[B, Hq, Sq, Sk]: S x S memory."""
        return self.rows(0, self.shape[2])

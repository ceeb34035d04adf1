"""Attention with relative positions in the scores: Shaw's and Transformer-XL's.

Their position terms depend on the query, so they are no mask and no fixed bias: they are computed as a tensor
[N, H, L, S] and given to the kernel as its bias, with gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ..masks import Band, Causal, Mask
from ..problem import new_seed
from ..weights import AttentionWeights
from .grouped import joined_with_causal
from .linear import apply
from .positions import check_even, positive, sinusoid


class _Projected(torch.nn.Module):
    """q_proj, k_proj, v_proj and out_proj of as many heads."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float, bias: bool, device, dtype) -> None:
        super().__init__()
        positive("embed_dim", embed_dim)
        positive("num_heads", num_heads)
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be divisible by num_heads, got embed_dim={embed_dim} and num_heads={num_heads}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.dropout = dropout
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, torch.nn.Linear(embed_dim, embed_dim, bias, device=device, dtype=dtype))

    def _batched(self, x: Tensor, name: str) -> Tensor:
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"{name} must be [N, length, {self.embed_dim}], got {list(x.shape)}")
        return x

    def _heads(self, projection: torch.nn.Linear, x: Tensor) -> Tensor:
        return apply(projection, x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _merge(self, out: Tensor) -> Tensor:
        return apply(self.out_proj, out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}"


def gathered(values: Tensor, index: Tensor) -> Tensor:
    """values [N, H, L, n] at index [L, S], the same for all heads: [N, H, L, S]."""
    return values.gather(-1, index.expand(*values.shape[:2], *index.shape))


class ShawRelativeAttention(_Projected):
    """Self-attention with learned vectors of the clipped distance j - i (Shaw et al., arXiv:1803.02155).

    Scores are ``q_i . (k_j + a_K[clip(j - i)]) / sqrt(D)`` and the output is ``sum_j w_ij (v_j + a_V[clip(j - i)])``.
    The terms in the scores are a bias of the kernel. The terms in the values need the weights themselves: these are
    computed beside the output by the formula, S x S memory, and `explain` says so.

    Args:
        embed_dim, num_heads: as MultiheadAttention's.
        max_distance: distances are clipped to -max_distance..max_distance.
        values: whether values have terms too. dropout: of the weights, in training. bias: of the projections.

    forward(x, *, mask=None, is_causal=False): x [N, S, embed_dim]; mask as in `fastattn.attention`, True is visible.

    Parameters: the projections, and key_table, value_table [2 max_distance + 1, head_dim], shared by all heads.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_distance: int,
        *,
        values: bool = True,
        dropout: float = 0.0,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, device, dtype)
        self.max_distance = positive("max_distance", max_distance)
        shape = (2 * max_distance + 1, self.head_dim)
        self.key_table = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.value_table = (
            torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if values else None
        )
        for table in (self.key_table, self.value_table):
            if table is not None:
                torch.nn.init.xavier_uniform_(table)

    def _operands(self, x: Tensor, mask, is_causal: bool):
        self._batched(x, "x")
        q, k, v = (self._heads(p, x) for p in (self.q_proj, self.k_proj, self.v_proj))
        i = torch.arange(x.shape[1], device=x.device)
        index = (i - i.unsqueeze(1)).clamp(-self.max_distance, self.max_distance) + self.max_distance
        bias = gathered((q * self.head_dim**-0.5) @ self.key_table.t().to(q.dtype), index)
        if is_causal:
            mask = joined_with_causal(mask, Causal())
        return q, k, v, index, {"mask": mask, "bias": bias}

    def forward(self, x: Tensor, *, mask: Tensor | Mask | None = None, is_causal: bool = False) -> Tensor:
        q, k, v, index, scores = self._operands(x, mask, is_causal)
        if self.training and self.dropout:
            scores |= {"dropout_p": self.dropout, "dropout_seed": new_seed(x.device)}
        if self.value_table is None:
            return self._merge(functional.attention(q, k, v, **scores))
        out = functional.attention(q, k, v, **scores)
        weights = AttentionWeights(q, k, **scores).all()
        sums = weights.new_zeros((*weights.shape[:3], self.value_table.shape[0]))
        sums = sums.scatter_add(-1, index.expand_as(weights), weights)
        return self._merge(out + (sums @ self.value_table.to(sums.dtype)).to(out.dtype))

    def explain(self, x: Tensor, *, mask=None, is_causal: bool = False) -> functional.Explanation:
        """Which kernel serves what part of a call; computes the projections and score terms alone."""
        q, k, v, _, scores = self._operands(x, mask, is_causal)
        dropout_p = self.dropout if self.training else 0.0
        explanation = functional.explain(q, k, v, dropout_p=dropout_p, **scores)
        explanation.notes.append("the relative terms of the scores are a bias: S x S memory")
        if self.value_table is not None:
            explanation.notes.append(
                "the relative terms of the values take the reference path: they need the weights, S x S memory, by the "
                "formula; the rest of the output does not"
            )
        return explanation


class TransformerXLAttention(_Projected):
    """Self-attention with a memory of earlier segments and relative positions (arXiv:1901.02860, section 3.3).

    Row i of the segment and key j of memory and segment, at distance d = i + M - j, have the score
    ``((q_i + u) . k_j + (q_i + v) . r_d) / sqrt(D)`` with r_d a projection of the sinusoid of d; u and v are learned a
    head. The second term is a bias of the kernel.

    Args:
        embed_dim (even), num_heads, dropout, bias: as MultiheadAttention's.

    Args of forward:
        x: [N, S, embed_dim], the segment.
        memory: [N, M, embed_dim], hidden states of earlier segments, or None; gets no gradient.
        mask: as in `fastattn.attention`, for S rows and M + S keys; True is visible.
        is_causal: row i sees keys 0..M + i.

    Returns:
        [N, S, embed_dim].

    Parameters: the projections, r_proj.weight, content_bias (u) and position_bias (v) [num_heads, head_dim].
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(check_even("embed_dim", embed_dim), num_heads, dropout, bias, device, dtype)
        self.r_proj = torch.nn.Linear(embed_dim, embed_dim, False, device=device, dtype=dtype)
        shape = (num_heads, self.head_dim)
        self.content_bias = torch.nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.position_bias = torch.nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def _operands(self, x: Tensor, memory: Tensor | None, mask, is_causal: bool):
        self._batched(x, "x")
        M, S = 0, x.shape[1]
        keys = x
        if memory is not None:
            self._batched(memory, "memory")
            if memory.shape[0] != x.shape[0]:
                raise ValueError(
                    f"memory and x must have the same batch size, got {memory.shape[0]} and {x.shape[0]}"
                )
            M = memory.shape[1]
            keys = torch.cat((memory.detach(), x), 1)
        q, k, v = (self._heads(p, t) for p, t in ((self.q_proj, x), (self.k_proj, keys), (self.v_proj, keys)))
        # Distances from the farthest key of the last row down to the nearest, or latest, that a row may see.
        last = 0 if is_causal else 1 - S
        distance = torch.arange(M + S - 1, last - 1, -1, device=x.device)
        r = self.r_proj(sinusoid(distance, self.embed_dim, interleaved=False).to(x.dtype))
        r = r.unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0)
        terms = ((q + self.position_bias.unsqueeze(1).to(q.dtype)) * self.head_dim**-0.5) @ r.to(q.dtype)
        i, j = torch.arange(S, device=x.device), torch.arange(M + S, device=x.device)
        index = (S - 1 - i.unsqueeze(1) + j).clamp(max=terms.shape[-1] - 1)
        if is_causal:
            mask = joined_with_causal(mask, Band(None, M))
        scores = {"mask": mask, "bias": gathered(terms, index)}
        return q + self.content_bias.unsqueeze(1).to(q.dtype), k, v, scores

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        mask: Tensor | Mask | None = None,
        is_causal: bool = True,
    ) -> Tensor:
        q, k, v, scores = self._operands(x, memory, mask, is_causal)
        dropout_p = self.dropout if self.training else 0.0
        return self._merge(functional.attention(q, k, v, dropout_p=dropout_p, **scores))

    def explain(self, x: Tensor, memory: Tensor | None = None, *, mask=None, is_causal: bool = True):
        """Which kernel serves a call; computes the projections and score terms alone."""
        q, k, v, scores = self._operands(x, memory, mask, is_causal)
        dropout_p = self.dropout if self.training else 0.0
        explanation = functional.explain(q, k, v, dropout_p=dropout_p, **scores)
        explanation.notes.append("the relative terms of the scores are a bias: S x (M + S) memory")
        return explanation

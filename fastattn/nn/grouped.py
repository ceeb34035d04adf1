"""GroupedQueryAttention, MultiQueryAttention and FeedForward: the blocks of today's decoders."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ..masks import Causal, Dense, Mask, Prepared
from ..problem import check_dropout, check_softcap, new_seed
from ..weights import AttentionWeights
from .dropping import dropped
from .linear import apply
from .norms import LayerNorm, RMSNorm
from .positions import RotaryEmbedding, positive


def joined_with_causal(mask: Tensor | Mask | Prepared | None, hi: Mask) -> Mask:
    """`mask`, in any form that can still be joined, and `hi`, the causal one."""
    if mask is None:
        return hi
    if isinstance(mask, Mask):
        return mask & hi
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        return Dense(mask) & hi
    raise ValueError(
        "is_causal=True goes with a mask of fastattn.masks or a bool tensor (True is visible); put what is additive "
        "into bias, and prepare Causal() & mask as one"
    )


class GroupedQueryAttention(torch.nn.Module):
    """Attention whose query heads share key and value heads in groups (arXiv:2305.13245).

    Query head h reads key head h // (num_heads // num_kv_heads), as Llama; K and V are never expanded.

    Args:
        embed_dim: width of query and of the output.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides num_heads.
        head_dim: width of a head; embed_dim / num_heads unless given.
        kdim, vdim: widths of key and value, embed_dim unless given.
        bias: of the projections of q, k and v. out_bias: of the output's; as `bias` unless given.
        qk_norm: "rms_norm" or "layer_norm" over each head of q and k, before rotation (as Qwen 3); None has none.
        rope: a `RotaryEmbedding` for q and k, or None.
        dropout: of the weights, in training. scale, softcap: as in `fastattn.attention`.

    Args of forward:
        query: [N, L, embed_dim] or [L, embed_dim]; float32, bfloat16, float16 or float64.
        key, value: [N, S, kdim], [N, S, vdim]; key is query and value is key unless given.
        mask: bool tensor broadcastable to [N, num_heads, L, S] (True is visible), or a mask of `fastattn.masks`.
        bias: added to the scores, broadcastable to the same.
        is_causal: row i sees keys 0..i beside what mask says.
        positions, key_positions: of rows and keys for rope, integer [L] or [N, L]; 0.. unless given, and keys of
            self-attention have the rows'.
        need_weights: also return the weights [N, num_heads, L, S].

    Parameters: q_proj, k_proj, v_proj, o_proj, and q_norm, k_norm with qk_norm: a Llama's names.

    Raises:
        ValueError: sizes that contradict each other, named together; TypeError, ValueError of `fastattn.attention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        head_dim: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        qk_norm: str | None = None,
        rope: RotaryEmbedding | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        softcap: float | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("embed_dim", embed_dim),
            ("num_heads", num_heads),
            ("num_kv_heads", num_kv_heads),
        ):
            positive(name, value)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads, got num_heads={num_heads} and num_kv_heads={num_kv_heads}"
            )
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be divisible by num_heads unless head_dim is given, got embed_dim={embed_dim} and "
                f"num_heads={num_heads}"
            )
        if qk_norm not in (None, "rms_norm", "layer_norm"):
            raise ValueError(f"qk_norm must be None, 'rms_norm' or 'layer_norm', got {qk_norm!r}")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else positive("head_dim", head_dim)
        for name, width in (("kdim", kdim), ("vdim", vdim)):
            if width is not None:
                positive(name, width)
        check_softcap(softcap)
        check_dropout(dropout, "dropout")
        if rope is not None and rope.dim > self.head_dim:
            raise ValueError(f"rope rotates {rope.dim} elements and head_dim is {self.head_dim}")
        self.dropout, self.scale, self.softcap = dropout, scale, softcap
        factory = {"device": device, "dtype": dtype}
        width, kv_width = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = torch.nn.Linear(embed_dim, width, bias, **factory)
        self.k_proj = torch.nn.Linear(kdim or embed_dim, kv_width, bias, **factory)
        self.v_proj = torch.nn.Linear(vdim or embed_dim, kv_width, bias, **factory)
        self.o_proj = torch.nn.Linear(width, embed_dim, bias if out_bias is None else out_bias, **factory)
        norm = {"rms_norm": RMSNorm, "layer_norm": LayerNorm}.get(qk_norm)
        self.q_norm = None if norm is None else norm(self.head_dim, **factory)
        self.k_norm = None if norm is None else norm(self.head_dim, **factory)
        self.rope = rope

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        mask: Tensor | Mask | Prepared | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        q, k, v = self._heads(query, key, value, positions, key_positions)
        scores = self._scores(mask, bias, is_causal)
        dropout_p = self.dropout if self.training else 0.0
        if not need_weights:
            return self._merge(functional.attention(q, k, v, dropout_p=dropout_p, **scores), query)
        if dropout_p:
            scores |= {"dropout_p": dropout_p, "dropout_seed": new_seed(q.device)}
        out = functional.attention(q, k, v, **scores)
        weights = AttentionWeights(q, k, **scores).all().to(q.dtype)
        return self._merge(out, query), weights if query.dim() == 3 else weights.squeeze(0)

    def explain(
        self, query, key=None, value=None, *, mask=None, bias=None, is_causal=False
    ) -> functional.Explanation:
        """Which kernel the attention of such a call runs and why; computes the projections alone."""
        q, k, v = self._heads(query, key, value, None, None)
        dropout_p = self.dropout if self.training else 0.0
        return functional.explain(q, k, v, dropout_p=dropout_p, **self._scores(mask, bias, is_causal))

    def _scores(self, mask, bias, is_causal: bool) -> dict:
        if is_causal:
            mask = joined_with_causal(mask, Causal())
        return {"mask": mask, "bias": bias, "scale": self.scale, "softcap": self.softcap}

    def _heads(self, query, key, value, positions, key_positions) -> tuple[Tensor, Tensor, Tensor]:
        own = key is None
        key = query if own else key
        value = key if value is None else value
        if not query.dim() == key.dim() == value.dim() or query.dim() not in (2, 3):
            raise ValueError(
                f"query, key and value must all be [N, length, width] or all [length, width], got {query.dim()}, "
                f"{key.dim()} and {value.dim()} dimensions"
            )
        projections = (
            ("query", self.q_proj, query),
            ("key", self.k_proj, key),
            ("value", self.v_proj, value),
        )
        for name, p, x in projections:
            width = getattr(p, "in_features", x.shape[-1])  # what stands in its place may have none
            if x.shape[-1] != width:
                raise ValueError(f"{name} must have width {width}, got shape {list(x.shape)}")
        q, k, v = (
            apply(p, x).unflatten(-1, (-1, self.head_dim)).transpose(-3, -2) for _, p, x in projections
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is None and (positions is not None or key_positions is not None):
            raise ValueError("positions are for rope, and this module has none")
        if self.rope is not None:
            q = self.rope(q, positions)
            k = self.rope(k, positions if own and key_positions is None else key_positions)
        return (q, k, v) if query.dim() == 3 else (q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0))

    def _merge(self, out: Tensor, query: Tensor) -> Tensor:
        out = out.transpose(1, 2).flatten(2)
        return apply(self.o_proj, out if query.dim() == 3 else out.squeeze(0))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"


class MultiQueryAttention(GroupedQueryAttention):
    """All query heads share one key and value head (arXiv:1911.02150); otherwise `GroupedQueryAttention`."""

    def __init__(self, embed_dim: int, num_heads: int, **keywords) -> None:
        super().__init__(embed_dim, num_heads, 1, **keywords)


class FeedForward(torch.nn.Module):
    """The Transformer's position-wise block: linear1, activation, dropout, linear2.

    Args:
        d_model: width of input and output. d_hidden: between.
        activation: "relu", "gelu" (exact) or "swiglu" (arXiv:2002.05202): ``linear2(silu(gate(x)) * linear1(x))``.
        bias: of the linear layers. dropout: after the activation, in training.

    Input [*, d_model]. In inference on the CPU the activation is computed inside the product.

    Raises:
        ValueError: another activation, a width below 1.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        activation: str = "relu",
        bias: bool = True,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if activation not in ("relu", "gelu", "swiglu"):
            raise ValueError(f"activation must be 'relu', 'gelu' or 'swiglu', got {activation!r}")
        positive("d_model", d_model)
        positive("d_hidden", d_hidden)
        factory = {"device": device, "dtype": dtype}
        self.activation = activation
        self.linear1 = torch.nn.Linear(d_model, d_hidden, bias, **factory)
        self.gate = torch.nn.Linear(d_model, d_hidden, bias, **factory) if activation == "swiglu" else None
        self.dropout = torch.nn.Dropout(dropout)
        self.linear2 = torch.nn.Linear(d_hidden, d_model, bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            h = apply(self.linear1, x, self.activation)
        else:
            h = torch.nn.functional.silu(apply(self.gate, x)) * apply(self.linear1, x)
        return apply(self.linear2, dropped(self.dropout, h))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"

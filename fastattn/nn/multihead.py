"""MultiheadAttention: torch's module on fastattn's attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..masks import Mask, Prepared
from ..problem import new_seed
from ..weights import AttentionWeights
from . import packing
from .linear import apply, linear
from .masking import Maskish, Visibility, causal, check_kinds, combine, without_padded_nan
from .sharing import FromTorch


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Visibility, dropout_p: float = 0.0, **arguments):
    """Attention of projected heads; what has no mask takes the shortest way."""
    if seen.mask is None and seen.bias is None and dropout_p == 0.0 and not arguments:
        return functional.scaled_dot_product_attention(q, k, v)
    return functional.attention(q, k, v, dropout_p=dropout_p, **seen.arguments(), **arguments)


class MultiheadAttention(FromTorch, torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` (arXiv:1706.03762) on fastattn's kernels, in training and evaluation alike.

    Constructor and forward arguments, parameters, state_dict, initialisation and results are torch's; what differs on
    purpose stands in docs/modules.md. `attn_mask` may also be a mask of `fastattn.masks` (True is visible there).

    Args of forward:
        query: [L, N, E], [N, L, E] with batch_first, or [L, E]; float32, bfloat16, float16 or float64. Nested tensors
            of one sequence an item, in training too; then no masks.
        key, value: [S, N, kdim], [S, N, vdim] and so on.
        key_padding_mask: [N, S] or [S]: bool, True where a key is padding, or added to the scores.
        need_weights: also return the weights, after dropout. The output does not wait for them: they are computed
            beside it, from q and k.
        attn_mask: [L, S] or [N * num_heads, L, S]: bool, True where hidden, or added to the scores.
        average_attn_weights: return their mean over heads, [N, L, S], instead of [N, num_heads, L, S].
        is_causal: a hint that attn_mask is the causal mask; needs it.

    Returns:
        (output as query, weights or None). A query row that sees no key gives out_proj's bias, and weights of 0.

    Raises:
        AssertionError, RuntimeError: where torch raises them, saying what does not fit.
        TypeError: a mask that is none.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | Mask | Prepared | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested or key.is_nested or value.is_nested:
            return self._nested(query, key, value, key_padding_mask, need_weights, attn_mask)
        if not need_weights and key_padding_mask is not None:
            out = self._of_real_keys(query, key, value, key_padding_mask, attn_mask, is_causal)
            if out is not None:
                return out, None
        q, k, v, seen = self._operands(
            query, key, value, key_padding_mask, attn_mask, is_causal and not need_weights, is_causal
        )
        dropout_p = self.dropout if self.training else 0.0
        if not need_weights:
            return self._merge(attend(q, k, v, seen, dropout_p), query), None
        extra = {}
        if dropout_p:
            extra = {"dropout_p": dropout_p, "dropout_seed": new_seed(query.device)}
        out = attend(q, k, v, seen, **extra)
        weights = AttentionWeights(q, k, **seen.arguments(), **extra)
        weights = (weights.mean() if average_attn_weights else weights.all()).to(q.dtype)
        return self._merge(out, query), weights if query.dim() == 3 else weights.squeeze(0)

    def explain(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Maskish = None,
        is_causal: bool = False,
    ) -> functional.Explanation:
        """Which kernel the attention of such a call runs, and why each other one refused.

        Computes the projections, no attention. Raises what forward raises.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            _, q, k, v, seen = self._nested_operands(query, key, value, key_padding_mask, attn_mask)
        else:
            q, k, v, seen = self._operands(
                query, key, value, key_padding_mask, attn_mask, is_causal, is_causal
            )
        return functional.explain(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, **seen.arguments()
        )

    def _operands(self, query, key, value, key_padding_mask, attn_mask, trusted, is_causal):
        """q [N, H, L, D], k and v [N, H, S + extra, D], and what is visible."""
        check_kinds(("key_padding_mask", "attn_mask"), key_padding_mask, attn_mask)
        check_shapes(self, query, key, value, key_padding_mask, attn_mask)
        query, key, value = self._without_padded_nan(query, key, value, key_padding_mask)
        if query.dim() == 2 and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        extra = (self.bias_k is not None) + bool(self.add_zero_attn)
        if is_causal:
            attn_mask = causal(attn_mask, trusted=trusted and key_padding_mask is None and not extra)
        q, k, v = (self._heads(t) for t in self._project(query, key, value))
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        sizes = (*q.shape[:3], k.shape[2] - extra)
        if key_padding_mask is None and attn_mask is None:
            return q, k, v, Visibility()
        return q, k, v, combine(key_padding_mask, attn_mask, sizes, extra=extra, dtype=q.dtype)

    def _without_padded_nan(self, query, key, value, padding) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs with what they share still shared. Rows of self-attention are keys, and padding, too."""
        first = without_padded_nan(key, padding, self.batch_first)
        second = first if value is key else without_padded_nan(value, padding, self.batch_first)
        return first if query is key else second if query is value else query, first, second

    def _of_real_keys(self, query, key, value, key_padding_mask, attn_mask, is_causal) -> Tensor | None:
        """The output with keys and values projected where they are no padding; None where that is not the way."""
        plain = self._qkv_same_embed_dim and self.bias_k is None and not self.add_zero_attn
        if not (plain and self.batch_first and key is value and query.dim() == 3) or is_causal:
            return None
        check_kinds(("key_padding_mask", "attn_mask"), key_padding_mask, attn_mask)
        check_shapes(self, query, key, value, key_padding_mask, attn_mask)
        if key_padding_mask.shape != key.shape[:2]:
            return None
        plan = packing.plan_keys(key_padding_mask, attn_mask, self.num_heads, query.shape[1])
        if plan is None:
            return None
        places, seen = plan
        if query is key:
            query = without_padded_nan(query, key_padding_mask, self.batch_first)
        E, bias = self.embed_dim, self.in_proj_bias
        weights = self.in_proj_weight.split((E, 2 * E))
        biases = (None, None) if bias is None else bias.split((E, 2 * E))
        q = linear(query.flatten(0, 1), weights[0], biases[0])
        k, v = linear(key.flatten(0, 1).index_select(0, places), weights[1], biases[1]).chunk(2, -1)
        q, k, v = (
            t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(0, 1).unsqueeze(0) for t in (q, k, v)
        )
        out = attend(q, k, v, seen, self.dropout if self.training else 0.0)
        return apply(self.out_proj, out.squeeze(0).transpose(0, 1).flatten(1).unflatten(0, query.shape[:2]))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections, each in its input's layout and as few products as the inputs allow."""
        E, bias = self.embed_dim, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            q, k, v = (linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))
        elif key is value and query is key:
            q, k, v = linear(query, self.in_proj_weight, bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.split((E, 2 * E) if key is value else (E, E, E))
            biases = (None,) * 3 if bias is None else bias.split([w.shape[0] for w in weights])
            inputs = (query, key) if key is value else (query, key, value)
            projected = [linear(x, w, b) for x, w, b in zip(inputs, weights, biases)]
            q, k, v = (projected[0], *projected[1].chunk(2, -1)) if key is value else projected
        if self.bias_k is not None:
            dim = self._sequence_dim(key)
            k, v = (
                torch.cat([t, self._extra(b, t, dim)], dim) for t, b in ((k, self.bias_k), (v, self.bias_v))
            )
        return q, k, v

    def _sequence_dim(self, x: Tensor) -> int:
        return 1 if self.batch_first and x.dim() == 3 else 0

    @staticmethod
    def _extra(bias: Tensor, like: Tensor, dim: int) -> Tensor:
        """bias_k or bias_v [1, 1, E] as one position of `like`."""
        shape = [1 if d == dim else size for d, size in enumerate(like.shape)]
        return bias.to(like.dtype).view([1] * (like.dim() - 1) + [-1]).expand(shape)

    def _heads(self, x: Tensor) -> Tensor:
        """[N, H, S, D], a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merge(self, out: Tensor, query: Tensor) -> Tensor:
        """[N, H, L, D] in query's layout, projected."""
        if query.dim() == 2:
            out = out.squeeze(0).transpose(0, 1)
        else:
            out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        return apply(self.out_proj, out.flatten(-2))

    def _nested_operands(self, query, key, value, key_padding_mask, attn_mask):
        """Query's sequences, and the operands: sequences one after the other, each seeing its own keys."""
        if key_padding_mask is not None or attn_mask is not None:
            raise AssertionError(
                "MultiheadAttention takes no key_padding_mask and no attn_mask with nested tensors: their lengths say "
                "what is padding"
            )
        if self.bias_k is not None or self.add_zero_attn:
            raise AssertionError("add_bias_kv and add_zero_attn do not go with nested tensors")
        if not (query.is_nested and key.is_nested and value.is_nested):
            raise AssertionError("query, key and value must all be nested tensors, or none")
        rows = packing.from_nested(query)
        same = key is query
        keys = rows if same else packing.from_nested(key)
        values = keys if value is key else packing.from_nested(value)
        if keys.lengths != values.lengths or len(rows.lengths) != len(keys.lengths):
            raise AssertionError(
                f"query, key and value must have as many sequences and key and value the same lengths, got "
                f"{rows.lengths}, {keys.lengths} and {values.lengths}"
            )
        q, k, v = (
            t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(0, 1).unsqueeze(0)
            for t in self._project(rows.values, keys.values, values.values)
        )
        return rows, q, k, v, Visibility(packing.documents(rows.lengths, keys.lengths))

    def _nested(self, query, key, value, key_padding_mask, need_weights, attn_mask):
        if need_weights:
            raise AssertionError("MultiheadAttention has need_weights=True with nested tensors; pass False")
        rows, q, k, v, seen = self._nested_operands(query, key, value, key_padding_mask, attn_mask)
        out = attend(q, k, v, seen, self.dropout if self.training else 0.0)
        return rows.nested(apply(self.out_proj, out.squeeze(0).transpose(0, 1).flatten(-2))), None


def check_shapes(module, query, key, value, key_padding_mask, attn_mask) -> None:
    """Ranks and sizes of a call, refused with torch's types of errors."""
    if query.dim() not in (2, 3):
        raise AssertionError(
            f"query should be unbatched 2D or batched 3D tensor but received {query.dim()}-D query tensor"
        )
    batched, rank = query.dim() == 3, query.dim()
    kind = "batched (3-D)" if batched else "unbatched (2-D)"
    if key.dim() != rank or value.dim() != rank:
        raise AssertionError(
            f"For {kind} `query`, expected `key` and `value` to be {rank}-D but found {key.dim()}-D and "
            f"{value.dim()}-D tensors respectively"
        )
    if key_padding_mask is not None and key_padding_mask.dim() != rank - 1:
        raise AssertionError(
            f"For {kind} `query`, expected `key_padding_mask` to be `None` or {rank - 1}-D but found "
            f"{key_padding_mask.dim()}-D tensor instead"
        )
    if isinstance(attn_mask, Tensor):
        if attn_mask.dim() not in (2, 3):
            raise AssertionError(
                f"For {kind} `query`, expected `attn_mask` to be `None`, 2-D or 3-D but found {attn_mask.dim()}-D "
                "tensor instead"
            )
        expected = (module.num_heads, query.shape[0], key.shape[0])
        if not batched and attn_mask.dim() == 3 and attn_mask.shape != expected:
            raise AssertionError(
                f"Expected `attn_mask` shape to be {expected} but got {tuple(attn_mask.shape)}"
            )
    if query.shape[-1] != module.embed_dim:
        raise AssertionError(
            f"was expecting embedding dimension of {module.embed_dim}, but got {query.shape[-1]}"
        )
    if not module._qkv_same_embed_dim:
        for name, t, width in (("key", key, module.kdim), ("value", value, module.vdim)):
            if t.shape[-1] != width:
                raise AssertionError(f"was expecting {name} dimension of {width}, but got {t.shape[-1]}")
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"key's sequence and batch dims {tuple(key.shape[:-1])} do not match value's "
                f"{tuple(value.shape[:-1])}"
            )
    elif key.shape != value.shape:
        raise AssertionError(f"key shape {tuple(key.shape)} does not match value shape {tuple(value.shape)}")
    batch = 0 if module.batch_first else 1
    if batched and query.shape[batch] != key.shape[batch]:
        raise RuntimeError(
            f"query and key must have the same batch size, got {query.shape[batch]} and {key.shape[batch]} "
            f"(batch_first={module.batch_first})"
        )

"""Hugging Face transformers: `attn_implementation="fastattn"`.

`register()` registers two things, and both are needed: the attention function, and the mask function (see
`model_masks`). Without the second, transformers drops padding and window masks without a word.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from .. import masks
from ..functional import attention
from . import traced_masks
from .model_masks import ModelMask, mask_function

NAME = "fastattn"

# Keywords that models pass along and that do not change what attention computes: the mask already holds them, or
# they belong to other backends.
_HARMLESS = frozenset(
    (
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "deterministic",
        "head_mask",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "seq_idx",
        "sliding_window",
        "use_cache",
    )
)


def _additive(mask: Tensor) -> Tensor:
    """A bool mask as 0 where it shows and -inf where it hides; a float one as it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))


def _prepared_tensor(mask: Tensor, q: Tensor, k: Tensor) -> Tensor | masks.Prepared:
    """A user's mask tensor [B or 1, H or 1, Sq, Sk or longer], read once for all layers that get it."""
    cropped = mask[..., : k.shape[-2]]
    # A plan that holds the tensor itself, as a bias, must not be held by it.
    if torch.compiler.is_compiling() or mask.requires_grad or mask.is_inference():
        return cropped
    key = (mask._version, *q.shape[:3], *k.shape[1:3])
    known = getattr(mask, "_fastattn_plan", None)
    if known is not None and known[0] == key:
        return known[1]
    plan = masks.prepare(cropped, q, k)
    if plan.lowered.bias is not None:
        return cropped
    mask._fastattn_plan = (key, plan)
    return plan


def attention_function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ModelMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **keywords,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query [B, Hq, Sq, D] -> (out [B, Sq, Hq, Dv], weights or None).

    Raises NotImplementedError for a keyword that would change the result and is not served.
    """
    unknown = sorted(name for name in keywords if name not in _HARMLESS and keywords[name] is not None)
    if unknown:
        raise NotImplementedError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention, which fastattn does not serve; "
            "use another attn_implementation for this model"
        )
    mask, bias = attention_mask, position_bias
    if isinstance(mask, ModelMask):
        if mask.bias is not None:
            bias = mask.bias if bias is None else bias + mask.bias
        mask = mask.prepared(query, key)
    elif isinstance(mask, Tensor) and torch.compiler.is_compiling():
        # Bits cannot be scanned from a tensor that has no values yet.
        hidden = _additive(mask[..., : key.shape[-2]])
        bias, mask = hidden if bias is None else bias + hidden, None
    elif isinstance(mask, Tensor):
        mask = _prepared_tensor(mask, query, key)
    elif mask is None and query.shape[2] > 1:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        mask = masks.Causal() if causal else None
    weights = bool(keywords.get("output_attentions"))
    results = attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        softcap=softcap,
        sinks=s_aux,
        scale=scaling,
        dropout_p=dropout,
        return_weights=weights,
    )
    out, seen = results if weights else (results, None)
    return out.transpose(1, 2).contiguous(), seen


# The keywords that the attention function takes.
SERVED = _HARMLESS | frozenset(inspect.signature(attention_function).parameters)


def register() -> None:
    """Makes `attn_implementation="fastattn"` known to transformers; calling it again changes nothing.

    Then `AutoModel.from_pretrained(..., attn_implementation="fastattn")` or
    `model.set_attn_implementation("fastattn")`.

    Raises ImportError where transformers is missing or too old (5.17 is the oldest tried).
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            f"transformers 5.17 or newer is needed: pip install 'transformers>=5.17' ({error})"
        ) from error
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)
    traced_masks.register()

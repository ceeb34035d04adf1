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

# Keywords that models pass along and that do not change what attention computes: they are for other parts of the model
# or only hints, or the mask holds them already (transformers makes packed masks from position_ids).
_HARMLESS = frozenset(
    (
        "cache_position",
        "deterministic",
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


def _documents(
    q: Tensor, cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None, seq_idx: Tensor | None
) -> masks.Mask:
    """The sequences packed into one, by their bounds [n + 1] or a number a token [B, S]; not all are None."""
    numbers = None if seq_idx is None else masks.Documents(ids=seq_idx)
    if cu_seq_lens_q is None and cu_seq_lens_k is None:
        return numbers
    if q.shape[0] != 1:
        raise NotImplementedError(
            f"cu_seq_lens_q and cu_seq_lens_k bound sequences packed into a batch of 1, got a batch of {q.shape[0]}"
        )
    rows = cu_seq_lens_k if cu_seq_lens_q is None else cu_seq_lens_q
    bounds = masks.Documents(rows, cu_seq_lens_k)
    return bounds if numbers is None else bounds & numbers


def _mask_of_keywords(causal: bool, sliding_window: int | None, Sq: int, Sk: int) -> masks.Mask | None:
    """What hides keys where a model gives no mask."""
    mask = masks.Causal() if causal and Sq > 1 else None
    if sliding_window is None:
        return mask
    if Sq not in (1, Sk):
        raise NotImplementedError(
            f"sliding_window={sliding_window} without a mask is served for 1 query row or as many as keys, got {Sq} "
            f"rows and {Sk} keys"
        )
    window = masks.SlidingWindow(sliding_window - 1, sliding_window - 1, lower_right=True)
    return window if mask is None else mask & window


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
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **keywords,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query [B, Hq, Sq, D] -> (out [B, Sq, Hq, Dv], weights or None).

    A mask that is given holds causality and the window; is_causal and sliding_window count without one. Packed
    sequences, by cu_seq_lens_q and cu_seq_lens_k or by seq_idx, are kept apart beside any mask.

    Raises NotImplementedError for a keyword that would change the result and is not served.
    """
    unknown = sorted(name for name in keywords if name not in _HARMLESS and keywords[name] is not None)
    if unknown:
        raise NotImplementedError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention, which fastattn does not serve; "
            "use another attn_implementation for this model"
        )
    mask, bias = attention_mask, position_bias
    packing = (cu_seq_lens_q, cu_seq_lens_k, seq_idx)
    packed = any(t is not None for t in packing)
    if packed and isinstance(mask, Tensor):
        raise NotImplementedError(
            "a mask tensor together with cu_seq_lens_q, cu_seq_lens_k or seq_idx: give one of them for the packing"
        )
    if isinstance(mask, ModelMask):
        if packed:
            mask = mask.within(packing, lambda: _documents(query, *packing))
        if mask.bias is not None:
            bias = mask.bias if bias is None else bias + mask.bias
        mask = mask.prepared(query, key)
    elif isinstance(mask, Tensor) and torch.compiler.is_compiling():
        # Bits cannot be scanned from a tensor that has no values yet.
        hidden = _additive(mask[..., : key.shape[-2]])
        bias, mask = hidden if bias is None else bias + hidden, None
    elif isinstance(mask, Tensor):
        mask = _prepared_tensor(mask, query, key)
    elif mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        mask = _mask_of_keywords(causal, sliding_window, query.shape[2], key.shape[2])
        if packed:
            documents = _documents(query, *packing)
            mask = documents if mask is None else mask & documents
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

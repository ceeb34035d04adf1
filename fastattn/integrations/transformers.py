"""Hugging Face transformers: `attn_implementation="fastattn"`.

`register()` registers two things, and both are needed: the attention function, and the mask function. Without the
second, transformers drops padding and window masks without a word. A model's own masks (causal, sliding window,
chunks, packed sequences, padding) become ranges of fastattn.masks; no S x S tensor is made for them. A mask
function that is not one of transformers' own is evaluated to a bool tensor, as transformers does for SDPA.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from .. import masks
from ..functional import attention
from ..masks import Mask

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
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    )
)


class ModelMask:
    """A mask on its way through a model, and its plan for each shape it meets: lowered once, not once a layer."""

    def __init__(self, mask: Mask):
        self.mask = mask
        self._plans: dict[tuple, masks.Prepared] = {}

    def prepared(self, q: Tensor, k: Tensor) -> masks.Prepared:
        key = (*q.shape[:3], *k.shape[1:3], q.device)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = masks.prepare(self.mask, q, k)
        return plan

    def __repr__(self) -> str:
        return f"ModelMask({self.mask!r})"


def _closure(function) -> dict:
    return inspect.getclosurevars(function).nonlocals


def _ranges_of(
    function, batch: int, q_length: int, kv_length: int, offset: int, kv_offset: int
) -> Mask | None:
    """A mask function of transformers as a mask in index space; None where it is not one of its own.

    offset is the position of row 0 less that of key 0. Everything is visible: an empty `masks.And` has no
    value, so that is `SlidingWindow()`.
    """
    from transformers import masking_utils as theirs

    if function is theirs.causal_mask_function:
        return masks.Band(None, offset)
    if function is theirs.bidirectional_mask_function:
        return masks.SlidingWindow()
    if getattr(function, "__module__", None) != theirs.__name__:
        return None
    made_by = function.__qualname__.split(".")[0]
    inside = _closure(function)
    if made_by == "and_masks":
        parts = [
            _ranges_of(part, batch, q_length, kv_length, offset, kv_offset)
            for part in inside["mask_functions"]
        ]
        if any(part is None for part in parts):
            return None
        together = parts[0]
        for part in parts[1:]:
            together = together & part
        return together
    if made_by == "sliding_window_overlay":
        return masks.Band(offset - int(inside["sliding_window"]) + 1, None)
    if made_by == "sliding_window_bidirectional_overlay":
        window = int(inside["sliding_window"])
        return masks.Band(offset - window, offset + window)
    if made_by == "packed_sequence_mask_function" and q_length == kv_length and offset == 0:
        return masks.Documents(ids=inside["packed_sequence_mask"])
    if made_by == "remap_positions_for_packed_sequence" and q_length == kv_length and offset == 0:
        # Positions rise by one inside a sequence, and the packed mask beside it keeps sequences apart: distances
        # between positions are distances between indices.
        return _ranges_of(inside["mask_function"], batch, q_length, kv_length, offset, kv_offset)
    if made_by == "padding_mask_function":
        return masks.KeyPadding(inside["padding_mask"][:, kv_offset : kv_offset + kv_length].bool())
    if made_by == "chunked_overlay" and offset + kv_offset == 0 and not bool(inside["left_padding"].any()):
        return masks.Chunked(int(inside["chunk_size"])) if kv_offset == 0 else None
    return None


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: Tensor | None = None,
    **arguments,
) -> ModelMask | Tensor | None:
    """transformers' mask interface: the mask of a model's call, as ranges where it is one of transformers' own.

    Returns None where every row sees every key and the model is not causal at this length.
    """
    from transformers import masking_utils as theirs

    padding = theirs.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None and padding.dim() == 2 and bool(padding.all()):
        padding = None
    known = isinstance(q_offset, int) or not torch.compiler.is_compiling()
    mask = None
    if known:
        offset = int(q_offset) - kv_offset
        mask = _ranges_of(mask_function, batch_size, q_length, kv_length, offset, kv_offset)
    if mask is None:
        arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return theirs.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **arguments,
        )
    if padding is not None:
        mask = mask & masks.KeyPadding(padding[:, kv_offset : kv_offset + kv_length].bool())
    return ModelMask(mask)


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
    mask = attention_mask
    if isinstance(mask, ModelMask):
        mask = mask.prepared(query, key)
    elif isinstance(mask, Tensor):
        mask = mask[..., : key.shape[-2]]
    elif mask is None and query.shape[2] > 1:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        mask = masks.Causal() if causal else None
    weights = bool(keywords.get("output_attentions"))
    results = attention(
        query,
        key,
        value,
        mask=mask,
        bias=position_bias,
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

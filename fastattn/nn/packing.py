"""Packing: the tokens of a padded batch, or of a nested tensor, as one sequence without padding.

A packed batch is [1, T, E] (or [T, 1, E]) with T the number of real tokens, in order of their sequences. Attention
stays inside a sequence by one range of keys a row, so nothing about padding is left for any layer to compute.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..masks import Documents, Prepared, lower
from ..masks.lower import Lowered
from ..masks.scan import scan_keys
from .masking import Maskish, Visibility, split


@dataclass(frozen=True, eq=False)
class Sequences:
    """The tokens of a nested tensor: values [T, E] and how many each sequence has."""

    values: Tensor
    lengths: list[int]
    layout: torch.layout

    def nested(self, values: Tensor) -> Tensor:
        """Other values of the same lengths as a nested tensor of the same layout."""
        parts = list(values.split(self.lengths))
        return torch.nested.as_nested_tensor(parts, layout=self.layout)


def from_nested(t: Tensor) -> Sequences:
    parts = t.unbind()
    return Sequences(torch.cat(parts), [part.shape[0] for part in parts], t.layout)


def through_values(module: torch.nn.Module, t: Tensor) -> Tensor:
    """What a norm, which treats tokens alike, makes of a nested tensor: of all its tokens at once."""
    sequences = from_nested(t)
    return sequences.nested(module.forward(sequences.values))


def documents(lengths: list[int], key_lengths: list[int] | None = None) -> Documents:
    bounds = [list(itertools.accumulate(ns, initial=0)) for ns in (lengths, key_lengths) if ns is not None]
    return Documents(*bounds)


@dataclass(frozen=True, eq=False)
class Packing:
    """How a padded batch is packed.

    index: int64 [T], the places of real tokens among all B * S, in the order of sequences.
    seen: what packed rows see, lowered.
    """

    index: Tensor
    lead: tuple[int, int]
    batch_first: bool
    seen: Visibility

    @property
    def tokens(self) -> int:
        return self.index.shape[0]

    def pack(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.index).unsqueeze(0 if self.batch_first else 1)

    def unpack(self, x: Tensor) -> Tensor:
        """Tokens back at their places, 0 in padding."""
        flat = x.new_zeros((self.lead[0] * self.lead[1], x.shape[-1]))
        return flat.index_copy(0, self.index, x.flatten(0, 1)).unflatten(0, self.lead)


def _untraceable(padding: Tensor) -> str | None:
    """Why the number of tokens cannot be looked at now."""
    if padding.is_meta:
        return "the number of tokens is data, and meta tensors have none"
    if torch.compiler.is_compiling():
        return "the number of tokens is data, which a traced graph cannot ask for"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func needs the same work for every batch item"
    return None


def plan(
    padding: Tensor, mask: Maskish, heads: int, batch_first: bool, lead: tuple[int, int]
) -> Packing | str:
    """How to pack a batch, or why not.

    Args:
        padding: [B, S], as torch's src_key_padding_mask.
        mask: what rows see beside that: None, a mask of `fastattn.masks`, or a tensor as torch's attn_mask.
        heads: of the attention.
        lead: the first two sizes of the batch, [B, S] or [S, B].
    """
    reason = _untraceable(padding)
    if reason is not None:
        return reason
    kept, bias = split(padding)
    if kept is None:
        return "src_key_padding_mask adds to the scores: it is not padding alone"
    B, S = kept.shape
    between = _ranges(mask, (B, heads, S, S), kept.device)
    if isinstance(between, str):
        return between
    places = kept.reshape(-1).nonzero().squeeze(1)
    T = places.shape[0]
    lo, hi = (_of_tokens(bound, places).expand(1, heads, T) for bound in _packed(kept, between, S))
    lowered = Lowered(1, heads, T, T, kept.device, lo=lo, hi=hi)
    index = places if batch_first else places % S * B + places // S
    return Packing(index, lead, batch_first, Visibility(Prepared(lowered, heads, f"{B} packed sequences")))


# With more real keys than this share of all, gathering them costs more than their projections save.
_MOST_KEYS = 0.9


def plan_keys(padding: Tensor, mask: Maskish, heads: int, rows: int) -> tuple[Tensor, Visibility] | None:
    """How to project and read real keys alone, for `rows` query rows an item, or None where that does not pay.

    Returns the places of the real keys among all B * S, and what the B * rows query rows, in order of items, see of
    them.
    """
    if _untraceable(padding) is not None or isinstance(mask, (Tensor, Prepared, Visibility)):
        return None
    kept, _ = split(padding)
    if kept is None:
        return None
    B, S = kept.shape
    places = kept.reshape(-1).nonzero().squeeze(1)
    T = places.shape[0]
    if T > _MOST_KEYS * B * S:
        return None
    between = _ranges(mask, (B, heads, rows, S), kept.device)
    if isinstance(between, str):
        return None
    lo, hi = (
        bound.transpose(0, 1).flatten(1).unsqueeze(0).expand(1, heads, B * rows)
        for bound in _packed(kept, between, rows)
    )
    lowered = Lowered(1, heads, B * rows, T, kept.device, lo=lo, hi=hi)
    return places, Visibility(Prepared(lowered, heads, f"{T} of {B * S} keys"))


def _packed(kept: Tensor, between: tuple[Tensor, Tensor] | None, rows: int) -> tuple[Tensor, Tensor]:
    """The bounds of what rows see, among packed keys: int32 [B, H or 1, rows] twice."""
    B, S = kept.shape
    # How many keys are kept before each place: a place's number in the packed order.
    rank = torch.zeros(B * S + 1, dtype=torch.int32, device=kept.device)
    torch.cumsum(kept.reshape(-1), 0, dtype=torch.int32, out=rank[1:])
    first = (torch.arange(B, device=kept.device) * S).view(B, 1, 1)
    if between is None:
        return tuple(rank[first + end].expand(B, 1, rows) for end in (0, S))
    return tuple(rank[first + bound].expand(B, bound.shape[1], rows) for bound in between)


def _of_tokens(bound: Tensor, places: Tensor) -> Tensor:
    """[B, H or 1, S] at the kept places: [1, H or 1, T]."""
    return bound.transpose(0, 1).flatten(1).index_select(1, places).unsqueeze(0)


def _ranges(
    mask: Maskish, sizes: tuple[int, int, int, int], device: torch.device
) -> tuple[Tensor, Tensor] | str | None:
    """lo and hi, int64 [B or 1, H or 1, L], of what a mask shows; None shows all; a str is why it has none."""
    if mask is None:
        return None
    B, H, L, S = sizes
    i = torch.arange(L, device=device)
    lo, hi = torch.zeros(1, 1, L, dtype=torch.int64, device=device), torch.full((1, 1, L), S, device=device)
    if isinstance(mask, Tensor):
        shown, bias = split(mask if mask.dim() == 2 else mask.unflatten(0, (B, H)))
        if shown is None:
            return "mask adds to the scores: it is not one range of keys a row"
        found = scan_keys(shown.reshape(1, -1, 1, S)).ranges
        if found is None:
            return "mask is not one range of keys a row"
        shape = (1, 1, L) if mask.dim() == 2 else (B, H, L)
        lo = lo if found.lo is None else found.lo.long().view(shape)
        return lo, hi if found.hi is None else found.hi.long().view(shape)
    if isinstance(mask, Visibility):
        return "mask is already combined with a padding mask"
    lowered = mask.lowered if isinstance(mask, Prepared) else lower(mask, B, H, H, L, S, device)
    if lowered.has_bits or lowered.bias is not None:
        return f"mask {mask!r} is not one range of keys a row"
    if lowered.lo is not None:
        lo = lowered.lo.long()
    if lowered.hi is not None:
        hi = lowered.hi.long()
    if lowered.band_lo is not None:
        lo = torch.maximum(lo, i + lowered.band_lo)
    if lowered.band_hi is not None:
        hi = torch.minimum(hi, i + (lowered.band_hi + 1))
    lo, hi = lo.clamp(0, S), hi.clamp(0, S)
    return lo, torch.maximum(lo, hi)

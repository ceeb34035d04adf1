"""transformers' mask functions while torch.compile traces: the same functions, as objects with readable parts.

Outside a trace, `model_masks` reads what a mask function is made of from its closure. Dynamo lets nobody look into
the closure of a function made during the trace, so there it is given other makers (by
`torch.compiler.substitute_in_graph`), whose products compute the same and can be read. Untraced code never sees
them, and models on other attention implementations only the same formulas in other clothes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class Traced:
    """made_by: the name of transformers' maker. inside: its arguments by name, as its closure would hold them."""

    def __init__(self, made_by: str, inside: dict, formula: Callable):
        self.made_by = made_by
        self.inside = inside
        self.formula = formula

    def __call__(self, batch_idx, head_idx, q_idx, kv_idx):
        return self.formula(batch_idx, head_idx, q_idx, kv_idx)


def _and_masks(*mask_functions):
    def formula(b, h, q, k):
        seen = q.new_ones((), dtype=torch.bool)
        for function in mask_functions:
            seen = seen & function(b, h, q, k).to(seen.device)
        return seen

    return Traced("and_masks", {"mask_functions": mask_functions}, formula)


def _or_masks(*mask_functions):
    def formula(b, h, q, k):
        seen = q.new_zeros((), dtype=torch.bool)
        for function in mask_functions:
            seen = seen | function(b, h, q, k).to(seen.device)
        return seen

    return Traced("or_masks", {"mask_functions": mask_functions}, formula)


def _sliding_window_overlay(sliding_window):
    def formula(b, h, q, k):
        return q - k < sliding_window

    return Traced("sliding_window_overlay", {"sliding_window": sliding_window}, formula)


def _sliding_window_bidirectional_overlay(sliding_window):
    def formula(b, h, q, k):
        return (q - k).abs() <= sliding_window

    return Traced("sliding_window_bidirectional_overlay", {"sliding_window": sliding_window}, formula)


def _chunked_overlay(chunk_size, left_padding):
    def formula(b, h, q, k):
        start = left_padding[b]
        return (q - start) // chunk_size == (k - start) // chunk_size

    inside = {"chunk_size": chunk_size, "left_padding": left_padding}
    return Traced("chunked_overlay", inside, formula)


def _packed_sequence_mask_function(packed_sequence_mask):
    def formula(b, h, q, k):
        return packed_sequence_mask[b, q] == packed_sequence_mask[b, k]

    inside = {"packed_sequence_mask": packed_sequence_mask}
    return Traced("packed_sequence_mask_function", inside, formula)


def _remap_positions_for_packed_sequence(mask_function, position_ids):
    def formula(b, h, q, k):
        return mask_function(b, h, position_ids[b, q], position_ids[b, k])

    inside = {"mask_function": mask_function, "position_ids": position_ids}
    return Traced("remap_positions_for_packed_sequence", inside, formula)


def _blockwise_overlay(block_sequence_ids):
    def formula(b, h, q, k):
        row = block_sequence_ids[b, q]
        return (row == block_sequence_ids[b, k]) & (row >= 0)

    return Traced("blockwise_overlay", {"block_sequence_ids": block_sequence_ids}, formula)


_MAKERS = (
    _and_masks,
    _or_masks,
    _sliding_window_overlay,
    _sliding_window_bidirectional_overlay,
    _chunked_overlay,
    _packed_sequence_mask_function,
    _remap_positions_for_packed_sequence,
    _blockwise_overlay,
)
_registered: list[bool] = []


def register() -> None:
    """Tells Dynamo of the makers, once. A maker that this transformers does not have is left out."""
    if _registered:
        return
    from transformers import masking_utils as theirs

    for maker in _MAKERS:
        original = getattr(theirs, maker.__name__.removeprefix("_"), None)
        if original is not None:
            torch.compiler.substitute_in_graph(original)(maker)
    _registered.append(True)

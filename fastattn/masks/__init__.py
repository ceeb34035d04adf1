"""Masks: which keys each query row may see, as values that combine with `&`, `|` and `~`.

    from fastattn.masks import Causal, KeyPadding, SlidingWindow
    mask = (Causal() & SlidingWindow(left=255)) & KeyPadding(lengths)

Any of them, a bool tensor or an additive float tensor serves as `mask`; attention pays for what it shows.
"""

from .algebra import (
    And,
    Band,
    Causal,
    CausalLowerRight,
    Chunked,
    Documents,
    KeyPadding,
    Mask,
    Not,
    Or,
    PrefixLM,
    SlidingWindow,
)
from .lower import Lowered, Prepared, from_tensor, lower, prepare
from .sparse import BigBird, BlockSparse, Dense, Fixed, Longformer, Predicate, Strided

__all__ = [
    "And",
    "Band",
    "BigBird",
    "BlockSparse",
    "Causal",
    "CausalLowerRight",
    "Chunked",
    "Dense",
    "Documents",
    "Fixed",
    "KeyPadding",
    "Longformer",
    "Lowered",
    "Mask",
    "Not",
    "Or",
    "Predicate",
    "Prepared",
    "PrefixLM",
    "SlidingWindow",
    "Strided",
    "from_tensor",
    "lower",
    "prepare",
]

"""64-bit words of visibility: one word a row of a 64 x 64 granule, the first key in the lowest bit."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

GRANULE = 64
FULL, EMPTY = -1, -2  # codes of a granule; any other code is the index of a bit tile


def granules(size: int) -> int:
    """Granules that `size` rows or keys fill, the last perhaps in part."""
    return -(-size // GRANULE)


def _kept(make: Callable[[torch.device], Tensor]) -> Callable[[torch.device], Tensor]:
    """`make`, called once a device; what is made while something traces lives no longer than the trace."""
    kept: dict[torch.device, Tensor] = {}

    @functools.wraps(make)
    def get(device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():
            return make(device)
        if device not in kept:
            made = make(device)
            if type(made) is not Tensor or torch._C._len_torch_dispatch_stack():
                return made
            kept[device] = made
        return kept[device]

    get.cache_clear = kept.clear
    return get


@_kept
def low_bits(device: torch.device) -> Tensor:
    """int64 [65]: word n has its n lowest bits set."""
    words = torch.tensor([(1 << n) - 1 for n in range(64)] + [-1], dtype=torch.int64)
    return words.to(device)


@_kept
def lanes(device: torch.device) -> Tensor:
    return torch.arange(GRANULE, device=device)


def range_words(lo: Tensor, hi: Tensor) -> Tensor:
    """Words whose bits lo..hi-1 are set; lo and hi are relative to the granule's first key, of any size."""
    table = low_bits(lo.device)
    return table[hi.clamp(0, 64).long()] & ~table[lo.clamp(0, 64).long()]


def pack_bits(visible: Tensor) -> Tensor:
    """Packs a contiguous bool tensor [..., 64 n] into words int64 [..., n], the first in the lowest bit.

    Eight bools are read as one integer; the multiplication gathers their lowest bits in its top byte.
    """
    gathered = (visible.view(torch.int64) * 0x0102040810204080) >> 56
    return gathered.to(torch.uint8).view(torch.int64)


def unpack_bits(words: Tensor) -> Tensor:
    """The inverse of `pack_bits`: int64 [...] to bool [..., 64]."""
    return (words.unsqueeze(-1) >> lanes(words.device)).bitwise_and_(1).bool()


def popcount(words: Tensor) -> Tensor:
    """Number of set bits of each int64 word."""
    x = words - ((words >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (x * 0x0101010101010101) >> 56 & 0xFF

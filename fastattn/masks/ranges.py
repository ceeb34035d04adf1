"""Ranges: the form of a mask in which row i sees the keys of one interval.

A `Ranges` keeps its bounds symbolic, ints where it can and int32 tensors where it must, so that combining the
masks of a padded causal batch costs two integers and one small tensor, never anything of the size Sq x Sk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import waits

Bound = int | Tensor | None


class Shape(NamedTuple):
    """The call a mask is lowered for: batch, query heads, query rows, keys, and where its tensors live."""

    B: int
    H: int
    Sq: int
    Sk: int
    device: torch.device


def certain(condition: bool) -> bool:
    """A condition on sizes; False where torch.export traces sizes of which it may hold or not. Asking there would fix
    the answer for every call of the program."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _tighter(a: Bound, b: Bound, low: bool) -> Bound:
    """The tighter of two lower (or upper) bounds."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b) if low else min(a, b)
    if not isinstance(a, Tensor):
        a, b = b, a
    if not isinstance(a, Tensor):  # sizes that are not known while torch.export traces
        return torch.sym_max(a, b) if low else torch.sym_min(a, b)
    if not isinstance(b, Tensor):
        return a.clamp(min=b) if low else a.clamp(max=b)
    return torch.maximum(a, b) if low else torch.minimum(a, b)


@dataclass(frozen=True, eq=False)
class Ranges:
    """Row i sees key j where `i + band_lo <= j <= i + band_hi` and `lo <= j < hi`; None is no bound.

    `lo` and `hi` are ints or int32 tensors [B or 1, H or 1, Sq or 1]; they may lie outside 0..Sk. A row whose
    upper bound does not pass its lower one sees nothing.
    """

    band_lo: int | None = None
    band_hi: int | None = None
    lo: Bound = None
    hi: Bound = None

    def planes(self) -> tuple[int, int]:
        """The batch and head extents the bounds vary over (1: they do not)."""
        (lo_b, lo_h), (hi_b, hi_h) = (
            t.shape[:2] if isinstance(t, Tensor) else (1, 1) for t in (self.lo, self.hi)
        )
        return max(lo_b, hi_b), max(lo_h, hi_h)

    def to(self, device: torch.device) -> Ranges:
        """The same with its tensors on a device."""
        lo, hi = (t.to(device) if isinstance(t, Tensor) else t for t in (self.lo, self.hi))
        return Ranges(self.band_lo, self.band_hi, lo, hi)

    def row_constant(self) -> bool:
        """Every row has the same interval."""
        tensors = (t for t in (self.lo, self.hi) if isinstance(t, Tensor))
        return self.band_lo is None and self.band_hi is None and all(t.shape[2] == 1 for t in tensors)

    def rows(self, shape: Shape, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Bounds of rows first..last-1 clamped to 0..Sk: two int32 tensors that broadcast to
        [B, H, last - first].

        Rows from Sq on repeat row Sq - 1.
        """
        one_row = self.row_constant()
        i = None
        if not one_row:
            i = torch.arange(first, last, dtype=torch.int32, device=shape.device).clamp_(max=shape.Sq - 1)
            i = i.view(1, 1, -1)
        bounds = []
        for low, band, bound in ((True, self.band_lo, self.lo), (False, self.band_hi, self.hi)):
            if isinstance(bound, Tensor) and bound.shape[2] > 1:
                bound = bound[:, :, first:last] if last <= shape.Sq else bound[:, :, i[0, 0].long()]
            if band is not None:
                bound = _tighter(i + (band if low else band + 1), bound, low)
            bound = _tighter(bound, 0 if low else shape.Sk, low)
            if not isinstance(bound, Tensor):
                bound = torch.full((1, 1, 1), bound, dtype=torch.int32, device=shape.device)
            bounds.append(bound.clamp(max=shape.Sk) if low else bound.clamp(min=0))
        return bounds[0], bounds[1]

    def __and__(self, other: Ranges) -> Ranges:
        return Ranges(
            _tighter(self.band_lo, other.band_lo, True),
            _tighter(self.band_hi, other.band_hi, False),
            _tighter(self.lo, other.lo, True),
            _tighter(self.hi, other.hi, False),
        )

    def trimmed(self, shape: Shape) -> Ranges:
        """The same mask without the scalar bounds that hide nothing at this shape."""
        band_lo, band_hi, lo, hi = self.band_lo, self.band_hi, self.lo, self.hi
        if band_lo is not None and certain(shape.Sq - 1 + band_lo <= 0):
            band_lo = None
        if band_hi is not None and certain(band_hi >= shape.Sk - 1):
            band_hi = None
        if lo is not None and not isinstance(lo, Tensor) and certain(lo <= 0):
            lo = None
        if hi is not None and not isinstance(hi, Tensor) and certain(hi >= shape.Sk):
            hi = None
        return Ranges(band_lo, band_hi, lo, hi)


EVERYTHING = Ranges()


def nothing(shape: Shape) -> Ranges:
    """No row sees a key; written as a band, which costs no tensor."""
    return Ranges(band_hi=-max(shape.Sq, 1))


def complement(ranges: Ranges, shape: Shape) -> Ranges | None:
    """What `ranges` hides, where that is one interval a row by its form alone; else None."""
    r = ranges.trimmed(shape)
    bounds = [r.band_lo is not None, r.band_hi is not None, r.lo is not None, r.hi is not None]
    if sum(bounds) == 0:
        return nothing(shape)
    if sum(bounds) == 1:
        if r.band_lo is not None:
            return Ranges(band_hi=r.band_lo - 1)
        if r.band_hi is not None:
            return Ranges(band_lo=r.band_hi + 1)
        return Ranges(hi=r.lo) if r.hi is None else Ranges(lo=r.hi)
    same_side = sum(bounds) == 2 and (r.band_lo is None) == (r.lo is None)
    if same_side and shape.Sq > 0:  # a band and a bound: merge them into one bound a row
        lo, hi = r.rows(shape, 0, shape.Sq)
        return Ranges(hi=lo) if r.hi is None and r.band_hi is None else Ranges(lo=hi)
    return None


def union(a: Ranges, b: Ranges, shape: Shape) -> Ranges | None:
    """What either shows, where that is one interval in every row; else None.

    Bands are joined by their scalars. Tensors are compared row by row, in O(B * H * Sq) at most; on an
    accelerator that reads one flag back.
    """
    a, b = a.trimmed(shape), b.trimmed(shape)
    for one, other in ((a, b), (b, a)):
        if one.band_lo is one.band_hi is one.lo is one.hi is None:
            return EVERYTHING
        if one.band_hi is not None and certain(one.band_hi <= -shape.Sq):
            return other
    if a.lo is a.hi is b.lo is b.hi is None:
        both = a & b
        bounded = both.band_lo is not None and both.band_hi is not None
        if bounded and not certain(both.band_lo <= both.band_hi + 1):
            return None  # there is a gap between them
        lo = None if a.band_lo is None or b.band_lo is None else _tighter(a.band_lo, b.band_lo, False)
        hi = None if a.band_hi is None or b.band_hi is None else _tighter(a.band_hi, b.band_hi, True)
        return Ranges(lo, hi).trimmed(shape)
    if waits.unreadable(shape.device):  # there are no values to compare
        return None
    rows = 1 if a.row_constant() and b.row_constant() else shape.Sq
    (a_lo, a_hi), (b_lo, b_hi) = a.rows(shape, 0, rows), b.rows(shape, 0, rows)
    a_empty, b_empty = a_hi <= a_lo, b_hi <= b_lo
    joined = a_empty | b_empty | (torch.minimum(a_hi, b_hi) >= torch.maximum(a_lo, b_lo))
    waits.note(shape.device, "whether two masks' ranges together are one range in every row")
    if not bool(joined.all()):
        return None
    lo = torch.where(b_empty, a_lo, torch.where(a_empty, b_lo, torch.minimum(a_lo, b_lo)))
    hi = torch.where(b_empty, a_hi, torch.where(a_empty, b_hi, torch.maximum(a_hi, b_hi)))
    # Keys seen from the first one on, or to the last one, need no tensor.
    return Ranges(lo=None if _all_equal(lo, 0) else lo, hi=None if _all_equal(hi, shape.Sk) else hi)


def _all_equal(bound: Tensor, value: int) -> bool:
    return bound.device.type == "cpu" and bool((bound == value).all())

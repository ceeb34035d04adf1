"""The leaves of a mask that is no interval a row, and AND, OR and NOT over them.

Every leaf knows three things, each vectorised over granules of 64 rows x 64 keys:

- its status in a window of the granule grid: empty (0), partial (1) or full (2), where partial may be claimed
  too often but never too rarely;
- a key for a partial granule, with equal keys for equal tiles;
- the tile itself, 64 words of 64 bits.

AND is the minimum of statuses, OR the maximum, NOT two minus it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .ranges import Ranges, Shape
from .words import EMPTY, FULL, GRANULE, granules, lanes, low_bits, pack_bits, range_words


class Window(NamedTuple):
    """A part of the granule grid: batches b0..b1-1, heads h0..h1-1, Q granules q0..q1-1, all K granules."""

    b0: int
    b1: int
    h0: int
    h1: int
    q0: int
    q1: int

    def of(self, tensor: Tensor) -> Tensor:
        """The window's planes of a tensor [B or 1, H or 1, ...]."""
        if tensor.shape[0] > 1:
            tensor = tensor[self.b0 : self.b1]
        if tensor.shape[1] > 1:
            tensor = tensor[:, self.h0 : self.h1]
        return tensor


class Granules(NamedTuple):
    """A list of granules: int64 vectors of batch, head, Q granule and K granule."""

    b: Tensor
    h: Tensor
    q: Tensor
    k: Tensor

    def pick(self, index: Tensor) -> Granules:
        return Granules(*(v[index] for v in self))

    def plane(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Index vectors into the batch and head dimensions of a tensor [B or 1, H or 1, ...]."""
        zero = self.b.new_zeros(())
        return (self.b if tensor.shape[0] > 1 else zero), (self.h if tensor.shape[1] > 1 else zero)


class Kind:
    """What the numbers of an encoded tree mean; the same order as in csrc/ops_mask.cpp."""

    AND = 0
    OR = 1
    NOT = 2
    RANGE = 3
    KEY_SET = 4
    MODULAR = 5
    SAME_ID = 6
    LAYOUT = 7
    BLOCK_LIST = 8
    CODES = 9
    WITHIN = 10


class Node:
    """A node of the tree; `planes` are the batch and head extents it varies over."""

    planes: tuple[int, int] = (1, 1)

    def status(self, window: Window, seen: dict[Leaf, Tensor]) -> Tensor:
        """int8 statuses, broadcastable to [b, h, q, k] of the window; leaves note theirs in `seen`."""
        raise NotImplementedError

    def words(self, at: Granules) -> Tensor:
        """Tiles int64 [N, 64]; bits beyond Sq and Sk are arbitrary."""
        raise NotImplementedError

    def leaves(self) -> Iterator[Leaf]:
        raise NotImplementedError

    def encode(self, put: Callable[[Tensor], int]) -> list[int]:
        """The tree in postfix order, as the op mask_build reads it; `put` takes a tensor and gives its number."""
        raise NotImplementedError


class Leaf(Node):
    def __init__(self, shape: Shape):
        self.shape = shape
        self.n_q, self.n_k = granules(shape.Sq), granules(shape.Sk)

    def status(self, window: Window, seen: dict[Leaf, Tensor]) -> Tensor:
        if self not in seen:
            seen[self] = self.window_status(window)
        return seen[self]

    def window_status(self, window: Window) -> Tensor:
        raise NotImplementedError

    def leaves(self) -> Iterator[Leaf]:
        yield self

    def key(self, at: Granules) -> Tensor:
        """int64 [N], below `key_count`; equal keys mean equal tiles. By default no two granules are equal."""
        b, h = self.planes
        key = at.q * self.n_k + at.k
        if h > 1:
            key = key + at.h * (self.n_q * self.n_k)
        return key + at.b * (h * self.n_q * self.n_k) if b > 1 else key

    @property
    def key_count(self) -> int:
        return self.planes[0] * self.planes[1] * self.n_q * self.n_k

    def key_starts(self) -> Tensor:
        """int32 [n_k]: the first key of each K granule."""
        return torch.arange(0, self.n_k * GRANULE, GRANULE, dtype=torch.int32, device=self.shape.device)

    def key_ends(self) -> Tensor:
        """int32 [n_k]: one past the last existing key of each K granule."""
        return (self.key_starts() + GRANULE).clamp_(max=self.shape.Sk)


@dataclass(eq=False)
class Inverse(Node):
    child: Node

    def __post_init__(self):
        self.planes = self.child.planes

    def status(self, window: Window, seen: dict[Leaf, Tensor]) -> Tensor:
        return 2 - self.child.status(window, seen)

    def words(self, at: Granules) -> Tensor:
        return ~self.child.words(at)

    def leaves(self) -> Iterator[Leaf]:
        return self.child.leaves()

    def encode(self, put: Callable[[Tensor], int]) -> list[int]:
        return [*self.child.encode(put), Kind.NOT]


@dataclass(eq=False)
class Combine(Node):
    """AND (`every`) or OR of children."""

    every: bool
    children: Sequence[Node]

    def __post_init__(self):
        self.planes = tuple(max(c.planes[d] for c in self.children) for d in (0, 1))

    def status(self, window: Window, seen: dict[Leaf, Tensor]) -> Tensor:
        parts = [c.status(window, seen) for c in self.children]
        return functools.reduce(torch.minimum if self.every else torch.maximum, parts)

    def words(self, at: Granules) -> Tensor:
        parts = [c.words(at) for c in self.children]
        return functools.reduce(torch.bitwise_and if self.every else torch.bitwise_or, parts)

    def leaves(self) -> Iterator[Leaf]:
        for child in self.children:
            yield from child.leaves()

    def encode(self, put: Callable[[Tensor], int]) -> list[int]:
        parts = [number for child in self.children for number in child.encode(put)]
        return [*parts, Kind.AND if self.every else Kind.OR, len(self.children)]


class RangeLeaf(Leaf):
    """An interval of keys a row."""

    def __init__(self, ranges: Ranges, shape: Shape):
        super().__init__(shape)
        self.ranges = ranges.trimmed(shape)
        self.planes = self.ranges.planes()
        r = self.ranges
        self.band_only = r.lo is None and r.hi is None
        self.one_row = r.row_constant()

    def window_status(self, window: Window) -> Tensor:
        starts, ends = self.key_starts(), self.key_ends()
        if self.band_only and not self.one_row:
            r, last = self.ranges, self.shape.Sq - 1
            first = torch.arange(window.q0, window.q1, dtype=torch.int32, device=self.shape.device) * GRANULE
            first = first.view(-1, 1)
            final = (first + (GRANULE - 1)).clamp(max=last)
            some = full = None
            if r.band_lo is not None:
                some, full = ends > first + r.band_lo, starts >= final + r.band_lo
            if r.band_hi is not None:
                below, inside = starts <= final + r.band_hi, ends <= first + (r.band_hi + 1)
                some = below if some is None else some & below
                full = inside if full is None else full & inside
            status = some.to(torch.int8) + (some & full)
            return status.view(1, 1, *status.shape)
        rows = (0, 1) if self.one_row else (window.q0 * GRANULE, window.q1 * GRANULE)
        lo, hi = (window.of(t) for t in self.ranges.rows(self.shape, *rows))
        per = 1 if self.one_row else GRANULE
        lo, hi = torch.broadcast_tensors(lo, hi)
        lo, hi = (t.unflatten(2, (-1, per)) for t in (lo, hi))
        sees = hi > lo
        first, final = (
            lo.masked_fill(~sees, self.shape.Sk).amin(3, True),
            hi.masked_fill(~sees, 0).amax(3, True),
        )
        some = (starts < final) & (ends > first)
        full = (starts >= lo.amax(3, True)) & (ends <= hi.amin(3, True))
        return some.to(torch.int8) + (some & full)

    def key(self, at: Granules) -> Tensor:
        if self.band_only and not self.one_row:
            return at.q - at.k + self.n_k
        if not self.one_row:
            return super().key(at)
        lo, hi = self._row_bounds(at)
        start = (at.k * GRANULE).view(-1, 1)
        return ((lo - start).clamp(0, 64) * 65 + (hi - start).clamp(0, 64)).view(-1)

    @property
    def key_count(self) -> int:
        if self.band_only and not self.one_row:
            return self.n_q + self.n_k + 1
        return 65 * 65 if self.one_row else super().key_count

    def _row_bounds(self, at: Granules) -> tuple[Tensor, Tensor]:
        """int64 [N, 64] (or [N, 1]) bounds of the granules' rows."""
        i = None
        if not self.one_row:
            i = (at.q.view(-1, 1) * GRANULE + lanes(at.q.device)).clamp_(max=self.shape.Sq - 1)
        r = self.ranges
        bounds = []
        for low, band, bound in ((True, r.band_lo, r.lo), (False, r.band_hi, r.hi)):
            tighter = torch.maximum if low else torch.minimum
            limit = None
            if isinstance(bound, Tensor):
                b, h = (x.view(-1, 1) for x in at.plane(bound))
                row = i if bound.shape[2] > 1 else b.new_zeros(())
                limit = bound[b, h, row].long()
            elif bound is not None:
                limit = at.q.new_full((1, 1), bound)
            if band is not None:
                of_band = i + (band if low else band + 1)
                limit = of_band if limit is None else tighter(limit, of_band)
            if limit is None:
                limit = at.q.new_full((1, 1), 0 if low else self.shape.Sk)
            bounds.append(limit)
        return bounds[0], bounds[1]

    def words(self, at: Granules) -> Tensor:
        lo, hi = self._row_bounds(at)
        start = (at.k * GRANULE).view(-1, 1)
        return range_words(lo - start, hi - start).expand(at.k.shape[0], GRANULE)

    def encode(self, put: Callable[[Tensor], int]) -> list[int]:
        numbers = [Kind.RANGE]
        for band, bound in ((self.ranges.band_lo, self.ranges.lo), (self.ranges.band_hi, self.ranges.hi)):
            tensor, number = -1, bound
            if isinstance(bound, Tensor):
                tensor, number = put(bound.contiguous()), None
            for given in (band, number):
                numbers += [0, 0] if given is None else [1, given]
            numbers.append(tensor)
        return numbers


class KeySetLeaf(Leaf):
    """A set of keys, the same for every row: bool [B or 1, H or 1, Sk]."""

    def __init__(self, keys: Tensor, shape: Shape):
        super().__init__(shape)
        self.planes = (keys.shape[0], keys.shape[1])
        self.keys = keys

    @functools.cached_property
    def by_granule(self) -> Tensor:
        padded = self.keys.new_zeros(*self.keys.shape[:2], self.n_k * GRANULE)
        padded[:, :, : self.shape.Sk] = self.keys
        return pack_bits(padded)

    def window_status(self, window: Window) -> Tensor:
        words = window.of(self.by_granule)
        complete = low_bits(self.shape.device)[(self.key_ends() - self.key_starts()).long()]
        return ((words != 0).to(torch.int8) + (words == complete)).unsqueeze(2)

    def key(self, at: Granules) -> Tensor:
        b, h = at.plane(self.by_granule)
        return (b * self.planes[1] + h) * self.n_k + at.k

    @property
    def key_count(self) -> int:
        return self.planes[0] * self.planes[1] * self.n_k

    def words(self, at: Granules) -> Tensor:
        b, h = at.plane(self.by_granule)
        return self.by_granule[b, h, at.k].unsqueeze(1).expand(-1, GRANULE)

    def encode(self, put: Callable[[Tensor], int]) -> list[int]:
        return [Kind.KEY_SET, put(self.keys.contiguous())]


class ModularLeaf(Leaf):
    """Keys at a distance from the row that `stride` divides."""

    def __init__(self, stride: int, shape: Shape):
        super().__init__(shape)
        self.stride = stride

    def window_status(self, window: Window) -> Tensor:
        q = torch.arange(window.q0, window.q1, dtype=torch.int32, device=self.shape.device).view(-1, 1)
        k = torch.arange(self.n_k, dtype=torch.int32, device=self.shape.device)
        if self.stride == 1:
            return torch.full((1, 1, len(q), self.n_k), 2, dtype=torch.int8, device=self.shape.device)
        # A multiple within the distances D - 63 .. D + 63 of two granules D apart.
        some = torch.remainder((q - k) * GRANULE + (GRANULE - 1), self.stride) <= 2 * (GRANULE - 1)
        return some.to(torch.int8).view(1, 1, *some.shape)

    def key(self, at: Granules) -> Tensor:
        return torch.remainder((at.q - at.k) * GRANULE, self.stride)

    @property
    def key_count(self) -> int:
        return self.stride

    def words(self, at: Granules) -> Tensor:
        lane = lanes(at.q.device)
        i = at.q.view(-1, 1, 1) * GRANULE + lane.view(-1, 1)
        j = at.k.view(-1, 1, 1) * GRANULE + lane
        return pack_bits(torch.remainder(i - j, self.stride) == 0).squeeze(-1)

    def encode(self, put: Callable[[Tensor], int]) -> list[int]:
        return [Kind.MODULAR, self.stride]


class SameIdLeaf(Leaf):
    """Rows see the keys of their own id; ids int32 [B or 1, Sq] and [B or 1, Sk], in any order."""

    def __init__(self, row_ids: Tensor, key_ids: Tensor, shape: Shape):
        super().__init__(shape)
        self.row_ids = self._padded(row_ids, self.n_q)
        self.key_ids = self._padded(key_ids, self.n_k)
        self.planes = (max(row_ids.shape[0], key_ids.shape[0]), 1)

    @staticmethod
    def _padded(ids: Tensor, count: int) -> Tensor:
        """[B, 1, count, 64], the last id repeated."""
        extra = count * GRANULE - ids.shape[1]
        ids = torch.cat([ids, ids[:, -1:].expand(-1, extra)], 1) if extra else ids
        return ids.reshape(ids.shape[0], 1, count, GRANULE)

    def window_status(self, window: Window) -> Tensor:
        rows, keys = window.of(self.row_ids)[:, :, window.q0 : window.q1], window.of(self.key_ids)
        (r_min, r_max), (k_min, k_max) = torch.aminmax(rows, dim=3), torch.aminmax(keys, dim=3)
        r_min, r_max, k_min, k_max = (
            r_min.unsqueeze(3),
            r_max.unsqueeze(3),
            k_min.unsqueeze(2),
            k_max.unsqueeze(2),
        )
        some = (r_min <= k_max) & (k_min <= r_max)
        return some.to(torch.int8) + ((r_min == k_max) & (k_min == r_max) & (r_min == k_min))

    def words(self, at: Granules) -> Tensor:
        rows = self.row_ids[at.plane(self.row_ids)[0], 0, at.q]
        keys = self.key_ids[at.plane(self.key_ids)[0], 0, at.k]
        return pack_bits(rows.unsqueeze(2) == keys.unsqueeze(1)).squeeze(-1)

    def encode(self, put: Callable[[Tensor], int]) -> list[int]:
        return [Kind.SAME_ID, put(self.row_ids), put(self.key_ids)]


class LayoutLeaf(Leaf):
    """A block layout bool [B or 1, H or 1, rows, columns] of square blocks of any size."""

    def __init__(self, layout: Tensor, block: int, shape: Shape):
        super().__init__(shape)
        self.layout, self.block = layout, block
        self.planes = (layout.shape[0], layout.shape[1])
        # Up to 4 x 4 blocks a granule: the blocks themselves are the key.
        self.side = GRANULE // block if GRANULE % block == 0 and block >= 16 else 0

    def _spans(self, first: int, last: int, size: int) -> list[Tensor]:
        """Block indices that granules first..last-1 meet: as many vectors as one meets at most."""
        granule = torch.arange(first, last, device=self.shape.device) * GRANULE
        head = granule // self.block
        tail = (granule + GRANULE).clamp_(max=size).sub_(1) // self.block
        reach = -(-(GRANULE - 1) // self.block) if GRANULE % self.block else GRANULE // self.block - 1
        reach = 0 if self.block % GRANULE == 0 else reach
        return [torch.minimum(head + t, tail) for t in range(reach + 1)]

    def window_status(self, window: Window) -> Tensor:
        some = full = window.of(self.layout)
        for dim, spans in (
            (2, self._spans(window.q0, window.q1, self.shape.Sq)),
            (3, self._spans(0, self.n_k, self.shape.Sk)),
        ):
            any_of, all_of = some.index_select(dim, spans[0]), full.index_select(dim, spans[0])
            for span in spans[1:]:
                any_of |= some.index_select(dim, span)
                all_of &= full.index_select(dim, span)
            some, full = any_of, all_of
        return some.to(torch.int8) + full

    def key(self, at: Granules) -> Tensor:
        if not self.side:
            return super().key(at)
        b, h = at.plane(self.layout)
        key = torch.zeros_like(at.q)
        for r in range(self.side):
            row = (at.q * self.side + r).clamp_(max=self.layout.shape[2] - 1)
            for c in range(self.side):
                column = (at.k * self.side + c).clamp_(max=self.layout.shape[3] - 1)
                key = key * 2 + self.layout[b, h, row, column]
        return key

    @property
    def key_count(self) -> int:
        return 1 << self.side**2 if self.side else super().key_count

    def words(self, at: Granules) -> Tensor:
        lane = lanes(at.q.device)
        b, h = (x.view(-1, 1, 1) for x in at.plane(self.layout))
        row = (at.q.view(-1, 1, 1) * GRANULE + lane.view(-1, 1)) // self.block
        column = (at.k.view(-1, 1, 1) * GRANULE + lane) // self.block
        row, column = row.clamp_(max=self.layout.shape[2] - 1), column.clamp_(max=self.layout.shape[3] - 1)
        return pack_bits(self.layout[b, h, row, column]).squeeze(-1)

    def encode(self, put: Callable[[Tensor], int]) -> list[int]:
        return [Kind.LAYOUT, put(self.layout.contiguous()), self.block]


class BlockListLeaf(Leaf):
    """Each block of rows sees a few blocks of keys: picks int32 [1, H or 1, row blocks, picks]."""

    def __init__(self, picks: Tensor, block: int, shape: Shape):
        super().__init__(shape)
        self.picks, self.block = picks.long(), block
        self.planes = (1, picks.shape[1])

    def window_status(self, window: Window) -> Tensor:
        picks = window.of(self.picks)
        device, block = self.shape.device, self.block
        # Row blocks that meet the window, cut at granules, and the granules of each piece's picks.
        first, last = window.q0 * GRANULE, min(window.q1 * GRANULE, self.shape.Sq)
        aligned = block % GRANULE == 0 or GRANULE % block == 0
        step = min(block, GRANULE) if aligned else 1
        row = torch.arange(first, last, step, device=device)
        picks = picks[:, :, row // block]
        granule = (row // GRANULE - window.q0).view(-1, 1).expand(picks.shape[2:])
        status = torch.zeros(
            1, picks.shape[1], window.q1 - window.q0, self.n_k, dtype=torch.int8, device=device
        )
        head = torch.arange(picks.shape[1], device=device).view(-1, 1, 1)
        for reach in range((block - 1) // GRANULE + 2):
            k = picks[0] * block // GRANULE + reach
            inside = (k * GRANULE < (picks[0] + 1) * block) & (k < self.n_k)
            k = torch.where(inside, k, picks[0] * block // GRANULE)
            status[0, head, granule.unsqueeze(0), k] = 2 if block % GRANULE == 0 else 1
        return status

    def words(self, at: Granules) -> Tensor:
        h = at.plane(self.picks)[1]
        row = (at.q.view(-1, 1) * GRANULE + lanes(at.q.device)) // self.block
        row = row.clamp_(max=self.picks.shape[2] - 1)
        picks = self.picks[0, h.view(-1, 1), row]
        start = (at.k * GRANULE).view(-1, 1, 1)
        words = range_words(picks * self.block - start, (picks + 1) * self.block - start)
        return functools.reduce(torch.bitwise_or, words.unbind(2))

    def encode(self, put: Callable[[Tensor], int]) -> list[int]:
        return [Kind.BLOCK_LIST, put(self.picks.contiguous()), self.block]


class CodeLeaf(Leaf):
    """Granules already known: codes int32 [B or 1, H or 1, n_q, n_k] into tiles int64 [T, 64]."""

    def __init__(self, codes: Tensor, tiles: Tensor, shape: Shape):
        super().__init__(shape)
        self.codes = codes
        self.planes = (codes.shape[0], codes.shape[1])
        self.tiles = torch.cat([tiles, tiles.new_tensor([0, -1]).view(2, 1).expand(2, GRANULE)])

    def window_status(self, window: Window) -> Tensor:
        codes = window.of(self.codes)[:, :, window.q0 : window.q1]
        return (codes != EMPTY).to(torch.int8) + (codes == FULL)

    def _code(self, at: Granules) -> Tensor:
        b, h = at.plane(self.codes)
        return self.codes[b, h, at.q, at.k].long()

    def key(self, at: Granules) -> Tensor:
        return self._code(at) + 2

    @property
    def key_count(self) -> int:
        return self.tiles.shape[0]

    def words(self, at: Granules) -> Tensor:
        return self.tiles[self._code(at)]

    def encode(self, put: Callable[[Tensor], int]) -> list[int]:
        return [Kind.CODES, put(self.codes.contiguous()), put(self.tiles)]

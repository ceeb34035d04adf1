"""Bits: block lists and unique 64 x 64 bit tiles, built granule by granule from the algebra.

The granule grid is walked in windows of granule rows. In each, the tree of leaves says which granules are
empty, full or partial; only partial ones get a key, only one granule a distinct key gets a tile, and equal
tiles are stored once: a strided pattern over 131072 tokens makes a few dozen tiles for its million granules.
So memory follows the result, never Sq x Sk.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import native, waits
from .leaves import Granules, Leaf, Node, RangeLeaf, Window
from .ranges import Shape
from .words import EMPTY, FULL, GRANULE, granules, lanes, low_bits, popcount

# Windows hold about this many granules: enough to drown the cost of a torch call, few enough that the int64
# index vectors of a window stay near half a megabyte each.
_WINDOW_GRANULES = 1 << 16
# Distinct tiles made at once: 2 MiB of words.
_TILES_AT_ONCE = 1 << 12
# The largest key count served by a table; beyond it keys are sorted.
_TABLE_KEYS = 1 << 20
_KEY_LIMIT = 1 << 62


class Bits(NamedTuple):
    """Block lists and tiles, as the kernels read them.

    offsets: int32 [Bm, Hm, n_q + 1], into the whole of `blocks`. blocks: int32 [N, 2], (K granule, tile) in
    order of the K granule, tile -1 for a full granule. tiles: int64 [T, 64].
    """

    offsets: Tensor
    blocks: Tensor
    tiles: Tensor


class TileTable:
    """Tiles seen so far, each once."""

    def __init__(self, shape: Shape):
        self.shape = shape
        device = shape.device
        self._weights = _hash_weights(device)
        self._hashes = torch.empty(0, dtype=torch.int64, device=device)  # ascending
        self._ids = torch.empty(0, dtype=torch.int64, device=device)  # tile of each hash
        self._tiles: list[Tensor] = []
        self.count = 0

    def tiles(self) -> Tensor:
        """All tiles, int64 [T, 64]."""
        if len(self._tiles) != 1:
            empty = torch.empty(0, GRANULE, dtype=torch.int64, device=self.shape.device)
            self._tiles = [torch.cat(self._tiles) if self._tiles else empty]
        return self._tiles[0]

    def codes(self, words: Tensor, last_row: Tensor | None, last_key: Tensor | None) -> Tensor:
        """Codes int64 [N] of tiles int64 [N, 64]; `last_row`, `last_key`: bool [N], the granule is at the
        ragged edge of the rows, of the keys (None: no granule is)."""
        if last_row is None and last_key is None:
            full = (words == -1).all(1)
        else:
            words, full = self._clip(words, last_row, last_key)
        codes = torch.full((words.shape[0],), FULL, dtype=torch.int64, device=words.device)
        codes.masked_fill_(~(words != 0).any(1), EMPTY)
        partial = torch.nonzero(~full & (codes != EMPTY)).view(-1)
        if partial.numel():
            codes[partial] = self._intern(words if partial.numel() == words.shape[0] else words[partial])
        return codes

    def _clip(self, words, last_row, last_key) -> tuple[Tensor, Tensor]:
        """The words without bits beyond the last row and key, and which tiles are then full."""
        complete = words.new_full((words.shape[0], 1), -1)
        if last_key is not None:
            rest = low_bits(words.device)[self.shape.Sk % GRANULE]
            complete = torch.where(last_key.view(-1, 1), rest, complete)
        complete = complete.expand(-1, GRANULE)
        if last_row is not None:
            beyond = lanes(words.device) >= self.shape.Sq % GRANULE
            complete = complete.masked_fill(last_row.view(-1, 1) & beyond, 0)
        words = words & complete
        return words, (words == complete).all(1)

    def _intern(self, words: Tensor) -> Tensor:
        """Tile indices of words int64 [N, 64], none empty or full."""
        mixed = (words ^ ((words >> 32) & 0xFFFFFFFF)) * self._weights
        hashes = (mixed ^ ((mixed >> 29) & 0x7FFFFFFFF)).sum(1)
        unique, inverse = torch.unique(hashes, return_inverse=True)
        first = torch.empty_like(unique).scatter_(0, inverse, torch.arange(len(hashes), device=words.device))
        candidates = words[first]
        if not torch.equal(candidates[inverse], words):  # two tiles of one hash: compare the words themselves
            candidates, inverse = torch.unique(words, dim=0, return_inverse=True)
            unique = candidates.new_empty(0)
        ids = self._known(unique, candidates)
        fresh = torch.nonzero(ids < 0).view(-1)
        if fresh.numel():
            ids[fresh] = torch.arange(self.count, self.count + fresh.numel(), device=words.device)
            self.count += fresh.numel()
            self._tiles.append(candidates[fresh])
            if unique.numel():
                hashes, order = torch.cat([self._hashes, unique[fresh]]).sort()
                self._hashes, self._ids = hashes, torch.cat([self._ids, ids[fresh]])[order]
        return ids[inverse]

    def _known(self, hashes: Tensor, words: Tensor) -> Tensor:
        """Indices of the tiles already stored, -1 for others."""
        missing = torch.full((words.shape[0],), -1, dtype=torch.int64, device=words.device)
        if self.count == 0:
            return missing
        if hashes.numel() == 0:  # a collision: compare with every stored tile
            stored = self.tiles()
            for n, row in enumerate(words):
                same = torch.nonzero((stored == row).all(1)).view(-1)
                missing[n] = same[0] if same.numel() else -1
            return missing
        place = torch.searchsorted(self._hashes, hashes).clamp_(max=max(len(self._hashes) - 1, 0))
        if len(self._hashes) == 0:
            return missing
        ids = self._ids[place]
        same = (self._hashes[place] == hashes) & (self.tiles()[ids] == words).all(1)
        return torch.where(same, ids, missing)


def _hash_weights(device: torch.device) -> Tensor:
    # Python's generator: torch's may not be called under vmap, not even for constants.
    draw = random.Random(0x5EED)
    return torch.tensor([draw.randrange(-(2**62), 2**62) * 2 + 1 for _ in range(GRANULE)], device=device)


def plane_offsets(ends: Tensor, B: int, H: int, count: int) -> Tensor:
    """Running totals int64 [B * H * count + 1] as int32 [B, H, count + 1], a plane's end repeated as the next
    one's start."""
    step = torch.arange(B * H, device=ends.device).view(-1, 1) * count
    at = step + torch.arange(count + 1, device=ends.device)
    return ends[at].to(torch.int32).view(B, H, count + 1)


def count_windows(tree: Node, shape: Shape) -> Iterator[tuple[Window, Tensor]]:
    """Yields windows of the granule grid, in order, and how many pairs of each granule a tree shows: int64
    [b, h, q, n_k], over the planes of the tree."""
    builder = _Builder(tree, shape, None)
    device = shape.device
    ends = torch.arange(builder.n_k + 1, device=device).mul_(GRANULE).clamp_(max=shape.Sk)
    keys = ends.diff()
    for window in builder.windows():
        status, seen, _ = builder.statuses(window)
        codes = builder.codes(status, seen, window).long()
        rows = torch.arange(window.q0, window.q1 + 1, device=device).mul_(GRANULE).clamp_(max=shape.Sq).diff()
        of_tile = torch.cat([popcount(builder.table.tiles()).sum(1), codes.new_zeros(2)])
        yield window, torch.where(codes == FULL, rows.view(-1, 1) * keys, of_tile[codes])


def build(tree: Node, shape: Shape, within: RangeLeaf | None = None) -> Bits | None:
    """Lowers a tree to bits; granules that `within` leaves empty are dropped.

    Returns None where every granule that is kept is full: the bits say nothing then.
    """
    if shape.Sq == 0 or shape.Sk == 0:
        return None
    if native.serves(shape.device):
        offsets, blocks, tiles, flags = native.build(tree, within, shape.Sq, shape.Sk)
        everything = native.read(flags, while_tracing=0) & native.EVERYTHING
        return None if everything else Bits(offsets, blocks, tiles)
    waits.note(
        shape.device,
        "the sizes of block lists, which torch operations build one window of granules at a time",
    )
    return _Builder(tree, shape, within).run()


class _Builder:
    def __init__(self, tree: Node, shape: Shape, within: RangeLeaf | None):
        self.tree, self.shape, self.within = tree, shape, within
        self.planes = tree.planes
        self.n_q, self.n_k = granules(shape.Sq), granules(shape.Sk)
        self.table = TileTable(shape)
        self.leaves = list(dict.fromkeys(tree.leaves()))
        self.ragged_q, self.ragged_k = shape.Sq % GRANULE != 0, shape.Sk % GRANULE != 0
        self.key_count = 4 if self.ragged_q or self.ragged_k else 1
        for leaf in self.leaves:
            self.key_count *= leaf.key_count + 2
        self.known: Tensor | None = None  # code of each key, or _UNKNOWN
        if self.key_count <= _TABLE_KEYS:
            self.known = torch.full((self.key_count,), _UNKNOWN, dtype=torch.int64, device=shape.device)

    def windows(self) -> Iterator[Window]:
        """Windows in the order of the block list: whole rows of granules, batches and heads outermost."""
        B, H = self.planes
        row = max(self.n_k, 1)
        rows = max(_WINDOW_GRANULES // row, 1)
        if rows < self.n_q:
            for b in range(B):
                for h in range(H):
                    for q in range(0, self.n_q, rows):
                        yield Window(b, b + 1, h, h + 1, q, min(q + rows, self.n_q))
            return
        planes = max(rows // max(self.n_q, 1), 1)
        if planes < H:
            for b in range(B):
                for h in range(0, H, planes):
                    yield Window(b, b + 1, h, min(h + planes, H), 0, self.n_q)
            return
        for b in range(0, B, planes // H):
            yield Window(b, min(b + planes // H, B), 0, H, 0, self.n_q)

    def statuses(self, window: Window) -> tuple[Tensor, dict[Leaf, Tensor], Tensor | None]:
        """The window's statuses int8 [b, h, q, k], those of each leaf, and what `within` hides."""
        seen: dict[Leaf, Tensor] = {}
        extent = (
            window.b1 - window.b0 if self.planes[0] > 1 else 1,
            window.h1 - window.h0 if self.planes[1] > 1 else 1,
            window.q1 - window.q0,
            self.n_k,
        )
        status = self.tree.status(window, seen).expand(extent)
        hidden = None
        if self.within is not None:
            hidden = self.within.window_status(window) == 0
            status = status.masked_fill(hidden, 0)
        return status, seen, hidden

    def run(self) -> Bits | None:
        device, (B, H) = self.shape.device, self.planes
        windows = list(self.windows())
        blocks, filled = None, 0
        if len(windows) > 1:
            # Reserve what the statuses allow, so that no second copy of the list is ever made.
            bound = sum(int(torch.count_nonzero(self.statuses(w)[0])) for w in windows)
            blocks = torch.empty(bound, 2, dtype=torch.int32, device=device)
        counts, kept = [], 0
        for window in windows:
            status, seen, hidden = self.statuses(window)
            codes = self.codes(status, seen, window)
            present = codes != EMPTY
            counts.append(present.sum(3).view(-1))
            index = torch.nonzero(present.view(-1)).view(-1)
            if self.table.count == 0:
                hides = 0 if hidden is None else int(torch.count_nonzero(hidden.expand_as(codes)))
                kept += codes.numel() - hides
            rows = torch.stack([index % self.n_k, codes.view(-1)[index]], 1)
            if blocks is None:
                blocks = rows.to(torch.int32)
            else:
                blocks[filled : filled + len(rows)] = rows
            filled += len(rows)
        if blocks is None:
            blocks = torch.empty(0, 2, dtype=torch.int32, device=device)
        blocks = blocks[:filled]
        if self.table.count == 0 and filled == kept:
            return None
        ends = torch.zeros(B * H * self.n_q + 1, dtype=torch.int64, device=device)
        if counts:
            torch.cumsum(torch.cat(counts), 0, out=ends[1:])
        return Bits(plane_offsets(ends, B, H, self.n_q), blocks, self.table.tiles())

    def codes(self, status: Tensor, seen: dict[Leaf, Tensor], window: Window) -> Tensor:
        """Codes int32 of a window's granules."""
        codes = torch.where(status == 2, FULL, EMPTY).to(torch.int32)
        place = torch.nonzero(status == 1)
        if place.numel() == 0:
            return codes
        local = Granules(*place.unbind(1))
        at = Granules(local.b + window.b0, local.h + window.h0, local.q + window.q0, local.k)
        keys = self.keys(at, local, seen)
        codes[tuple(local)] = self.resolve(keys, at).to(torch.int32)
        return codes

    def keys(self, at: Granules, local: Granules, seen: dict[Leaf, Tensor]) -> Tensor:
        """A key for each granule such that equal keys mean equal tiles, edges included."""
        key, count = None, 1
        for leaf in self.leaves:
            of_leaf = leaf.key(at) + 2
            status = seen[leaf]
            index = [v if status.shape[d] > 1 else v.new_zeros(()) for d, v in enumerate(local)]
            state = status[tuple(index)]
            of_leaf = torch.where(state == 1, of_leaf, state.long() >> 1)
            key, count = self._append(key, count, of_leaf, leaf.key_count + 2)
        if self.ragged_q or self.ragged_k:
            edge = (at.q == self.n_q - 1) * 2 + (at.k == self.n_k - 1)
            key, count = self._append(key, count, edge, 4)
        return key

    @staticmethod
    def _append(key: Tensor | None, count: int, more: Tensor, of: int) -> tuple[Tensor, int]:
        if key is None:
            return more, of
        if count * of > _KEY_LIMIT:
            unique, key = torch.unique(key, return_inverse=True)
            count = unique.numel()
        if count * of > _KEY_LIMIT:
            unique, more = torch.unique(more, return_inverse=True)
            of = unique.numel()
        return key * of + more, count * of

    def resolve(self, keys: Tensor, at: Granules) -> Tensor:
        """Codes of granules by their keys."""
        if self.known is not None:
            some = torch.full_like(self.known, -1)
            some[keys] = torch.arange(keys.numel(), device=keys.device)
            fresh = torch.nonzero((some >= 0) & (self.known == _UNKNOWN)).view(-1)
            if fresh.numel():
                self.known[fresh] = self.make(at.pick(some[fresh]))
            return self.known[keys]
        unique, inverse = torch.unique(keys, return_inverse=True)
        some = torch.empty_like(unique)
        some[inverse] = torch.arange(keys.numel(), device=keys.device)
        return self.make(at.pick(some))[inverse]

    def make(self, at: Granules) -> Tensor:
        """Makes the tiles of some granules; their codes."""
        codes = []
        for first in range(0, at.q.numel(), _TILES_AT_ONCE):
            part = Granules(*(v[first : first + _TILES_AT_ONCE] for v in at))
            last_row = part.q == self.n_q - 1 if self.ragged_q else None
            last_key = part.k == self.n_k - 1 if self.ragged_k else None
            codes.append(self.table.codes(self.tree.words(part), last_row, last_key))
        return codes[0] if len(codes) == 1 else torch.cat(codes)


_UNKNOWN = -3

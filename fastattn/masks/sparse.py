"""Sparse patterns, block layouts, tensors and predicates as masks. See `algebra` for what a mask is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import check
from .algebra import Apart, Causal, Chunked, Mask, SlidingWindow
from .leaves import BlockListLeaf, CodeLeaf, KeySetLeaf, LayoutLeaf, ModularLeaf, Node
from .ranges import Ranges, Shape
from .scan import codes_of, four_dims, scan_keys, scan_planes, scan_tensor, unbroadcast


@dataclass(frozen=True, repr=False, eq=False)
class KeySet(Mask):
    """Every row sees the keys of a set: bool [Sk], or a function of Sk that gives it."""

    keys: Callable[[Shape], Tensor]

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        return self.keys(shape).view(1, 1, 1, shape.Sk)

    def _leaf(self, shape: Shape) -> Node:
        return KeySetLeaf(self.keys(shape).view(1, 1, shape.Sk), shape)


@dataclass(frozen=True, repr=False, eq=False)
class Interval(Mask):
    """Some rows see one interval of keys, as ranges say."""

    of: Callable[[Shape], Ranges]

    def _ranges(self, shape: Shape) -> Ranges:
        return self.of(shape)


@dataclass(frozen=True, repr=False, eq=False)
class Residue(Mask):
    """Keys whose distance from the row `stride` divides, on both sides."""

    stride: int

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        return (i - j) % self.stride == 0

    def _leaf(self, shape: Shape) -> Node:
        return ModularLeaf(self.stride, shape)


def _first_keys(count: int) -> Mask:
    return Interval(lambda shape: Ranges(hi=min(count, shape.Sk)))


def _rows(chosen: Callable[[Shape], Tensor]) -> Mask:
    """All keys for the rows of a set, none for others."""

    def ranges(shape: Shape) -> Ranges:
        return Ranges(hi=(chosen(shape).to(torch.int32) * shape.Sk).view(1, 1, -1))

    return Interval(ranges)


def _first_rows(count: int) -> Mask:
    return _rows(lambda shape: torch.arange(shape.Sq, device=shape.device) < count)


@dataclass(frozen=True, repr=False, eq=False)
class Longformer(Mask):
    """A window, and tokens that see all and are seen by all (Beltagy et al. 2020, arXiv:2004.05150).

    window: its whole width as in the paper, `window // 2` keys on either side.
    global_tokens: how many of the first positions are global, or their positions, ints below max(Sq, Sk).
    """

    window: int
    global_tokens: int | Sequence[int] | Tensor = 0

    def __post_init__(self) -> None:
        check.integer("Longformer", "window", self.window, 0)
        if isinstance(self.global_tokens, int):
            check.integer("Longformer", "global_tokens", self.global_tokens, 0)
            return
        positions = check.integers("Longformer", "global_tokens", self.global_tokens, (1,))
        low, high = check.least_and_most(positions)
        if low < 0:
            raise ValueError(f"Longformer: positions in global_tokens must be at least 0, got {low}")
        object.__setattr__(self, "global_tokens", positions)
        object.__setattr__(self, "_most", high)

    def _check(self, shape: Shape) -> None:
        listed = isinstance(self.global_tokens, Tensor) and self.global_tokens.numel()
        if listed and self._most >= max(shape.Sq, shape.Sk):
            raise ValueError(
                f"Longformer: global_tokens holds position {self._most}, the call has {shape.Sq} query rows "
                f"and {shape.Sk} keys"
            )

    def _is_global(self, size: int, device: torch.device) -> Tensor:
        if isinstance(self.global_tokens, int):
            return torch.arange(size, device=device) < self.global_tokens
        positions = torch.arange(size, dtype=torch.int32, device=device)
        return torch.isin(positions, self.global_tokens.to(device))

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        near = (i - j).abs() <= self.window // 2
        rows = self._is_global(shape.Sq, shape.device).view(1, 1, -1, 1)
        return near | rows | self._is_global(shape.Sk, shape.device)

    def _expand(self, shape: Shape) -> Mask:
        window = SlidingWindow(self.window // 2, self.window // 2)
        if isinstance(self.global_tokens, int):
            if self.global_tokens == 0:
                return window
            return Apart((window, _first_keys(self.global_tokens), _first_rows(self.global_tokens)))
        keys = KeySet(lambda s: self._is_global(s.Sk, s.device))
        return Apart((window, keys, _rows(lambda s: self._is_global(s.Sq, s.device))))


def _uniform(seed: int, size: tuple[int, ...], device: torch.device) -> Tensor:
    """float64 in [0, 1) by seed and place alone, the same on every device: SplitMix64 (Steele et al. 2014)."""

    def signed(x: int) -> int:
        return (x + 2**63) % 2**64 - 2**63

    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & (2 ** (64 - bits) - 1)

    x = torch.arange(1, math.prod(size) + 1, device=device).view(size)
    x = x * signed(0x9E3779B97F4A7C15) + signed(seed * 0xD1B54A32D192ED03)
    x = (x ^ shifted(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * signed(0x94D049BB133111EB)
    return shifted(x ^ shifted(x, 31), 11).double() * 2.0**-53


@dataclass(frozen=True, repr=False, eq=False)
class BigBird(Mask):
    """Window, global and random blocks (Zaheer et al. 2020, arXiv:2007.14062, the internal construction).

    block: rows and keys a block.
    window: blocks of the window, an odd number, the middle one on the diagonal.
    random: further blocks a row block sees, drawn among those it does not see already, by `seed` and the
    shape alone; `per_head` draws them for each query head.
    global_blocks: first blocks that see all and are seen by all.
    """

    block: int = 64
    window: int = 3
    random: int = 3
    global_blocks: int = 2
    seed: int = 0
    per_head: bool = False

    def __post_init__(self) -> None:
        check.integer("BigBird", "block", self.block, 1)
        check.integer("BigBird", "window", self.window, 1)
        check.integer("BigBird", "random", self.random, 0)
        check.integer("BigBird", "global_blocks", self.global_blocks, 0)
        check.integer("BigBird", "seed", self.seed, -(2**63))
        if self.window % 2 == 0:
            raise ValueError(f"BigBird: window must be odd, got {self.window}")

    def random_blocks(self, shape: Shape) -> Tensor:
        """The drawn K blocks, int64 [1, H or 1, row blocks, random]; where a row block has fewer blocks left
        than `random`, some repeat what it sees anyway."""
        rows, columns = -(-shape.Sq // self.block), -(-shape.Sk // self.block)
        heads = shape.H if self.per_head else 1
        draws = _uniform(self.seed, (heads, rows, self.random), shape.device)
        # Seen already: the first `shown` blocks and [first, last); where they overlap the window loses.
        a = torch.arange(rows, device=shape.device)
        shown = min(self.global_blocks, columns)
        first = (a - self.window // 2).clamp(shown, columns)
        last = (a + self.window // 2 + 1).clamp(shown, columns)
        left = columns - shown - (last - first)
        ranks: list[Tensor] = []  # ascending, among the blocks left
        for n in range(self.random):
            rank = (draws[..., n] * (left - n).clamp(min=0)).long()
            for other in ranks:
                rank = rank + (rank >= other)
            ranks.append(rank)
            ranks = list(torch.stack(ranks).sort(0).values)
        if not ranks:
            return torch.zeros(1, heads, rows, 0, dtype=torch.int64, device=shape.device)
        block = torch.stack(ranks, -1) + shown
        block = block + torch.where(block >= first.unsqueeze(-1), (last - first).unsqueeze(-1), 0)
        # A draw past the blocks left means that all are drawn: the row sees everything, block 0 too.
        drawn = torch.arange(self.random, device=shape.device) < left.unsqueeze(-1)
        return torch.where(drawn, block, 0).unsqueeze(0)

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        a, b = i // self.block, j // self.block
        seen = ((a - b).abs() <= self.window // 2) | (a < self.global_blocks) | (b < self.global_blocks)
        return seen | Picked(self)._dense(i, j, shape) if self.random else seen

    def _expand(self, shape: Shape) -> Mask:
        count = self.global_blocks * self.block
        picked = (Picked(self),) if self.random else ()
        return Apart((Interval(self._window), _first_keys(count), _first_rows(count), *picked))

    def _window(self, shape: Shape) -> Ranges:
        a = torch.arange(shape.Sq, dtype=torch.int32, device=shape.device).div_(
            self.block, rounding_mode="floor"
        )
        reach = self.window // 2
        lo = ((a - reach) * self.block).clamp_(0, shape.Sk).view(1, 1, -1)
        return Ranges(lo=lo, hi=((a + reach + 1) * self.block).clamp_(0, shape.Sk).view(1, 1, -1))


@dataclass(frozen=True, repr=False, eq=False)
class Picked(Mask):
    """The random blocks of a BigBird."""

    of: BigBird

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        a, b = i // self.of.block, j // self.of.block
        seen = torch.zeros_like(a == b)
        for pick in self.of.random_blocks(shape)[:, :, a.view(-1)].unbind(3):
            seen = seen | (pick.unsqueeze(3) == b)
        return seen

    def _leaf(self, shape: Shape) -> Node:
        return BlockListLeaf(self.of.random_blocks(shape), self.of.block, shape)


@dataclass(frozen=True, repr=False, eq=False)
class Strided(Mask):
    """The causal strided pattern (Child et al. 2019, arXiv:1904.10509): row i sees its last `stride` keys and
    itself, and before them every key whose distance `stride` divides."""

    stride: int

    def __post_init__(self) -> None:
        check.integer("Strided", "stride", self.stride, 1)

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        return (j <= i) & ((i - j <= self.stride) | ((i - j) % self.stride == 0))

    def _expand(self, shape: Shape) -> Mask:
        return Causal() & (SlidingWindow(self.stride, None) | Residue(self.stride))


@dataclass(frozen=True, repr=False, eq=False)
class Fixed(Mask):
    """The causal fixed pattern (Child et al. 2019, arXiv:1904.10509): row i sees, up to itself, its own chunk
    of `stride` keys and the last `summary` keys of every chunk."""

    stride: int
    summary: int = 1

    def __post_init__(self) -> None:
        check.integer("Fixed", "stride", self.stride, 1)
        check.integer("Fixed", "summary", self.summary, 1)
        if self.summary > self.stride:
            raise ValueError(f"Fixed: summary must be at most stride = {self.stride}, got {self.summary}")

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        return (j <= i) & (
            (i // self.stride == j // self.stride) | (j % self.stride >= self.stride - self.summary)
        )

    def _expand(self, shape: Shape) -> Mask:
        def summaries(s: Shape) -> Tensor:
            return torch.arange(s.Sk, device=s.device) % self.stride >= self.stride - self.summary

        return Causal() & (Chunked(self.stride) | KeySet(summaries))


@dataclass(frozen=True, repr=False, eq=False)
class BlockSparse(Mask):
    """Square blocks by a layout: row i sees key j where layout[..., i // block, j // block].

    layout: bool [n, m], [H, n, m] or [B, H, n, m] with n = ceil(Sq / block), m = ceil(Sk / block); a B or H
    of 1 serves all.
    """

    layout: Tensor
    block: int = 64

    def __post_init__(self) -> None:
        check.integer("BlockSparse", "block", self.block, 1)
        layout = self.layout
        if not isinstance(layout, Tensor):
            layout = torch.as_tensor(layout)
        if layout.dtype != torch.bool:
            raise TypeError(f"BlockSparse: layout must be bool, got {layout.dtype}")
        if layout.dim() not in (2, 3, 4):
            raise ValueError(
                "BlockSparse: layout must be [n, m], [H, n, m] or [B, H, n, m], got shape "
                f"{tuple(layout.shape)}"
            )
        object.__setattr__(self, "layout", layout.detach().clone())

    def _check(self, shape: Shape) -> None:
        for dim, S, of in ((-2, shape.Sq, "query rows"), (-1, shape.Sk, "keys")):
            needed = -(-S // self.block)
            if self.layout.shape[dim] != needed:
                raise ValueError(
                    f"BlockSparse: layout {tuple(self.layout.shape)} has {self.layout.shape[dim]} blocks of "
                    f"{self.block} {of}, the call's {S} need {needed}"
                )
        four_dims("BlockSparse: layout", self.layout, shape.B, shape.H)

    def _blocks(self, shape: Shape) -> Tensor:
        return four_dims("BlockSparse: layout", self.layout, shape.B, shape.H).to(shape.device)

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        blocks = self._blocks(shape)
        return blocks[:, :, i.view(-1, 1) // self.block, j.view(1, -1) // self.block]

    def _leaf(self, shape: Shape) -> Node:
        return LayoutLeaf(self._blocks(shape), self.block, shape)

    def _size(self) -> tuple[int | None, int | None]:
        return self.layout.shape[-2] * self.block, self.layout.shape[-1] * self.block


@dataclass(frozen=True, repr=False, eq=False)
class Dense(Mask):
    """A bool tensor, True where a row sees a key: [Sq, Sk], [H, Sq, Sk] or [B, H, Sq, Sk]; any dimension of 1
    serves all. It is not copied, and read anew at each call."""

    visible: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.visible, Tensor):
            raise TypeError(f"Dense: visible must be a bool tensor, got {type(self.visible).__name__}")
        if self.visible.dtype != torch.bool:
            raise TypeError(f"Dense: visible must be a bool tensor, got {self.visible.dtype}")
        if self.visible.dim() not in (2, 3, 4):
            raise ValueError(
                "Dense: visible must be [Sq, Sk], [H, Sq, Sk] or [B, H, Sq, Sk], got shape "
                f"{tuple(self.visible.shape)}"
            )

    def _full(self, shape: Shape) -> Tensor:
        return four_dims("Dense: visible", self.visible, shape.B, shape.H, shape.Sq, shape.Sk)

    def _check(self, shape: Shape) -> None:
        self._full(shape)

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        return self._full(shape).to(shape.device)

    def _ranges(self, shape: Shape) -> Ranges | None:
        seen = unbroadcast(self._full(shape)).to(shape.device)
        if seen.shape[3] == 1:
            return Ranges(hi=seen[..., 0].to(torch.int32) * shape.Sk)
        if seen.shape[2] > 1:
            return None
        return scan_keys(seen).ranges

    def _leaf(self, shape: Shape) -> Node:
        seen = unbroadcast(self._full(shape)).to(shape.device)
        if seen.shape[2] == 1:
            return KeySetLeaf(seen[:, :, 0], shape)
        return CodeLeaf(*codes_of(scan_tensor(seen, shape).bits, shape), shape)

    def _size(self) -> tuple[int | None, int | None]:
        return self.visible.shape[-2], self.visible.shape[-1]


@dataclass(frozen=True, repr=False, eq=False)
class Predicate(Mask):
    """Any function of batch, head, row and key.

    fn(b, h, i, j) gets int64 index tensors [B, 1, 1, 1], [1, H, 1, 1], [1, 1, n, 1] and [1, 1, 1, Sk] and
    returns a bool tensor that broadcasts to [B, H, n, Sk]; a result of extent 1 in batch or head serves all.
    It is called for some batches, heads and rows at a time and must not remember anything between calls.
    """

    fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"Predicate: fn must be callable, got {type(self.fn).__name__}")

    def _call(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = self.fn(b, h, i, j)
        if not isinstance(seen, Tensor):
            raise TypeError(f"Predicate: fn must return a bool tensor, got {type(seen).__name__}")
        if seen.dtype != torch.bool:
            raise TypeError(f"Predicate: fn must return a bool tensor, got {seen.dtype}")
        whole = (b.shape[0], h.shape[1], i.shape[2], j.shape[3])
        shape = (1,) * (4 - seen.dim()) + tuple(seen.shape)
        if len(shape) > 4 or any(got not in (1, full) for got, full in zip(shape, whole, strict=False)):
            raise ValueError(
                f"Predicate: fn must return a shape that broadcasts to [B, H, rows, Sk] = {list(whole)}, got "
                f"{list(seen.shape)}"
            )
        return seen.view(shape)

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        b = torch.arange(shape.B, device=shape.device).view(-1, 1, 1, 1)
        h = torch.arange(shape.H, device=shape.device).view(1, -1, 1, 1)
        return self._call(b, h, i, j)

    def _leaf(self, shape: Shape) -> Node:
        b = torch.arange(shape.B, device=shape.device).view(-1, 1, 1, 1)
        h = torch.arange(shape.H, device=shape.device).view(1, -1, 1, 1)
        j = torch.arange(shape.Sk, device=shape.device).view(1, 1, 1, -1)
        if torch.compiler.is_compiling():  # all at once: pieces would unroll in the graph
            i = torch.arange(shape.Sq, device=shape.device).view(1, 1, -1, 1)
            seen = self._call(b, h, i, j)
            seen = seen.expand(*seen.shape[:2], shape.Sq, shape.Sk)
            return CodeLeaf(*codes_of(scan_tensor(seen, shape).bits, shape), shape)
        # One row tells whether batch and head matter.
        extent = self._call(b, h, j.new_zeros(1, 1, 1, 1), j).shape if shape.Sq and shape.Sk else (1, 1)
        planes = (extent[0], extent[1])

        def rows(batch: int, head: int, first: int, last: int) -> Tensor:
            i = torch.arange(first, last, device=shape.device).view(1, 1, -1, 1)
            seen = self._call(b[batch : batch + 1], h[:, head : head + 1], i, j)
            return seen.expand(1, 1, last - first, shape.Sk)[0, 0]

        codes, tiles = scan_planes(rows, planes, shape)
        return CodeLeaf(codes, tiles, shape)

"""Lowering: from a mask or a tensor, and the shape of a call, to what kernels read.

A lowered mask is *ranges*, one interval of keys a row, and, only where that is not enough, *bits*: which
64 x 64 granules a granule of rows sees, and tiles of bits for those seen in part. A mask of both forms shows
what both show. The parts of a conjunction are lowered each to the cheaper form: a dense tensor under key
padding stays one plane of bits and B lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Union

import torch
from torch import Tensor

from . import native, waits
from . import ranges as interval
from .algebra import And, Apart, Mask, Not, Or
from .bits import Bits, build, count_windows, plane_offsets
from .leaves import CodeLeaf, Combine, Inverse, KeySetLeaf, Node, RangeLeaf, Window
from .ranges import Ranges, Shape
from .scan import codes_of, four_dims, rows_of, scan_bias, scan_keys, scan_tensor, unbroadcast, visible
from .sparse import Dense
from .words import GRANULE, granules, unpack_bits


@dataclass(eq=False)
class Lowered:
    """A mask as kernels read it, for one shape.

    Row i sees key j where all of these hold that are not None:
    - `i + band_lo <= j` and `j <= i + band_hi`, ints;
    - `lo <= j < hi`: int32 [B, Hq, Sq] views, stride 0 wherever a bound does not vary, values in 0..Sk;
    - bit j of row i. Granules have 64 rows and 64 keys. `block_offsets` int32 [B or 1, Hq or 1, n_q + 1]
      indexes the whole of `block_list` int32 [N, 2]: Q granule n of plane (b, h) sees entries
      offsets[n]..offsets[n + 1], each (K granule, tile), ascending by K granule; what is not listed is
      hidden. Tile -1 is full, else `bit_tiles` int64 [T, 64] holds a word a row, the first key in the lowest
      bit, bits beyond Sq and Sk 0. No two tiles are equal, none is empty or full.

    `bias`, where a float tensor held more than 0 and -inf: the tensor itself, expanded to [B, Hq, Sq, Sk].
    `waits`: for what the host had to wait while it lowered a mask on an accelerator.
    """

    B: int
    Hq: int
    Sq: int
    Sk: int
    device: torch.device
    band_lo: int | None = None
    band_hi: int | None = None
    lo: Tensor | None = None
    hi: Tensor | None = None
    block_offsets: Tensor | None = None
    block_list: Tensor | None = None
    bit_tiles: Tensor | None = None
    bias: Tensor | None = None
    waits: tuple[str, ...] = ()
    _transposed: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @property
    def has_ranges(self) -> bool:
        """Some range hides keys."""
        return not (self.band_lo is self.band_hi is self.lo is self.hi is None)

    @property
    def has_bits(self) -> bool:
        return self.block_list is not None

    @property
    def is_everything(self) -> bool:
        """Every row sees every key (a bias apart)."""
        return not (self.has_ranges or self.has_bits)

    def differs_in_group(self, Hkv: int) -> bool:
        """Whether query heads that share a KV head may see different keys."""
        if self.Hq == Hkv:
            return False
        tensors = (t for t in (self.lo, self.hi) if t is not None)
        by_head = any(t.shape[1] > 1 and t.stride(1) != 0 for t in tensors)
        return by_head or (self.has_bits and self.block_offsets.shape[1] > 1)

    def bits(self) -> Bits | None:
        return Bits(self.block_offsets, self.block_list, self.bit_tiles) if self.has_bits else None

    def ranges(self) -> Ranges:
        bounds = (t if t is None else unbroadcast(t) for t in (self.lo, self.hi))
        return Ranges(self.band_lo, self.band_hi, *bounds)

    def shape(self) -> Shape:
        return Shape(self.B, self.Hq, self.Sq, self.Sk, self.device)

    def transpose(self) -> tuple[Tensor, Tensor]:
        """The lists from keys to rows, for the backward; made at the first call.

        Returns `block_offsets_t` int32 [B or 1, Hq or 1, n_k + 1] and `block_list_t` int32 [N, 2] of
        (Q granule, tile), ascending by Q granule; the tiles are the same. Raises ValueError on a mask without
        bits.
        """
        if not self.has_bits:
            raise ValueError("a mask lowered to ranges alone has no block lists to transpose")
        if self._transposed is None:
            self._transposed = _transpose(self.bits(), granules(self.Sq), granules(self.Sk))
        return self._transposed

    def to_dense(self) -> Tensor:
        """What the lowered form shows, bool [B, Hq, Sq, Sk]; the bias apart."""
        i = torch.arange(self.Sq, device=self.device).view(-1, 1)
        j = torch.arange(self.Sk, device=self.device)
        seen = torch.ones(self.B, self.Hq, self.Sq, self.Sk, dtype=torch.bool, device=self.device)
        if self.band_lo is not None:
            seen &= j >= i + self.band_lo
        if self.band_hi is not None:
            seen &= j <= i + self.band_hi
        if self.lo is not None:
            seen &= j >= self.lo.unsqueeze(3)
        if self.hi is not None:
            seen &= j < self.hi.unsqueeze(3)
        if self.has_bits:
            seen &= self.bit_rows(0, self.Sq)
        return seen

    def bit_rows(self, start: int, stop: int) -> Tensor:
        """What rows start..stop - 1 see by the bits alone: bool [B or 1, Hq or 1, stop - start, Sk]."""
        if native.serves(self.device):
            return native.rows(*self.bits(), start, stop, self.Sk)
        Bm, Hm = self.block_offsets.shape[:2]
        n_q, n_k = granules(self.Sq), granules(self.Sk)
        first, last = start // GRANULE, granules(stop)
        row, blocks = rows_of(self.bits()), self.block_list.long()
        if (first, last) != (0, n_q):
            chosen = (row % n_q >= first) & (row % n_q < last)
            row, blocks = row[chosen], blocks[chosen]
        grid = blocks.new_zeros(Bm * Hm, last - first, n_k, GRANULE, GRANULE, dtype=torch.bool)
        full = self.bit_tiles.new_full((1, GRANULE), -1)  # a tile index of -1 is the last: full
        tiles = unpack_bits(torch.cat([self.bit_tiles, full])[blocks[:, 1]])
        grid[row // n_q, row % n_q - first, blocks[:, 0]] = tiles
        grid = grid.transpose(2, 3).reshape(Bm, Hm, (last - first) * GRANULE, n_k * GRANULE)
        return grid[:, :, start - first * GRANULE : stop - first * GRANULE, : self.Sk]

    def granule_counts(self) -> Iterator[tuple[Window, Tensor]]:
        """Yields windows of the granule grid and how many pairs of each granule are visible, int64
        [b, h, q, n_k].

        The windows follow in order of batch, head and Q granule, over the planes in which the mask differs: a
        mask that is the same for all heads has one head. Time and memory follow the granules, not Sq x Sk.
        """
        shape = self.shape()
        parts: list[Node] = [RangeLeaf(self.ranges(), shape)]
        if self.has_bits:
            parts.append(CodeLeaf(*codes_of(self.bits(), shape), shape))
        return count_windows(Combine(True, parts), shape)

    def visible_fraction(self, granule_pairs: bool = False) -> float:
        """The share of (row, key) pairs that is visible, or with `granule_pairs` of (Q granule, K granule)
        pairs of which any is; 1.0 where there are none."""
        sizes = (granules(self.Sq), granules(self.Sk)) if granule_pairs else (self.Sq, self.Sk)
        if 0 in (self.B, self.Hq, *sizes):
            return 1.0
        total = seen = 0
        for window, counts in self.granule_counts():
            seen += int((counts > 0).sum() if granule_pairs else counts.sum())
            if window.q0 == 0:
                total += counts.shape[0] * counts.shape[1] * sizes[0] * sizes[1]
        return seen / total


def _transpose(bits: Bits, n_q: int, n_k: int) -> tuple[Tensor, Tensor]:
    B, H = bits.offsets.shape[:2]
    if native.serves(bits.offsets.device):
        return native.transpose(bits.offsets, bits.blocks, n_k)
    row = rows_of(bits)
    column = bits.blocks[:, 0] + (row // max(n_q, 1)).to(torch.int32) * n_k
    column, order = torch.sort(column, stable=True)
    blocks = torch.stack([(row[order] % max(n_q, 1)).to(torch.int32), bits.blocks[:, 1][order]], 1)
    # A count by bins would make the host wait for the largest.
    columns = torch.arange(B * H * n_k + 1, dtype=column.dtype, device=column.device)
    ends = torch.searchsorted(column, columns)
    return plane_offsets(ends, B, H, n_k), blocks


Masklike = Union[Mask, "Prepared", Tensor, None]


@dataclass(frozen=True)
class Prepared:
    """A mask lowered once, for any number of layers of one shape; made by `Mask.prepare` or `prepare`."""

    lowered: Lowered
    Hkv: int
    source: str

    def check(self, B: int, Hq: int, Hkv: int, Sq: int, Sk: int, device) -> None:
        """Raises ValueError where a call has another shape or device than the mask was prepared for."""
        own = self.lowered
        made = {
            "B": own.B,
            "Hq": own.Hq,
            "Hkv": self.Hkv,
            "Sq": own.Sq,
            "Sk": own.Sk,
            "device": str(own.device),
        }
        call = {"B": B, "Hq": Hq, "Hkv": Hkv, "Sq": Sq, "Sk": Sk, "device": str(_device(device))}
        if made != call:
            texts = (", ".join(f"{n}={v}" for n, v in d.items()) for d in (made, call))
            raise ValueError("mask {} was prepared for {}; this call has {}".format(self.source, *texts))

    def __repr__(self) -> str:
        own = self.lowered
        return (
            f"Prepared({self.source}, B={own.B}, Hq={own.Hq}, Sq={own.Sq}, Sk={own.Sk}, device={own.device})"
        )


def prepare(mask: Masklike, q: Tensor, k: Tensor) -> Prepared:
    """Lowers a mask or a plain tensor for q [B, Hq, Sq, D] and k [B, Hkv, Sk, D]."""
    for name, t in (("q", q), ("k", k)):
        if t.dim() != 4:
            raise ValueError(f"prepare: {name} must be [B, heads, length, D], got shape {tuple(t.shape)}")
    B, Hq, Sq = q.shape[:3]
    Hkv, Sk = k.shape[1:3]
    if k.shape[0] != B or Hkv == 0 or Hq % Hkv:
        raise ValueError(f"prepare: q {tuple(q.shape)} and k {tuple(k.shape)} do not fit together")
    lowered = lower(mask, B, Hq, Hkv, Sq, Sk, q.device)
    source = f"a {mask.dtype} tensor {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
    return Prepared(lowered, Hkv, source)


def _device(device) -> torch.device:
    """A device with its index, so that "cuda" and "cuda:0" compare equal."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def lower(mask: Masklike, B: int, Hq: int, Hkv: int, Sq: int, Sk: int, device) -> Lowered:
    """Lowers a mask, a prepared one, a plain tensor (see `from_tensor`) or None for one call.

    Tensors of the result lie on `device`. Raises ValueError or TypeError naming the mask and the argument
    where they do not fit.

    On the meta device no tensor has values: the result has the mask's ranges as far as they need none, and no bits.
    """
    device = _device(device)
    if isinstance(mask, Prepared):
        mask.check(B, Hq, Hkv, Sq, Sk, device)
        return mask.lowered
    if mask is None:
        return Lowered(B, Hq, Sq, Sk, device)
    shape = Shape(B, Hq, Sq, Sk, device)
    if device.type == "cpu" or waits.unreadable(device):
        return _lower(mask, shape)
    with waits.noted() as reasons:
        lowered = _lower(mask, shape)
    lowered.waits = tuple(reasons)
    return lowered


def _lower(mask: Mask | Tensor, shape: Shape) -> Lowered:
    B, Hq, Sq, Sk, _ = shape
    if isinstance(mask, Tensor):
        return from_tensor(mask, B, Hq, Sq, Sk)
    if not isinstance(mask, Mask):
        raise TypeError(f"mask must be a fastattn.masks mask, a tensor or None, got {type(mask).__name__}")
    mask._check(shape)
    form = _form(mask, False, shape)
    if form.ranges is not None:
        return _lowered(form.ranges, None, shape)
    ranges, rest = interval.EVERYTHING, []
    for part in form.parts if form.every else (form,):
        if part.ranges is None:
            rest.append(part)
        else:
            ranges = ranges & part.ranges
    if Sq == 0 or Sk == 0 or waits.valueless(shape.device):
        return _lowered(ranges, None, shape)
    bits = _bits_of(rest, ranges, shape)
    return _lowered(ranges, bits, shape)


def _bits_of(rest: list[_Form], ranges: Ranges, shape: Shape) -> Bits | None:
    if _sizes_vary(shape):
        return _bits_of_any_size(_Form(every=True, parts=tuple(rest)), shape)
    if len(rest) == 1 and type(rest[0].literal) is Dense and not rest[0].hidden:
        seen = unbroadcast(rest[0].literal._full(shape)).to(shape.device)
        if seen.shape[2] > 1:  # the scan's own lists; the kernels drop what the ranges hide
            return scan_tensor(seen, shape).bits
    nodes = [part.node(shape) for part in rest]
    tree = nodes[0] if len(nodes) == 1 else Combine(True, nodes)
    within = RangeLeaf(ranges, shape)
    fits = all(r == 1 or r == t for r, t in zip(within.planes, tree.planes, strict=False))
    hides = not (within.one_row and within.band_only)
    return build(tree, shape, within if fits and hides else None)


def _sizes_vary(shape: Shape) -> bool:
    """Whether torch.export traces sizes that are not known; Dynamo, which `strict=True` uses, shows all as ints."""
    strict = torch.compiler.is_exporting() and torch.compiler.is_dynamo_compiling()
    return strict or not all(isinstance(size, int) for size in shape[:4])


def _bits_of_any_size(form: _Form, shape: Shape) -> Bits | None:
    """Bits while torch.export traces sizes that vary: of the formula, whose tensors have the sizes themselves. Those of
    most leaves count granules, and torch would ask whether there is more than one."""
    i, j = (torch.arange(n, device=shape.device) for n in (shape.Sq, shape.Sk))
    seen = form.dense(i.view(1, 1, -1, 1), j.view(1, 1, 1, -1), shape)
    if seen.shape[2] == 1:
        return build(KeySetLeaf(seen[:, :, 0].expand(-1, -1, shape.Sk), shape), shape)
    return scan_tensor(seen.expand(-1, -1, shape.Sq, shape.Sk), shape).bits


def _lowered(ranges: Ranges, bits: Bits | None, shape: Shape, bias: Tensor | None = None) -> Lowered:
    ranges = ranges.trimmed(shape)
    bounds = []
    for bound in (ranges.lo, ranges.hi):
        if bound is not None and not isinstance(bound, Tensor):
            within = torch.sym_min(torch.sym_max(bound, 0), shape.Sk)
            bound = torch.full((1, 1, 1), within, dtype=torch.int32, device=shape.device)
        bounds.append(None if bound is None else bound.expand(shape.B, shape.H, shape.Sq))
    offsets, blocks, tiles = bits if bits is not None else (None, None, None)
    bands = ranges.band_lo, ranges.band_hi
    return Lowered(*shape, *bands, *bounds, offsets, blocks, tiles, bias)


# As many rows take the decode kernel, which reads -inf from a bias itself and loses to lists that differ by head.
_DECODE_ROWS = 8


def narrowed(lowered: Lowered, bias: Tensor) -> Lowered:
    """A lowered mask without the granules that a bias [B or 1, Hq or 1, Sq or 1, Sk or 1] hides whole by -inf.

    For speed alone: kernels hide each -inf of a bias themselves. So the mask stays as it is where a look would cost
    more than it can save or has no answer: off the CPU (the host would wait), in short calls, under torch.func and
    dispatch modes, for fake tensors, and for a bias without rows while torch.compile traces or where its keys have
    gaps.
    """
    shape = lowered.shape()
    if shape.device.type != "cpu" or bias.numel() == 0 or bias.shape[3] == 1:
        return lowered
    if not torch.compiler.is_compiling():  # sizes may be symbols there
        plain = type(bias) in (Tensor, torch.nn.Parameter)
        if not plain or shape.Sq <= _DECODE_ROWS or shape.Sk <= GRANULE:
            return lowered
        if waits.transformed() or torch._C._len_torch_dispatch_stack():
            return lowered
    once = unbroadcast(bias.detach())
    if once.shape[3] == 1:
        return lowered
    ranges, bits = interval.EVERYTHING, None
    if once.shape[2] > 1:
        bits = scan_bias(once, shape)
    else:
        ranges = scan_keys(once).ranges
    if ranges is None or (bits is None and ranges.lo is ranges.hi is None):
        return lowered
    if bits is not None and lowered.has_bits:
        leaves = [CodeLeaf(*codes_of(b, shape), shape) for b in (lowered.bits(), bits)]
        bits = build(Combine(True, leaves), shape)
    both = _lowered(lowered.ranges() & ranges, bits or lowered.bits(), shape, lowered.bias)
    both.waits = lowered.waits
    return both


@dataclass(eq=False)
class _Form:
    """A mask in negation normal form: a literal, perhaps hidden instead of shown, or a conjunction or
    disjunction of forms; with its ranges where it has any."""

    ranges: Ranges | None = None
    literal: Mask | None = None
    hidden: bool = False
    every: bool = False
    parts: tuple[_Form, ...] = ()

    def node(self, shape: Shape) -> Node:
        if self.ranges is not None:
            return RangeLeaf(self.ranges, shape)
        if self.literal is not None:
            leaf = self.literal._leaf(shape)
            return Inverse(leaf) if self.hidden else leaf
        return Combine(self.every, [part.node(shape) for part in self.parts])

    def dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        """The formula, as `Mask._dense`."""
        if self.ranges is not None:
            return _Interval(self.ranges)._dense(i, j, shape)
        if self.literal is not None:
            seen = self.literal._dense(i, j, shape)
            return ~seen if self.hidden else seen
        parts = [part.dense(i, j, shape) for part in self.parts]
        return functools.reduce(torch.logical_and if self.every else torch.logical_or, parts)


def _form(mask: Mask, hidden: bool, shape: Shape) -> _Form:
    """The normal form of a mask, or of what it hides."""
    if isinstance(mask, Not):
        return _form(mask.mask, not hidden, shape)
    simpler = mask._expand(shape)
    if simpler is not None:
        return _form(simpler, hidden, shape)
    if not isinstance(mask, (And, Or)):
        ranges = mask._ranges(shape)
        if hidden and ranges is not None:
            complement = interval.complement(ranges, shape)
            if complement is None:
                return _Form(literal=_Interval(ranges), hidden=True)
            ranges = complement
        return _Form(ranges, None if ranges is not None else mask, hidden)
    every = isinstance(mask, And) != hidden
    parts: list[_Form] = []
    for part in mask.masks:
        form = _form(part, hidden, shape)
        nested = form.ranges is None and form.literal is None and form.every == every
        parts.extend(form.parts if nested else [form])
    if isinstance(mask, Apart) and not every:
        return _Form(every=False, parts=tuple(parts))
    return _joined(parts, every, shape)


def _joined(parts: list[_Form], every: bool, shape: Shape) -> _Form:
    """A conjunction or disjunction, its ranges joined as far as one interval a row results."""
    joined: list[Ranges] = []
    for part in parts:
        if part.ranges is None:
            continue
        together = part.ranges
        for n, other in enumerate(joined):
            both = together & other if every else interval.union(together, other, shape)
            if both is not None:
                joined.pop(n)
                together = both
                break
        joined.append(together)
    forms = [_Form(r) for r in joined] + [part for part in parts if part.ranges is None]
    return forms[0] if len(forms) == 1 else _Form(every=every, parts=tuple(forms))


@dataclass(frozen=True, repr=False, eq=False)
class _Interval(Mask):
    """Ranges already found, where only their complement is asked for."""

    of: Ranges

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        lo, hi = (bound.unsqueeze(3) for bound in self.of.rows(shape, 0, shape.Sq))
        return (j >= lo) & (j < hi)

    def _leaf(self, shape: Shape) -> Node:
        return RangeLeaf(self.of, shape)


def from_tensor(
    attn_mask: Tensor,
    B: int,
    Hq: int,
    Sq: int,
    Sk: int,
    *,
    q_dtype: torch.dtype | None = None,
    name: str = "attn_mask",
) -> Lowered:
    """Lowers a plain mask tensor [Sq, Sk], [Hq, Sq, Sk] or [B, Hq, Sq, Sk], any dimension 1 or of stride 0.

    bool: True shows. float16, bfloat16, float32 (or float64 for float64 queries): added to the scores; -inf
    hides, anything else, finfo.min too, is a finite bias. A float tensor of only 0 and -inf that needs no
    gradient becomes bits or ranges like a bool one; else it stays as `bias` beside them. With `q_dtype` a
    float tensor must have that dtype or float32. A tensor that differs along keys only, or along rows only,
    becomes ranges where it can. It is read once.

    Raises TypeError for another dtype, ValueError for a shape that does not broadcast.
    """
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(attn_mask).__name__}")
    if attn_mask.dtype != torch.bool:
        allowed = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        if q_dtype is not None:
            allowed = tuple(dict.fromkeys((q_dtype, torch.float32)))
        if attn_mask.dtype not in allowed:
            names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
            raise TypeError(f"{name} must be bool or one of {names}, got {attn_mask.dtype}")
    whole = four_dims(name, attn_mask, B, Hq, Sq, Sk)
    shape = Shape(B, Hq, Sq, Sk, attn_mask.device)
    additive, learned = attn_mask.dtype != torch.bool, attn_mask.requires_grad
    ranges, bits, finite = interval.EVERYTHING, None, False
    if waits.valueless(shape.device):
        finite = additive
    elif B and Hq and Sq and Sk:
        once = unbroadcast(whole.detach())
        if once.shape[2] > 1 and once.shape[3] > 1:
            bits, finite = scan_tensor(once, shape)
        elif once.shape[3] > 1:
            ranges, finite = scan_keys(once)
            if ranges is None:
                ranges, bits = interval.EVERYTHING, build(Dense(visible(once))._leaf(shape), shape)
        else:
            seen = visible(once)
            traced = torch.compiler.is_compiling()
            if additive:
                waits.note(shape.device, "whether a float tensor holds more than 0 and -inf")
            finite = additive and (traced or bool(((once != 0) & seen).any()))
            ranges = Dense(seen)._ranges(shape)
    bias = whole.expand(B, Hq, Sq, Sk) if additive and (finite or learned) else None
    return _lowered(ranges, bits, shape, bias)

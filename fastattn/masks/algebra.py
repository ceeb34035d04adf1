"""Masks as values: what each shows, how they combine, and what they lower to.

A mask says which keys j a query row i may see, as a formula over indices 0..Sq-1 and 0..Sk-1. Masks are
immutable and hold no shape; the shape comes with the call. They combine with `&`, `|` and `~`.

Each class gives its meaning twice: `_dense` is the plain formula, the specification that tests compare with;
`_ranges`, `_expand` and `_leaf` are what the lowering uses, and never make anything of size Sq x Sk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import check, waits
from .leaves import KeySetLeaf, Node, SameIdLeaf
from .ranges import Ranges, Shape
from .scan import scan_keys


class Mask:
    """Base of all masks."""

    def _check(self, shape: Shape) -> None:
        """Raises ValueError where the mask does not fit the call's shape."""

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        """The formula: bool, broadcastable to [B, H, Sq, Sk]; i is [1, 1, Sq, 1], j is [1, 1, 1, Sk]."""
        raise NotImplementedError

    def _expand(self, shape: Shape) -> Mask | None:
        """The same mask in terms of simpler ones."""
        return None

    def _ranges(self, shape: Shape) -> Ranges | None:
        """The mask as one interval a row, or None."""
        return None

    def _leaf(self, shape: Shape) -> Node:
        """The mask as bits."""
        raise NotImplementedError(f"{type(self).__name__} has no bits")

    def to_dense(self, Sq: int, Sk: int, B: int = 1, H: int = 1, device=None) -> Tensor:
        """The mask as a bool tensor [B, H, Sq, Sk], True where row i sees key j.

        Computed from the mask's formula, apart from its lowering: the oracle of the tests.
        """
        shape = Shape(B, H, Sq, Sk, torch.device(device or "cpu"))
        return self._formula(shape).expand(B, H, Sq, Sk).contiguous()

    def _formula(self, shape: Shape) -> Tensor:
        """The formula of all rows and keys, bool, broadcastable to [B, H, Sq, Sk]."""
        self._check(shape)
        i = torch.arange(shape.Sq, device=shape.device).view(1, 1, -1, 1)
        j = torch.arange(shape.Sk, device=shape.device).view(1, 1, 1, -1)
        return self._dense(i, j, shape)

    def _is_mapped(self) -> bool:
        """Whether torch.func.vmap maps over a tensor of the mask."""
        values = [getattr(self, f.name) for f in fields(self)]
        values += [part for value in values if isinstance(value, tuple) for part in value]
        return any(
            value._is_mapped()
            if isinstance(value, Mask)
            else isinstance(value, Tensor) and waits.mapped(value)
            for value in values
        )

    def visible_fraction(
        self, Sq: int, Sk: int, granules: bool = False, B: int = 1, H: int = 1, device=None
    ) -> float:
        """The share of (row, key) pairs that the mask shows; with `granules`, of 64 x 64 granules that show
        any.

        Counted from the lowered form; 1.0 where there is nothing to see.
        """
        from .lower import lower

        return lower(self, B, H, H, Sq, Sk, device or "cpu").visible_fraction(granules)

    def show(
        self,
        path=None,
        *,
        Sq: int | None = None,
        Sk: int | None = None,
        B: int = 1,
        H: int = 1,
        b: int = 0,
        h: int = 0,
        width: int = 64,
    ) -> None:
        """Prints the mask of batch b and head h as text, or with `path` writes it there as a PNG.

        Rows go down, keys go right, darker shows more; `width` is the text's width in characters. Sq and Sk
        default to the size the mask itself has (ids, a bool tensor), else 64. The PNG needs matplotlib
        (`pip install 'fastattn[plot]'`); ImportError says so where it is missing.
        """
        from . import show

        if path is None:
            print(show.text(self, Sq, Sk, B, H, b, h, width))
        else:
            show.picture(self, path, Sq, Sk, B, H, b, h)

    def prepare(self, q: Tensor, k: Tensor):
        """Lowers the mask once for q [B, Hq, Sq, D] and k [B, Hkv, Sk, D], for any number of layers.

        Returns `fastattn.masks.Prepared`, which is passed where the mask would be; used with another shape or
        device it raises ValueError.
        """
        from .lower import prepare

        return prepare(self, q, k)

    def __and__(self, other: Mask) -> Mask:
        return _join(And, self, other)

    def __or__(self, other: Mask) -> Mask:
        return _join(Or, self, other)

    def __invert__(self) -> Mask:
        # Dynamo traces no `~` of a user's object: a mask made inside a compiled function is spelt `Not(mask)`.
        return self.mask if isinstance(self, Not) else Not(self)

    def __repr__(self) -> str:
        shown = ((f.name, getattr(self, f.name), f.default) for f in fields(self) if f.repr)
        return f"{type(self).__name__}({', '.join(f'{n}={_text(v)}' for n, v, d in shown if v is not d)})"

    def __eq__(self, other: object) -> bool:
        """Masks are equal where their fields are; tensors are equal to themselves only."""
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.repr)

    def __hash__(self) -> int:
        values = (getattr(self, f.name) for f in fields(self) if f.repr)
        return hash((type(self), *(id(v) if isinstance(v, (Tensor, list)) else v for v in values)))

    def _size(self) -> tuple[int | None, int | None]:
        """Sq and Sk where the mask itself fixes them."""
        return None, None


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return a == b


def _text(value: object) -> str:
    """Small tensors by value, large ones by type and shape."""
    if not isinstance(value, Tensor):
        return getattr(value, "__qualname__", None) or repr(value)
    if value.device.type == "cpu" and value.numel() <= 8 and value.dim() <= 1:
        return repr(value.tolist())
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _join(kind: type, *masks: Mask) -> Mask:
    parts: list[Mask] = []
    for mask in masks:
        if not isinstance(mask, Mask):
            return NotImplemented
        parts.extend(mask.masks if isinstance(mask, kind) else [mask])
    return kind(tuple(parts))


@dataclass(frozen=True, repr=False, eq=False)
class And(Mask):
    """What all of `masks` show."""

    masks: tuple[Mask, ...]

    def _check(self, shape: Shape) -> None:
        for mask in self.masks:
            mask._check(shape)

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        seen = self.masks[0]._dense(i, j, shape)
        for mask in self.masks[1:]:
            seen = seen & mask._dense(i, j, shape)
        return seen

    def _size(self) -> tuple[int | None, int | None]:
        sizes = [m._size() for m in self.masks]
        return tuple(next((s[d] for s in sizes if s[d] is not None), None) for d in (0, 1))

    def __repr__(self) -> str:
        return " & ".join(f"({m!r})" if isinstance(m, Or) else repr(m) for m in self.masks)


@dataclass(frozen=True, repr=False, eq=False)
class Or(Mask):
    """What any of `masks` shows."""

    masks: tuple[Mask, ...]

    _check = And._check
    _size = And._size

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        seen = self.masks[0]._dense(i, j, shape)
        for mask in self.masks[1:]:
            seen = seen | mask._dense(i, j, shape)
        return seen

    def __repr__(self) -> str:
        return " | ".join(repr(m) for m in self.masks)


class Apart(Or):
    """A disjunction of which no single interval a row is to be expected: none is looked for."""


@dataclass(frozen=True, repr=False, eq=False)
class Not(Mask):
    """What `mask` hides."""

    mask: Mask

    def _check(self, shape: Shape) -> None:
        self.mask._check(shape)

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        return ~self.mask._dense(i, j, shape)

    def _size(self) -> tuple[int | None, int | None]:
        return self.mask._size()

    def __repr__(self) -> str:
        return f"~({self.mask!r})" if isinstance(self.mask, (And, Or)) else f"~{self.mask!r}"


def _offset(lower_right: bool, shape: Shape) -> int:
    """What is added to a row's index: 0, or what aligns the last row with the last key."""
    return shape.Sk - shape.Sq if lower_right else 0


@dataclass(frozen=True, repr=False, eq=False)
class Causal(Mask):
    """Row i sees keys 0..i: the corner is the upper left one, as torch's `is_causal`."""

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        return j <= i

    def _ranges(self, shape: Shape) -> Ranges:
        return Ranges(band_hi=0)


@dataclass(frozen=True, repr=False, eq=False)
class CausalLowerRight(Mask):
    """Row i sees keys 0..i + Sk - Sq: the last row sees all, as with a cache, ONNX and FlashAttention."""

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        return j <= i + (shape.Sk - shape.Sq)

    def _ranges(self, shape: Shape) -> Ranges:
        return Ranges(band_hi=shape.Sk - shape.Sq)


@dataclass(frozen=True, repr=False, eq=False)
class Band(Mask):
    """Row i sees keys i + lo .. i + hi; None is no limit on that side. lo and hi may have any sign.

    Every causal mask, sliding window and chunk of a longer sequence is one: with the first row at position p and
    the first key at position 0, causal is Band(None, p).
    """

    lo: int | None = None
    hi: int | None = None

    def __post_init__(self) -> None:
        check.integer("Band", "lo", self.lo, -(2**31), none_allowed=True)
        check.integer("Band", "hi", self.hi, -(2**31), none_allowed=True)

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        seen = torch.ones_like(i == j)
        if self.lo is not None:
            seen = seen & (j >= i + self.lo)
        return seen if self.hi is None else seen & (j <= i + self.hi)

    def _ranges(self, shape: Shape) -> Ranges:
        return Ranges(self.lo, self.hi)


@dataclass(frozen=True, repr=False, eq=False)
class SlidingWindow(Mask):
    """Row i sees keys i - left .. i + right; None is no limit on that side.

    With `lower_right`, i counts from Sk - Sq on, so that the last row stands at the last key.
    """

    left: int | None = None
    right: int | None = None
    lower_right: bool = False

    def __post_init__(self) -> None:
        check.integer("SlidingWindow", "left", self.left, 0, none_allowed=True)
        check.integer("SlidingWindow", "right", self.right, 0, none_allowed=True)

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        i = i + _offset(self.lower_right, shape)
        seen = torch.ones_like(i == j)
        if self.left is not None:
            seen = seen & (j >= i - self.left)
        return seen if self.right is None else seen & (j <= i + self.right)

    def _ranges(self, shape: Shape) -> Ranges:
        offset = _offset(self.lower_right, shape)
        return Ranges(
            None if self.left is None else offset - self.left,
            None if self.right is None else offset + self.right,
        )


@dataclass(frozen=True, repr=False, eq=False)
class KeyPadding(Mask):
    """Hides the padding keys of each batch item, from all rows.

    lengths: how many keys are real, ints in 0..Sk: one int for all items, or B of them; or a bool tensor
    [B, Sk], True for real keys, in any arrangement.
    side: where the padding lies, "right" or "left" of the real keys; for lengths only.
    """

    lengths: int | Sequence[int] | Tensor
    side: str = "right"

    def __post_init__(self) -> None:
        if self.side not in ("right", "left"):
            raise ValueError(f"KeyPadding: side must be 'right' or 'left', got {self.side!r}")
        if isinstance(self.lengths, Tensor) and self.lengths.dtype == torch.bool:
            if self.lengths.dim() != 2:
                raise ValueError(
                    f"KeyPadding: a bool tensor must be [B, Sk], got shape {tuple(self.lengths.shape)}"
                )
            if self.side != "right":
                raise ValueError(
                    "KeyPadding: side goes with lengths; a bool tensor says itself where keys are"
                )
            keys = self.lengths.detach().clone()
            object.__setattr__(self, "lengths", keys)
            object.__setattr__(self, "_interval", scan_keys(keys[:, None, None]).ranges)
        else:
            lengths = check.integers("KeyPadding", "lengths", self.lengths, (0, 1))
            check.lengths_within("KeyPadding", "lengths", lengths, 2**31 - 1, "Sk")
            object.__setattr__(self, "_most", check.least_and_most(lengths)[1])
            object.__setattr__(self, "lengths", lengths)

    def _check(self, shape: Shape) -> None:
        if self.lengths.dtype == torch.bool:
            check.batch_is("KeyPadding", "lengths (bool)", self.lengths.shape[0], shape.B)
            if self.lengths.shape[1] != shape.Sk:
                raise ValueError(
                    f"KeyPadding: the bool tensor has {self.lengths.shape[1]} keys, the call has {shape.Sk}"
                )
            return
        if self.lengths.dim():
            check.batch_is("KeyPadding", "lengths", self.lengths.shape[0], shape.B)
        if self._most > shape.Sk:
            check.lengths_within("KeyPadding", "lengths", self.lengths, shape.Sk, "Sk")

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        if self.lengths.dtype == torch.bool:
            return self.lengths.to(shape.device).view(shape.B, 1, 1, shape.Sk)
        lengths = self.lengths.to(shape.device).view(-1, 1, 1, 1)
        return j < lengths if self.side == "right" else j >= shape.Sk - lengths

    def _ranges(self, shape: Shape) -> Ranges | None:
        if self.lengths.dtype == torch.bool:
            return None if self._interval is None else self._interval.to(shape.device)
        lengths = self.lengths.to(shape.device).view(-1, 1, 1)
        if not check.on_host(self.lengths):  # values there were never looked at
            lengths = lengths.clamp(0, shape.Sk)
        return Ranges(hi=lengths) if self.side == "right" else Ranges(lo=shape.Sk - lengths)

    def _leaf(self, shape: Shape) -> Node:
        return KeySetLeaf(self.lengths.to(shape.device).unsqueeze(1), shape)

    def _size(self) -> tuple[int | None, int | None]:
        return None, self.lengths.shape[1] if self.lengths.dtype == torch.bool else None


@dataclass(frozen=True, repr=False, eq=False)
class Documents(Mask):
    """Packed sequences: a row sees the keys of its own document.

    cu_seqlens: the documents' bounds, ints [0, ..., S] that do not fall; `cu_seqlens_k` those of the keys, if
    they are packed in another way (document n of the rows sees document n of the keys).
    ids: instead of bounds, a document number for each position, [S] or [B, S], in any order; `ids_k` for the
    keys, if there are others.
    """

    cu_seqlens: Sequence[int] | Tensor | None = None
    cu_seqlens_k: Sequence[int] | Tensor | None = None
    ids: Sequence[int] | Tensor | None = None
    ids_k: Sequence[int] | Tensor | None = None

    def __post_init__(self) -> None:
        if (self.cu_seqlens is None) == (self.ids is None):
            given = "both" if self.ids is not None else "neither"
            raise ValueError(f"Documents: give cu_seqlens or ids, got {given}")
        rows, keys = ("cu_seqlens", "cu_seqlens_k") if self.ids is None else ("ids", "ids_k")
        stray = "ids_k" if self.ids is None else "cu_seqlens_k"
        if getattr(self, stray) is not None:
            raise ValueError(f"Documents: {stray} goes with {stray.removesuffix('_k')}, which is not given")
        for name in (rows, keys):
            value = getattr(self, name)
            if value is None:
                continue
            if self.ids is None:
                value = _bounds_of_documents(name, value)
            else:
                value = check.integers("Documents", name, value, (1, 2))
            object.__setattr__(self, name, value)
        # Lengths are the data's own, so the interval of each row is known before any call.
        if self.ids is not None:
            object.__setattr__(self, "_intervals", _intervals_of_ids(self.ids, self._keys()))
            return
        counts = len(self.cu_seqlens) - 1, len(self._keys()) - 1
        if counts[0] != counts[1]:
            raise ValueError(
                f"Documents: cu_seqlens bounds {counts[0]} documents, cu_seqlens_k {counts[1]}; they must be as "
                "many"
            )
        bounds = self.cu_seqlens, self._keys()
        totals = tuple(int(t[-1]) if check.on_host(t) else None for t in bounds)
        object.__setattr__(self, "_totals", totals)
        object.__setattr__(self, "_intervals", None if None in totals else _intervals_of_bounds(*bounds))

    def _keys(self) -> Tensor:
        """cu_seqlens or ids of the keys."""
        rows, keys = (self.cu_seqlens, self.cu_seqlens_k) if self.ids is None else (self.ids, self.ids_k)
        return rows if keys is None else keys

    def _check(self, shape: Shape) -> None:
        if self.ids is None and self._totals == (shape.Sq, shape.Sk):
            return
        name = "cu_seqlens" if self.ids is None else "ids"
        names = (name, name if getattr(self, name + "_k") is None else name + "_k")
        for n, (S, of) in enumerate(((shape.Sq, "query rows"), (shape.Sk, "keys"))):
            if self.ids is None:
                if self._totals[n] not in (None, S):
                    raise ValueError(
                        f"Documents: {names[n]} ends at {self._totals[n]}, the call has {S} {of}"
                    )
                continue
            ids = self._keys() if n else self.ids
            if ids.shape[-1] != S:
                raise ValueError(
                    f"Documents: {names[n]} has {ids.shape[-1]} positions, the call has {S} {of}"
                )
            if ids.dim() == 2:
                check.batch_is("Documents", names[n], ids.shape[0], shape.B)

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        if self.ids is not None:
            rows, keys = (torch.atleast_2d(t.to(shape.device)) for t in (self.ids, self._keys()))
            return rows[:, None, :, None] == keys[:, None, None, :]
        rows, keys = self.cu_seqlens.to(shape.device), self._keys().to(shape.device)
        seen = torch.zeros(shape.Sq, shape.Sk, dtype=torch.bool, device=shape.device)
        for n in range(len(rows) - 1):
            seen[rows[n] : rows[n + 1], keys[n] : keys[n + 1]] = True
        return seen.view(1, 1, shape.Sq, shape.Sk)

    def _ranges(self, shape: Shape) -> Ranges | None:
        if self._intervals is not None:
            lo, hi = (t.to(shape.device).unsqueeze(1) for t in self._intervals)
            return Ranges(lo=lo, hi=hi)
        if self.ids is not None:
            return None
        # Bounds on an accelerator were never looked at: nothing here may depend on their values.
        rows, keys = self.cu_seqlens.to(shape.device), self._keys().to(shape.device).clamp(0, shape.Sk)
        i = torch.arange(shape.Sq, dtype=torch.int32, device=shape.device)
        document = torch.bucketize(i, rows[1:], right=True).clamp_(max=len(rows) - 2)
        return Ranges(lo=keys[document].view(1, 1, -1), hi=keys[document + 1].view(1, 1, -1))

    def _leaf(self, shape: Shape) -> Node:
        rows, keys = (torch.atleast_2d(t.to(shape.device)) for t in (self.ids, self._keys()))
        return SameIdLeaf(rows, keys, shape)

    def _size(self) -> tuple[int | None, int | None]:
        if self.ids is not None:
            return self.ids.shape[-1], self._keys().shape[-1]
        return self._totals


def _bounds_of_documents(name: str, value: Sequence[int] | Tensor) -> Tensor:
    """cu_seqlens as int32 [n + 1]; looked at on the host only, where it already is there."""
    bounds = check.integers("Documents", name, value, (1,))
    if bounds.numel() < 2:
        raise ValueError(f"Documents: {name} must hold at least 2 bounds, got {bounds.numel()}")
    if check.on_host(bounds):
        if int(bounds[0]) != 0:
            raise ValueError(f"Documents: {name} must begin with 0, got {int(bounds[0])}")
        falls = torch.nonzero(bounds.diff() < 0)
        if falls.numel():
            n = int(falls[0])
            raise ValueError(
                f"Documents: {name} must not fall, got {int(bounds[n])} then {int(bounds[n + 1])} at {n + 1}"
            )
    return bounds


def _intervals_of_bounds(rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Per row the interval of its document's keys, int32 [1, Sq] twice."""
    # Both ends step at the first row of a document; empty documents share that row.
    steps, starts = keys.diff(), rows[1:-1].long()
    lo, hi = torch.zeros(2, int(rows[-1]) + 1, dtype=torch.int32)
    hi[0] = keys[1]
    lo.scatter_add_(0, starts, steps[:-1])
    hi.scatter_add_(0, starts, steps[1:])
    lo, hi = (t[:-1].cumsum(0, dtype=torch.int32).unsqueeze(0) for t in (lo, hi))
    return lo, hi


def _intervals_of_ids(rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor] | None:
    """Per row the interval of keys with its id, int32 [B or 1, Sq] twice; None where one's keys have gaps, or nobody
    knows."""
    rows, keys = torch.atleast_2d(rows), torch.atleast_2d(keys)
    B = max(rows.shape[0], keys.shape[0])
    if rows.shape[0] not in (1, B) or keys.shape[0] not in (1, B):
        raise ValueError(f"Documents: ids has batch {rows.shape[0]}, ids_k has batch {keys.shape[0]}")
    if keys.shape[1] == 0:
        empty = rows.new_zeros(B, rows.shape[1])
        return empty, empty
    rows, keys = rows.expand(B, -1), keys.expand(B, -1)
    # A stable order keeps equal ids in order of their position: the first and last of each are its interval.
    ordered, position = keys.sort(dim=1, stable=True)
    rows = rows.contiguous()
    first, last = (torch.searchsorted(ordered, rows, right=r) for r in (False, True))
    count = last - first
    lo = position.gather(1, first.clamp(max=keys.shape[1] - 1))
    hi = position.gather(1, (last - 1).clamp_(min=0)) + 1
    if waits.unreadable(count.device):
        return None
    if not bool(((hi - lo == count) | (count == 0)).all()):
        return None
    return lo.masked_fill_(count == 0, 0).to(torch.int32), hi.masked_fill_(count == 0, 0).to(torch.int32)


@dataclass(frozen=True, repr=False, eq=False)
class PrefixLM(Mask):
    """A prefix all rows see, causal after it: row i sees key j where j <= i or j < lengths[b].

    lengths: ints in 0..Sk, one for all batch items or B of them. `lower_right` aligns the causal part with
    the last key.
    """

    lengths: int | Sequence[int] | Tensor
    lower_right: bool = False

    def __post_init__(self) -> None:
        lengths = check.integers("PrefixLM", "lengths", self.lengths, (0, 1))
        check.lengths_within("PrefixLM", "lengths", lengths, 2**31 - 1, "Sk")
        object.__setattr__(self, "_most", check.least_and_most(lengths)[1])
        object.__setattr__(self, "lengths", lengths)

    def _check(self, shape: Shape) -> None:
        if self.lengths.dim():
            check.batch_is("PrefixLM", "lengths", self.lengths.shape[0], shape.B)
        if self._most > shape.Sk:
            check.lengths_within("PrefixLM", "lengths", self.lengths, shape.Sk, "Sk")

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        lengths = self.lengths.to(shape.device).view(-1, 1, 1, 1)
        return (j <= i + _offset(self.lower_right, shape)) | (j < lengths)

    def _ranges(self, shape: Shape) -> Ranges:
        first = 1 + _offset(self.lower_right, shape)
        ends = torch.arange(first, first + shape.Sq, dtype=torch.int32, device=shape.device)
        hi = torch.maximum(ends.view(1, 1, -1), self.lengths.to(shape.device).view(-1, 1, 1))
        return Ranges(hi=hi.clamp_(0, shape.Sk))


@dataclass(frozen=True, repr=False, eq=False)
class Chunked(Mask):
    """Rows see the keys of their own chunk of `size` positions, on both sides; `Causal() & Chunked(n)` for
    the causal kind. `lower_right` counts rows from Sk - Sq on."""

    size: int
    lower_right: bool = False

    def __post_init__(self) -> None:
        check.integer("Chunked", "size", self.size, 1)

    def _dense(self, i: Tensor, j: Tensor, shape: Shape) -> Tensor:
        return (i + _offset(self.lower_right, shape)).div(self.size, rounding_mode="floor") == j // self.size

    def _ranges(self, shape: Shape) -> Ranges:
        first = _offset(self.lower_right, shape)
        i = torch.arange(first, first + shape.Sq, dtype=torch.int32, device=shape.device)
        lo = i.sub_(torch.remainder(i, self.size)).view(1, 1, -1)
        hi = lo + self.size
        return Ranges(lo=lo.clamp_(0, shape.Sk), hi=hi.clamp_(0, shape.Sk))

"""Mask families: each mask the tools measure and verify, written twice.

`Family.mask` gives the fastattn object and `Family.dense` the same mask as a boolean tensor made from torch
operations alone, so that a benchmark's rival and a check's oracle do not depend on the code they judge.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

GRANULE = 64


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention call: q [b, hq, sq, d], k [b, hkv, sk, d], v [b, hkv, sk, dv]; `rank` 3 drops
    the heads and `rank` 5 splits the batch in two."""

    b: int
    hq: int
    sq: int
    d: int
    hkv: int = 0
    sk: int = 0
    dv: int = 0
    rank: int = 4

    def __post_init__(self):
        for name, default in (("hkv", self.hq), ("sk", self.sq), ("dv", self.d)):
            if not getattr(self, name):
                object.__setattr__(self, name, default)
        if self.hq % self.hkv:
            raise ValueError(f"hq must be a multiple of hkv, got hq={self.hq} and hkv={self.hkv}")

    def __str__(self):
        heads = f"h{self.hq}" if self.hkv == self.hq else f"h{self.hq}/{self.hkv}"
        length = f"s{self.sq}" if self.sk == self.sq else f"s{self.sq}x{self.sk}"
        size = f"d{self.d}" if self.dv == self.d else f"d{self.d}-{self.dv}"
        return "-".join((f"b{self.b}", heads, length, size))


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of mask.

    mask: shape -> a `fastattn.masks` object, or None for no mask at all.
    dense: shape -> bool tensor broadcastable to [b, hq, sq, sk], True where a query sees a key, or None.
    pairs: shape -> visible (query, key) pairs of one head, summed over the batch; None counts `dense`.
    torch_spelling: how torch is called at its fairest: "none", "causal" (the flag) or "bool" (the tensor).
    """

    name: str
    mask: Callable[[AttentionShape], Any]
    dense: Callable[[AttentionShape], torch.Tensor | None]
    pairs: Callable[[AttentionShape], int] | None = None
    torch_spelling: str = "bool"

    def visible_pairs(self, shape: AttentionShape) -> int:
        """Visible (batch, query head, query, key) tuples of a call of this shape."""
        if self.pairs is not None:
            return self.pairs(shape) * shape.hq
        dense = self.dense(shape)
        full = dense.expand(torch.broadcast_shapes(dense.shape, (1, 1, shape.sq, shape.sk)))
        return int(full.sum()) * (shape.b // full.shape[0]) * (shape.hq // full.shape[1])

    def granule_fraction(self, shape: AttentionShape) -> float:
        """Share of the 64 x 64 granules that hold at least one visible pair: what a kernel has to touch."""
        dense = self.dense(shape)
        return 1.0 if dense is None else granule_fraction(dense, shape.sq, shape.sk)


def granule_fraction(dense: torch.Tensor, sq: int, sk: int) -> float:
    """Visible 64 x 64 granules over all, for a bool tensor broadcastable to [..., sq, sk]."""
    dense = dense.expand(torch.broadcast_shapes(dense.shape, (sq, sk))).reshape(-1, sq, sk)
    padded = torch.nn.functional.pad(dense, (0, -sk % GRANULE, 0, -sq % GRANULE))
    blocks = padded.unflatten(1, (-1, GRANULE)).unflatten(3, (-1, GRANULE))
    return blocks.any(dim=4).any(dim=2).float().mean().item()


def _masks():
    from fastattn import masks

    return masks


def padding_lengths(shape: AttentionShape, percent: int = 50) -> list[int]:
    """Key lengths that hide `percent` of the keys on average, spread evenly over the batch."""
    middle, width = 1 - percent / 100, 2 * min(percent, 100 - percent) / 100
    shares = [middle + width * ((2 * i + 1) / (2 * shape.b) - 0.5) for i in range(shape.b)]
    return [max(1, round(shape.sk * share)) for share in shares]


def document_starts(length: int, count: int) -> list[int]:
    """Where `count` packed documents of mixed length begin, with `length` at the end; a short one may be empty."""
    sizes = [1 + 3 * (7 * n % 5) for n in range(count)]
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    return [round(length * bound / bounds[-1]) for bound in bounds]


@functools.lru_cache(maxsize=8)
def block_layout(shape: AttentionShape, percent: int) -> torch.Tensor:
    """A random bool layout of 64 x 64 blocks: `percent` of each row's blocks visible, and never none of
    them."""
    rows, columns = math.ceil(shape.sq / GRANULE), math.ceil(shape.sk / GRANULE)
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(percent))
    kept = max(1, round(columns * percent / 100))
    return torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, scores.topk(kept, dim=1).indices, True)


@functools.lru_cache(maxsize=8)
def stride_layout(shape: AttentionShape, stride: int) -> torch.Tensor:
    """A layout of 64 x 64 blocks: those whose distance from the diagonal `stride` divides."""
    rows, columns = math.ceil(shape.sq / GRANULE), math.ceil(shape.sk / GRANULE)
    return (torch.arange(rows)[:, None] - torch.arange(columns)[None, :]) % stride == 0


def _formula(name, mask, visible, pairs=None, torch_spelling="bool") -> Family:
    """visible(i, j, shape) -> bool tensor from row and key indices that broadcast to [sq, sk]."""

    def dense(shape):
        i, j = torch.arange(shape.sq)[:, None], torch.arange(shape.sk)[None, :]
        return visible(i, j, shape)[None, None]

    return Family(name, mask, dense, pairs, torch_spelling)


def _causal() -> Iterator[Family]:
    def pairs(shape):
        return shape.b * sum(min(i + 1, shape.sk) for i in range(shape.sq))

    def lower_right_pairs(shape):
        return shape.b * sum(min(max(i + 1 + shape.sk - shape.sq, 0), shape.sk) for i in range(shape.sq))

    yield _formula("causal", lambda s: _masks().Causal(), lambda i, j, s: j <= i, pairs, "causal")
    yield _formula(
        "causal-lower-right",
        lambda s: _masks().CausalLowerRight(),
        lambda i, j, s: j <= i + s.sk - s.sq,
        lower_right_pairs,
    )


def _window(left: int) -> Family:
    def pairs(shape):
        ends = (max(0, min(i, shape.sk - 1) - max(0, i - left) + 1) for i in range(shape.sq))
        return shape.b * sum(ends)

    return _formula(
        f"window{left}",
        lambda shape: _masks().SlidingWindow(left, 0),
        lambda i, j, shape: (j <= i) & (j >= i - left),
        pairs,
    )


def _padding(percent: int) -> Family:
    def dense(shape):
        lengths = torch.tensor(padding_lengths(shape, percent))
        return (torch.arange(shape.sk) < lengths[:, None])[:, None, None, :]

    return Family(
        f"padding{percent}",
        lambda shape: _masks().KeyPadding(padding_lengths(shape, percent)),
        dense,
        lambda shape: shape.sq * sum(padding_lengths(shape, percent)),
    )


def _documents(count: int) -> Family:
    def mask(shape):
        starts, key_starts = document_starts(shape.sq, count), document_starts(shape.sk, count)
        return _masks().Documents(starts, None if starts == key_starts else key_starts)

    def number(positions, length):
        return torch.bucketize(positions, torch.tensor(document_starts(length, count)[1:]), right=True)

    return _formula(f"documents{count}", mask, lambda i, j, shape: number(i, shape.sq) == number(j, shape.sk))


def _prefix(percent: int) -> Family:
    def length(shape):
        return shape.sk * percent // 100

    return _formula(
        f"prefix{percent}",
        lambda shape: _masks().PrefixLM(length(shape)),
        lambda i, j, shape: (j <= i) | (j < length(shape)),
    )


def _chunked(count: int) -> Family:
    def size(shape):
        return max(1, shape.sk // count)

    return _formula(
        f"chunked{count}",
        lambda shape: _masks().Causal() & _masks().Chunked(size(shape)),
        lambda i, j, shape: (j <= i) & (i // size(shape) == j // size(shape)),
    )


def _longformer(window: int) -> Family:
    return _formula(
        f"longformer{window}",
        lambda shape: _masks().Longformer(window, 4),
        lambda i, j, shape: ((i - j).abs() <= window // 2) | (i < 4) | (j < 4),
    )


def _strided(stride: int) -> Family:
    return _formula(
        f"strided{stride}",
        lambda shape: _masks().Strided(stride),
        lambda i, j, shape: (j <= i) & ((i - j <= stride) | ((i - j) % stride == 0)),
    )


def _fixed(stride: int) -> Family:
    return _formula(
        f"fixed{stride}",
        lambda shape: _masks().Fixed(stride, 8),
        lambda i, j, shape: (j <= i) & ((i // stride == j // stride) | (j % stride >= stride - 8)),
    )


def _bigbird(random: int) -> Family:
    """The random blocks are the algebra's own draw, so its `to_dense`, which has tests of its own, stands
    in."""

    def mask(shape):
        return _masks().BigBird(GRANULE, random=random)

    return Family(f"bigbird{random}", mask, lambda shape: mask(shape).to_dense(shape.sq, shape.sk))


def _blocks(name: str, number: int, layout: Callable[[AttentionShape, int], torch.Tensor]) -> Family:
    return _formula(
        f"{name}{number}",
        lambda shape: _masks().BlockSparse(layout(shape, number), GRANULE),
        lambda i, j, shape: layout(shape, number)[i // GRANULE, j // GRANULE],
    )


def _table() -> Iterator[Family]:
    yield Family("none", lambda s: None, lambda s: None, lambda s: s.b * s.sq * s.sk, "none")
    yield from _causal()
    for make, numbers in (
        (_window, (16, 64, 256, 1024, 2048)),
        (_padding, (25, 50, 75)),
        (_documents, (3, 9, 32)),
        (_prefix, (25, 50, 75)),
        (_chunked, (4, 8, 16)),
        (_longformer, (32, 256, 512, 1024)),
        (_strided, (32, 128)),
        (_fixed, (32, 128)),
        (_bigbird, (1, 3, 9)),
    ):
        for number in numbers:
            yield make(number)
    for stride in (2, 4, 8):
        yield _blocks("stride", stride, stride_layout)
    for percent in (5, 10, 25, 50):
        yield _blocks("blocks", percent, block_layout)


# By name: the mask, and the number that sets how much it shows.
FAMILIES: dict[str, Family] = {family.name: family for family in _table()}


def family_of(mask: str) -> str:
    """A mask's name without its number: what is one line in a plot."""
    return mask.rstrip("0123456789")

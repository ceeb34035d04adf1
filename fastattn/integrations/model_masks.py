"""The masks of transformers models, as masks of fastattn: `ModelMask` and `mask_function`.

transformers builds a mask from functions of (batch, head, query position, key position). Those it defines itself
(causal, sliding window, chunks, packed sequences, padding, blocks seen in both directions, and their AND and OR)
are recognised by where they were made, and become ranges of keys, or bits where they are no ranges. Nothing of
size Sq x Sk is made for them. Any other function is evaluated to a bool tensor, as transformers does for SDPA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import masks
from ..masks import Mask
from ..masks.ranges import Ranges
from .traced_masks import Traced


@dataclass(frozen=True, repr=False, eq=False)
class Rows(Mask):
    """Row i sees keys lo <= j < hi; integer tensors [B or 1, 1, Sq or 1] of any values, None is no bound."""

    lo: Tensor | None = None
    hi: Tensor | None = None

    def _dense(self, i, j, shape):
        seen = torch.ones_like(i == j)
        if self.lo is not None:
            seen = seen & (j >= self.lo.unsqueeze(-1))
        return seen if self.hi is None else seen & (j < self.hi.unsqueeze(-1))

    def _ranges(self, shape):
        bounds = (self.lo, self.hi)
        return Ranges(
            None, None, *(None if t is None else t.clamp(0, shape.Sk).to(torch.int32) for t in bounds)
        )


class ModelMask:
    """A mask on its way through a model: lowered once for each shape it meets, not once a layer.

    A model's own code may treat its mask as a tensor (slice it, concatenate it, read its shape). It then gets the
    bool tensor [B, 1, Sq, Sk] that it would have had with SDPA.

    mask: what is visible. bias: None, or added to the scores, broadcastable to [B, Hq, Sq, Sk]. padding: bool
    [B, S], True for real tokens, where it is all that `mask` hides. packing: kept here by packing encoders.
    """

    def __init__(
        self, mask: Mask, shape: tuple[int, int, int], device: torch.device, bias: Tensor | None = None
    ):
        self.mask = mask
        self.bias = bias
        self.padding: Tensor | None = None
        self.packing = None
        batch, q_length, kv_length = shape
        self.shape = torch.Size((batch, 1, q_length, kv_length))
        self.device = device
        self._plans: dict[tuple, masks.Prepared] = {}
        self._within: tuple[tuple, list[Tensor], ModelMask] | None = None

    ndim = 4
    dtype = torch.bool

    def dim(self) -> int:
        return 4

    def contiguous(self) -> ModelMask:
        return self

    def prepared(self, q: Tensor, k: Tensor) -> masks.Prepared:
        """The mask for q [B, Hq, Sq, D] and k [B, Hkv, Sk, D]."""
        if torch.compiler.is_compiling():  # sizes may be symbols; equal work in a graph is done once anyway
            return masks.prepare(self.mask, q, k)
        key = (*q.shape[:3], *k.shape[1:3], q.device)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = masks.prepare(self.mask, q, k)
        return plan

    def within(self, packing: tuple[Tensor | None, ...], documents: Callable[[], Mask]) -> ModelMask:
        """This mask inside the packed sequences that some tensors tell: the same one for all layers that pass them."""
        given = [t for t in packing if t is not None]
        fixed = not torch.compiler.is_compiling() and not any(t.is_inference() for t in given)
        key = tuple((id(t), t._version) for t in given) if fixed else None
        if not fixed or self._within is None or self._within[0] != key:
            made = ModelMask(
                self.mask & documents(), (self.shape[0], *self.shape[2:]), self.device, self.bias
            )
            if not fixed:
                return made
            self._within = key, given, made  # the tensors are held, so that no other one gets their ids
        return self._within[2]

    def dense(self) -> Tensor:
        """bool [B, 1, Sq, Sk]."""
        batch, _, q_length, kv_length = self.shape
        seen = self.mask.to_dense(q_length, kv_length, batch, 1, self.device)
        return seen if self.bias is None else seen & (self.bias == 0)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index):
        return self.dense()[index]

    def __invert__(self) -> Tensor:
        return ~self.dense()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        def tensor(x):
            if isinstance(x, ModelMask):
                return x.dense()
            return type(x)(map(tensor, x)) if isinstance(x, (list, tuple)) else x

        return function(*map(tensor, args), **{name: tensor(x) for name, x in (kwargs or {}).items()})

    def __repr__(self) -> str:
        return f"ModelMask({self.mask!r})"


def _operator(name: str) -> Callable:
    def apply(self, other):
        other = other.dense() if isinstance(other, ModelMask) else other
        return getattr(self.dense(), name)(other)

    return apply


for _name in ("and", "or", "mul", "add", "sub", "rand", "ror", "rmul", "radd", "rsub"):
    setattr(ModelMask, f"__{_name}__", _operator(f"__{_name}__"))


@dataclass(frozen=True)
class _Place:
    """Where a mask lies: row i is position i + q_offset, key j is position j + kv_offset.

    q_offset is a tensor for a static cache. It is not read: a compiled decoding step would be compiled again for
    each of its values, and an accelerator be waited for.
    """

    batch: int
    q_length: int
    kv_length: int
    q_offset: int | Tensor
    kv_offset: int
    device: torch.device

    def rows(self) -> Tensor:
        """Positions of the rows, [1, 1, Sq]."""
        return (torch.arange(self.q_length, device=self.device) + self.q_offset).view(1, 1, -1)

    def band(self, lo: int | None, hi: int | None) -> Mask:
        """A row at position p sees the keys of positions p + lo .. p + hi; None is no limit."""
        offset = self.q_offset - self.kv_offset
        if not isinstance(offset, Tensor):
            return masks.Band(None if lo is None else offset + lo, None if hi is None else offset + hi)
        at = self.rows() - self.kv_offset
        return Rows(None if lo is None else at + lo, None if hi is None else at + (hi + 1))

    def is_square(self) -> bool:
        """Rows and keys are the same positions, from the first one on."""
        return self.q_length == self.kv_length and self.kv_offset == 0 and isinstance(self.q_offset, int)


def _closure(function: Callable) -> dict:
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells)}


def _keys(padding: Tensor, place: _Place) -> Tensor:
    return padding[:, place.kv_offset : place.kv_offset + place.kv_length].bool()


def _translate(function: Callable, place: _Place) -> Mask | None:
    """A mask function of transformers as a mask; None where it is not one of its own."""
    from transformers import masking_utils as theirs

    if function is theirs.causal_mask_function:
        return place.band(None, 0)
    if function is theirs.bidirectional_mask_function:
        return masks.SlidingWindow()
    compiling = torch.compiler.is_compiling()
    if isinstance(function, Traced):
        made_by, inside = function.made_by, function.inside
    elif compiling or getattr(function, "__module__", None) != theirs.__name__:
        return None
    else:
        made_by, inside = function.__qualname__.split(".")[0], _closure(function)
    if made_by in ("and_masks", "or_masks"):
        parts = [_translate(part, place) for part in inside["mask_functions"]]
        if any(part is None for part in parts):
            return None
        together = parts[0]
        for part in parts[1:]:
            together = together & part if made_by == "and_masks" else together | part
        return together
    if made_by == "sliding_window_overlay":
        return place.band(1 - inside["sliding_window"], None)
    if made_by == "sliding_window_bidirectional_overlay":
        return place.band(-inside["sliding_window"], inside["sliding_window"])
    if made_by == "chunked_overlay":
        return _chunked(inside["chunk_size"], inside["left_padding"], place)
    if made_by == "packed_sequence_mask_function" and place.is_square():
        return _packed(inside["packed_sequence_mask"])
    if made_by == "remap_positions_for_packed_sequence" and place.is_square():
        # Positions rise by one inside a sequence, and the packed mask beside it keeps sequences apart: distances
        # between positions are distances between indices.
        return _translate(inside["mask_function"], place)
    if made_by == "padding_mask_function" and not compiling:
        return masks.KeyPadding(_keys(inside["padding_mask"], place))
    if made_by == "blockwise_overlay" and isinstance(place.q_offset, int) and not compiling:
        return _blocks(inside["block_sequence_ids"], place)
    return None


def _chunked(size: int, left_padding: Tensor, place: _Place) -> Mask:
    """Chunks of `size` positions, counted from each item's first token: left_padding [B]."""
    start = left_padding.to(place.device).view(-1, 1, 1)
    first = (place.rows() - start) // size * size + start - place.kv_offset
    return Rows(first, first + size)


def _packed(numbers: Tensor) -> Mask:
    """numbers [B, S], the sequence each token is in: they never fall, so a sequence is an interval."""
    numbers = numbers.contiguous()
    first, last = (torch.searchsorted(numbers, numbers, right=r).unsqueeze(1) for r in (False, True))
    return Rows(first, last)


def _blocks(numbers: Tensor, place: _Place) -> Mask:
    """Tokens of a block see each other both ways; numbers [B, all positions], -1 where a token is in none."""
    rows = numbers[:, place.q_offset : place.q_offset + place.q_length]
    keys = numbers[:, place.kv_offset : place.kv_offset + place.kv_length]
    return masks.Documents(ids=rows, ids_k=keys.masked_fill(keys < 0, -2))


def _traced_padding(keys: Tensor) -> tuple[Mask, Tensor]:
    """Padding bool [B, Sk] while tracing, when its values cannot be looked at.

    The first and the last real key bound a range; padding between them is hidden by a bias [B, 1, 1, Sk].
    """
    positions = torch.arange(keys.shape[1], device=keys.device)
    first = torch.where(keys, positions, keys.shape[1]).amin(1)
    last = torch.where(keys, positions + 1, 0).amax(1)
    bias = torch.zeros(keys.shape, device=keys.device).masked_fill(~keys, float("-inf"))
    return Rows(first.view(-1, 1, 1), last.view(-1, 1, 1)), bias[:, None, None, :]


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | ModelMask | None = None,
    device: torch.device | str = "cpu",
    **arguments,
) -> ModelMask | Tensor:
    """transformers' mask interface: the mask of a model's call, as ranges where it is one of transformers' own.

    attention_mask: the padding, bool [B, all positions], True for real tokens.
    """
    from transformers import masking_utils as theirs

    if isinstance(attention_mask, ModelMask):  # an encoder's mask on its second way in
        return attention_mask
    device = torch.device(device)
    padding = theirs.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    compiling = torch.compiler.is_compiling()
    place = _Place(batch_size, q_length, kv_length, q_offset, kv_offset, device)
    mask = _translate(mask_function or theirs.causal_mask_function, place)
    if mask is None:
        arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return theirs.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            **arguments,
        )
    bias = None
    if padding is not None and compiling:
        keys, bias = _traced_padding(_keys(padding, place))
        mask = mask & keys
    elif padding is not None:
        mask = mask & masks.KeyPadding(_keys(padding, place))
    made = ModelMask(mask, (batch_size, q_length, kv_length), device, bias)
    if padding is not None and mask_function is theirs.bidirectional_mask_function and place.is_square():
        made.padding = _keys(padding, place)
    return made

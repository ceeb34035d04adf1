"""When is a kernel's answer right: one rule for rounding errors, and an exact test for masks.

The tests, ``fastattn verify`` and the benches all ask here. A tolerance cannot judge a mask: of 4096 keys a
kernel may lose one and stay well within any. So masks are read back from a kernel bit by bit
(`check_visible`), and everything else is measured against float64 in units of what torch itself loses in the
same dtype (`error_rule`).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Rounding bands in units of the dtype's epsilon times the result's magnitude: beside torch's own error, and
# alone where torch has no usable answer. A half result is a float32 one rounded once, by at most half an
# epsilon; float32 sums a row in an order of its own.
_BAND = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 4.0, torch.float64: 4.0}
_BAND_ALONE = {torch.bfloat16: 2.0, torch.float16: 2.0, torch.float32: 32.0, torch.float64: 32.0}

_MEASURES = {
    "max": lambda errors: errors.abs().max().item(),
    "rms": lambda errors: errors.square().mean().sqrt().item(),
}


@dataclass(frozen=True)
class Verdict:
    """The outcome of `error_rule`; true in a condition when the result is right.

    `ours`, `theirs` and `limit` are errors by the measure ("max" or "rms") that came closest to its limit;
    `theirs` is NaN where torch is no comparator.
    """

    ok: bool
    ours: float
    theirs: float
    limit: float
    measure: str
    reason: str

    def __bool__(self) -> bool:
        return self.ok


def error_rule(
    actual: Tensor, exact: Tensor, theirs: Tensor | None = None, *, magnitude: float | None = None
) -> Verdict:
    """Judge `actual` by the float64 result `exact` and torch's result `theirs` in actual's dtype.

    Two measures, the largest absolute error and the root of the mean squared error, each have to satisfy
    ``ours <= 2 * theirs + band``, with ``band = c * eps(dtype) * magnitude`` and c = 1 for half precisions, 4
    for float32 and float64. The magnitude is that of `exact` by the same measure, or the one given (the
    largest |v| where an average of v comes out small). Without a comparator, or where torch is not finite
    although the exact result is, the limit is the band alone, of c = 2 and 32.

    NaN and infinities of `actual` have to stand where those of `exact`, rounded to actual's dtype, stand.

    Raises:
        ValueError: the shapes differ, or `theirs` has another dtype than `actual`.
    """
    if actual.shape != exact.shape or (theirs is not None and theirs.shape != exact.shape):
        other = None if theirs is None else tuple(theirs.shape)
        raise ValueError(
            f"shapes differ: actual {tuple(actual.shape)}, exact {tuple(exact.shape)}, theirs {other}"
        )
    if theirs is not None and theirs.dtype != actual.dtype:
        raise ValueError(
            f"theirs is {theirs.dtype}; the comparator has to be of actual's dtype, {actual.dtype}"
        )
    dtype = actual.dtype
    exact = exact.detach().double()
    rounded = exact.to(dtype).double()
    ours = actual.detach().to(exact.device).double()

    finite = rounded.isfinite()
    misplaced = ~torch.where(finite, ours.isfinite(), (ours == rounded) | (ours.isnan() & rounded.isnan()))
    if misplaced.any():
        at = tuple(misplaced.nonzero()[0].tolist())
        count = f"{int(misplaced.sum())} of {ours.numel()} entries"
        reason = f"not finite in the right places, {count}: {ours[at]:g} at {at} instead of {rounded[at]:g}"
        return Verdict(False, math.inf, math.nan, 0.0, "max", reason)
    if not finite.any():
        return Verdict(True, 0.0, 0.0, 0.0, "max", "nothing finite to compare")

    exact, ours = exact[finite], ours[finite]
    comparator = None if theirs is None else theirs.detach().to(exact.device).double()[finite]
    if comparator is not None and not comparator.isfinite().all():
        comparator = None
    band = (_BAND_ALONE if comparator is None else _BAND)[dtype] * torch.finfo(dtype).eps
    verdicts = []
    for measure, size in _MEASURES.items():
        error = size(ours - exact)
        their_error = math.nan if comparator is None else size(comparator - exact)
        limit = band * (size(exact) if magnitude is None else magnitude)
        limit += 0.0 if comparator is None else 2 * their_error
        beside = "no comparator" if comparator is None else f"torch {their_error:.3g}"
        reason = f"{measure} error {error:.3g}, {beside}, limit {limit:.3g}"
        verdicts.append(Verdict(error <= limit, error, their_error, limit, measure, reason))
    return max(verdicts, key=lambda verdict: (not verdict.ok, verdict.ours / max(verdict.limit, 1e-300)))


# How many keys may share a column of v: a count of as many, off by 2^-8 (bfloat16) or 2^-11 (float16) of
# itself where the weights are rounded and again where the output is, is still within 1/4.
_KEYS_A_COLUMN = {torch.bfloat16: 32, torch.float16: 256}
_RANDOM_COLUMNS = 10
_MOST_KEYS = 2**17


def exact_mask_inputs(
    B: int,
    Hq: int,
    Hkv: int,
    Sq: int,
    Sk: int,
    D: int = 64,
    Dv: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor, slice]]:
    """Inputs whose attention spells out which keys each query sees: (q, k, v, a slice: the keys v tells of).

    q is 0 and k random, so that all visible keys of a row weigh 1/n and its LSE is log(n), n being their
    number. v is 0 or 1, so that n * out counts the visible keys with a 1 in each column. The columns hold,
    key by key, the binary digits of 1 + the key's index, by which one key lost, gained or swapped for another
    always shows, and 10 random digits, drawn for each (batch, kv head), by which any other difference, or a
    wrong head read, shows in all but 2^-10 of cases. Half precisions can count 32 (bfloat16) or 256 (float16)
    keys, so each run of that many keys has columns of its own; what does not fit into Dv columns is yielded
    one after another.

    Raises:
        ValueError: Sk is beyond 131072, where float32 no longer tells log(n) from log(n + 1) safely.
    """
    if Sk > _MOST_KEYS:
        raise ValueError(f"Sk is {Sk}; the exact mask check reads at most {_MOST_KEYS} keys")
    generator = torch.Generator().manual_seed(seed)
    span = max(1, min(Sk, _KEYS_A_COLUMN.get(dtype, Sk)))
    digits = span.bit_length()
    width = digits + _RANDOM_COLUMNS
    q = torch.zeros(B, Hq, Sq, D, dtype=dtype, device=device)
    k = torch.randn(B, Hkv, Sk, D, generator=generator).to(device, dtype)
    random = torch.randint(2, (B, Hkv, Sk, _RANDOM_COLUMNS), generator=generator)
    keys = torch.arange(Sk)
    numbers = (1 + keys % span)[:, None] >> torch.arange(digits) & 1
    codes = torch.cat([numbers.expand(B, Hkv, Sk, digits), random], -1)
    for first in range(0, max(1, math.ceil(Sk / span)) * width, Dv):
        column = torch.arange(first, first + Dv)
        told = slice(first // width * span, ((first + Dv - 1) // width + 1) * span)
        own = keys[told, None] // span == column // width
        v = torch.zeros(B, Hkv, Sk, Dv, dtype=dtype)
        v[:, :, told] = (codes[:, :, told, column % width] * own).to(dtype)
        yield q, k, v.to(device), told


@dataclass(frozen=True)
class MaskCheck:
    """The outcome of `check_visible`; true in a condition when every row saw exactly what it should.

    `wrong` bool [B, Hq, Sq], `seen` and `expected` int64 [B, Hq, Sq]: the rows that differ, how many keys
    each row saw by its LSE (-1 where that is NaN or infinite), and how many it should have seen.
    """

    wrong: Tensor
    seen: Tensor
    expected: Tensor

    def __bool__(self) -> bool:
        return not self.wrong.any()

    def __str__(self) -> str:
        if self:
            return f"all {self.wrong.numel()} rows see exactly their keys"
        rows = self.wrong.nonzero().tolist()
        lines = []
        for b, h, i in rows[:8]:
            seen, expected = int(self.seen[b, h, i]), int(self.expected[b, h, i])
            instead = "other ones" if seen == expected else str(expected)
            lines.append(f"batch {b} head {h} row {i} sees {seen} keys instead of {instead}")
        return f"{len(rows)} of {self.wrong.numel()} rows see the wrong keys: {'; '.join(lines)}"


def check_visible(
    attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    mask: Tensor,
    B: int,
    Hq: int,
    Hkv: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    D: int = 64,
    Dv: int = 64,
) -> MaskCheck:
    """Read back from `attend` which keys each query sees, and compare with `mask`, to the key.

    `attend(q, k, v) -> (out, lse)` is attention under the mask in question with no bias, ALiBi, sink or
    dropout; lse is natural and float32. `mask`: bool, broadcastable to [B, Hq, Sq, Sk], its last two
    dimensions being Sq and Sk themselves. A row that sees nothing has to come out as 0 with an LSE of -inf.
    `attend` is called once in float32 (for Dv of 28 on) and about Sk / 128 times in bfloat16 with Dv = 64;
    see `exact_mask_inputs`.
    """
    Sq, Sk = mask.shape[-2:]
    mask = mask.to(device).expand(B, Hq, Sq, Sk)
    expected = mask.sum(-1)
    wrong = torch.zeros(B, Hq, Sq, dtype=torch.bool, device=device)
    seen = torch.zeros_like(expected)
    for q, k, v, keys in exact_mask_inputs(B, Hq, Hkv, Sq, Sk, D, Dv, dtype=dtype, device=device):
        out, lse = attend(q, k, v)
        count = lse.double().exp()
        seen = torch.where(count.isfinite(), count, -1.0).round().long()
        wrong |= seen != expected
        wrong |= (expected == 0) & ((lse != -math.inf) | (out != 0).any(-1))
        for b in range(B):
            for h in range(Hq):  # a head at a time: the mask is large in float32
                right = mask[b, h, :, keys].float() @ v[b, h // (Hq // Hkv), keys].float()
                found = out[b, h].float() * expected[b, h, :, None]
                wrong[b, h] |= ~((found - right).abs() < 0.5).all(-1)
    return MaskCheck(wrong, seen, expected)

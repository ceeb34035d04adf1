"""Plain tensors as masks: one pass over a bool or float tensor, granule by granule."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import native, waits
from .bits import Bits, TileTable, build
from .leaves import CodeLeaf
from .ranges import Ranges, Shape
from .words import EMPTY, FULL, GRANULE, granules, pack_bits

# Elements looked at in one go by the torch version: a few MiB of bools.
_ELEMENTS_AT_ONCE = 1 << 22


class Scan(NamedTuple):
    """bits: what the tensor shows, None where that is everything. finite: a float tensor holds something
    other than 0 and -inf."""

    bits: Bits | None
    finite: bool


def four_dims(
    name: str, tensor: Tensor, B: int, H: int, Sq: int | None = None, Sk: int | None = None
) -> Tensor:
    """A mask tensor of rank 2 to 4 as [B or 1, H or 1, Sq or 1, Sk or 1]; raises ValueError where it does not
    broadcast to the call's shape. Without Sq and Sk the last two dimensions are not looked at."""
    if tensor.dim() not in (2, 3, 4):
        raise ValueError(
            f"{name} must have shape [Sq, Sk], [H, Sq, Sk] or [B, H, Sq, Sk], got {tuple(tensor.shape)}"
        )
    whole = (B, H, tensor.shape[-2] if Sq is None else Sq, tensor.shape[-1] if Sk is None else Sk)
    shape = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
    for got, full, of in zip(shape, whole, ("batch", "query heads", "query rows", "keys"), strict=False):
        if got not in (1, full):
            hint = ""
            if tensor.dim() == 3 and of == "query heads" and got == B:
                hint = (
                    f"; a tensor of rank 3 is read as [H, Sq, Sk], for one a batch item give [{B}, 1, Sq, Sk]"
                )
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} does not broadcast to [B, H, Sq, Sk] = "
                f"{list(whole)}: {of} is {full}, got {got}{hint}"
            )
    return tensor.reshape(shape) if tensor.dim() == 4 else tensor[(None,) * (4 - tensor.dim())]


def unbroadcast(tensor: Tensor) -> Tensor:
    """The tensor with one entry left of each dimension that repeats itself in memory."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=False)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def visible(tensor: Tensor) -> Tensor:
    """Where a bool or additive mask shows keys: all but -inf, finfo.min included."""
    return tensor if tensor.dtype == torch.bool else tensor != float("-inf")


class Keys(NamedTuple):
    """ranges: what a tensor without rows shows, None where some plane's keys have gaps (or nobody knows: torch.compile
    traces, vmap maps, or it is a meta tensor). finite: a float tensor holds something other than 0 and -inf."""

    ranges: Ranges | None
    finite: bool


def scan_keys(tensor: Tensor) -> Keys:
    """Reads a bool or float tensor [B or 1, H or 1, 1, Sk] once. A bound that hides nothing is None.

    Reads flags back from an accelerator.
    """
    if tensor.numel() == 0:
        return Keys(Ranges(), False)
    if waits.unreadable(tensor.device) or waits.mapped(tensor):
        return Keys(None, tensor.dtype != torch.bool)
    if native.serves(tensor.device):
        lo, hi, flags = native.keys(tensor)
        gaps, whole = flags & native.GAPS, (flags & native.FROM_START, flags & native.TO_END)
        nonzero = bool(flags & native.NONZERO)
    else:
        seen = visible(tensor)
        count = seen.sum(-1, dtype=torch.int32)
        lo = seen.to(torch.int8).argmax(-1).to(torch.int32)
        hi = lo + count
        # Where the `count` keys from the first one on are all visible, they are the whole interval.
        last = (hi - 1).clamp_(min=0).long().unsqueeze(-1)
        covered = seen.cumsum(-1, dtype=torch.int32).gather(-1, last).squeeze(-1)
        other = ((tensor != 0) & seen).any() if tensor.dtype != torch.bool else torch.zeros_like(seen).any()
        waits.note(tensor.device, "whether the keys of a tensor without rows have gaps")
        tests = [(covered != count).any(), (lo == 0).all(), (hi == tensor.shape[-1]).all(), other]
        gaps, *whole, nonzero = torch.stack(tests).tolist()
    ranges = None if gaps else Ranges(lo=None if whole[0] else lo, hi=None if whole[1] else hi)
    return Keys(ranges, nonzero)


def scan_planes(
    rows: Callable[[int, int, int, int], Tensor], planes: tuple[int, int], shape: Shape
) -> tuple[Tensor, Tensor]:
    """Scans what `rows(b, h, first, last)` shows, a bool tensor [last - first, Sk] at a time.

    Returns codes int32 [*planes, n_q, n_k] and tiles int64 [T, 64].
    """
    n_q, n_k = granules(shape.Sq), granules(shape.Sk)
    table = TileTable(shape)
    codes = torch.empty(*planes, n_q, n_k, dtype=torch.int32, device=shape.device)
    step = max(_ELEMENTS_AT_ONCE // max(n_k * GRANULE * GRANULE, 1), 1)
    ragged_q, ragged_k = shape.Sq % GRANULE != 0, shape.Sk % GRANULE != 0
    for b in range(planes[0]):
        for h in range(planes[1]):
            for q in range(0, n_q, step) if n_k else ():
                last_q = min(q + step, n_q)
                first, last = q * GRANULE, min(last_q * GRANULE, shape.Sq)
                seen = torch.zeros(
                    (last_q - q) * GRANULE, n_k * GRANULE, dtype=torch.bool, device=shape.device
                )
                seen[: last - first, : shape.Sk] = rows(b, h, first, last)
                words = pack_bits(seen).view(last_q - q, GRANULE, n_k).transpose(1, 2).reshape(-1, GRANULE)
                granule = torch.arange(words.shape[0], device=shape.device)
                last_row = granule // n_k == n_q - 1 - q if ragged_q else None
                last_key = granule % n_k == n_k - 1 if ragged_k else None
                codes[b, h, q:last_q] = table.codes(words, last_row, last_key).view(-1, n_k)
    return codes, table.tiles()


def scan_tensor(tensor: Tensor, shape: Shape) -> Scan:
    """Scans a bool or float tensor [B or 1, H or 1, Sq, Sk] once; any strides."""
    scan = native.scanner(tensor.device)
    waits.note(shape.device, "how many granules a tensor has of each kind")
    if scan is not None:
        offsets, blocks, tiles, flags = scan(tensor)
        flags = native.read(flags, while_tracing=native.NONZERO)
        bits = None if flags & native.EVERYTHING else Bits(offsets, blocks, tiles)
        return Scan(bits, bool(flags & native.NONZERO))
    finite = torch.zeros((), dtype=torch.bool, device=shape.device)

    def rows(b: int, h: int, first: int, last: int) -> Tensor:
        part = tensor[b, h, first:last]
        seen = visible(part)
        if tensor.dtype != torch.bool:
            finite.logical_or_(((part != 0) & seen).any())
        return seen

    codes, tiles = scan_planes(rows, (tensor.shape[0], tensor.shape[1]), shape)
    return Scan(build(CodeLeaf(codes, tiles, shape), shape), bool(finite))


def scan_bias(bias: Tensor, shape: Shape) -> Bits | None:
    """What of a bias [B or 1, H or 1, Sq, Sk] on the CPU need not be visited: as the bits of `scan_tensor`, but None
    where no granule is hidden whole, which one entry of each tells. -inf beside numbers may be listed as visible."""
    if not native.serves(bias.device):
        return scan_tensor(bias, shape).bits
    offsets, blocks, tiles, flags = native.bias(bias)
    everything = native.read(flags, while_tracing=0) & native.EVERYTHING
    return None if everything else Bits(offsets, blocks, tiles)


def codes_of(bits: Bits | None, shape: Shape) -> tuple[Tensor, Tensor]:
    """The codes int32 [B or 1, H or 1, n_q, n_k] of lists of granules, and their tiles."""
    n_q, n_k = granules(shape.Sq), granules(shape.Sk)
    if bits is None:
        full = torch.full((1, 1, n_q, n_k), FULL, dtype=torch.int32, device=shape.device)
        return full, torch.empty(0, GRANULE, dtype=torch.int64, device=shape.device)
    B, H = bits.offsets.shape[:2]
    codes = torch.full((B * H * n_q, n_k), EMPTY, dtype=torch.int32, device=shape.device)
    codes[rows_of(bits), bits.blocks[:, 0].long()] = bits.blocks[:, 1]
    return codes.view(B, H, n_q, n_k), bits.tiles


def rows_of(bits: Bits) -> Tensor:
    """int64 [N]: the Q granule of each listed block, counted through all planes."""
    counts = bits.offsets.diff(dim=2).flatten()
    return torch.repeat_interleave(counts, output_size=bits.blocks.shape[0])

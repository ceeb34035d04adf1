"""The launch table: what tile each kernel takes, how many warps and pipeline stages, and why.

A choice depends on shapes of one batch item, the dtype and the architecture, never on the batch or on how many
multiprocessors there are: results do not either.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .._triton import release

# What is left of shared memory for K and V tiles decides the stages; in bytes a block may take.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}
SHARED["interpreter"] = SHARED["sm_80"]


def architecture(device: torch.device) -> str:
    """The row of SHARED that serves a device."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    if capability in ((8, 6), (8, 9)):
        return "sm_120"  # as little shared memory
    return {8: "sm_80", 9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(capability[0], "sm_120")


def parts(size: int) -> tuple[int, int]:
    """A head size as at most two powers of two, none under 16, or padded to one where that is no wider."""
    whole = max(16, 1 << (size - 1).bit_length() if size > 1 else 16)
    low = whole // 2
    if low < 16 or size <= low:
        return whole, 0
    rest = max(16, 1 << (size - low - 1).bit_length() if size > low + 1 else 16)
    return (low, rest) if low + rest < whole else (whole, 0)


# --- attention ---


@dataclass(frozen=True)
class AttentionLaunch:
    """M rows of queries by N keys a step; chunk: columns of a product of q and k at a time, 0 for all."""

    M: int
    N: int
    num_warps: int
    num_stages: int
    chunk: int = 0


def value_parts(size: int, tile: AttentionLaunch) -> tuple[int, int]:
    """`parts` for the columns of V. Triton lays the warps of mma along the longer side of an accumulator; along its
    columns every warp would hold all rows of Q and P, so that what is twice as wide as the tile's rows is halved. So
    are 256 columns, which wgmma would hold in one piece."""
    first, second = parts(size)
    if not second and (first == 2 * tile.M == 32 * tile.num_warps or first == 256 and tile.M == 64):
        return first // 2, first // 2
    return first, second


# Keys of a split of decode: K and V of 256 KB at head size 128 in bf16, microseconds of memory traffic.
DECODE_SPLIT = 512
# Rows that decode packs; more fill a tile of the attention kernel.
DECODE_ROWS = 64
# Of the last-level cache, what K and V of the heads in flight may take.
SECTION_BYTES = 32 << 20


def attention(
    arch: str, itemsize: int, width: int, rows: int, bits: bool, terms: bool, packed: bool
) -> AttentionLaunch:
    """width: the wider of the two heads, its parts together; rows: query rows, packed ones counted; bits: the mask
    has granules, whose rows are the most a tile holds then; terms: bias, ALiBi, softcap or dropout; packed: rows
    are those of several heads."""
    amd, mma, chunk = arch.startswith("gfx"), arch in ("sm_80", "sm_120"), 0
    if arch == "interpreter":
        m, n, warps = 64, 64, 4  # NumPy takes few large steps quicker than many small ones
    elif itemsize == 4:
        # IEEE products run on the FMA units, and hold whole rows and columns of a step in registers: short steps.
        m, n, warps, chunk = 16 if terms else 32, 16, 8, 16
    elif width > 128:
        # The accumulator of 64 rows is what 8 warps hold; beside terms that of 32. The assembler of Triton 3.6 stops
        # at 168 registers for sm_120 and spills, with bits and steps of 16.
        short = 32 if amd or bits and arch == "sm_120" else 16
        m, n, warps = (32, short, 4) if terms else (64, 64 if amd else 32, 4 if amd else 8)
    elif terms:
        # The terms' own blocks are as large as the scores: those of 32 keys fit beside the accumulator, and of 16
        # where mma's operand Q takes registers too, or packed rows have a slope and a bias's address each.
        m, n, warps = 64, 16 if (mma or packed) and width > 64 else 32, 4
    elif bits:
        # Entries of the list are read ahead, and mma's operand Q stays in registers: 64 keys spill by Triton 3.6.
        m, n, warps = 64, 32 if mma and width > 64 else 64, 4
    elif width > 64:
        # With 99 KB of shared memory 64 keys would leave one stage, whose K and V pass through registers.
        m, n, warps = 128, 32 if arch == "sm_120" else 64, 4 if amd else 8
    else:
        # Hopper's wgmma reads its operands from shared memory, so that 4 warps hold head size 64.
        m, n, warps = 128, 64, 4 if arch == "sm_90" else 8
    while m > 16 and m // 2 >= rows:
        m //= 2
    # A third stage holds more addresses, for which there are no registers beside terms.
    tile = AttentionLaunch(m, n, warps, 2 if terms else 3, chunk)
    while tile.num_stages > 1 and _shared(tile, itemsize, width) > SHARED[arch]:
        tile = replace(tile, num_stages=tile.num_stages - 1)
    return tile


def _shared(tile: AttentionLaunch, itemsize: int, width: int) -> int:
    """Bytes of shared memory at most: Q stays, every stage holds a tile of K and one of V, and some is for the rest."""
    return (tile.M + 2 * tile.N * tile.num_stages) * width * itemsize + (8 << 10)


def attention_candidates(
    arch: str, itemsize: int, width: int, rows: int, bits: bool, terms: bool, packed: bool
) -> tuple[AttentionLaunch, ...]:
    """What tuning times, for the arguments of `attention`: the table's tile, then those that differ in one number."""
    first = attention(arch, itemsize, width, rows, bits, terms, packed)
    most = 64 if bits else 128  # a tile of bits is a granule or a part of one
    near = [replace(first, M=m) for m in (first.M // 2, first.M * 2) if 16 <= m <= most and m < 2 * rows]
    near += [replace(first, N=n) for n in (first.N // 2, first.N * 2) if 16 <= n <= most]
    near += [replace(first, num_warps=w) for w in (first.num_warps // 2, first.num_warps * 2) if 2 <= w <= 8]
    near += [
        replace(first, num_stages=s) for s in (first.num_stages - 1, first.num_stages + 1) if 1 <= s <= 4
    ]
    return (first, *(tile for tile in near if _shared(tile, itemsize, width) <= SHARED[arch]))


# --- attention backward ---

_BEFORE_3_9 = release() < (3, 9)


def _columns_at_once(arch: str, width: int, terms: bool, which: str) -> int:
    """Of a float32 product of the backward. Triton 3.6 keeps in registers what it reads of all of them."""
    if _BEFORE_3_9:
        if not terms:
            return 16
        return 64 if arch == "sm_120" else 32 if arch == "sm_80" and width <= 128 else 16
    whole = which != "bias" and not arch.startswith("gfx")
    return width if whole and (terms or which == "keys" and arch == "sm_80") else 16


def attention_bwd(
    arch: str, itemsize: int, width: int, bits: bool, terms: bool, which: str
) -> AttentionLaunch:
    """Of the passes "keys" (M rows a step by N keys that stay), "queries" (the other way round) and "bias" (one tile).

    width: the wider of the two heads, padded to a power of two. bits: tiles are granules or parts of them. terms: bias,
    ALiBi, softcap or dropout. The tiles are large ones that spill in no form of the mask (kernels/resources.md).
    """
    amd, keys = arch.startswith("gfx"), which == "keys"
    # AMD has 512 registers a lane for 4 warps, as many as NVIDIA has for 8.
    warps = 4 if amd else 8
    if itemsize == 4:
        # IEEE products run on the FMA units, which hold whole rows and columns of a step in registers.
        if arch == "interpreter":
            return AttentionLaunch(*((32, 64) if keys else (64, 32)), warps, 1, 32)
        stay = 16 if terms or width > 128 else 32
        # In two stages Triton 3.6 schedules the loop anew, and 8 bytes that spill find a register.
        stages = 2 if _BEFORE_3_9 and keys and terms and arch == "sm_80" and width > 128 else 1
        chunk = _columns_at_once(arch, width, terms, which)
        return AttentionLaunch(*((16, stay) if keys else (stay, 16)), warps, stages, chunk)
    if which == "bias":
        # No sums over rows or keys: all that grows with the head are the operands, 32 columns of them at a time.
        return AttentionLaunch(16, 32, warps, 1, 32 if width > 64 else 0)
    # Two tiles of operands a stage have to fit beside the two that stay.
    stages = 1 if arch in ("sm_120", "gfx942") or width > 128 else 2
    if terms and arch != "interpreter":
        # Bias, distance, slope of the softcap and dropout's words are each a tile as large as the scores.
        if keys:
            return AttentionLaunch(16, {64: 64, 128: 32}.get(max(width, 64), 16), warps, stages)
        return AttentionLaunch(
            *((32, 32) if width <= 64 else (32, 16) if width <= 128 else (16, 32)), warps, stages
        )
    if width > 128:
        return AttentionLaunch(32, 32, warps, stages)
    if not keys:
        # mma's operands, Q and dO of all rows, stay in registers.
        if width <= 64 and arch in ("sm_80", "sm_120"):
            return AttentionLaunch(64, 32, warps, stages)
        if bits or amd or arch in ("sm_80", "sm_120", "interpreter") or (arch == "sm_100" and width <= 64):
            return AttentionLaunch(64, 64, warps, stages)
        return AttentionLaunch(128, 64, warps, stages)
    if arch == "sm_100" and not bits:
        # A pipeline around tensor memory keeps what the sums' copies need, twice the registers of none.
        stages = 1
    # dK and dV of N keys, S and dP of M x N and the rows' statistics are what 255 registers have to hold.
    if width <= 64 and arch in ("sm_90", "sm_100"):
        return AttentionLaunch(64, 64 if bits or arch == "sm_90" else 128, warps, stages)
    return AttentionLaunch(32, 32 if bits and width <= 64 and arch == "sm_80" else 64, warps, stages)

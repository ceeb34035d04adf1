"""A plain mask tensor on a device, read once into block lists and bit tiles (fastattn/masks/lower.py).

One program reads one granule, 64 x 64 elements: a word a row, and whether it is empty, partial or full. The lists are
put together from the granules' codes by running totals, in order; the host waits once, for three numbers (entries,
tiles, flags), because the results have exact sizes. Equal tiles stay apart: finding them would take a sort, and a tile
is 512 bytes beside the 4 KB of mask that it was read from.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .aot_case import AotCase

GRANULE = tl.constexpr(64)
EMPTY, PARTIAL, FULL = 0, 1, 2
# Flags of the op: as csrc/ops_mask.cpp has them.
EVERYTHING, NONZERO = 1, 2
# 4096 elements: 32 a thread.
WARPS = 4


@triton.jit
def mask_scan_kernel(
    mask, codes, words, nonzero, batch: tl.int64, head: tl.int64, row: tl.int64, key: tl.int64,
    H, Sq, Sk, n_q, n_k, BOOL: tl.constexpr,
):  # fmt: skip
    """codes int8 and nonzero int8 [planes, n_q, n_k], words int64 [planes, n_q, n_k, 64]."""
    pid = tl.program_id(0).to(tl.int64)
    plane = pid // (n_q * n_k)
    i_q = (pid // n_k % n_q).to(tl.int32)
    i_k = (pid % n_k).to(tl.int32)
    o_c = tl.arange(0, GRANULE)
    o_i = i_q * GRANULE + o_c
    o_j = i_k * GRANULE + o_c
    m_ij = (o_i < Sq)[:, None] & (o_j < Sk)[None, :]
    p_mask = mask + plane // H * batch + plane % H * head
    p = p_mask + o_i.to(tl.int64)[:, None] * row + o_j.to(tl.int64)[None, :] * key
    if BOOL:
        seen = tl.load(p, mask=m_ij, other=0) != 0
        other = False
    else:
        x = tl.load(p, mask=m_ij, other=float("-inf"))
        seen = x != float("-inf")
        other = tl.max(tl.max((seen & (x != 0)).to(tl.int32), 1), 0) > 0
    word = tl.sum(seen.to(tl.int64) << o_c.to(tl.int64)[None, :], 1)
    count = tl.sum(tl.sum(seen.to(tl.int32), 1), 0)
    all_of_it = tl.minimum(Sq - i_q * GRANULE, GRANULE) * tl.minimum(Sk - i_k * GRANULE, GRANULE)
    tl.store(words + pid * GRANULE + o_c, word)
    tl.store(codes + pid, ((count > 0).to(tl.int32) + (count == all_of_it).to(tl.int32)).to(tl.int8))
    if not BOOL:
        tl.store(nonzero + pid, other.to(tl.int8))


def _nth(running: torch.Tensor, count: int) -> torch.Tensor:
    """Where a running total of zeros and ones reaches 1, 2, ..., count."""
    return torch.searchsorted(running, torch.arange(1, count + 1, dtype=running.dtype, device=running.device))


def mask_scan(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op; arguments and results as in csrc/ops.cpp, the flags on the CPU."""
    B, H, Sq, Sk = mask.shape
    n_q, n_k = -(-Sq // 64), -(-Sk // 64)
    grid = (B, H, n_q, n_k)
    total = B * H * n_q * n_k
    if total >= 2**31:
        raise ValueError(f"fastattn: a mask of {total} granules of 64 x 64 is too large for int32 lists")
    additive = mask.dtype != torch.bool
    codes = mask.new_empty(grid, dtype=torch.int8)
    words = mask.new_empty((total, 64), dtype=torch.int64)
    nonzero = mask.new_empty(grid if additive else 1, dtype=torch.int8)
    mask_scan_kernel[(total,)](
        mask if additive else mask.view(torch.uint8), codes, words, nonzero, *mask.stride(), H, Sq, Sk, n_q, n_k,
        BOOL=not additive, num_warps=WARPS,
    )  # fmt: skip
    seen, partial = (codes != EMPTY).flatten(), (codes == PARTIAL).flatten()
    entries, tiles = seen.cumsum(0), partial.cumsum(0)
    other = nonzero.any() if additive else torch.zeros_like(seen[0])
    n, t, finite = torch.stack([entries[-1], tiles[-1], other.to(entries.dtype)]).tolist()
    at = _nth(entries, n)
    tile = torch.where(partial[at], tiles[at] - 1, -1)
    blocks = torch.stack([at % n_k, tile], 1).to(torch.int32)
    ends = torch.cat([entries.new_zeros(1), entries[n_k - 1 :: n_k]])
    step = torch.arange(B * H, device=mask.device).view(-1, 1) * n_q
    offsets = ends[step + torch.arange(n_q + 1, device=mask.device)].to(torch.int32).view(B, H, n_q + 1)
    flags = NONZERO * bool(finite) + EVERYTHING * (n == total and t == 0)
    return offsets, blocks, words[_nth(tiles, t)], torch.tensor(flags)


def aot_cases():
    for name, kind in (("bool", "*u8"), ("additive_bf16", "*bf16"), ("additive_fp32", "*fp32")):
        signature = {"mask": kind, "codes": "*i8", "words": "*i64", "nonzero": "*i8"}
        signature |= dict.fromkeys(("batch", "head", "row", "key"), "i64")
        signature |= dict.fromkeys(("H", "Sq", "Sk", "n_q", "n_k"), "i32")
        yield AotCase(f"mask_scan_{name}", mask_scan_kernel, signature, {"BOOL": name == "bool"}, WARPS, 1)

"""Softmax over any dimension: scale * x + bias over the visible entries, 0 at the hidden ones.

x, out: a grid of rows of N entries (rows.py); mask (bytes, 0 hides), bias (-inf hides), causal (row i of the last
dimension sees entries 0..i). A row with nothing visible is 0; one whose visible entries are all -inf is NaN. fp32
maximum, exponentials and sum: a chunk of a row at a time, put together as in the online softmax (arXiv:1805.02867),
with a finite pivot while everything so far is -inf.

A dimension that is not the last is read in place, 32 neighbouring rows at a time, up to 256 entries; a longer one is
copied to the end of the tensor and back.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import row_launch
from .aot_case import AotCase
from .rows import (
    MAX_DIMS,
    RowGrid,
    block_rows,
    blocks,
    device_of,
    is_wide,
    lanes,
    row_aot_cases,
    row_grid,
    row_offset,
)


@triton.jit
def _scores(p_x, p_mask, p_bias, o_n, o_x, scale, b_in, i_q, N, CAUSAL: tl.constexpr):
    """scale * x + bias, -inf where hidden, and what is visible, both [BLOCK_M, BLOCK_N]."""
    b_see = b_in[:, None] & (o_n < N)[None, :]
    if CAUSAL:
        b_see = b_see & (o_n[None, :] <= i_q[:, None])
    b_s = tl.load(p_x[:, None] + o_x[None, :], mask=b_see, other=0).to(tl.float32) * scale
    if p_bias is not None:
        b_bias = tl.load(p_bias[:, None] + o_n[None, :], mask=b_see, other=0).to(tl.float32)
        b_s += b_bias
        b_see = b_see & (b_bias != float("-inf"))
    if p_mask is not None:
        b_see = b_see & (tl.load(p_mask[:, None] + o_n[None, :], mask=b_see, other=0) != 0)
    return tl.where(b_see, b_s, float("-inf")), b_see


@triton.jit
def _fold(b_s, b_top, b_sum):
    """The maximum [BLOCK_M] so far, a finite pivot, the sum and this chunk's weights relative to it."""
    b_top_now = tl.maximum(b_top, tl.max(b_s, 1))
    b_pivot = tl.where(b_top_now == float("-inf"), 0.0, b_top_now)
    b_e = tl.exp(b_s - b_pivot[:, None])
    b_sum = b_sum * tl.exp(b_top - b_pivot) + tl.sum(b_e, 1)
    return b_top_now, b_pivot, b_sum, b_e


@triton.jit(do_not_specialize=["M"])
def _softmax(
    x,
    mask,
    bias,
    out,
    scale,
    M,
    N,
    n1,
    n2,
    x0,
    x1,
    x2,
    xn,
    m0,
    m1,
    m2,
    b0,
    b1,
    b2,
    o0,
    o1,
    o2,
    on,
    DIMS: tl.constexpr,
    CAUSAL: tl.constexpr,
    STRIDED: tl.constexpr,
    LOOPED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_m = block_rows(tl.program_id(0), BLOCK_M, WIDE)
    b_in = o_m < M
    i_q = o_m % n2  # the row's place in the last dimension, for causal
    o_n = tl.arange(0, BLOCK_N)
    o_x = o_n
    o_out = o_n
    if STRIDED:  # never looped
        o_x = o_n.to(tl.int64) * xn
        o_out = o_n.to(tl.int64) * on
    p_x = x + row_offset(o_m, n1, n2, x0, x1, x2, DIMS)
    p_out = out + row_offset(o_m, n1, n2, o0, o1, o2, DIMS)
    p_mask = mask
    if mask is not None:
        p_mask = mask + row_offset(o_m, n1, n2, m0, m1, m2, DIMS)
    p_bias = bias
    if bias is not None:
        p_bias = bias + row_offset(o_m, n1, n2, b0, b1, b2, DIMS)

    b_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_any = tl.zeros([BLOCK_M], tl.int32)
    last = 0
    if LOOPED:
        end = N
        if CAUSAL:
            end = tl.minimum(N, tl.max(i_q, 0) + 1).to(tl.int32)
        last = (end - 1) // BLOCK_N * BLOCK_N
        start = last * 0
        while start < last:
            o_c = tl.multiple_of(start, BLOCK_N) + o_n
            b_s, b_see = _scores(p_x, p_mask, p_bias, o_c, o_c, scale, b_in, i_q, N, CAUSAL)
            b_top, b_pivot, b_sum, b_e = _fold(b_s, b_top, b_sum)
            if mask is not None or bias is not None:
                b_any = tl.maximum(b_any, tl.max(b_see.to(tl.int32), 1))
            start += BLOCK_N
        last = tl.multiple_of(last, BLOCK_N)
        o_x = last + o_n
        o_out = last + o_n
    o_c = last + o_n
    b_s, b_see = _scores(p_x, p_mask, p_bias, o_c, o_x, scale, b_in, i_q, N, CAUSAL)
    b_top, b_pivot, b_sum, b_e = _fold(b_s, b_top, b_sum)
    b_factor = 1.0 / b_sum
    if mask is not None or bias is not None:
        b_any = tl.maximum(b_any, tl.max(b_see.to(tl.int32), 1))
        b_factor = tl.where(b_any != 0, b_factor, 0.0)
    b_write = b_in[:, None] & (o_c < N)[None, :]
    tl.store(p_out[:, None] + o_out[None, :], b_e * b_factor[:, None], mask=b_write)
    if LOOPED:
        start = last - BLOCK_N  # backwards: what was read last is still in the cache
        while start >= 0:
            o_c = tl.multiple_of(start, BLOCK_N) + o_n
            b_s, b_see = _scores(p_x, p_mask, p_bias, o_c, o_c, scale, b_in, i_q, N, CAUSAL)
            b_y = tl.exp(b_s - b_pivot[:, None]) * b_factor[:, None]
            tl.store(p_out[:, None] + o_c[None, :], b_y)
            start -= BLOCK_N
        if CAUSAL:
            start = last + BLOCK_N
            while start < N:
                o_c = tl.multiple_of(start, BLOCK_N) + o_n
                b_zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                tl.store(p_out[:, None] + o_c[None, :], b_zero, mask=(o_c < N)[None, :])
                start += BLOCK_N


def _unit(t: Tensor | None, dim: int) -> bool:
    return t is None or t.stride(dim) == 1 or t.shape[dim] <= 1


def plan(x: Tensor, dim: int, mask: Tensor | None, bias: Tensor | None, causal: bool, out: Tensor | None):
    """How a call runs: (grid or None, launch, whether columns lie apart). Without a grid it runs on copies."""
    N = x.shape[dim]
    strided = not (_unit(x, dim) and _unit(out, dim))
    launch = row_launch.softmax(N, mask is None and bias is None, strided and N <= row_launch.STRIDED_MOST)
    grid = row_grid(x.shape, range(dim, dim + 1), (x, mask, bias, out), keep_last=causal)
    if grid.dims > MAX_DIMS or (strided and N > row_launch.STRIDED_MOST):
        return None, launch, strided
    return grid, launch, strided


def _columns_last(t: Tensor | None, x: Tensor, dim: int) -> Tensor | None:
    """A copy of t with x's shape, its dimension dim last."""
    return None if t is None else t.expand(x.shape).movedim(dim, -1).contiguous()


def softmax_out(x, dim, mask, bias, scale, causal, out) -> None:
    if x.numel() == 0:
        return
    mask = None if mask is None else mask.view(torch.uint8)
    grid, launch, strided = plan(x, dim, mask, bias, causal, out)
    if grid is None:
        copies = [_columns_last(t, x, dim) for t in (x, mask, bias)]
        y = torch.empty_like(copies[0], dtype=out.dtype)
        grid, launch, strided = plan(copies[0], x.dim() - 1, *copies[1:], causal, y)
        _launch(*copies, scale, causal, y, x.dim() - 1, grid, launch, strided)
        out.copy_(y.movedim(-1, dim))
        return
    _launch(x, mask, bias, scale, causal, out, dim, grid, launch, strided)


def _launch(x, mask, bias, scale, causal, out, dim, grid: RowGrid, launch, strided: bool) -> None:
    with device_of(x):
        _softmax[(blocks(grid.rows, launch.BLOCK_M),)](
            x,
            mask,
            bias,
            out,
            scale,
            grid.rows,
            x.shape[dim],
            *grid.sizes_of_inner(),
            *grid.strides_of(0),
            x.stride(dim),
            *grid.strides_of(1),
            *grid.strides_of(2),
            *grid.strides_of(3),
            out.stride(dim),
            DIMS=grid.dims,
            CAUSAL=causal,
            STRIDED=strided,
            LOOPED=launch.regime == "looped",
            WIDE=is_wide(grid.rows),
            BLOCK_M=launch.BLOCK_M,
            BLOCK_N=launch.BLOCK_N,
            num_warps=launch.warps_of(lanes()),
            num_stages=1,
        )


def softmax_fwd(x, dim, mask, bias, scale, causal, out_fp32) -> Tensor:
    out = x.new_empty(x.shape, dtype=torch.float32 if out_fp32 else x.dtype)
    softmax_out(x, dim, mask, bias, scale, causal, out)
    return out


def aot_cases() -> Iterator[AotCase]:
    rows = ("M", "N", "n1", "n2")
    strides = [f"{t}{d}" for t in "xmbo" for d in range(3)]
    for name, N, dtype, dims, mask, bias, causal, strided in (
        ("several", 128, "fp16", 1, False, False, False, False),
        ("several_all", 128, "bf16", 3, True, True, True, False),
        ("strided", 256, "fp32", 2, False, False, False, True),
        ("whole", 4096, "bf16", 1, False, False, False, False),
        ("whole_longest", 32768, "fp32", 1, False, False, False, False),
        ("whole_all", 16384, "bf16", 3, True, True, True, False),
        ("looped", 65536, "bf16", 1, False, False, False, False),
        ("looped_all", 65536, "fp32", 3, True, True, True, False),
    ):
        launch = row_launch.softmax(N, not mask and not bias, strided)
        signature = {"x": f"*{dtype}", "out": f"*{dtype}", "scale": "fp32"}
        signature |= dict.fromkeys((*rows, *strides, "xn", "on"), "i32")
        constexprs = {
            "DIMS": dims,
            "CAUSAL": causal,
            "STRIDED": strided,
            "LOOPED": launch.regime == "looped",
            "WIDE": False,
            "BLOCK_M": launch.BLOCK_M,
            "BLOCK_N": launch.BLOCK_N,
        }
        for given, tensor, kind in ((mask, "mask", "*u8"), (bias, "bias", "*fp32")):
            if given:
                signature[tensor] = kind
            else:
                constexprs[tensor] = None
        aligned = tuple(n for n in signature if n not in ("scale", "M", "n1", "n2", "x2" if strided else ""))
        yield from row_aot_cases(name, _softmax, signature, constexprs, launch, aligned)

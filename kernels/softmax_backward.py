"""Backward of softmax, from its result:

    ds = y * (dy - sum(dy * y)),   dx = scale * ds
    dbias = the sum of ds over the rows that share a row of bias

A row that mask and bias emptied has y = 0, and so a gradient of 0. dbias is a kernel of its own, which reads the rows'
dot products: the rows of one bias row are dealt to a number of programs that depends on shapes only, and the programs'
sums are added in order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import row_launch
from .add_parts import add_parts
from .aot_case import AotCase
from .rows import (
    MAX_DIMS,
    block_rows,
    blocks,
    device_of,
    is_wide,
    lanes,
    row_aot_cases,
    row_grid,
    row_offset,
)

# Sums of a gradient of bias at most: enough programs to share the work, few enough to stay small.
_PARTS = 64


@triton.jit(do_not_specialize=["M"])
def _dx(
    dy,
    y,
    dx,
    dots,
    scale,
    M,
    N,
    n1,
    n2,
    d0,
    d1,
    d2,
    dn,
    y0,
    y1,
    y2,
    yn,
    g0,
    g1,
    g2,
    gn,
    DIMS: tl.constexpr,
    STRIDED: tl.constexpr,
    LOOPED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_m = block_rows(tl.program_id(0), BLOCK_M, WIDE)
    b_in = o_m < M
    o_n = tl.arange(0, BLOCK_N)
    size = tl.zeros([], tl.int32) + N
    last = size * 0
    if LOOPED:
        last = tl.multiple_of((size - 1) // BLOCK_N * BLOCK_N, BLOCK_N)
    o_l = last + o_n
    o_dy = o_l
    o_y = o_l
    o_dx = o_l
    if STRIDED:  # never looped
        o_dy = o_n.to(tl.int64) * dn
        o_y = o_n.to(tl.int64) * yn
        o_dx = o_n.to(tl.int64) * gn
    b_ok = b_in[:, None] & (o_l < N)[None, :]
    p_dy = dy + row_offset(o_m, n1, n2, d0, d1, d2, DIMS)[:, None]
    p_y = y + row_offset(o_m, n1, n2, y0, y1, y2, DIMS)[:, None]
    b_dy = tl.load(p_dy + o_dy[None, :], mask=b_ok, other=0).to(tl.float32)
    b_y = tl.load(p_y + o_y[None, :], mask=b_ok, other=0).to(tl.float32)
    b_dot = tl.sum(b_dy * b_y, 1)
    if LOOPED:
        start = last * 0
        while start < last:
            o_c = (tl.multiple_of(start, BLOCK_N) + o_n)[None, :]
            b_all = b_in[:, None] & (o_c < N)
            b_c = tl.load(p_dy + o_c, mask=b_all, other=0).to(tl.float32)
            b_dot += tl.sum(b_c * tl.load(p_y + o_c, mask=b_all, other=0).to(tl.float32), 1)
            start += BLOCK_N
    if dots is not None:
        tl.store(dots + o_m.to(tl.int64), b_dot, mask=b_in)
    if dx is not None:
        p_dx = dx + row_offset(o_m, n1, n2, g0, g1, g2, DIMS)[:, None]
        tl.store(p_dx + o_dx[None, :], b_y * (b_dy - b_dot[:, None]) * scale, mask=b_ok)
        if LOOPED:
            start = last - BLOCK_N  # backwards: what was read last is still in the cache
            while start >= 0:
                o_c = (tl.multiple_of(start, BLOCK_N) + o_n)[None, :]
                b_all = b_in[:, None] & (o_c < N)
                b_c = tl.load(p_dy + o_c, mask=b_all, other=0).to(tl.float32) - b_dot[:, None]
                b_c = tl.load(p_y + o_c, mask=b_all, other=0).to(tl.float32) * b_c * scale
                tl.store(p_dx + o_c, b_c, mask=b_all)
                start -= BLOCK_N


@triton.jit
def _dbias(
    dy,
    y,
    dots,
    out,
    N,
    shared,
    parts,
    share,
    columns,
    n1,
    n2,
    d0,
    d1,
    d2,
    dn,
    y0,
    y1,
    y2,
    yn,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of columns of part p of a bias row, from `share` of the `shared` rows that have it."""
    part = tl.program_id(0) // columns
    o_n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    row = part // parts
    if WIDE:
        row = row.to(tl.int64)
    first = part % parts * share + row * shared
    end = tl.minimum(first + share, row * shared + shared)
    o_dy = (o_n.to(tl.int64) * dn)[None, :]
    o_y = (o_n.to(tl.int64) * yn)[None, :]
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    while first < end:
        o_m = first + tl.arange(0, BLOCK_M)
        b_ok = (o_m < end)[:, None] & (o_n < N)[None, :]
        b_dot = tl.load(dots + o_m.to(tl.int64), mask=o_m < end, other=0)
        p_dy = dy + row_offset(o_m, n1, n2, d0, d1, d2, DIMS)[:, None]
        p_y = y + row_offset(o_m, n1, n2, y0, y1, y2, DIMS)[:, None]
        b_dy = tl.load(p_dy + o_dy, mask=b_ok, other=0).to(tl.float32)
        b_sum += tl.load(p_y + o_y, mask=b_ok, other=0).to(tl.float32) * (b_dy - b_dot[:, None])
        first += BLOCK_M
    tl.store(out + part.to(tl.int64) * N + o_n, tl.sum(b_sum, 0), mask=o_n < N)


def _leading(bias: Tensor | None, rank: int, dim: int) -> list[int]:
    """The dimensions in the order: those bias spans, those it broadcasts over, the softmax's."""
    outer = [d for d in range(rank) if d != dim]
    if bias is not None:
        outer.sort(key=lambda d: not (d >= rank - bias.dim() and bias.shape[d - rank] > 1))
    return [*outer, dim]


def softmax_bwd(dy, y, dim, bias, scale, x_dtype, needs) -> tuple[Tensor, Tensor]:
    N, sums = y.shape[dim], needs[1] and bias is not None
    dx = y.new_empty(y.shape if needs[0] else (0,), dtype=x_dtype)
    rows = bias.numel() // bias.shape[dim - y.dim() + bias.dim()] if sums and N else 0
    dbias = bias.new_empty((rows, N)) if sums else y.new_empty(0, dtype=torch.float32)
    if y.numel() == 0:
        return dx, dbias.zero_()
    leader = bias if sums else None
    to = dx if needs[0] else None
    strided = N > 1 and any(t is not None and t.stride(dim) != 1 for t in (dy, y, to))
    order = None
    grid = row_grid(y.shape, range(dim, dim + 1), (dy, y, to), leader=leader)
    if grid.dims > MAX_DIMS or (strided and N > row_launch.STRIDED_MOST):
        order = _leading(leader, y.dim(), dim)
        dy, y = dy.permute(order).contiguous(), y.permute(order).contiguous()
        to = torch.empty_like(y, dtype=x_dtype) if needs[0] else None
        dim, strided = y.dim() - 1, False
        grid = row_grid(y.shape, range(dim, dim + 1), (dy, y, to))
    launch = row_launch.softmax_backward(N, strided)
    dots = y.new_empty(grid.rows, dtype=torch.float32) if sums else None
    columns_of = [(t.stride(dim) if t is not None and N > 1 else 1) for t in (dy, y, to)]
    strides = [(*grid.strides_of(i), columns_of[i]) for i in range(3)]
    flags = {"DIMS": grid.dims, "WIDE": is_wide(grid.rows)}
    with device_of(y):
        _dx[(blocks(grid.rows, launch.BLOCK_M),)](
            dy,
            y,
            to,
            dots,
            scale,
            grid.rows,
            N,
            *grid.sizes_of_inner(),
            *(number for three in strides for number in three),
            **flags,
            STRIDED=strided,
            LOOPED=launch.regime == "looped",
            BLOCK_M=launch.BLOCK_M,
            BLOCK_N=launch.BLOCK_N,
            num_warps=launch.warps_of(lanes()),
            num_stages=1,
        )
        if sums:
            columns = row_launch.COLUMNS
            shared = grid.rows // rows
            share = -(-shared // max(1, min(_PARTS // rows, shared)))
            parts, tiles = -(-shared // share), -(-N // columns.BLOCK_N)
            result = dbias if parts == 1 else y.new_empty((rows * parts, N), dtype=torch.float32)
            _dbias[(blocks(rows * parts * tiles, 1),)](
                dy,
                y,
                dots,
                result,
                N,
                shared,
                parts,
                share,
                tiles,
                *grid.sizes_of_inner(),
                *strides[0],
                *strides[1],
                **flags,
                BLOCK_M=columns.BLOCK_M,
                BLOCK_N=columns.BLOCK_N,
                num_warps=columns.warps_of(lanes()),
                num_stages=1,
            )
            if parts > 1:
                add_parts(result, rows, parts, N, dbias)
    if order is not None and needs[0]:
        dx.permute(order).copy_(to)
    return dx, dbias


def aot_cases() -> Iterator[AotCase]:
    numbers = ("M", "N", "n1", "n2")
    strides = [f"{t}{d}" for t in "dyg" for d in (0, 1, 2, "n")]
    for name, N, dtype, dims, strided in (
        ("several", 128, "fp16", 1, False),
        ("strided", 256, "fp32", 2, True),
        ("whole", 4096, "bf16", 1, False),
        ("whole_longest", 16384, "fp32", 3, False),
        ("looped", 65536, "fp32", 1, False),
    ):
        launch = row_launch.softmax_backward(N, strided)
        signature = dict.fromkeys(("dy", "y", "dx"), f"*{dtype}") | {"dots": "*fp32", "scale": "fp32"}
        signature |= dict.fromkeys((*numbers, *strides), "i32")
        constexprs = {
            "DIMS": dims,
            "STRIDED": strided,
            "LOOPED": launch.regime == "looped",
            "WIDE": False,
            "BLOCK_M": launch.BLOCK_M,
            "BLOCK_N": launch.BLOCK_N,
        }
        aligned = [n for n in signature if n not in ("scale", "M", "n1", "n2")]
        yield from row_aot_cases(name, _dx, signature, constexprs, launch, aligned)
    launch = row_launch.COLUMNS
    for name, dtype, strided in (("dbias_fp32", "fp32", True), ("dbias_bf16", "bf16", False)):
        signature = {"dy": f"*{dtype}", "y": f"*{dtype}", "dots": "*fp32", "out": "*fp32"}
        shapes = ("N", "shared", "parts", "share", "columns", "n1", "n2", *strides[:8])
        signature |= dict.fromkeys(shapes, "i32")
        constexprs = {"DIMS": 2, "WIDE": False, "BLOCK_M": launch.BLOCK_M, "BLOCK_N": launch.BLOCK_N}
        if not strided:
            signature = {n: kind for n, kind in signature.items() if n not in ("dn", "yn")}
            constexprs |= {"dn": 1, "yn": 1}
        aligned = [n for n in signature if n not in ("shared", "parts", "share", "columns", "n1", "n2")]
        yield from row_aot_cases(name, _dbias, signature, constexprs, launch, aligned)

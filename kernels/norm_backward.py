"""Backward of LayerNorm and RMSNorm, from h and the statistics of the forward. With g = dy * (weight + offset) and
n = (h - mean) * rstd:

    dh = rstd * (g - mean(g) - n * mean(g * n)) + dsum
    dweight = sum over rows of dy * n,   dbias = sum over rows of dy

without mean(g) for RMSNorm; dsum is the gradient that reached the sum of add + norm by itself.

Rows that fit the registers are read once: they are dealt to a fixed number of programs, each of which keeps its sums of
dy * n and dy in registers. Longer rows are read by one kernel for dh and again by another for the sums. The programs'
sums are fp32 and are added in order by a last kernel: no atomics, the same bits every time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import triton
import triton.language as tl

from . import row_launch
from .add_parts import add_parts
from .aot_case import AotCase
from .rows import (
    MAX_DIMS,
    block_rows,
    blocks,
    contiguous_rows,
    device_of,
    is_wide,
    lanes,
    row_aot_cases,
    row_grid,
    row_offset,
)


@triton.jit
def _row_statistics(stats, o_m, b_in, M, RMS: tl.constexpr):
    """rstd, mean and the rest of the mean [BLOCK_M]."""
    p_stats = stats + o_m.to(tl.int64)
    b_rstd = tl.load(p_stats, mask=b_in, other=0)
    b_mean = b_rstd
    b_rest = b_rstd
    if not RMS:
        rows = tl.zeros([], tl.int64) + M
        b_mean = tl.load(p_stats + rows, mask=b_in, other=0)
        b_rest = tl.load(p_stats + 2 * rows, mask=b_in, other=0)
    return b_rstd, b_mean, b_rest


@triton.jit
def _loaded(p, o_n, b_ok):
    return tl.load(p[:, None] + o_n[None, :], mask=b_ok, other=0).to(tl.float32)


@triton.jit
def _n_of(b_h, b_rstd, b_mean, b_rest, b_ok, RMS: tl.constexpr):
    if RMS:
        return b_h * b_rstd[:, None]
    return tl.where(b_ok, ((b_h - b_mean[:, None]) - b_rest[:, None]) * b_rstd[:, None], 0.0)


@triton.jit
def _weight(weight, offset, o_n, N):
    """weight + offset [BLOCK_N]; 1 without a weight."""
    if weight is None:
        return tl.full(o_n.shape, 1.0, tl.float32)
    return tl.load(weight + o_n, mask=o_n < N, other=0).to(tl.float32) + offset


@triton.jit(do_not_specialize=["M"])
def _norm_backward(
    dy,
    dsum,
    h,
    dx,
    stats,
    weight,
    dweights,
    dbiases,
    offset,
    M,
    N,
    n1,
    n2,
    d0,
    d1,
    d2,
    s0,
    s1,
    s2,
    h0,
    h1,
    h2,
    g0,
    g1,
    g2,
    DIMS: tl.constexpr,
    RMS: tl.constexpr,
    LOOPED: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_n = tl.arange(0, BLOCK_N)
    size = tl.zeros([], tl.int32) + N
    width = size.to(tl.float32)
    last = size * 0
    if LOOPED:
        last = tl.multiple_of((size - 1) // BLOCK_N * BLOCK_N, BLOCK_N)
    o_l = last + o_n
    b_w = _weight(weight, offset, o_l, N)
    b_dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_db = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    stop = tl.cdiv(M, BLOCK_M)
    if GROUPS == 0:
        stop = block + 1
    while block < stop:
        o_m = block_rows(block, BLOCK_M, WIDE)
        b_in = o_m < M
        p_h = h + row_offset(o_m, n1, n2, h0, h1, h2, DIMS)
        p_dy = dy + row_offset(o_m, n1, n2, d0, d1, d2, DIMS)
        b_rstd, b_mean, b_rest = _row_statistics(stats, o_m, b_in, M, RMS)
        b_ok = b_in[:, None] & (o_l < N)[None, :]
        b_dy = _loaded(p_dy, o_l, b_ok)
        b_n = _n_of(_loaded(p_h, o_l, b_ok), b_rstd, b_mean, b_rest, b_ok, RMS)
        if dweights is not None:
            b_dw += b_dy * b_n
        if dbiases is not None:
            b_db += b_dy
        if dx is not None:
            b_g = b_dy * b_w[None, :]
            b_sum_gn = tl.sum(b_g * b_n, 1)
            b_sum_g = b_sum_gn * 0
            if not RMS:
                b_sum_g = tl.sum(b_g, 1)
            if LOOPED:
                start = last * 0
                while start < last:
                    o_c = tl.multiple_of(start, BLOCK_N) + o_n
                    b_all = b_in[:, None] & (o_c < N)[None, :]
                    b_c = _loaded(p_dy, o_c, b_all) * _weight(weight, offset, o_c, N)[None, :]
                    b_nc = _n_of(_loaded(p_h, o_c, b_all), b_rstd, b_mean, b_rest, b_all, RMS)
                    b_sum_gn += tl.sum(b_c * b_nc, 1)
                    if not RMS:
                        b_sum_g += tl.sum(b_c, 1)
                    start += BLOCK_N
            b_mean_g = b_sum_g / width
            b_mean_gn = b_sum_gn / width
            p_dx = dx + row_offset(o_m, n1, n2, g0, g1, g2, DIMS)
            p_dsum = dsum
            if dsum is not None:
                p_dsum = dsum + row_offset(o_m, n1, n2, s0, s1, s2, DIMS)
            b_dx = (b_g - b_mean_g[:, None] - b_n * b_mean_gn[:, None]) * b_rstd[:, None]
            if dsum is not None:
                b_dx += _loaded(p_dsum, o_l, b_ok)
            tl.store(p_dx[:, None] + o_l[None, :], b_dx, mask=b_ok)
            if LOOPED:
                start = last - BLOCK_N  # backwards: what was read last is still in the cache
                while start >= 0:
                    o_c = tl.multiple_of(start, BLOCK_N) + o_n
                    b_all = b_in[:, None] & (o_c < N)[None, :]
                    b_c = _loaded(p_dy, o_c, b_all) * _weight(weight, offset, o_c, N)[None, :]
                    b_nc = _n_of(_loaded(p_h, o_c, b_all), b_rstd, b_mean, b_rest, b_all, RMS)
                    b_dx = (b_c - b_mean_g[:, None] - b_nc * b_mean_gn[:, None]) * b_rstd[:, None]
                    if dsum is not None:
                        b_dx += _loaded(p_dsum, o_c, b_all)
                    tl.store(p_dx[:, None] + o_c[None, :], b_dx, mask=b_all)
                    start -= BLOCK_N
        block += GROUPS if GROUPS != 0 else 1
    if GROUPS != 0:
        p_part = tl.program_id(0).to(tl.int64) * N + o_n
        if dweights is not None:
            tl.store(dweights + p_part, tl.sum(b_dw, 0), mask=o_n < N)
        if dbiases is not None:
            tl.store(dbiases + p_part, tl.sum(b_db, 0), mask=o_n < N)


@triton.jit(do_not_specialize=["M"])
def _norm_sums(
    dy,
    h,
    stats,
    dweights,
    dbiases,
    M,
    N,
    share,
    n1,
    n2,
    d0,
    d1,
    d2,
    h0,
    h1,
    h2,
    DIMS: tl.constexpr,
    RMS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums over the `share` rows of a group, of a block of columns."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    if WIDE:
        group = group.to(tl.int64)
    first = group * share
    end = tl.minimum(first + share, M)
    b_dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_db = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    while first < end:
        o_m = first + tl.arange(0, BLOCK_M)
        b_in = o_m < end
        b_ok = b_in[:, None] & (o_n < N)[None, :]
        b_dy = _loaded(dy + row_offset(o_m, n1, n2, d0, d1, d2, DIMS), o_n, b_ok)
        if dweights is not None:
            b_rstd, b_mean, b_rest = _row_statistics(stats, o_m, b_in, M, RMS)
            b_h = _loaded(h + row_offset(o_m, n1, n2, h0, h1, h2, DIMS), o_n, b_ok)
            b_dw += b_dy * _n_of(b_h, b_rstd, b_mean, b_rest, b_ok, RMS)
        if dbiases is not None:
            b_db += b_dy
        first += BLOCK_M
    p_part = tl.program_id(1).to(tl.int64) * N + o_n
    if dweights is not None:
        tl.store(dweights + p_part, tl.sum(b_dw, 0), mask=o_n < N)
    if dbiases is not None:
        tl.store(dbiases + p_part, tl.sum(b_db, 0), mask=o_n < N)


def norm_bwd(dy, dsum, h, stats, row_dims, weight, bias_dtype, offset, rms, needs):
    shape = h.shape[h.dim() - row_dims :]
    N, row = math.prod(shape), range(h.dim() - row_dims, h.dim())
    dx = h.new_empty(h.shape if needs[0] else (0,))
    dweight = h.new_empty(0, dtype=stats.dtype)
    dbias = dweight.clone()
    if needs[1] and weight is not None:
        dweight = weight.new_empty(shape)
    if needs[2] and bias_dtype is not None and not rms:
        dbias = h.new_empty(shape, dtype=bias_dtype)
    if h.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    dy, dsum, h = (None if t is None else contiguous_rows(t, row_dims) for t in (dy, dsum, h))
    given = (dy, dsum, h, dx if needs[0] else None)
    grid = row_grid(h.shape, row, given)
    if grid.dims > MAX_DIMS:
        dy, dsum, h = (None if t is None else t.contiguous() for t in (dy, dsum, h))
        given = (dy, dsum, h, dx if needs[0] else None)
        grid = row_grid(h.shape, row, given)
    sums = dweight.numel() + dbias.numel() > 0
    launch = row_launch.norm_backward(N, sums)
    columns = row_launch.COLUMNS
    looped = launch.regime == "looped"
    programs = blocks(grid.rows, launch.BLOCK_M)
    share = -(-grid.rows // columns.groups)
    groups = -(-grid.rows // share) if looped else min(programs, launch.groups)
    dweights, dbiases = (
        stats.new_empty((groups, N)) if sums and t.numel() else None for t in (dweight, dbias)
    )
    inner = grid.sizes_of_inner()
    rms_and_dims = {"DIMS": grid.dims, "RMS": rms, "WIDE": is_wide(grid.rows)}
    with device_of(h):
        in_rows = not looped and sums
        if needs[0] or in_rows:
            _norm_backward[(groups if in_rows else programs,)](
                *given,
                stats,
                weight,
                dweights if in_rows else None,
                dbiases if in_rows else None,
                offset,
                grid.rows,
                N,
                *inner,
                *(stride for tensor in range(4) for stride in grid.strides_of(tensor)),
                **rms_and_dims,
                LOOPED=looped,
                GROUPS=launch.groups,
                BLOCK_M=launch.BLOCK_M,
                BLOCK_N=launch.BLOCK_N,
                num_warps=launch.warps_of(lanes()),
                num_stages=1,
            )
        if looped and sums:
            _norm_sums[(-(-N // columns.BLOCK_N), groups)](
                dy,
                h,
                stats,
                dweights,
                dbiases,
                grid.rows,
                N,
                share,
                *inner,
                *grid.strides_of(0),
                *grid.strides_of(2),
                **rms_and_dims,
                BLOCK_M=columns.BLOCK_M,
                BLOCK_N=columns.BLOCK_N,
                num_warps=columns.warps_of(lanes()),
                num_stages=1,
            )
        for parts, result in ((dweights, dweight), (dbiases, dbias)):
            if parts is not None:
                add_parts(parts, 1, groups, N, result)
    return dx, dweight, dbias


def aot_cases() -> Iterator[AotCase]:
    three = [f"{t}{d}" for t in "dshg" for d in range(3)]
    for name, N, dtype, dims, rms, dsum, sums in (
        ("several_layer", 128, "bf16", 1, False, False, True),
        ("whole_layer", 4096, "bf16", 1, False, True, True),
        ("whole_longest_layer", 8192, "fp32", 1, False, True, True),
        ("whole_longest_rms", 8192, "bf16", 3, True, True, True),
        ("whole_frozen_rms", 8192, "bf16", 1, True, False, False),
        ("looped_layer", 65536, "fp32", 1, False, True, False),
        ("looped_rms", 16384, "bf16", 3, True, False, False),
    ):
        launch = row_launch.norm_backward(N, sums)
        signature = dict.fromkeys(("dy", "h", "dx", "weight"), f"*{dtype}")
        signature |= {"stats": "*fp32", "offset": "fp32"}
        signature |= dict.fromkeys(("M", "N", "n1", "n2", *three), "i32")
        constexprs = {
            "DIMS": dims,
            "RMS": rms,
            "LOOPED": launch.regime == "looped",
            "WIDE": False,
            "GROUPS": launch.groups,
            "BLOCK_M": launch.BLOCK_M,
            "BLOCK_N": launch.BLOCK_N,
        }
        for tensor, there in (("dsum", dsum), ("dweights", sums), ("dbiases", sums and not rms)):
            if there:
                signature[tensor] = f"*{dtype}" if tensor == "dsum" else "*fp32"
            else:
                constexprs[tensor] = None
        aligned = [n for n in signature if n not in ("offset", "M", "n1", "n2")]
        yield from row_aot_cases(name, _norm_backward, signature, constexprs, launch, aligned)
    launch = row_launch.COLUMNS
    for dtype in ("fp32", "bf16"):
        signature = {"dy": f"*{dtype}", "h": f"*{dtype}"} | dict.fromkeys(
            ("stats", "dweights", "dbiases"), "*fp32"
        )
        signature |= dict.fromkeys(("M", "N", "share", "n1", "n2", "d0", "d1", "d2", "h0", "h1", "h2"), "i32")
        constexprs = {"DIMS": 1, "RMS": False, "WIDE": False}
        constexprs |= {"BLOCK_M": launch.BLOCK_M, "BLOCK_N": launch.BLOCK_N}
        aligned = [n for n in signature if n not in ("M", "share", "n1", "n2")]
        yield from row_aot_cases(f"sums_{dtype}", _norm_sums, signature, constexprs, launch, aligned)

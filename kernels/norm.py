"""LayerNorm and RMSNorm of rows, alone or after adding a residual.

    y = (h - mean) / sqrt(mean((h - mean)^2) + eps) * (weight + offset) + bias,   or   h / sqrt(mean(h^2) + eps) * ...

of h = x, or of h = x + residual rounded to the sum's dtype, which is returned too. Rows are N contiguous entries.
Statistics are fp32 and of centred values, chunks of a row merged by Chan, Golub and LeVeque (1983); what rounding left
of the mean is kept beside it, so that a mean of a million times the deviation does not cancel. A row whose squares
leave the range of fp32 is scaled by a power of two first.

stats, as the backward reads it: fp32 [3, rows], 1 / sqrt(variance + eps), the mean, and the rest of the mean; [1, rows]
for RMSNorm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import row_launch
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
def _chunk(p_x, p_residual, p_sum, o_n, b_in, N):
    """h [BLOCK_M, BLOCK_N], 0 outside of the row. Stores the sum where there is one."""
    b_ok = b_in[:, None] & (o_n < N)[None, :]
    b_h = tl.load(p_x[:, None] + o_n[None, :], mask=b_ok, other=0).to(tl.float32)
    if p_residual is not None:
        b_h += tl.load(p_residual[:, None] + o_n[None, :], mask=b_ok, other=0).to(tl.float32)
        b_rounded = b_h.to(p_sum.dtype.element_ty)
        tl.store(p_sum[:, None] + o_n[None, :], b_rounded, mask=b_ok)
        b_h = b_rounded.to(tl.float32)
    return b_h


@triton.jit
def _merge(b_h, o_n, N, start, b_pivot, b_mean, b_squares, RMS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Adds the chunk b_h, which begins at `start`, to the moments of those before it.

    mean and squares [BLOCK_M] are around pivot, the mean of the first chunk.
    """
    if RMS:
        return b_pivot, b_mean, b_squares + tl.sum(b_h * b_h, 1)
    count = tl.minimum(N - start, BLOCK_N).to(tl.float32)
    before = start.to(tl.float32)
    b_ok = (o_n < N)[None, :]
    b_h = tl.where(b_ok, b_h - b_pivot[:, None], 0.0)
    b_here = tl.sum(b_h, 1) / count
    b_d = tl.where(b_ok, b_h - b_here[:, None], 0.0)
    b_rest = tl.sum(b_d, 1) / count
    b_around = tl.sum(b_d * b_d, 1) - b_rest * b_rest * count
    first = start == 0
    b_pivot = tl.where(first, b_here, b_pivot)
    b_delta = tl.where(first, b_rest, b_here + b_rest) - b_mean
    share = count / (before + count)
    b_mean += b_delta * share
    b_squares += b_around + b_delta * b_delta * (before * share)
    return b_pivot, b_mean, b_squares


@triton.jit
def _moments(
    p_x,
    p_residual,
    p_sum,
    b_last,
    last,
    o_n,
    b_in,
    b_power,
    N,
    RMS: tl.constexpr,
    LOOPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Mean, rest of the mean, and mean of squares around it [BLOCK_M], of a row times b_power."""
    b_pivot = tl.zeros([BLOCK_M], tl.float32)
    b_mean = tl.zeros([BLOCK_M], tl.float32)
    b_squares = tl.zeros([BLOCK_M], tl.float32)
    if LOOPED:
        start = last * 0
        while start < last:
            o_c = tl.multiple_of(start, BLOCK_N) + o_n
            b_h = _chunk(p_x, p_residual, p_sum, o_c, b_in, N) * b_power[:, None]
            b_pivot, b_mean, b_squares = _merge(b_h, o_c, N, start, b_pivot, b_mean, b_squares, RMS, BLOCK_N)
            start += BLOCK_N
    b_pivot, b_mean, b_squares = _merge(
        b_last * b_power[:, None], last + o_n, N, last, b_pivot, b_mean, b_squares, RMS, BLOCK_N
    )
    b_whole = b_pivot + b_mean
    b_rest = b_mean - (b_whole - b_pivot)
    # Not by a maximum with 0, which would hide NaN.
    return b_whole, b_rest, tl.where(b_squares < 0, 0.0, b_squares) / N.to(tl.float32)


@triton.jit
def _taming_power(p_h, b_last, last, o_n, b_in, b_bad, eps, N, LOOPED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The power of two [BLOCK_M] that brings the larger of a row's magnitudes and sqrt(eps) near 1, where b_bad."""
    b_peak = tl.max(tl.abs(b_last), 1)
    if LOOPED:
        start = last * 0
        while start < last:
            o_c = tl.multiple_of(start, BLOCK_N) + o_n
            b_peak = tl.maximum(b_peak, tl.max(tl.abs(_chunk(p_h, None, None, o_c, b_in, N)), 1))
            start += BLOCK_N
    b_scale = tl.maximum(b_peak, tl.sqrt(eps))
    b_exponent = 254 - (b_scale.to(tl.int32, bitcast=True) >> 23)
    b_exponent = tl.minimum(tl.maximum(b_exponent, 1), 253)
    b_power = (b_exponent << 23).to(tl.float32, bitcast=True)
    return tl.where(b_bad & (b_peak > 0) & (b_peak <= 3.4028234663852886e38), b_power, 1.0)


@triton.jit
def _normalised(b_h, b_power, b_mean, b_rest, b_rstd, weight, bias, offset, o_n, N, RMS: tl.constexpr):
    b_y = b_h * b_power[:, None]
    if not RMS:
        b_y = (b_y - b_mean[:, None]) - b_rest[:, None]
    b_y = b_y * b_rstd[:, None]
    if weight is not None:
        b_w = tl.load(weight + o_n, mask=o_n < N, other=0).to(tl.float32) + offset
        b_y = b_y * b_w[None, :]
    if bias is not None:
        b_y += tl.load(bias + o_n, mask=o_n < N, other=0).to(tl.float32)[None, :]
    return b_y


@triton.jit(do_not_specialize=["M"])
def _norm(
    x,
    residual,
    total,
    y,
    weight,
    bias,
    stats,
    eps,
    offset,
    M,
    N,
    n1,
    n2,
    x0,
    x1,
    x2,
    r0,
    r1,
    r2,
    t0,
    t1,
    t2,
    y0,
    y1,
    y2,
    DIMS: tl.constexpr,
    RMS: tl.constexpr,
    TAME: tl.constexpr,
    LOOPED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_m = block_rows(tl.program_id(0), BLOCK_M, WIDE)
    b_in = o_m < M
    o_n = tl.arange(0, BLOCK_N)
    p_x = x + row_offset(o_m, n1, n2, x0, x1, x2, DIMS)
    p_y = y + row_offset(o_m, n1, n2, y0, y1, y2, DIMS)
    p_residual = residual
    p_sum = total
    p_h = p_x  # where h can be read again
    if residual is not None:
        p_residual = residual + row_offset(o_m, n1, n2, r0, r1, r2, DIMS)
        p_sum = total + row_offset(o_m, n1, n2, t0, t1, t2, DIMS)
        p_h = p_sum
    size = tl.zeros([], tl.int32) + N  # a number in a register also where N is known to be 1
    last = size * 0
    if LOOPED:
        last = tl.multiple_of((size - 1) // BLOCK_N * BLOCK_N, BLOCK_N)
    b_last = _chunk(p_x, p_residual, p_sum, last + o_n, b_in, size)
    b_power = tl.full([BLOCK_M], 1.0, tl.float32)
    b_mean, b_rest, b_square = _moments(
        p_x, p_residual, p_sum, b_last, last, o_n, b_in, b_power, size, RMS, LOOPED, BLOCK_M, BLOCK_N
    )
    b_eps = b_power * eps
    if TAME:
        # Squares that overflowed, or that lost digits to underflow which eps does not hide.
        b_bad = (b_square < 1.2980742146337069e33) == 0  # 2^110
        b_bad = (b_bad | ((b_square < 7.888609052210118e-31) & (b_eps < 1.3234889800848443e-23))) & b_in
        if tl.max(b_bad.to(tl.int32), 0) != 0:
            b_power = _taming_power(p_h, b_last, last, o_n, b_in, b_bad, eps, size, LOOPED, BLOCK_N)
            b_mean, b_rest, b_square = _moments(
                p_h, None, None, b_last, last, o_n, b_in, b_power, size, RMS, LOOPED, BLOCK_M, BLOCK_N
            )
            b_eps = b_power * eps * b_power
    b_rstd = tl.div_rn(b_power * 0 + 1.0, tl.sqrt_rn(b_square + b_eps))
    # A row without variance is 0, not 0 * inf, as long as there is an eps.
    b_rstd = tl.where((eps > 0) & (b_rstd > 3.4028234663852886e38), 3.4028234663852886e38, b_rstd)
    if stats is not None:
        p_stats = stats + o_m.to(tl.int64)
        tl.store(p_stats, b_rstd * b_power, mask=b_in)
        if not RMS:
            rows = tl.zeros([], tl.int64) + M
            tl.store(p_stats + rows, b_mean / b_power, mask=b_in)
            tl.store(p_stats + 2 * rows, b_rest / b_power, mask=b_in)

    o_c = last + o_n
    b_y = _normalised(b_last, b_power, b_mean, b_rest, b_rstd, weight, bias, offset, o_c, N, RMS)
    tl.store(p_y[:, None] + o_c[None, :], b_y, mask=b_in[:, None] & (o_c < N)[None, :])
    if LOOPED:
        start = last - BLOCK_N  # backwards: what was read last is still in the cache
        while start >= 0:
            o_c = tl.multiple_of(start, BLOCK_N) + o_n
            b_h = _chunk(p_h, None, None, o_c, b_in, size)
            b_y = _normalised(b_h, b_power, b_mean, b_rest, b_rstd, weight, bias, offset, o_c, N, RMS)
            tl.store(p_y[:, None] + o_c[None, :], b_y, mask=b_in[:, None] & (o_c < N)[None, :])
            start -= BLOCK_N


def _run(x, residual, row_dims, weight, bias, eps, offset, rms, y, total, stats) -> None:
    N = math.prod(x.shape[x.dim() - row_dims :])
    if x.numel() == 0:
        return
    row = range(x.dim() - row_dims, x.dim())
    x = contiguous_rows(x, row_dims)
    residual = None if residual is None else contiguous_rows(residual, row_dims)
    grid = row_grid(x.shape, row, (x, residual, total, y))
    if grid.dims > MAX_DIMS:
        outs = (
            torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None else None
            for t in (y, total)
        )
        y_now, total_now = outs
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        _run(x, residual, row_dims, weight, bias, eps, offset, rms, y_now, total_now, stats)
        y.copy_(y_now)
        if total is not None:
            total.copy_(total_now)
        return
    launch = row_launch.norm(N)
    with device_of(x):
        _norm[(blocks(grid.rows, launch.BLOCK_M),)](
            x,
            residual,
            total,
            y,
            weight,
            bias,
            stats,
            eps,
            offset,
            grid.rows,
            N,
            *grid.sizes_of_inner(),
            *(stride for tensor in range(4) for stride in grid.strides_of(tensor)),
            DIMS=grid.dims,
            RMS=rms,
            TAME=_may_overflow(x if total is None else total),
            LOOPED=launch.regime == "looped",
            WIDE=is_wide(grid.rows),
            BLOCK_M=launch.BLOCK_M,
            BLOCK_N=launch.BLOCK_N,
            num_warps=launch.warps_of(lanes()),
            num_stages=1,
        )


def _may_overflow(h: Tensor) -> bool:
    """Whether squares of h's numbers can leave the range of fp32."""
    return h.dtype != torch.float16


def _new(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _new_stats(x: Tensor, row_dims: int, rms: bool) -> Tensor:
    rows = math.prod(x.shape[: x.dim() - row_dims])
    return x.new_empty((1 if rms else 3, rows), dtype=torch.float32)


def norm_fwd(x, row_dims, weight, bias, eps, offset, rms) -> tuple[Tensor, Tensor]:
    y, stats = _new(x), _new_stats(x, row_dims, rms)
    _run(x, None, row_dims, weight, bias, eps, offset, rms, y, None, stats)
    return y, stats


def norm_out(x, row_dims, weight, bias, eps, offset, rms, out) -> None:
    _run(x, None, row_dims, weight, bias, eps, offset, rms, out, None, None)


def add_norm_fwd(
    x, residual, row_dims, weight, bias, eps, offset, rms, sum_dtype
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, stats = _new(x), _new(x, sum_dtype), _new_stats(x, row_dims, rms)
    _run(x, residual, row_dims, weight, bias, eps, offset, rms, y, total, stats)
    return y, total, stats


def add_norm_out(x, residual, row_dims, weight, bias, eps, offset, rms, out, sum_out) -> None:
    _run(x, residual, row_dims, weight, bias, eps, offset, rms, out, sum_out, None)


def aot_cases() -> Iterator[AotCase]:
    strides = [f"{t}{d}" for t in "xrty" for d in range(3)]
    for name, N, dtype, dims, rms, add, affine in (
        ("several_layer", 128, "bf16", 1, False, False, True),
        ("several_add_layer", 768, "bf16", 3, False, True, True),
        ("whole_rms", 4096, "bf16", 1, True, False, True),
        ("whole_add_rms", 8192, "bf16", 1, True, True, True),
        ("whole_longest_add_layer", 16384, "fp32", 1, False, True, True),
        ("looped_layer", 32768, "fp32", 1, False, False, True),
        ("looped_add_rms", 65536, "bf16", 3, True, True, True),
        ("looped_rms_plain", 262144, "fp16", 1, True, False, False),
    ):
        launch = row_launch.norm(N)
        signature = {"x": f"*{dtype}", "y": f"*{dtype}", "stats": "*fp32", "eps": "fp32", "offset": "fp32"}
        signature |= dict.fromkeys(("M", "N", "n1", "n2", *strides), "i32")
        constexprs = {
            "DIMS": dims,
            "RMS": rms,
            "TAME": dtype != "fp16",
            "LOOPED": launch.regime == "looped",
            "WIDE": False,
            "BLOCK_M": launch.BLOCK_M,
            "BLOCK_N": launch.BLOCK_N,
        }
        given = (("residual", add), ("total", add), ("weight", affine), ("bias", affine and not rms))
        for tensor, there in given:
            if there:
                signature[tensor] = "*fp32"
            else:
                constexprs[tensor] = None
        aligned = (n for n in signature if n not in ("eps", "offset", "M", "n1", "n2"))
        yield from row_aot_cases(name, _norm, signature, constexprs, launch, aligned)

"""The last step of a gradient that is a sum over rows: out [rows, N] = the sum of each row's parts [rows, parts, N].

Parts are added a block after another, each number by the same lane, then the block's lanes by one tree: the order
depends on nothing but their count.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from . import row_launch
from .aot_case import AotCase
from .rows import device_of, lanes, row_aot_cases


@triton.jit(do_not_specialize=["count"])
def _add_parts(parts, out, count, N, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    row = (tl.program_id(0) // columns).to(tl.int64)
    o_n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = tl.arange(0, BLOCK_M)
    p_parts = parts + row * count * N
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = count * 0
    while first < count:
        b_ok = (first + o_m < count)[:, None] & (o_n < N)[None, :]
        o_p = (first + o_m).to(tl.int64)[:, None] * N + o_n[None, :]
        b_sum += tl.load(p_parts + o_p, mask=b_ok, other=0)
        first += BLOCK_M
    tl.store(out + row * N + o_n, tl.sum(b_sum, 0), mask=o_n < N)


def add_parts(parts: Tensor, rows: int, count: int, N: int, out: Tensor) -> None:
    """parts: fp32, rows * count * N numbers. out: contiguous, rows * N numbers of any dtype."""
    launch = row_launch.PARTS
    columns = -(-N // launch.BLOCK_N)
    with device_of(out):
        _add_parts[(rows * columns,)](
            parts,
            out,
            count,
            N,
            columns,
            BLOCK_M=launch.BLOCK_M,
            BLOCK_N=launch.BLOCK_N,
            num_warps=launch.warps_of(lanes()),
            num_stages=1,
        )


def aot_cases() -> Iterator[AotCase]:
    launch = row_launch.PARTS
    signature = {"parts": "*fp32", "out": "*bf16", "count": "i32", "N": "i32", "columns": "i32"}
    constexprs = {"BLOCK_M": launch.BLOCK_M, "BLOCK_N": launch.BLOCK_N}
    yield from row_aot_cases("parts", _add_parts, signature, constexprs, launch, ("parts", "out", "N"))

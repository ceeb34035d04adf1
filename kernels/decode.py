"""Attention of few query rows: K and V are cut every DECODE_SPLIT keys, each cut a program of the attention kernel,
and the cuts' states are merged in their order. Where a cut lies depends on nothing but the keys.
"""

from collections.abc import Iterator

import triton
import triton.language as tl

from .aot_case import AotCase
from .online_softmax import LOG2E
from .tiles import store_rows

_INTS = ["out_batch", "out_head", "out_row", "Hq", "heads", "group", "Sq", "n_blocks", "splits"]
# Splits that a step of the merge reads.
CHUNK = 16
WARPS = 4


@triton.jit(do_not_specialize=_INTS)
def merge_kernel(
    partials, out, lse, sinks, out_batch: tl.int64, out_head: tl.int64, out_row: tl.int64,
    Hq: tl.int32, heads: tl.int32, group: tl.int32, Sq: tl.int32, n_blocks: tl.int32, splits: tl.int32,
    keep_scale: tl.float32, unit: tl.float32,
    DV: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One row a program: out and LSE from the states (m, l, DV sums) that its splits left; m in `unit`s of a
    natural logarithm."""
    row = tl.program_id(0).to(tl.int64)
    i_i = row % Sq
    i_h = row // Sq % Hq
    i_b = row // Sq // Hq
    if PACKED:
        r = i_i * group + i_h % group
        plane = i_b * heads + i_h // group
    else:
        r = i_i
        plane = i_b * heads + i_h
    p = partials + ((plane * n_blocks + r // M) * splits * M + r % M) * (DV + 2)
    o_s = tl.arange(0, CHUNK)
    o_d = tl.arange(0, WIDTH)
    m = tl.full([1], float("-inf"), tl.float32)
    for first in tl.range(0, splits, CHUNK):
        o = (first + o_s).to(tl.int64)
        b_m = tl.load(p + o * (M * (DV + 2)), mask=o < splits, other=float("-inf"))
        m = tl.maximum(m, tl.max(b_m, 0))
    pivot = tl.where(m == float("-inf"), 0.0, m)
    l = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, WIDTH], tl.float32)
    for first in tl.range(0, splits, CHUNK):
        o = (first + o_s).to(tl.int64)
        p_s = p + o * (M * (DV + 2))
        b_m = tl.load(p_s, mask=o < splits, other=float("-inf"))
        b_l = tl.load(p_s + 1, mask=o < splits, other=0.0)
        b_w = tl.exp2((b_m - pivot) * (unit * LOG2E))
        b_acc = tl.load(
            p_s[:, None] + 2 + o_d[None, :], mask=(o < splits)[:, None] & (o_d < DV)[None, :], other=0.0
        )
        l += tl.sum(b_l * b_w, 0)
        acc += tl.sum(b_acc * b_w[:, None], 0)[None, :]
    sink = None
    if sinks is not None:
        sink = tl.load(sinks + i_h)
    o_row = row + tl.zeros([1], tl.int64)
    o_out = i_b * out_batch + i_h * out_head + i_i * out_row + tl.zeros([1], tl.int64)
    store_rows(acc, acc, m, l, unit, out, o_out, lse, o_row, l == l, sink, keep_scale, WIDTH, 0, DV)


def merge(
    partials, out, lse, sinks, keep_scale: float, unit: float, plan, n_blocks: int, heads: int, group: int
) -> None:
    """out and lse from what the splits of a plan left in partials."""
    B, Hq, Sq, DV = out.shape
    merge_kernel[(B * Hq * Sq,)](
        partials, out, lse, sinks, *out.stride()[:3], Hq, heads, group, Sq, n_blocks, plan.splits, keep_scale, unit,
        DV=DV, WIDTH=max(16, triton.next_power_of_2(DV)), M=plan.tile.M, CHUNK=CHUNK, PACKED=plan.packed,
        num_warps=WARPS,
    )  # fmt: skip


def aot_cases() -> Iterator[AotCase]:
    for DV in (64, 256):
        signature = {"partials": "*fp32", "out": "*bf16", "lse": "*fp32", "sinks": "*fp32"}
        signature |= {n: "i64" if n.startswith("out_") else "i32" for n in _INTS}
        signature |= {"keep_scale": "fp32", "unit": "fp32"}
        constexprs = dict(DV=DV, WIDTH=DV, M=16, CHUNK=CHUNK, PACKED=True)
        pointers = ("partials", "out", "lse", "sinks")
        yield AotCase(f"merge_d{DV}", merge_kernel, signature, constexprs, WARPS, 3, pointers)

"""What softmax and the norms share: the grid of rows, the offsets of a row, and how a row is cut.

A tensor is a grid of rows: the dimensions that are not the row's own, merged where every tensor allows it, at most
three afterwards. Strides are in elements; a stride of 0 broadcasts. Offsets are 64-bit before any multiply.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot_case import AMD, NVIDIA, AotCase

MAX_DIMS = 3
_NO_DEVICE = nullcontext()


@dataclass(frozen=True)
class RowGrid:
    """sizes: of the dimensions, outermost first. strides: of each tensor, in the order they were given."""

    rows: int
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def dims(self) -> int:
        return max(len(self.sizes), 1)

    def sizes_of_inner(self) -> tuple[int, int]:
        """The sizes of the last two dimensions, which a row's number is divided by."""
        return self._three(self.sizes)[1:]

    def strides_of(self, tensor: int) -> tuple[int, int, int]:
        """Right-aligned; 0 for an absent tensor."""
        return self._three(self.strides[tensor])

    @staticmethod
    def _three(numbers: tuple[int, ...]) -> tuple[int, int, int]:
        return (*(0,) * (MAX_DIMS - len(numbers)), *numbers)


def row_grid(
    shape: Sequence[int],
    row: range,
    tensors: Sequence[Tensor | None],
    keep_last: bool = False,
    leader: Tensor | None = None,
) -> RowGrid:
    """The grid of all dimensions of `shape` but those in `row`, for tensors right-aligned with it.

    keep_last: the last dimension stays apart. leader: the dimensions that it spans come first, those that it broadcasts
    over last. More than MAX_DIMS dimensions may be left.
    """
    rank = len(shape)
    outer = [d for d in range(rank) if d not in row]
    last = outer[-1] if keep_last else None
    if leader is not None:
        outer.sort(key=lambda d: not (d >= rank - leader.dim() and leader.shape[d - rank] > 1))

    def stride(t: Tensor | None, d: int) -> int:
        if t is None or d < rank - t.dim() or t.shape[d - rank] == 1:
            return 0
        return t.stride(d - rank)

    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    rows = 1
    for d in outer:
        size = shape[d]
        rows *= size
        if size == 1 and d != last:
            continue
        here = [stride(t, d) for t in tensors]
        if sizes and d != last and all(s[-1] == h * size for s, h in zip(strides, here)):
            sizes[-1] *= size
            for s, h in zip(strides, here):
                s[-1] = h
            continue
        sizes.append(size)
        for s, h in zip(strides, here):
            s.append(h)
    return RowGrid(rows, tuple(sizes), tuple(tuple(s) for s in strides))


@triton.jit
def row_offset(o_m, n1, n2, s0, s1, s2, DIMS: tl.constexpr):
    """Where rows o_m [BLOCK_M] of a tensor begin."""
    if DIMS == 1:
        return o_m.to(tl.int64) * s2
    inner = (o_m % n2).to(tl.int64) * s2
    o_m = o_m // n2
    if DIMS == 2:
        return inner + o_m.to(tl.int64) * s1
    return inner + (o_m % n1).to(tl.int64) * s1 + (o_m // n1).to(tl.int64) * s0


@triton.jit
def block_rows(block, BLOCK_M: tl.constexpr, WIDE: tl.constexpr):
    """The rows [BLOCK_M] of a block. WIDE: their numbers need 64 bits."""
    if WIDE:
        block = tl.cast(block, tl.int64)
    return block * BLOCK_M + tl.arange(0, BLOCK_M)


def is_wide(rows: int) -> bool:
    # A block may begin up to a block's rows before the limit.
    return rows >= 2**31 - 2**16


def blocks(rows: int, block: int) -> int:
    """How many blocks cover the rows. Raises ValueError where a grid cannot hold them."""
    count = -(-rows // block)
    if count >= 2**31:
        raise ValueError(f"{rows} rows in blocks of {block} are more than a grid holds, 2^31 - 1")
    return count


def contiguous_rows(t: Tensor, row_dims: int) -> Tensor:
    """t, or a copy whose last dimensions are one run of elements."""
    expected = 1
    for size, stride in zip(reversed(t.shape[-row_dims:]), reversed(t.stride()[-row_dims:])):
        if size != 1 and stride != expected:
            return t.contiguous()
        expected *= size
    return t


def device_of(t: Tensor):
    """Makes t's device current for a launch; nothing on the CPU, where the interpreter runs."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else _NO_DEVICE


def lanes() -> int:
    return 64 if torch.version.hip else 32


def row_aot_cases(name, fn, signature, constexprs, launch, divisible_by_16) -> Iterator[AotCase]:
    """A case for NVIDIA's warps and one for AMD's."""
    for width, targets in ((32, NVIDIA), (64, AMD)):
        warps = launch.warps_of(width)
        yield AotCase(name, fn, signature, constexprs, warps, 1, tuple(divisible_by_16), targets=targets)

"""How rows are cut into programs: the launch table of softmax and the norms.

Three regimes. "several": short rows, many to a program. "whole": a row lies in the registers of one program and is
read once. "looped": a longer row passes through the registers in chunks; its last chunk stays there, the others are
read again from the L2 cache. What is launched depends on the row's length and dtypes alone, never on how many rows
there are: a row's bits do not know their batch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowLaunch:
    """BLOCK_M rows of BLOCK_N columns a program and step. groups: programs that share all rows between them, each
    with sums of its own; 0 where every block of rows has a program."""

    regime: str
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    groups: int = 0

    def warps_of(self, lanes: int) -> int:
        """num_warps is for warps of 32 lanes; AMD's have 64."""
        return max(1, self.num_warps * 32 // lanes)

    def __str__(self) -> str:
        tile = f"{self.BLOCK_M} x {self.BLOCK_N}, {self.num_warps} warps"
        return f"{self.regime} rows, {tile}" + (f", {self.groups} groups" if self.groups else "")


# A warp of 32 lanes with 16 numbers each: 32 bytes in half precision, two whole 16-byte accesses a lane.
_LANE_NUMBERS = 16
# One number of the row a register, next to addresses and temporaries, at the 64 registers that 1024 threads have.
_FORWARD_MOST = 32768
# Chunks of a longer row: addresses of the loop beside them.
_FORWARD_CHUNK = 16384
# Backward of a norm: h, dy, weight, and two sums, of which 16 each fill the 128 registers that 512 threads have.
_BACKWARD_MOST = 8192
# Softmax backward holds y and dy.
_SOFTMAX_BACKWARD_MOST = 16384
# Numbers in a program's tile of short rows: four warps, so that many programs share a processor and hide its waits.
_SEVERAL = 2048
# Rows of a tile whose columns lie apart: a warp reads 32 neighbouring rows of a column.
_STRIDED_ROWS = 32
# Each of its numbers has an address of its own, two registers more.
STRIDED_MOST = 256


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _warps(numbers: int, a_lane: int = _LANE_NUMBERS) -> int:
    """At most 1024 threads to a program."""
    return max(1, min(32, numbers // (32 * a_lane)))


def _launch(
    N: int, longest: int, chunk: int, tile: int = _SEVERAL, groups: int = 0, a_lane: int = _LANE_NUMBERS
) -> RowLaunch:
    """a_lane: numbers to a lane in a chunk of a looped row."""
    if longest < N:
        return RowLaunch("looped", 1, chunk, _warps(chunk, a_lane))
    width = _power(N)
    if 2 * width <= tile:
        return RowLaunch("several", tile // width, width, _warps(tile), groups)
    return RowLaunch("whole", 1, width, _warps(width), groups)


def _strided(N: int) -> RowLaunch:
    width = _power(N)
    rows = max(_STRIDED_ROWS, _SEVERAL // width)
    return RowLaunch("several", rows, width, _warps(rows * width))


def softmax(N: int, plain: bool, strided: bool) -> RowLaunch:
    """plain: neither mask nor bias, which take registers as x does. strided: columns lie apart; N <= STRIDED_MOST."""
    if strided:
        return _strided(N)
    if plain:
        return _launch(N, _FORWARD_MOST, _FORWARD_CHUNK)
    return _launch(N, _FORWARD_MOST // 4, _FORWARD_CHUNK // 4, a_lane=_LANE_NUMBERS // 2)


def softmax_backward(N: int, strided: bool) -> RowLaunch:
    return _strided(N) if strided else _launch(N, _SOFTMAX_BACKWARD_MOST, _FORWARD_CHUNK // 2)


def norm(N: int) -> RowLaunch:
    return _launch(N, _FORWARD_MOST // 2, _FORWARD_CHUNK // 2)


def norm_backward(N: int, sums: bool) -> RowLaunch:
    """sums: gradients of weight or bias are wanted. Short rows then belong to groups, each with sums of its own, and
    long ones are summed by a second kernel. Two programs of 4096 numbers fit a processor of a GPU with 132 of them,
    one of 8192; twice the groups would be twice the sums to write and read again."""
    groups = (128 if N > 4096 else 256) if sums else 0
    return _launch(N, _BACKWARD_MOST, _BACKWARD_MOST, tile=2 * _SEVERAL, groups=groups)


@dataclass(frozen=True)
class ColumnLaunch(RowLaunch):
    """Sums over rows: BLOCK_N columns a program, BLOCK_M rows a step, `groups` shares of the rows."""


# 512 bytes of half precision to a row, whole lines of memory; many programs for a long row, so few groups will do.
COLUMNS = ColumnLaunch("columns", 16, 256, 8, 16)
# The last sum, over the groups: few numbers, so small tiles that give many programs.
PARTS = ColumnLaunch("parts", 32, 64, 4)

"""A call's tensors and numbers as the attention kernels take them, for the launchers of both directions."""

from __future__ import annotations

import torch


def refuse_caches(*given: torch.Tensor | None) -> None:
    """Raises where block_table, kv_lengths, k_scale or v_scale is given: no kernel here reads them."""
    for name, t in zip(("block_table", "kv_lengths", "k_scale", "v_scale"), given, strict=True):
        if t is not None:
            raise ValueError(
                f"fastattn: {name} is not served by the Triton kernels: no paged or quantised caches"
            )


def strides_of(t: torch.Tensor | None, sizes: tuple[int, ...]) -> list[int]:
    """Strides in elements, 0 along the dimensions that broadcast."""
    if t is None:
        return [0] * len(sizes)
    return [0 if t.shape[d] == 1 and size != 1 else t.stride(d) for d, size in enumerate(sizes)]


def columns_adjacent(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(3) == 1 or t.shape[3] <= 1 else t.contiguous()


def precision() -> str:
    """Products of float32: IEEE, or TF32 where torch's own flag allows it."""
    # Not allow_tf32, which raises where somebody has set this one.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def dropout_scalars(p: float) -> tuple[int, float]:
    """The threshold of kept words, its 32 bits as a signed number, and the factor on what is kept."""
    threshold = min(int(p * 2**32), 2**32 - 1)
    return threshold - 2**32 if threshold >= 2**31 else threshold, 1.0 / (1.0 - p)


def clamp_band(band: int | None, unlimited: int, length: int) -> int:
    """A band's scalar as 32 bits; past `length` rows or keys all numbers mean the same."""
    return unlimited if band is None else max(-length, min(length, band))


def in_units(*tensors: torch.Tensor) -> tuple[int, list[int]]:
    """(unit, the strides of batch, head and row of each tensor in it): 16 bytes of the first's dtype, or 1 element."""
    strides = [s for t in tensors for s in t.stride()[:3]]
    unit = 16 // tensors[0].element_size()
    if any(s % unit for s in strides):
        unit = 1
    return unit, [s // unit for s in strides]

"""The rows measured on a GPU. Floors are those of an H200 in bfloat16: shares of the best of torch's SDPA backends,
multiples of compiled flex_attention, and shares of the copy rate measured in the same run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from .families import AttentionShape
from .workloads import CEILING, Limit, RowShape, Workload, default_spelling

SDPA = ("sdpa cudnn", "sdpa flash", "sdpa efficient")
# The other of our own backends: what these rows show of it decides which one comes first.
CUDA = "ours in CUDA C++"
# Tokens a call, whatever the length: enough programs to fill the chip.
_TOKENS = 16384


def _shape(length: int, size: int) -> AttentionShape:
    return AttentionShape(max(1, _TOKENS // length), 2048 // size, length, size)


def attention() -> Iterator[Workload]:
    """Forward, and forward and backward, beside each of SDPA's backends: the floor over all is that over the best."""
    for training, floor in ((False, 0.6), (True, 0.45)):
        for size in (64, 128):
            for length in (2048, 4096, 8192, 16384):
                for mask in ("none", "causal"):
                    yield Workload(
                        "gpu-attention",
                        "attention",
                        "bf16",
                        _shape(length, size),
                        mask,
                        "flag",
                        training=training,
                        limits=tuple(Limit(name, floor) for name in SDPA),
                        quick=length == 4096,
                        beside=(*SDPA, CUDA),
                    )


def masks() -> Iterator[Workload]:
    """Documents, windows and boolean tensors beside compiled flex_attention and SDPA with the tensor."""
    flex = (Limit("flex_attention", 1.2),)
    for training in (False, True):
        for size in (64, 128):
            for mask in ("documents9", "window1024", "blocks10"):
                spelling = "bool" if mask == "blocks10" else default_spelling(mask)
                sparse = mask != "window1024"  # about a tenth is visible
                yield Workload(
                    "gpu-masks",
                    "attention",
                    "bf16",
                    AttentionShape(1, 2048 // size, 8192, size),
                    mask,
                    spelling,
                    training=training,
                    limits=flex + ((Limit("torch", 10.0),) if sparse else ()),
                    quick=size == 128 and not training,
                    beside=("flex_attention", CUDA),
                )
    for mask in ("causal", "documents9"):
        shape = AttentionShape(1, 16, 8192, 128)
        yield Workload("gpu-masks", "attention", "bf16", shape, mask, "bool", ("spelling",), beside=("none",))


def decode() -> Iterator[Workload]:
    """One query row over a long cache: memory bounds it."""
    for batch, length, size in ((32, 8192, 128), (8, 32768, 128), (1, 131072, 128), (32, 8192, 64)):
        shape = AttentionShape(batch, 32, 1, size, hkv=8, sk=length)
        yield Workload(
            "gpu-decode",
            "attention",
            "bf16",
            shape,
            "none",
            "flag",
            ("decode",),
            limits=(Limit(CEILING, 0.8),),
            quick=length == 8192,
            beside=(*SDPA, CUDA),
        )


def rows() -> Iterator[Workload]:
    """256 MB and more a call, past the last-level cache; widths up to 262144, where no cliff may be."""
    for op in ("softmax", "layer_norm", "rms_norm", "add_rms_norm"):
        for width in (1024, 4096, 16384, 32768, 65536, 131072, 262144):
            for training in (False, True):
                shape = RowShape((1 << 27) // width, width)
                limits = (Limit(CEILING, 0.9),) if width >= 4096 else ()
                row = Workload("gpu-rows", op, "bf16", shape, training=training, limits=limits)
                yield dataclasses.replace(row, quick=width in (4096, 65536), beside=("liger", "quack", CUDA))

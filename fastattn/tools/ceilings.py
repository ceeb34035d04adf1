"""What this machine can do at most, measured in the same run as the numbers that are printed as shares of it.

Arithmetic ceilings are register loops of fused multiply-adds, bf16 dot products or bf16 tile products;
memory ceilings read or copy a working set of the size in question, through the caches or past them. All
threads of the current thread count run at once, on random data (`csrc/cpu/ceilings.h`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

# On tiles attention splits an fp16 number into two bf16: four products for one of scores and of their gradients, three
# of the other two and three of these.
_FP16_FORWARD, _FP16_TRAINING = (4 + 3) / 2, (4 + 3 + 2 * 4 + 3 * 3) / 7
# What bounds a dtype's arithmetic: the loops that could do it, with how many of their operations one of the dtype's
# takes. The best on the chosen instruction set counts.
ARITHMETIC = {
    "fp32": {"fma_f32": 1},
    "bf16": {"tile_bf16": 1, "dot_bf16": 1, "fma_f32": 1},
    "fp16": {"tile_bf16": _FP16_FORWARD, "fma_f32": 1},
    "fp16-training": {"tile_bf16": _FP16_TRAINING, "fma_f32": 1},
    "fp64": {"fma_f32": 1},
}
MEMORY = {"read": ("read",), "copy": ("copy", "copy_stream")}

# On a GPU: its matrix products, and copies from memory to memory.
GPU_ARITHMETIC = {name: {f"matmul_{name.split('-')[0]}": 1} for name in ARITHMETIC}
GPU_MEMORY = {"read": ("copy",), "copy": ("copy",)}

# A working set beyond any cache; larger ones cost time to fill and change nothing.
LARGEST_SET = 1 << 29


def measure_gpu(kind: str, seconds: float, bytes: int) -> float:
    """FLOP/s of matrix products of 8192 in a dtype, or the bytes/s that a copy of 1 GiB reads and writes, on the
    current CUDA device. Timed by events, on random data."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    if kind == "copy":
        source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        work, call = 2.0 * source.numel(), lambda: target.copy_(source)
    else:
        size = 8192 if kind in ("matmul_bf16", "matmul_fp16") else 4096
        a, b = (torch.randn(size, size, device="cuda").to(dtypes[kind.removeprefix("matmul_")]) for _ in "ab")
        work, call = 2.0 * size**3, lambda: a @ b
    for _ in range(3):
        call()
    best, spent = 0.0, 0.0
    while spent < seconds:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        start.record()
        for _ in range(10):
            call()
        end.record()
        end.synchronize()
        elapsed = start.elapsed_time(end) / 1e3
        best, spent = max(best, 10 * work / elapsed), spent + elapsed
    return best


# Another process may have slowed a measurement: it is repeated this often, and the best one counts.
SECONDS_BETWEEN = 10.0


class Ceilings:
    """Ceilings of one device at the current thread count, measured when asked for; the best of a run counts.

    measure: (kind, seconds, bytes) -> FLOP/s or bytes/s, 0 where the machine has no such instruction; by
    default the compiled op on the CPU and `measure_gpu` on a CUDA device that is there; else there are no ceilings.
    """

    def __init__(self, device: str = "cpu", measure: Callable[[str, float, int], float] | None = None):
        if measure is None and device == "cpu":
            measure = getattr(torch.ops.fastattn, "measure_ceiling", None)
        self._gpu = device.startswith("cuda")
        if measure is None and self._gpu and torch.cuda.is_available():
            measure = measure_gpu
        self._measure = measure
        self._rates: dict[tuple[str, int], float] = {}
        self._when: dict[tuple[str, int], float] = {}

    def rate(self, ceiling: str, bytes: float | None = None) -> float | None:
        """FLOP/s of what `ARITHMETIC` names, or bytes/s of "read" or "copy" over a working set of `bytes`.

        A copy's bytes are those read plus those written. None where it cannot be measured.
        """
        if self._measure is None:
            return None
        arithmetic, memory = (GPU_ARITHMETIC, GPU_MEMORY) if self._gpu else (ARITHMETIC, MEMORY)
        if ceiling in arithmetic:
            kinds = arithmetic[ceiling].items()
            return max(self._kind(kind, 0) / operations for kind, operations in kinds) or None
        # Rounded up to a power of two: neighbours share a measurement.
        size = min(1 << max(14, (int(bytes or LARGEST_SET) - 1).bit_length()), LARGEST_SET)
        return max(self._kind(kind, 0 if self._gpu else size) for kind in memory[ceiling]) or None

    def _kind(self, kind: str, size: int) -> float:
        key = kind, size
        if time.monotonic() - self._when.get(key, -SECONDS_BETWEEN) >= SECONDS_BETWEEN:
            self._rates[key] = max(self._rates.get(key, 0.0), float(self._measure(kind, 0.1, size)))
            self._when[key] = time.monotonic()
        return self._rates[key]

    def measured(self) -> list[dict[str, Any]]:
        """Every ceiling measured so far, for the JSON."""
        return [
            {"kind": kind, "bytes": size or None, "rate": rate}
            for (kind, size), rate in self._rates.items()
            if rate
        ]

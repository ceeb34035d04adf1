"""Tiles by the clock, for who asks: FASTATTN_TUNE=1 in the environment. Off by default.

The launch table's tiles depend on nothing but shapes, dtype and architecture, so that results never do either. With
tuning the first call of a kind times the table's tile and its neighbours, on its own tensors, and the fastest serves
that kind for as long as the process lives. Tiles differ in the order of their sums: another process may choose another
and differ in the last bits. While a CUDA graph is captured nothing can be timed; the table serves until it can.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch

# Launches timed of each tile, after one that compiles it.
REPEATS = 5

_chosen: dict[Hashable, Any] = {}


def wanted() -> bool:
    return os.environ.get("FASTATTN_TUNE", "0").lower() in ("1", "true", "on", "yes", "y")


def chosen(kind: Hashable) -> Any | None:
    """The tile that was the fastest for calls of a kind, or None where none was timed yet."""
    return _chosen.get(kind)


def forget() -> None:
    """Calls are timed anew."""
    _chosen.clear()


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """What one launch takes: the median of some, after one that does not count."""
    run()
    times = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def best(kind: Hashable, tiles: Sequence[Any], run: Callable[[Any], None], device: torch.device) -> Any:
    """The tile that serves calls of a kind: the fastest of `tiles` by run(tile), or the first where none can be timed.

    A tile that does not compile or fit is left out; what the first one raises, the table's, is raised.
    """
    from triton.errors import TritonError

    if kind in _chosen:
        return _chosen[kind]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return tiles[0]
    times = {}
    for tile in tiles:
        try:
            times[tile] = seconds(partial(run, tile), device)
        except (TritonError, RuntimeError):  # the latter where a pass of the compiler fails
            if tile == tiles[0]:
                raise
            times[tile] = math.inf
    _chosen[kind] = min(tiles, key=times.__getitem__)
    return _chosen[kind]


def explain(kind: Hashable, tiles: Sequence[Any]) -> str:
    """For people: what tuning did for calls of a kind, or would do."""
    if kind in _chosen:
        return f"the fastest of {len(tiles)} timed (FASTATTN_TUNE)"
    return f"to be timed beside {len(tiles) - 1} others by the first call (FASTATTN_TUNE)"

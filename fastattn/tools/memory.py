"""Peak memory of one call beyond its inputs, measured in a process of its own.

The process builds the inputs, sets the kernel's record of its peak back, calls once and reads the record: resident
memory that the call needed on top of what was there, its result included. One thread, because each has scratch of
its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import cases, workloads
from .workloads import Workload

COLUMNS = ("row", "ours", "torch", "torch / ours", "limit")
MEBIBYTE = 1 << 20

# What building a mask of 131072 x 131072 may take: a square of bits would be 2 GiB.
LONG_MASK = 64 * MEBIBYTE


def measure(row: Workload) -> dict[str, Any]:
    """Peaks in bytes of our side and torch's, each None where it cannot run, with the reason under "why"."""
    result: dict[str, Any] = {"suite": row.suite, "name": row.name, "why": {}}
    for side in ("ours", "torch"):
        command = [sys.executable, "-m", __name__, row.suite, row.name, side]
        # Blocks from this size on are mapped one by one: memory freed before the call cannot serve it unseen.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        answer = json.loads(done.stdout) if done.returncode == 0 else {"why": _last_line(done.stderr)}
        result[side] = answer.get("peak")
        if "why" in answer:
            result["why"][side] = answer["why"]
    result["limit"] = LONG_MASK if "long" in row.features else None
    known = result["limit"] is not None and result["ours"] is not None
    result["met"] = result["ours"] <= result["limit"] if known else None
    return result


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it ended without a word"])[-1]


def cells(result: dict[str, Any]) -> tuple[str, ...]:
    """One result as the cells of COLUMNS."""

    def size(value):
        return "-" if value is None else f"{value / MEBIBYTE:.1f} MiB"

    ours, theirs = result["ours"], result["torch"]
    ratio = f"{theirs / ours:.1f}" if ours and theirs else "-"
    verdict = {True: " ok", False: " MISSED", None: ""}[result["met"]]
    return result["name"], size(ours), size(theirs), ratio, size(result["limit"]) + verdict


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _peak_of(suite: str, name: str, side: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    row = next(row for row in workloads.SUITES[suite].rows if row.name == name)
    try:
        case = cases.build(row)
    except cases.NotAvailable as reason:
        return {"why": str(reason)}
    if side not in case.variants:
        return {"why": "it has no such operation"}
    # Modules that the first call imports, and code that it maps, are not the call's memory.
    warm = torch.randn(1, 1, 8, 16)
    torch.nn.functional.scaled_dot_product_attention(warm, warm, warm)
    cases.library("attention")(warm, warm, warm)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    with torch.set_grad_enabled(row.training):
        kept = case.variants[side]()
    peak = _status("VmHWM") - before
    del kept
    return {"peak": peak}


if __name__ == "__main__":
    try:
        answer = _peak_of(*sys.argv[1:])
    except Exception as error:
        answer = {"why": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    print(json.dumps(answer))

"""Print what a bug report needs: processor features, instruction set and why it was chosen, threads, build,
versions, GPU and Triton if any.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from typing import Any

import torch

import fastattn

from . import machine

OPTIONAL = (
    "numpy",
    "transformers",
    "rich",
    "matplotlib",
    "pytest-benchmark",
    "flash-attn",
    "xformers",
    "liger-kernel",
)
VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "MKL_NUM_THREADS",
    "MKL_ENABLE_INSTRUCTIONS",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "LD_PRELOAD",
    "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=1, sort_keys=True))
        return 0
    for section, values in facts.items():
        print(section)
        for name, value in values.items():
            print(f"  {name + ':':<20} {_text(value)}")
    return 0


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value) or "none"
    return "no" if value in (None, False) else "yes" if value is True else str(value)


def collect() -> dict[str, dict[str, Any]]:
    """Every fact, by section; all JSON values."""
    return {
        "fastattn": _fastattn(),
        "processor": _processor(),
        "torch": _torch(),
        "GPU": _gpu(),
        "system": {
            "python": sys.version.replace("\n", " "),
            "platform": platform.platform(),
            "variables": {
                name: value
                for name, value in sorted(os.environ.items())
                if name in VARIABLES or name.startswith("FASTATTN_")
            },
            "packages": {name: found for name in OPTIONAL if (found := machine.version(name))},
        },
    }


def _fastattn() -> dict[str, Any]:
    facts: dict[str, Any] = {"version": fastattn.__version__, "revision": machine.revision()}
    info = machine.introspection()
    if info is None:
        return facts | {
            "compiled part": "missing: build it with `pip install .` or `python setup.py build_ext --inplace`"
        }
    facts |= {
        "instruction set": info.isa(),
        "why": info.isa_reason(),
        "available": list(info.available_isas()),
    }
    missing = info.missing_for()
    if missing:
        facts["not available"] = {name: f"(lacks {what})" for name, what in missing.items()}
    return facts | {f"build {name}": value for name, value in info.build_info().items()}


def _processor() -> dict[str, Any]:
    info = machine.introspection()
    features = dict(info.cpu_features()) if info else {}
    return {
        "model": machine.cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "features": sorted(name for name, present in features.items() if present),
        "absent features": sorted(name for name, present in features.items() if not present),
    }


def _torch() -> dict[str, Any]:
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "inter-op threads": torch.get_num_interop_threads(),
        "memory kept for results": f"up to {torch.ops.fastattn._result_memory()[2] >> 20} MB (FASTATTN_KEEP_MB)",
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "parallel backend": _parallel_backend(),
        "CUDA": torch.version.cuda,
        "ROCm": torch.version.hip,
    }


def _parallel_backend() -> str | None:
    for line in torch.__config__.parallel_info().splitlines():
        if line.startswith("ATen parallel backend:"):
            return line.split(":", 1)[1].strip()
    return None


def _gpu() -> dict[str, Any]:
    facts: dict[str, Any] = {"triton": machine.triton_version()}
    if not torch.cuda.is_available():
        return {"devices": None, **facts}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts[f"device {index}"] = {
            properties.name: "",
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "multiprocessors": properties.multi_processor_count,
        }
    return facts

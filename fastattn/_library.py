"""Loads the op library and says, where it cannot, which torch met which build."""

from __future__ import annotations

import os
from pathlib import Path

import torch

try:
    from . import _info
except ImportError as error:
    raise ImportError(
        "fastattn is not built for this Python: its module fastattn._info does not load "
        f"({error}). Install it with `pip install .`, or `make build-inplace` in a checkout."
    ) from error

_OPS = Path(__file__).with_name("_ops.so")


def _load() -> None:
    if not _OPS.exists():
        raise ImportError(
            f"fastattn is not built: {_OPS} is missing. `pip install .`, or `make build-inplace`."
        )
    _info.isa()  # a FASTATTN_ISA that names nothing this machine runs fails here, with what it may be
    keep = os.environ.get("FASTATTN_KEEP_MB", "0")
    if not keep.isdecimal():
        raise ImportError(f"FASTATTN_KEEP_MB must be a whole number of megabytes, 0 or more, got {keep!r}")
    try:
        torch.ops.load_library(str(_OPS))
    except OSError as error:
        raise ImportError(
            f"the op library of fastattn does not load: it was built with the headers of torch "
            f"{_info.build_info()['torch_headers']} for torch 2.11 and newer, this is torch {torch.__version__} "
            f"({error})"
        ) from error


_load()


def force_isa(name: str) -> None:
    """Runs another instruction set from the next call on; for tests and comparisons.

    Raises RuntimeError naming those this machine supports.
    """
    torch.ops.fastattn._set_isa(name)

"""The CUDA library on CPU tensors: torch.ops.fastattn_cuda through its own bindings, with the kernels on the twin."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch

from fastattn import _cuda_library, ops, transforms

from . import build

TORCH = Path(torch.__file__).parent


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """Builds and loads tests/twin/cuda_ops.cpp; registers the ops."""
    include = [f"-isystem{TORCH / 'include' / folder}" for folder in (".", "torch/csrc/api/include")]
    link = (f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10")
    library = build.library(
        "cuda_ops.cpp", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", *include, link=link
    )
    library.launched.restype = ctypes.c_char_p
    return library


@lru_cache(maxsize=1)
def _attention() -> ops.Ops:
    load()
    attention = ops.Ops(_cuda_library.NAMESPACE)
    transforms.register(attention)
    return attention


def serve_attention(monkeypatch) -> None:
    """backend="cuda" takes attention on CPU tensors, down to the kernels, until the test ends."""
    monkeypatch.setitem(ops.OPS, "cuda", _attention())
    monkeypatch.setattr(_cuda_library, "refuse", lambda name, device: None)
    monkeypatch.setattr(_cuda_library, "shared_kib", lambda device: 227)


def run(seed: int, function, *arguments):
    """(result, names of the kernels that ran) of an op under a schedule."""
    library = load()
    library.set_seed(ctypes.c_uint64(seed))
    result = function(*arguments)
    return result, library.launched().decode().split("\n")[:-1]

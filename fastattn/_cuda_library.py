"""The CUDA library `fastattn/_cuda.so` and its op namespace `fastattn_cuda`: loaded on a CUDA torch only, and where it
is left out, why.

It is a library of its own because the CPU's must load on every torch, and this one needs what only a CUDA torch has.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from . import _library  # noqa: F401  the CPU library comes first

NAMESPACE = "fastattn_cuda"
PATH = Path(__file__).with_name("_cuda.so")

# The ops that a committed measurement shows ahead of Triton's kernel on the same card. None is measured yet, so Triton
# comes first wherever it can run, and backend="cuda" asks for these kernels.
AHEAD_OF_TRITON: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Library:
    """A library as it was built, and the newest CUDA that the driver runs.

    cuda, driver: 13000 for 13.0. archs: as in FASTATTN_CUDA_ARCHS, "80" or "90a".
    """

    cuda: int
    archs: tuple[str, ...]
    driver: int = field(compare=False)

    def refuse(self, major: int, minor: int) -> str | None:
        """Why there is no code for a card of this compute capability, or None."""
        for arch in self.archs:
            number, special = re.fullmatch(r"(\d+)([af]?)", arch).groups()
            built = int(number[:-1]), int(number[-1])
            # Plain code runs on later minor versions; a suffix ties it to its card, or to the cards of its family.
            if (major, minor) == built or (special != "a" and major == built[0] and minor > built[1]):
                return None
        # The highest plain architecture left its PTX, which the driver compiles for any later card.
        plain = [int(arch) for arch in self.archs if arch.isdigit()]
        if plain and major * 10 + minor > max(plain):
            if self.driver >= self.cuda:
                return None
            return (
                f"this card is sm_{major}{minor}, for which the driver would have to compile PTX of CUDA "
                f"{_version(self.cuda)}, and it knows CUDA up to {_version(self.driver)}: update the driver, or build "
                f"the library with FASTATTN_CUDA_ARCHS={major}{minor}"
            )
        return (
            f"the CUDA library has code for {', '.join('sm_' + a for a in self.archs)}, this card is "
            f"sm_{major}{minor}; FASTATTN_CUDA_ARCHS at build time adds it"
        )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _load() -> Library | str:
    """The library, registered with torch, or why it is left out."""
    if torch.version.hip is not None:
        return "the CUDA library is for NVIDIA's cards, this torch is built for ROCm"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not PATH.exists():
        return "the CUDA library is not built: install with FASTATTN_CUDA=1 on a machine with nvcc"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        return f"the CUDA library does not load ({error})"
    ops = torch.ops.fastattn_cuda
    built, driver = ops._built_for(), ops._driver()
    if driver == 0:
        return "there is no NVIDIA driver"
    # Within a major version an older driver runs what a newer toolkit has built.
    if driver // 1000 < built // 1000:
        return (
            f"the CUDA library is built with CUDA {_version(built)}, the driver runs up to {_version(driver)}: update "
            f"the driver, or build the library with an older toolkit"
        )
    return Library(built, tuple(ops._architectures().split()), driver)


LIBRARY = _load()


def loaded() -> bool:
    """Whether torch.ops.fastattn_cuda has its kernels."""
    return isinstance(LIBRARY, Library)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# What torch.compiler.assume_constant_result sets, without importing the compiler for it.
_capability._dynamo_marked_constant = True


def refuse(name: str, device: torch.device) -> str | None:
    """Why no CUDA C++ kernel runs on tensor `name` of this device, or None."""
    if device.type != "cuda":
        return f"{name} is on {device.type}, not on a CUDA or ROCm device"
    if isinstance(LIBRARY, str):
        return LIBRARY
    return LIBRARY.refuse(*_capability(device))


def prefer_triton(op: str) -> str | None:
    """Why Triton's kernel of an op, which can run, comes first; None where this library's does."""
    if op in AHEAD_OF_TRITON:
        return None
    return (
        f'no committed measurement shows the CUDA kernel of {op} ahead of Triton\'s; backend="cuda" runs it'
    )


@cache
def shared_kib(device: torch.device) -> int:
    """KiB of shared memory that one block of a card can ask for."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024


shared_kib._dynamo_marked_constant = True

"""Dropout of activations in training on the CPU, with a fourth of torch's random numbers.

torch draws one number an element, one after the other: at a Transformer's widths that takes as long as a quarter of the
matrix products. Here a 64-bit number of the same generator decides four elements, 16 bits each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .watching import watched

# 16 bits hold a probability to 2^-17; below this that would be no longer a small part of it.
_LEAST = 1e-2


def dropped(module: torch.nn.Module, x: Tensor) -> Tensor:
    """`module(x)` of a Dropout, or of what stands in its place, drawn the faster way where nobody can tell."""
    if type(module) is not torch.nn.Dropout:
        return module(x)
    if not module.training or module.p == 0.0:
        return x if not watched(module) else module(x)
    if watched(module) or module.inplace or not _LEAST <= module.p < 1.0 or not _serves(x):
        return module(x)
    return x * keep_factors(x, module.p)


def _serves(x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.is_cpu
        and not x.is_nested
        and x.is_floating_point()
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def keep_factors(x: Tensor, p: float) -> Tensor:
    """0 where an element is dropped, else 1 / (the probability that it is kept), in x's shape and dtype."""
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    cut = round(p * 65536)
    keep = words.view(torch.int16)[: x.numel()] >= cut - 32768
    return keep.to(x.dtype).mul_(65536 / (65536 - cut)).view(x.shape)

"""Linear layers of inference on the CPU, with the activation in the product.

bf16 goes to oneDNN, whose activation saves a pass over the result. float32 goes to fastattn's kernel where the kernels
are those of AMX: of BERT's four products it ran 206 to 239 GFLOP/s with 512 rows, one thread, where torch's own path,
MKL, ran 150 to 158, and 175 to 222 with 128 rows, where MKL ran 134 to 138. Elsewhere float32 goes to oneDNN: on
AVX-512 machines that are not Intel's MKL runs at 80 % of its speed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops  # noqa: F401  the op library has to be loaded first
from .watching import watched

_own = torch.ops.fastattn.linear_fwd.default
_onednn = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
# Below this many rows packing costs more than the better product saves.
_LEAST_ROWS = 64
# fastattn's kernel serves this many inputs and outputs or more: with 64 rows it was as fast as MKL at 128 x 128 and
# 13 % faster at 256 x 256; smaller ones were not compared.
_LEAST_WIDTH = 256


def _serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.compiler.is_compiling():
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if any(type(t) not in _PLAIN or not t.is_cpu for t in tensors) or x.is_nested or x.dim() < 2:
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    if x.dtype not in (torch.float32, torch.bfloat16) or any(t.dtype != x.dtype for t in tensors[1:]):
        return False
    if torch.is_autocast_enabled("cpu") or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch.autograd.forward_ad._current_level >= 0 or x.shape[-1] != weight.shape[-1]:
        return False
    return (
        x.numel() >= _LEAST_ROWS * x.shape[-1] > 0
        and weight.shape[0] > 0
        and not torch.overrides._get_current_function_mode_stack()
    )


def _is_faster(weight: Tensor) -> bool:
    """Whether fastattn's kernel was measured to be faster than oneDNN's, which may be allowed to round to bf16."""
    return (
        weight.dtype == torch.float32
        and min(weight.shape) >= _LEAST_WIDTH
        and torch.ops.fastattn._isa() == "amx"
        and torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """`F.linear`, then "none", "relu" or "gelu" (exact)."""
    if _serves(x, weight, bias):
        if _is_faster(weight):
            return _own(x, weight, bias, activation)
        if _onednn is not None and torch.backends.mkldnn.enabled:
            # An empty algorithm name is relu's; gelu's "none" is the exact one.
            return _onednn(x, weight, bias, activation, [], "none" if activation == "gelu" else "")
    y = F.linear(x, weight, bias)
    return y if activation == "none" else (F.relu if activation == "relu" else F.gelu)(y)


def is_plain(module: torch.nn.Module) -> bool:
    """Whether a Linear is torch's own, and nobody sees whether its forward was called."""
    return type(module).forward is torch.nn.Linear.forward and not watched(module)


def apply(module: torch.nn.Module, x: Tensor, activation: str = "none") -> Tensor:
    """A Linear module, or what stands in its place, and the activation."""
    if is_plain(module):
        return linear(x, module.weight, module.bias, activation)
    y = module(x)
    return y if activation == "none" else (F.relu if activation == "relu" else F.gelu)(y)

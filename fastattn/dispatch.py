"""Which kernel runs: a visible ordered list, each kernel with its reasons to refuse.

`choose` is pure, so that `explain` prints exactly what a call would do. A forced backend that refuses raises
with its reason. There is no other fallback anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import _cuda_library, _triton
from .problem import Problem, name_of
from .row_problem import RowProblem

# A position is an int32 in the CPU kernels, and so is the end of a range.
MOST_ROWS = 2**31 - 1
# What every kernel computes; float64 goes to the reference.
KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))

# The CPU kernel's routes by shape are the op's own rule; see csrc/ops_attention.cpp.
Refusal = Callable[[Any], "str | None"]


@dataclass(frozen=True)
class Kernel:
    """name: what backend= and explain call it. refuse: the first reason not to run a problem, or None. device: the type
    of device without which it refuses, so that a call need not ask, unless backend= forces it; None: any."""

    name: str
    refuse: Refusal
    device: str | None = None


@dataclass(frozen=True)
class Choice:
    """The kernel that runs a problem, out of a list."""

    kernel: Kernel
    problem: Problem | RowProblem
    kernels: tuple[Kernel, ...]

    @property
    def refusals(self) -> tuple[tuple[str, str], ...]:
        """Why the kernels before it do not, in the order of the list; made when asked for: it is most of the choice."""
        if self.problem.backend is not None:
            return ()
        before = self.kernels[: self.kernels.index(self.kernel)]
        return tuple((kernel.name, kernel.refuse(self.problem)) for kernel in before)


def _refuse_cuda(p: Problem) -> str | None:
    reason = _cuda_library.refuse("q", p.device)
    if reason is not None:
        return reason
    if p.dtype not in (torch.bfloat16, torch.float16):
        return f"q is {name_of(p.dtype)}, the CUDA kernels take bfloat16 and float16"
    for name, size in (("D", p.D), ("Dv", p.Dv)):
        if size > 256:
            return f"{name} is {size}, the CUDA kernels take head sizes up to 256"
    if p.has_tangents():
        return _FORWARD_AD
    if p.needs_grad() and max(p.D, p.Dv) > 128:
        shared = _cuda_library.shared_kib(p.device)
        if shared < 160:
            return (
                f"gradients of head sizes above 128 need 160 KiB of shared memory a block, {p.device} has "
                f"{shared} KiB"
            )
    if max(p.B, p.Hq, p.Sq, p.Sk) >= 2**30:
        return "sequences of 2^30 rows and more"
    if p.B * p.Hq * (p.Sq // 64 + 1) >= 2**31:
        return "more blocks than a grid holds"
    return _after_triton(p, "attention", _refuse_triton)


def _refuse_triton(p: Problem) -> str | None:
    reason = _triton.refuse("q", p.device, p.backend == "triton") or _triton.unusable_attention(p.device)
    if reason is not None:
        return reason
    if p.dtype == torch.float64:
        return "float64 is computed by the reference"
    for name, size in (("D", p.D), ("Dv", p.Dv)):
        if size > 256:
            return f"{name} is {size}, the Triton kernels take head sizes up to 256"
    if p.has_tangents():
        return _FORWARD_AD
    if p.Sq + p.Sk >= 2**31 - 2**16 or p.Sq * (p.Hq // max(p.Hkv, 1)) >= 2**31 - 2**16:
        return "sequences of 2^31 rows and keys together and more"
    # 16 rows a block and 512 keys a split at the least: a grid holds 2^31 - 1 blocks.
    if p.B * p.Hq * (p.Sq // 16 + 1) * (p.Sk // 512 + 1 if p.Sq <= 64 else 1) >= 2**31:
        return "more blocks than a grid holds"
    return None


def _refuse_cpu(p: Problem) -> str | None:
    if p.device.type not in ("cpu", "meta"):
        return f"q is on {p.device.type}"
    if p.dtype == torch.float64:
        return "float64 is computed by the reference"
    if p.has_tangents():
        return _FORWARD_AD
    for name, size in (("query rows", p.Sq), ("keys", p.Sk)):
        if size >= MOST_ROWS:
            return f"{size} {name}, the CPU kernels take fewer than 2^31 - 1"
    return None


def _refuse_reference(p: Problem) -> str | None:
    return None


KERNELS = (
    Kernel("cuda", _refuse_cuda, "cuda"),
    Kernel("triton", _refuse_triton, "cuda"),
    Kernel("cpu", _refuse_cpu, "cpu"),
    Kernel("reference", _refuse_reference),
)


_FORWARD_AD = "forward-mode AD needs tangents, which a custom op would silently make zero"


def _refuse_rows_cuda(p: RowProblem) -> str | None:
    reason = _cuda_library.refuse("x", p.device) or _refuse_rows(p)
    if reason is not None:
        return reason
    if p.x.dim() > 9:
        return f"x has {p.x.dim()} dimensions, the kernel takes up to 9"
    width = math.prod(p.normalized_shape) if p.normalized_shape else p.x.shape[p.dim]
    if width > 2**30:
        return f"rows of {width} entries, the kernel takes up to 2^30"
    if p.x.numel() >= (2**31 - 1) * max(width, 1):
        return "more rows than a grid holds, 2^31 - 1"
    return _after_triton(p, p.op, _refuse_rows_triton)


def _after_triton(p: Problem | RowProblem, op: str, refuse_triton: Refusal) -> str | None:
    """Why the CUDA kernel of an op leaves a call that nobody forced to Triton's; None where that refuses."""
    if p.backend is not None or refuse_triton(p) is not None:
        return None
    return _cuda_library.prefer_triton(op)


def _refuse_rows_triton(p: RowProblem) -> str | None:
    reason = _triton.refuse("x", p.device, p.backend == "triton") or _refuse_rows(p)
    if reason is not None:
        return reason
    width = math.prod(p.normalized_shape) if p.normalized_shape else p.x.shape[p.dim]
    if width >= 2**31 - 2**16:
        return f"rows of {width} entries, the kernel takes fewer than 2^31 - 2^16"
    if p.x.numel() >= (2**31 - 1) * max(width, 1):
        return "more rows than a grid holds, 2^31 - 1"
    return None


def _refuse_rows_cpu(p: RowProblem) -> str | None:
    if p.device.type not in ("cpu", "meta"):
        return f"x is on {p.device.type}"
    reason = _refuse_rows(p)
    if reason is None and p.x.dim() > 9:
        return f"x has {p.x.dim()} dimensions, the kernel takes up to 9"
    return reason


def _refuse_rows(p: RowProblem) -> str | None:
    """What no kernel takes."""
    dtypes = {name: t.dtype for name, t in p.tensors().items()} | {"dtype": p.dtype, "sum_dtype": p.sum_dtype}
    for name, dtype in dtypes.items():
        if dtype is not None and dtype not in KERNEL_DTYPES:
            return f"{name} is {name_of(dtype)}, which is computed by the reference"
    if p.has_tangents():
        return _FORWARD_AD
    if p.is_transformed():
        return "torch.func transforms the call, at any depth and order: that takes plain PyTorch"
    if p.x.dim() == 0:
        return "x is a single number, without a row"
    return None


ROW_KERNELS = (
    Kernel("cuda", _refuse_rows_cuda, "cuda"),
    Kernel("triton", _refuse_rows_triton, "cuda"),
    Kernel("cpu", _refuse_rows_cpu, "cpu"),
    Kernel("reference", _refuse_reference),
)


def choose(p: Problem | RowProblem, kernels: tuple[Kernel, ...] = KERNELS) -> Choice:
    """The first kernel of the list that does not refuse, or the forced one.

    Raises RuntimeError where `backend=` forces a kernel that refuses, with its reason.
    """
    if p.backend is None:
        # On meta tensors the ops compute nothing, they say what their results look like.
        device = "cpu" if p.device.type == "meta" else p.device.type
        for kernel in kernels:
            if kernel.device in (None, device) and kernel.refuse(p) is None:
                return Choice(kernel, p, kernels)
    kernel = next(kernel for kernel in kernels if kernel.name == p.backend)
    reason = kernel.refuse(p)
    if reason is not None:
        raise RuntimeError(f"backend={p.backend!r} cannot run this call: {reason}")
    return Choice(kernel, p, kernels)


def features(p: Problem) -> str:
    """The call in a line, as explain prints it."""
    parts = [
        f"B={p.B} Hq={p.Hq} Hkv={p.Hkv} Sq={p.Sq} Sk={p.Sk} D={p.D} Dv={p.Dv}",
        f"{name_of(p.dtype)} on {p.device.type}",
    ]
    for label, given in (
        ("bias", p.bias is not None),
        ("alibi", p.alibi_slopes is not None),
        (f"softcap {p.softcap}", p.softcap is not None),
        ("sinks", p.sinks is not None),
        (f"dropout {p.dropout_p}", p.dropout_p > 0),
        ("gradients", p.needs_grad()),
    ):
        if given:
            parts.append(label)
    return ", ".join(parts)

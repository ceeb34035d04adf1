"""Where lowering makes the host wait for an accelerator: a result whose form or size depends on a mask's values; and
the device on which nothing has any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_functorch = torch._C._functorch
_reasons: ContextVar[list[str] | None] = ContextVar("reasons", default=None)


def valueless(device: torch.device) -> bool:
    """Whether no tensor of a device has values: torch's meta device. What lowering would read stays unknown there."""
    return device.type == "meta"


def unreadable(device: torch.device) -> bool:
    """Whether nobody can look at a mask's values now: torch.compile traces, or the device has none."""
    return torch.compiler.is_compiling() or valueless(device)


def transformed() -> bool:
    """Whether a transform of torch.func is at work; torch.compile traces what such a transform does by itself."""
    return not torch.compiler.is_compiling() and _functorch.peek_interpreter_stack() is not None


def mapped(tensor: Tensor) -> bool:
    """Whether torch.func.vmap maps over a tensor: it stands for many then, and has no values to look at."""
    if torch.compiler.is_compiling():
        return False
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def note(device: torch.device, reason: str) -> None:
    """Says that values on a device are about to be read, and why. On the CPU nobody waits."""
    if device.type == "cpu" or torch.compiler.is_compiling():
        return
    reasons = _reasons.get()
    if reasons is not None and reason not in reasons:
        reasons.append(reason)


@contextmanager
def noted() -> Iterator[list[str]]:
    """The reasons that `note` is given meanwhile, each once."""
    token = _reasons.set([])
    try:
        yield _reasons.get()
    finally:
        _reasons.reset(token)

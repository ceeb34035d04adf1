"""Checks of what masks are built from; every message names the mask, the argument, what came and what may."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from . import waits


def integer(mask: str, name: str, value: object, least: int, none_allowed: bool = False) -> int | None:
    """An int of at least `least`."""
    if value is None and none_allowed:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        allowed = "an int or None" if none_allowed else "an int"
        raise TypeError(f"{mask}: {name} must be {allowed}, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{mask}: {name} must be at least {least}, got {value}")
    return int(value)


def integers(mask: str, name: str, value: object, ranks: tuple[int, ...]) -> Tensor:
    """A fresh int32 tensor of an int, a sequence of ints or an integer tensor, of one of the ranks given."""
    if isinstance(value, Tensor):
        if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"{mask}: {name} must be an integer tensor, got {value.dtype}")
        tensor = value.detach().to(torch.int32, copy=True)
    else:
        try:
            tensor = torch.tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{mask}: {name} must hold ints, got {type(value).__name__} {value!r}") from None
        if tensor.numel() and (tensor.dtype.is_floating_point or tensor.dtype == torch.bool):
            raise TypeError(f"{mask}: {name} must hold ints, got {value!r}")
        tensor = tensor.to(torch.int32)
    if tensor.dim() not in ranks:
        allowed = " or ".join(f"{r}-D" for r in ranks)
        raise ValueError(f"{mask}: {name} must be {allowed}, got shape {tuple(tensor.shape)}")
    return tensor


def on_host(tensor: Tensor) -> bool:
    """Whether values may be looked at: no accelerator is waited for, torch.compile is not tracing, vmap not mapping."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not waits.mapped(tensor)


def least_and_most(tensor: Tensor) -> tuple[int, int]:
    """The extremes of an integer tensor; (0, 0) where it is empty, or on an accelerator: that is not waited
    for."""
    if not on_host(tensor) or tensor.numel() == 0:
        return 0, 0
    least, most = torch.aminmax(tensor)
    return int(least), int(most)


def lengths_within(mask: str, name: str, lengths: Tensor, most: int, limit: str) -> None:
    """Raises where a length on the host lies outside 0..most; `limit` says what `most` is."""
    low, high = least_and_most(lengths)
    if low < 0 or high > most:
        bad = lengths.flatten().tolist()
        where = next(n for n, x in enumerate(bad) if not 0 <= x <= most)
        at = f"{name}[{where}]" if lengths.dim() else name
        raise ValueError(f"{mask}: {at} is {bad[where]}; {name} must lie in 0..{limit} = {most}")


def batch_is(mask: str, name: str, got: int, B: int) -> None:
    if got != B:
        raise ValueError(f"{mask}: {name} has batch {got}, the call has batch {B}")

"""Modules that call `scaled_dot_product_attention` themselves: timm's, diffusers', a user's own.

`swap` names them in its report, and `sdpa_patch` serves them. Both libraries have switches between the function and
other ways to compute attention; `switches` says how those of a model stand for `sdpa_patch(model=...)` to serve it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_FUNCTIONS = {"scaled_dot_product_attention", "dispatch_attention_fn"}


@functools.cache
def _names(function: Callable) -> frozenset[str]:
    """The names that a function's code uses, seen through its decorators."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return frozenset() if code is None else frozenset(code.co_names)


def _processor(module: nn.Module) -> object | None:
    """A diffusers module's processor, which computes its attention."""
    processor = getattr(module, "processor", None)
    return processor if callable(processor) else None


def own_call(module: nn.Module) -> str | None:
    """In words, how a module comes to call the function itself; None for one that does not.

    Looked at are the code of its forward and, for diffusers, of its processor.
    """
    if type(module).__module__.startswith(("torch.", "fastattn.")):
        return None
    processor = _processor(module)
    own = _names(type(module).forward)
    names = own if processor is None else own | _names(type(processor).__call__)
    if any(True for _ in _switches_of(module)):
        return "switched to other attention: fastattn.sdpa_patch(model=...) switches it back meanwhile and serves it"
    if names & _FUNCTIONS:
        at = "it" if own & _FUNCTIONS else f"its {type(processor).__name__}"
        return f"{at} calls scaled_dot_product_attention itself: run it inside fastattn.sdpa_patch()"
    return None


def _switches_of(module: nn.Module) -> Iterator[tuple[object, str, Any]]:
    if getattr(module, "fused_attn", None) is False and _names(type(module).forward) & _FUNCTIONS:
        yield module, "fused_attn", True  # timm
    processor = _processor(module)
    processors = sys.modules.get("diffusers.models.attention_processor")
    if processor is None or processors is None:
        return
    if type(processor) is processors.AttnProcessor:
        yield module, "processor", processors.AttnProcessor2_0()
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is not None and hasattr(processor, "_attention_backend"):
        native = dispatch.AttentionBackendName.NATIVE
        chosen = processor._attention_backend or dispatch._AttentionBackendRegistry.get_active_backend()[0]
        if chosen != native:
            yield processor, "_attention_backend", native


def switches(model: nn.Module) -> list[tuple[object, str, Any]]:
    """(object, attribute, value) to set, for the modules of a model to call the function; none that stand so."""
    return [switch for module in model.modules() for switch in _switches_of(module)]

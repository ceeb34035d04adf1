"""Whether anybody would notice that a module's work is done without calling it."""

from __future__ import annotations

import torch

_any_global_hook = torch.nn.modules.module._has_any_global_hook


def watched(module: torch.nn.Module) -> bool:
    """Whether a call of the module is seen: by a hook on it or on all modules, or a forward bound to the instance."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _any_global_hook()
    )

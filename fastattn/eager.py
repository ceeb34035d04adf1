"""An op with its gradient, for calls that nothing traces or transforms."""

from __future__ import annotations

from collections.abc import Callable

import torch

_BelowAutograd = torch._C._AutoDispatchBelowAutograd


def eager(op: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """`op` as an autograd.Function of its own, from what `torch.library.register_autograd` is given too.

    What register_autograd makes walks the schema at every call: 0.2 ms for attention's, 0.05 ms for a norm's.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            with _BelowAutograd():
                results = op(*arguments)
            setup_context(ctx, arguments, results)
            return results

    Eager.backward = staticmethod(backward)
    return Eager.apply

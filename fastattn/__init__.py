"""Fused attention, softmax and LayerNorm for PyTorch: any mask at the price of what it shows."""

from . import masks, reference, transforms  # noqa: F401  transforms registers derivatives and vmap rules
from .functional import attention, explain, scaled_dot_product_attention
from .patch import sdpa_patch
from .swap import SwapReport, restore, swap
from .version import __version__

__all__ = [
    "__version__",
    "SwapReport",
    "attention",
    "explain",
    "masks",
    "reference",
    "restore",
    "scaled_dot_product_attention",
    "sdpa_patch",
    "swap",
]

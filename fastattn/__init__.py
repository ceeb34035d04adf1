"""Fused attention, softmax and LayerNorm for PyTorch: any mask at the price of what it shows."""

from . import convert, masks, nn, plot, reference, transforms  # noqa: F401  transforms registers derivatives and vmap rules
from .cache import empty_cache
from .functional import attention, explain, scaled_dot_product_attention
from .patch import sdpa_patch
from .rows import add_layer_norm, add_rms_norm, layer_norm, rms_norm, softmax
from .swap import SwapReport, restore, swap
from .version import __version__

__all__ = [
    "__version__",
    "SwapReport",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "convert",
    "empty_cache",
    "explain",
    "layer_norm",
    "masks",
    "nn",
    "plot",
    "reference",
    "restore",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
    "sdpa_patch",
    "swap",
]

"""Fused attention, softmax and LayerNorm for PyTorch: any mask at the price of what it shows."""

from . import masks, reference
from .functional import attention, explain, scaled_dot_product_attention
from .version import __version__

__all__ = [
    "__version__",
    "attention",
    "explain",
    "masks",
    "reference",
    "scaled_dot_product_attention",
]

"""LayerNorm, RMSNorm and Softmax on fastattn's kernels, and AddNorm, which fuses a residual into a norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import rows
from .dropping import dropped
from .packing import through_values
from .sharing import FromTorch
from .watching import watched


class LayerNorm(FromTorch, torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on `fastattn.layer_norm`: same arguments, parameters, state_dict and result.

    Input [*, *normalized_shape] in float32, bfloat16, float16 or float64, or a nested tensor of such sequences; weight
    and bias may have a dtype of their own. Output has the input's shape and dtype. Statistics are float32 of centred
    values, so a large mean or values whose squares overflow do no harm where torch's own module fails (see
    docs/modules.md).

    Raises:
        What `fastattn.layer_norm` raises: TypeError, ValueError naming the argument.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            return through_values(self, input)
        return rows.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(FromTorch, torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on `fastattn.rms_norm`; `eps=None` is float32's epsilon, float64's for float64.

    Shapes, dtypes and errors as in `LayerNorm`. Method: arXiv:1910.07467.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_nested:
            return through_values(self, x)
        return rows.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class Softmax(FromTorch, torch.nn.Softmax):
    """`torch.nn.Softmax` on `fastattn.softmax`. `dim=None` is guessed from the rank by torch's rule, with its warning.

    Input of any shape in float32, bfloat16, float16 or float64. A row of only -inf is NaN, as torch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        dim = self.dim
        if dim is None:
            dim = torch.nn.functional._get_softmax_dim("softmax", input.dim(), 5)
        return rows.softmax(input, dim)


def add_then_norm(norm: torch.nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(s), s) of s = x + residual: in one pass where `norm` is ours and nobody watches it, else in two."""
    forward = type(norm).forward
    ours = forward in (LayerNorm.forward, RMSNorm.forward)
    if not ours or watched(norm) or x.dtype != residual.dtype or x.shape != residual.shape:
        total = x + residual
        return norm(total), total
    if forward is LayerNorm.forward:
        return rows.add_layer_norm(x, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return rows.add_rms_norm(x, residual, norm.normalized_shape, norm.weight, norm.eps)


class AddNorm(torch.nn.Module):
    """Dropout, residual and norm around a sub-block, in one pass over memory.

    `order="post"`: ``norm(residual + dropout(x))``, the original Transformer's.
    `order="pre"`: ``(norm(s), s)`` with ``s = residual + dropout(x)``: the next sub-block's input and the stream.

    Args:
        normalized_shape: the last dimensions, as an int or a sequence.
        norm: "layer_norm" or "rms_norm".
        order: "post" or "pre".
        dropout: probability of dropping an element of x, in training.
        eps: the norm's; None is 1e-5 for layer_norm and the dtype's epsilon for rms_norm.
        bias: whether layer_norm has one.

    Input: x and residual of one shape [*, *normalized_shape] and dtype. Parameters: `norm.weight`, `norm.bias`.

    Raises:
        ValueError: norm, order or dropout is none of these; bias=True with rms_norm; x and residual differ in shape.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        norm: str = "layer_norm",
        order: str = "post",
        dropout: float = 0.0,
        eps: float | None = None,
        bias: bool | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if norm not in ("layer_norm", "rms_norm"):
            raise ValueError(f"norm must be 'layer_norm' or 'rms_norm', got {norm!r}")
        if order not in ("post", "pre"):
            raise ValueError(f"order must be 'post' or 'pre', got {order!r}")
        if norm == "rms_norm" and bias:
            raise ValueError("bias=True and norm='rms_norm' contradict each other: RMSNorm has no bias")
        factory = {"device": device, "dtype": dtype}
        if norm == "rms_norm":
            self.norm = RMSNorm(normalized_shape, eps, **factory)
        else:
            self.norm = LayerNorm(
                normalized_shape, 1e-5 if eps is None else eps, bias=bias is not False, **factory
            )
        self.order = order
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if x.shape != residual.shape:
            raise ValueError(
                f"x and residual must have the same shape, got {list(x.shape)} and {list(residual.shape)}"
            )
        y, total = add_then_norm(self.norm, dropped(self.dropout, x), residual)
        return y if self.order == "post" else (y, total)

    def extra_repr(self) -> str:
        return f"order={self.order!r}"

"""The masks of torch's modules, as `fastattn.attention` takes them.

torch's modules have two: `key_padding_mask` and `attn_mask`, True or -inf where a key is *hidden*; a float one may
also add to the scores. Both become one `Visibility`. Checks raise what torch's modules raise, with the same types.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import Causal, Dense, KeyPadding, Mask, Prepared, lower, waits
from ..masks.check import on_host


@dataclass(frozen=True, eq=False)
class Visibility:
    """What rows see and what is added to their scores, ready for `fastattn.attention`."""

    mask: Mask | Prepared | None = None
    bias: Tensor | None = None

    def arguments(self) -> dict:
        return {"mask": self.mask, "bias": self.bias}

    def prepared(self, q_shape: tuple[int, int, int], Sk: int, device: torch.device) -> Visibility:
        """With the mask lowered once, for q_shape (B, H, Sq) and Sk keys of as many heads."""
        if self.mask is None or isinstance(self.mask, Prepared):
            return self
        if waits.transformed() and self.mask._is_mapped():
            return self  # attention adds it to the scores
        B, H, Sq = q_shape
        lowered = lower(self.mask, B, H, H, Sq, Sk, device)
        return Visibility(Prepared(lowered, H, "the masks of a stack"), self.bias)


Maskish = Tensor | Mask | Prepared | Visibility | None


def check_kinds(names: tuple[str, str], key_padding_mask, attn_mask) -> None:
    """Types of the two masks, in torch's words: AssertionError for another dtype, a warning where they differ."""
    for name, mask in zip(names, (key_padding_mask, attn_mask)):
        if isinstance(mask, Tensor) and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(f"only bool and floating types of {name} are supported, got {mask.dtype}")
        if name == names[0] and mask is not None and not isinstance(mask, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(mask).__name__}")
        if mask is not None and not isinstance(mask, (Tensor, Mask, Prepared, Visibility)):
            raise TypeError(
                f"{name} must be a tensor, a mask of fastattn.masks or None, got {type(mask).__name__}"
            )
    if (
        isinstance(attn_mask, Tensor)
        and key_padding_mask is not None
        and key_padding_mask.dtype != attn_mask.dtype
    ):
        warnings.warn(
            f"Support for mismatched {names[0]} and {names[1]} is deprecated. Use same type for both instead.",
            stacklevel=3,
        )


def split(t: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(what a mask shows, what it adds): a bool one adds nothing, nor does a float one of only 0 and -inf."""
    if t.dtype == torch.bool:
        return ~t, None
    if not (t.requires_grad or t.is_meta or torch.compiler.is_compiling() or waits.mapped(t)):
        shown = t == 0
        if bool((shown | (t == -math.inf)).all()):
            return shown, None
    return None, t


def _padded_rows(x: Tensor, padding: Tensor, batch_first: bool) -> Tensor:
    """Which rows of x [N, S, E], [S, N, E] or [S, E] are padding: True in [N, S] or [S], or -inf."""
    padded = padding if padding.dtype == torch.bool else padding == -math.inf
    return padded if batch_first or x.dim() == 2 else padded.transpose(0, 1)


def without_padding(x: Tensor, padding: Tensor, batch_first: bool) -> Tensor:
    """x with padded rows 0."""
    return x.masked_fill(_padded_rows(x, padding, batch_first).unsqueeze(-1), 0.0)


def without_padded_nan(x: Tensor, padding: Tensor | None, batch_first: bool) -> Tensor:
    """x with 0 in padded rows that hold a NaN or an infinity, where gradients may come: those rows have none, but a
    weight's gradient multiplies what they hold by 0."""
    if padding is None or not torch.is_grad_enabled():
        return x
    padded = _padded_rows(x, padding, batch_first)
    if padded.shape != x.shape[:-1]:
        return x  # whoever combines the masks says so
    poisoned = padded & ~torch.linalg.vector_norm(x.detach(), math.inf, -1).isfinite()
    if on_host(poisoned) and not poisoned.any():
        return x
    return x.masked_fill(poisoned.unsqueeze(-1), 0.0)


def causal(attn_mask: Maskish, *, trusted: bool) -> Maskish:
    """`is_causal=True`, a hint about attn_mask: believed only where torch believes it."""
    if attn_mask is None:
        raise RuntimeError(
            "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
            "`generate_square_subsequent_mask` to create this mask."
        )
    return Causal() if trusted and isinstance(attn_mask, Tensor) else attn_mask


def combine(
    key_padding_mask: Tensor | None,
    attn_mask: Maskish,
    sizes: tuple[int, int, int, int],
    *,
    extra: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Visibility:
    """Both masks as one.

    Args:
        key_padding_mask: [B, S], bool (True is hidden) or added to the scores.
        attn_mask: [L, S], [B * H, L, S], or a mask of `fastattn.masks` (there True is visible).
        sizes: (B, H, L, S).
        extra: keys that follow the S and are seen by every row.
        dtype: of the queries; an additive mask in a third dtype is cast to it.

    Raises:
        AssertionError, RuntimeError: a shape that does not fit, as torch.
    """
    B, H, L, S = sizes
    if isinstance(attn_mask, Visibility):
        if key_padding_mask is None and not extra:
            return attn_mask
        raise TypeError("attn_mask is already combined with a padding mask; pass no other beside it")
    parts: list[Mask] = []
    biases: list[Tensor] = []
    prepared = None
    if key_padding_mask is not None:
        _check_padding(key_padding_mask, B, S)
        padding = F.pad(key_padding_mask, (0, extra)) if extra else key_padding_mask
        shown, bias = split(padding)
        if shown is not None:
            parts.append(KeyPadding(shown))
        else:
            biases.append(bias[:, None, None])
    if isinstance(attn_mask, Tensor):
        mask = _four_dims(attn_mask, sizes)
        shown, bias = split(F.pad(mask, (0, extra)) if extra else mask)
        if shown is not None:
            parts.append(Dense(shown))
        else:
            biases.append(bias)
    elif isinstance(attn_mask, Prepared):
        prepared = attn_mask
    elif attn_mask is not None:
        if extra:
            seen = attn_mask.to_dense(L, S, B, H, (key_padding_mask if parts else torch.empty(0)).device)
            attn_mask = Dense(F.pad(seen, (0, extra), value=True))
        parts.append(attn_mask)
    if prepared is not None and (parts or extra):
        beside = "key_padding_mask" if parts else "the keys that add_bias_kv and add_zero_attn add"
        raise TypeError(f"a prepared attn_mask cannot be joined with {beside}; pass the mask it was made of")
    mask = None
    for part in parts:
        mask = part if mask is None else mask & part
    return Visibility(prepared if prepared is not None else mask, _sum(biases, dtype))


def _sum(biases: list[Tensor], dtype: torch.dtype) -> Tensor | None:
    if len(biases) == 2:
        work = torch.promote_types(dtype, torch.float32)
        return biases[0].to(work) + biases[1].to(work)
    return next((b if b.dtype in (dtype, torch.float32) else b.to(dtype) for b in biases), None)


def _check_padding(mask: Tensor, B: int, S: int) -> None:
    for dim, size in enumerate((B, S)):
        if mask.shape[dim] != size:
            raise AssertionError(
                f"Expected key_padding_mask.shape[{dim}] to be {size}, but got {mask.shape[dim]}"
            )


def _four_dims(mask: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """attn_mask as [1, 1, L, S] or [B, H, L, S]."""
    B, H, L, S = sizes
    if mask.dim() == 2:
        if mask.shape != (L, S):
            raise RuntimeError(
                f"The shape of the 2D attn_mask is {tuple(mask.shape)}, but should be {(L, S)}."
            )
        return mask[None, None]
    if mask.shape != (B * H, L, S):
        raise RuntimeError(
            f"The shape of the 3D attn_mask is {tuple(mask.shape)}, but should be {(B * H, L, S)}."
        )
    return mask.unflatten(0, (B, H))

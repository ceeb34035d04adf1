"""TransformerEncoderLayer and TransformerEncoder: torch's modules, which here compute nothing for padding."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..masks import Mask, Prepared
from . import packing
from .dropping import dropped
from .linear import apply
from .masking import (
    Maskish,
    Visibility,
    causal,
    check_kinds,
    combine,
    without_padded_nan,
    without_padding,
)
from .multihead import MultiheadAttention, check_shapes
from .norms import add_then_norm
from .sharing import FromTorch, converted
from .watching import watched

MaskArgument = Tensor | Mask | Prepared | None


def sublayer_names(activation) -> str | None:
    """The activation by the name `linear` fuses, or None."""
    if isinstance(activation, torch.nn.Module) and watched(activation):
        return None
    if activation is F.relu or type(activation) is torch.nn.ReLU:
        return "relu"
    exact_gelu = type(activation) is torch.nn.GELU and activation.approximate == "none"
    return "gelu" if activation is F.gelu or exact_gelu else None


def feed_forward(layer: torch.nn.Module, x: Tensor, last_dropout: torch.nn.Module) -> Tensor:
    """linear2(dropout(activation(linear1(x)))) and the dropout after it."""
    name = sublayer_names(layer.activation)
    h = apply(layer.linear1, x, name or "none")
    if name is None:
        h = layer.activation(h)
    return dropped(last_dropout, apply(layer.linear2, dropped(layer.dropout, h)))


def sequence_sizes(x: Tensor, batch_first: bool) -> tuple[int, int]:
    """(N, L) of [N, L, E], [L, N, E] or [L, E]."""
    if x.dim() == 2:
        return 1, x.shape[0]
    return (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])


class TransformerEncoderLayer(FromTorch, torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on fastattn's kernels: one path for training, evaluation and nested tensors.

    Constructor and forward arguments, parameters, state_dict and results are torch's; docs/modules.md lists what
    differs on purpose. Replaced children (`self_attn`, norms, a LoRA's linear layers) are called in every mode.

    Args of forward:
        src: [S, N, E], [N, S, E] with batch_first, [S, E], or a nested tensor (then no masks).
        src_mask: [S, S] or [N * nhead, S, S], bool (True is hidden) or added to the scores; or a mask of
            `fastattn.masks` (True is visible).
        src_key_padding_mask: [N, S] or [S], bool or additive.
        is_causal: a hint that src_mask is the causal mask; needs it.

    Raises:
        What `MultiheadAttention` raises.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._modules.update({name: converted(child) for name, child in self._modules.items()})

    def forward(
        self,
        src: Tensor,
        src_mask: MaskArgument = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        check_kinds(("src_key_padding_mask", "src_mask"), src_key_padding_mask, src_mask)
        if src.is_nested:
            return through_nested(self, src, src_mask, src_key_padding_mask, [self])
        src = without_padded_nan(src, src_key_padding_mask, getattr(self.self_attn, "batch_first", False))
        if self.norm_first:
            attended = self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            y, x = add_then_norm(self.norm2, src, attended)
            return x + self._ff_block(y)
        attended = self._sa_block(src, src_mask, src_key_padding_mask, is_causal)
        x = add_then_norm(self.norm1, src, attended)[0]
        return add_then_norm(self.norm2, x, self._ff_block(x))[0]

    def _sa_block(
        self, x: Tensor, attn_mask: Maskish, key_padding_mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        x = self.self_attn(
            x,
            x,
            x,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            need_weights=False,
            is_causal=is_causal,
        )[0]
        return dropped(self.dropout1, x)

    def _ff_block(self, x: Tensor) -> Tensor:
        return feed_forward(self, x, self.dropout2)


def through_nested(module, src: Tensor, mask, padding, layers, norm=None) -> Tensor:
    """A nested tensor's sequences, packed, through layers and norm, and back into a nested tensor."""
    if mask is not None or padding is not None:
        raise AssertionError(
            f"{type(module).__name__} takes no mask and no src_key_padding_mask with a nested src: its lengths say "
            "what is padding"
        )
    sequences = packing.from_nested(src)
    batch_first = layers[0].self_attn.batch_first
    x = sequences.values.unsqueeze(0 if batch_first else 1)
    heads, T = layers[0].self_attn.num_heads, x.shape[0] * x.shape[1]
    seen = Visibility(packing.documents(sequences.lengths)).prepared((1, heads, T), T, x.device)
    for layer in layers:
        x = layer(x, src_mask=seen)
    x = x if norm is None else norm(x)
    return sequences.nested(x.flatten(0, 1))


def is_ours(layer: torch.nn.Module) -> bool:
    """Whether a layer and its attention have fastattn's forward: they take masks lowered before."""
    return (
        type(layer).forward is TransformerEncoderLayer.forward
        and type(layer.self_attn).forward is MultiheadAttention.forward
    )


@dataclass
class EncoderExplanation:
    """What a call of TransformerEncoder does; `str()` is for people.

    packed: whether padding is left out. reason: why not, or how many tokens remain. attention: the explanation of the
    first layer's attention.
    """

    packed: bool
    reason: str
    attention: functional.Explanation | None

    def __str__(self) -> str:
        first = f"packing  {'yes' if self.packed else 'no'}: {self.reason}"
        return first if self.attention is None else f"{first}\n{self.attention}"


class TransformerEncoder(FromTorch, torch.nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` that packs: under a padding mask no layer computes padded tokens.

    Under `src_key_padding_mask` the real tokens are gathered into one sequence, attention keeps to each item's range of
    keys, and the result is scattered back: torch's shape, padded rows 0, in training and evaluation. Padding may lie
    anywhere. With `mask` it packs where each row sees one range of keys (causal, windows, ...). Where it does not
    pack, `explain` says why and the result is the same. Layers then see [1, T, E] ([T, 1, E] without batch_first).

    Args:
        encoder_layer: copied num_layers times; only fastattn's layers pack.
        norm: applied to the last layer's output.
        enable_nested_tensor: False turns packing off.
        mask_check: kept for torch's signature; any padding packs.

    Args of forward:
        src: [S, N, E], [N, S, E] with batch_first, [S, E], or a nested tensor (then no masks).
        mask, src_key_padding_mask, is_causal: as `TransformerEncoderLayer`; is_causal=None looks at the mask.
    """

    def __init__(
        self,
        encoder_layer: torch.nn.Module,
        num_layers: int,
        norm: torch.nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        # Not torch's own constructor: it warns of conditions of its fast path, which this class does not have.
        torch.nn.Module.__init__(self)
        self.layers = torch.nn.ModuleList([copy.deepcopy(encoder_layer) for _ in range(num_layers)])
        self.num_layers = num_layers
        self.norm = norm
        self.enable_nested_tensor = enable_nested_tensor
        self.use_nested_tensor = enable_nested_tensor
        self.mask_check = mask_check

    def forward(
        self,
        src: Tensor,
        mask: MaskArgument = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        check_kinds(("src_key_padding_mask", "mask"), src_key_padding_mask, mask)
        ours = self._ours()
        if src.is_nested and ours:
            return through_nested(self, src, mask, src_key_padding_mask, self.layers, self.norm)
        if not ours:
            return self._plainly(src, mask, src_key_padding_mask, bool(is_causal))
        if is_causal:
            mask = causal(mask, trusted=src_key_padding_mask is None)
        plan = self._plan(src, mask, src_key_padding_mask)
        if isinstance(plan, packing.Packing):
            x = self._through(plan.pack(src), plan.seen)
            return plan.unpack(x)
        seen = self._seen(src, mask, src_key_padding_mask)
        if torch.is_grad_enabled():
            # What padding holds would meet gradients of 0 in those of the weights, where NaN stays.
            src = self._without_padding(src, src_key_padding_mask)
        return self._without_padding(self._through(src, seen), src_key_padding_mask)

    def _without_padding(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """x with padded rows 0: those of True, or of -inf."""
        attention = getattr(self.layers[0], "self_attn", None) if len(self.layers) else None
        if padding is None or attention is None:
            return x
        return without_padding(x, padding, getattr(attention, "batch_first", False))

    def _ours(self) -> bool:
        """Whether every layer takes what is lowered once, and the same."""
        layers = list(self.layers)
        return len(
            {(m.self_attn.num_heads, m.self_attn.batch_first) for m in layers if is_ours(m)}
        ) == 1 and all(map(is_ours, layers))

    def _through(self, x: Tensor, seen: Visibility | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, src_mask=seen)
        return x if self.norm is None else self.norm(x)

    def _plainly(self, src, mask, src_key_padding_mask, is_causal) -> Tensor:
        """Layers of another class, or that differ, each given the masks as they are."""
        x = src
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask)
        return self._without_padding(x if self.norm is None else self.norm(x), src_key_padding_mask)

    def _plan(self, src: Tensor, mask: MaskArgument, padding: Tensor | None) -> packing.Packing | str:
        """How this call packs, or why not."""
        if not all(map(is_ours, self.layers)):
            return "a layer is none of fastattn.nn; TransformerEncoder.from_torch converts torch's"
        if not self._ours():
            return "the layers differ in nhead or batch_first"
        check_shapes(self.layers[0].self_attn, src, src, src, padding, mask)
        if padding is None:
            return "there is no src_key_padding_mask"
        if src.dim() != 3 or padding.dim() != 2:
            return "src is one sequence: [S, E]"
        if not self.enable_nested_tensor:
            return "enable_nested_tensor is False"
        attention = self.layers[0].self_attn
        N, S = sequence_sizes(src, attention.batch_first)
        if (
            padding.shape != (N, S)
            or isinstance(mask, Tensor)
            and mask.shape not in ((S, S), (N * attention.num_heads, S, S))
        ):
            return "the masks do not fit src"  # the layers say how
        lead = (src.shape[0], src.shape[1])
        return packing.plan(padding, mask, attention.num_heads, attention.batch_first, lead)

    def _seen(self, src: Tensor, mask: MaskArgument, padding: Tensor | None) -> Visibility | None:
        """Both masks lowered once for all layers; None where there is none or the layers have to complain."""
        if mask is None and padding is None:
            return None
        attention = self.layers[0].self_attn
        N, S = sequence_sizes(src, attention.batch_first)
        if src.dim() == 2 and padding is not None and padding.dim() == 1:
            padding = padding.unsqueeze(0)
        seen = combine(padding, mask, (N, attention.num_heads, S, S), dtype=src.dtype)
        return seen.prepared((N, attention.num_heads, S), S, src.device)

    def explain(
        self,
        src: Tensor,
        mask: MaskArgument = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> EncoderExplanation:
        """Whether a call packs and which kernel its attention runs; computes one projection, no layer."""
        if is_causal:
            mask = causal(mask, trusted=src_key_padding_mask is None)
        if src.is_nested and self._ours():
            explanation = self.layers[0].self_attn.explain(src, src, src, src_key_padding_mask, mask)
            return EncoderExplanation(True, "src is nested: there is no padding", explanation)
        plan = self._plan(src, mask, src_key_padding_mask)
        if not self._ours():
            return EncoderExplanation(False, plan, None)
        attention = self.layers[0].self_attn
        if isinstance(plan, str):
            seen = self._seen(src, mask, src_key_padding_mask)
            return EncoderExplanation(False, plan, attention.explain(src, src, src, attn_mask=seen))
        x = plan.pack(src)
        total = plan.lead[0] * plan.lead[1]
        reason = f"{plan.tokens} of {total} tokens are computed"
        return EncoderExplanation(True, reason, attention.explain(x, x, x, attn_mask=plan.seen))

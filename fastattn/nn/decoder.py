"""TransformerDecoderLayer, TransformerDecoder and Transformer: torch's modules on fastattn's kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropping import dropped
from .encoder import MaskArgument, TransformerEncoder, TransformerEncoderLayer, feed_forward, sequence_sizes
from .masking import Maskish, Visibility, causal, check_kinds, combine, without_padded_nan
from .multihead import MultiheadAttention, check_shapes
from .norms import LayerNorm, add_then_norm
from .sharing import FromTorch, converted


class TransformerDecoderLayer(FromTorch, torch.nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` on fastattn's kernels.

    Constructor and forward arguments, parameters, state_dict and results are torch's; docs/modules.md lists what
    differs on purpose. Masks as in `TransformerEncoderLayer`; `memory_mask` is [T, S] or [N * nhead, T, S].
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._modules.update({name: converted(child) for name, child in self._modules.items()})

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: MaskArgument = None,
        memory_mask: MaskArgument = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        _refuse_nested(self, tgt, memory)
        check_kinds(("tgt_key_padding_mask", "tgt_mask"), tgt_key_padding_mask, tgt_mask)
        check_kinds(("memory_key_padding_mask", "memory_mask"), memory_key_padding_mask, memory_mask)
        tgt = without_padded_nan(tgt, tgt_key_padding_mask, getattr(self.self_attn, "batch_first", False))
        attend_self = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        attend_memory = (memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        if self.norm_first:
            y, x = add_then_norm(self.norm2, tgt, self._sa_block(self.norm1(tgt), *attend_self))
            y, x = add_then_norm(self.norm3, x, self._mha_block(y, *attend_memory))
            return x + self._ff_block(y)
        x = add_then_norm(self.norm1, tgt, self._sa_block(tgt, *attend_self))[0]
        x = add_then_norm(self.norm2, x, self._mha_block(x, *attend_memory))[0]
        return add_then_norm(self.norm3, x, self._ff_block(x))[0]

    def _sa_block(
        self, x: Tensor, attn_mask: Maskish, key_padding_mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        x = self.self_attn(
            x,
            x,
            x,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            need_weights=False,
        )[0]
        return dropped(self.dropout1, x)

    def _mha_block(
        self,
        x: Tensor,
        mem: Tensor,
        attn_mask: Maskish,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
    ) -> Tensor:
        x = self.multihead_attn(
            x,
            mem,
            mem,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            need_weights=False,
        )[0]
        return dropped(self.dropout2, x)

    def _ff_block(self, x: Tensor) -> Tensor:
        return feed_forward(self, x, self.dropout3)


def _refuse_nested(module: torch.nn.Module, tgt: Tensor, memory: Tensor) -> None:
    for name, x in (("tgt", tgt), ("memory", memory)):
        if x.is_nested:
            raise AssertionError(
                f"{type(module).__name__} takes no nested tensors, got a nested {name}; pad it and pass "
                f"{name}_key_padding_mask"
            )


def _is_ours(layer: torch.nn.Module) -> bool:
    return type(layer).forward is TransformerDecoderLayer.forward and all(
        type(attention).forward is MultiheadAttention.forward
        for attention in (layer.self_attn, layer.multihead_attn)
    )


class TransformerDecoder(FromTorch, torch.nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder` on fastattn's kernels; masks are lowered once for all layers.

    Arguments, parameters, state_dict and results are torch's.
    """

    def __init__(
        self, decoder_layer: torch.nn.Module, num_layers: int, norm: torch.nn.Module | None = None
    ) -> None:
        torch.nn.Module.__init__(self)
        self.layers = torch.nn.ModuleList([copy.deepcopy(decoder_layer) for _ in range(num_layers)])
        self.num_layers = num_layers
        self.norm = norm

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: MaskArgument = None,
        memory_mask: MaskArgument = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        _refuse_nested(self, tgt, memory)
        check_kinds(("tgt_key_padding_mask", "tgt_mask"), tgt_key_padding_mask, tgt_mask)
        check_kinds(("memory_key_padding_mask", "memory_mask"), memory_key_padding_mask, memory_mask)
        masks = {
            "tgt_mask": tgt_mask,
            "memory_mask": memory_mask,
            "tgt_key_padding_mask": tgt_key_padding_mask,
            "memory_key_padding_mask": memory_key_padding_mask,
            "tgt_is_causal": bool(tgt_is_causal),
            "memory_is_causal": memory_is_causal,
        }
        if len(self.layers) and all(map(_is_ours, self.layers)):
            batch_first = self.layers[0].self_attn.batch_first
            tgt = without_padded_nan(tgt, tgt_key_padding_mask, batch_first)
            memory = without_padded_nan(memory, memory_key_padding_mask, batch_first)
            masks = {
                "tgt_mask": self._seen(
                    "self_attn", tgt, tgt, tgt_mask, tgt_key_padding_mask, bool(tgt_is_causal)
                ),
                "memory_mask": self._seen(
                    "multihead_attn", tgt, memory, memory_mask, memory_key_padding_mask, memory_is_causal
                ),
            }
        x = tgt
        for layer in self.layers:
            x = layer(x, memory, **masks)
        return x if self.norm is None else self.norm(x)

    def _seen(
        self,
        name: str,
        rows: Tensor,
        keys: Tensor,
        mask: MaskArgument,
        padding: Tensor | None,
        is_causal: bool,
    ) -> Visibility | None:
        attention = getattr(self.layers[0], name)
        check_shapes(attention, rows, keys, keys, padding, mask)
        if is_causal:
            mask = causal(mask, trusted=padding is None)
        if mask is None and padding is None:
            return None
        if padding is not None and keys.dim() == 2 and padding.dim() == 1:
            padding = padding.unsqueeze(0)
        (N, T), (_, S) = (sequence_sizes(x, attention.batch_first) for x in (rows, keys))
        seen = combine(padding, mask, (N, attention.num_heads, T, S), dtype=rows.dtype)
        return seen.prepared((N, attention.num_heads, T), S, rows.device)


class Transformer(FromTorch, torch.nn.Transformer):
    """`torch.nn.Transformer` of fastattn's encoder and decoder (arXiv:1706.03762).

    Constructor and forward arguments, parameters, state_dict, initialisation (equal under equal seeds) and results
    are torch's. With `src_key_padding_mask` the encoder packs and its padded rows are 0: pass
    `memory_key_padding_mask` too, as with torch, or the decoder attends to them.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        # Not torch's own constructor, which would build its own layers; the order of random draws is the same.
        torch.nn.Module.__init__(self)
        factory = {"device": device, "dtype": dtype}
        layer = (
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
        )

        def norm():
            return LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)

        if custom_encoder is not None:
            self.encoder = custom_encoder
        else:
            encoder_layer = TransformerEncoderLayer(*layer, **factory)
            self.encoder = TransformerEncoder(encoder_layer, num_encoder_layers, norm())
        if custom_decoder is not None:
            self.decoder = custom_decoder
        else:
            decoder_layer = TransformerDecoderLayer(*layer, **factory)
            self.decoder = TransformerDecoder(decoder_layer, num_decoder_layers, norm())
        self._reset_parameters()
        self.d_model = d_model
        self.nhead = nhead
        self.batch_first = batch_first

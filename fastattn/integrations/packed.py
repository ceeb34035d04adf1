"""Encoders that compute no padding: `swap(model, pack=True)`.

An encoder of BERT's kind gets hidden states [B, S, E] and a padding mask. A packing one takes the T real tokens out
as one sequence [1, T, E], lets every layer (attention, feed-forward, norms) work on those, and puts them back; rows of
padding come out as 0. That is right for layers that treat tokens alike but for attention. Whether an encoder's do is
tried when it is swapped: it runs on two short sequences, padded and packed.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from .. import masks
from ..swap import StandIn
from .model_masks import ModelMask


class Packing:
    """Where the real tokens of padding [B, S] are, True for real; and what they see when packed."""

    def __init__(self, real: Tensor):
        self.lead = tuple(real.shape)
        self.index = real.reshape(-1).nonzero().squeeze(1)
        T = self.index.shape[0]
        starts = [0, *real.sum(1).cumsum(0).tolist()]
        self.mask = ModelMask(masks.Documents(starts), (1, T, T), real.device)

    def pack(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.index).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        B, S = self.lead
        return x.new_zeros(B * S, x.shape[-1]).index_copy(0, self.index, x[0]).view(B, S, -1)


def _packing(mask: object, others: tuple) -> Packing | None:
    """How a call is packed; None where it has no padding, or more to it than hidden states and their padding."""
    if not isinstance(mask, ModelMask) or mask.padding is None or torch.compiler.is_compiling():
        return None
    if any(isinstance(x, (Tensor, tuple, list, ModelMask)) or hasattr(x, "get_seq_length") for x in others):
        return None
    from transformers.utils import output_capturing

    if output_capturing._active_collector.get():  # the states of every layer are asked for
        return None
    if mask.packing is None:
        mask.packing = Packing(mask.padding)
    return mask.packing if mask.packing.index.shape[0] < mask.padding.numel() else None


class PackedEncoder(StandIn):
    def forward(self, hidden_states: Tensor, attention_mask: object = None, *others, **named):
        forward = super().forward
        packing = _packing(attention_mask, (*others, *named.values()))
        if packing is None or hidden_states.shape[:2] != packing.lead:
            return forward(hidden_states, attention_mask, *others, **named)
        out = forward(packing.pack(hidden_states), packing.mask, *others, **named)
        if isinstance(out, Tensor):
            return packing.unpack(out)
        if isinstance(out, tuple):
            return (packing.unpack(out[0]), *out[1:])
        out["last_hidden_state"] = packing.unpack(out["last_hidden_state"])
        return out


def is_candidate(module: nn.Module, attention: set[int]) -> bool:
    """Whether a module has the form of an encoder of layers; attention: ids of modules that call the interface."""
    try:
        names = list(inspect.signature(type(module).forward).parameters)[1:3]
    except (TypeError, ValueError):
        return False
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    return names == ["hidden_states", "attention_mask"] and any(
        id(inner) in attention for child in lists for inner in child.modules()
    )


def objection(module: nn.Module, config: object) -> str | None:
    """Why an encoder is not packed; None where it may be."""
    hooked = sum(bool(m._forward_hooks or m._forward_pre_hooks) for m in module.modules())
    if hooked:
        return f"hooks on modules inside ({hooked}), which would see packed tokens"
    if next(module.parameters()).is_meta:
        return None
    widths = dict.fromkeys(getattr(config, name, None) for name in ("hidden_size", "embedding_size", "dim"))
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        found = [_agrees(module, width) for width in widths if isinstance(width, int)]
    finally:
        for m in training:
            m.training = True
    if True in found:
        return None
    return "packed, its layers compute something else" if False in found else "it could not be tried"


def _agrees(module: nn.Module, width: int) -> bool | None:
    """Whether hidden states of that width come out alike padded and packed; None where they cannot go in."""
    p = next(module.parameters())
    x = torch.randn(2, 6, width, generator=torch.Generator().manual_seed(0)).to(p.device, p.dtype)
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], dtype=torch.bool, device=p.device)
    packing = Packing(real)

    def run(x: Tensor, seen: Tensor) -> Tensor:
        hidden = torch.zeros(seen.shape, dtype=p.dtype, device=p.device)
        out = module(x, hidden.masked_fill(~seen, torch.finfo(p.dtype).min))
        return out if isinstance(out, Tensor) else out[0]

    try:
        with torch.no_grad():
            padded = run(x, real[:, None, None].expand(2, 1, 6, 6))
            packed = packing.unpack(run(packing.pack(x), packing.mask.dense()))
    except Exception:  # whatever a module raises for a width or a mask that is not for it
        return None
    error = (padded.float() - packed.float())[real].abs().max()
    return bool(error <= 64 * torch.finfo(p.dtype).eps * padded.float().abs().max())

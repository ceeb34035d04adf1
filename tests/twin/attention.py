"""Calls the sm_80 attention kernels on the twin with torch tensors."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastattn.masks import Mask, lower

from . import build
from .attention_args import AttentionArgs, fill

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
HEADS = (32, 64, 96, 128, 192, 256)


def library(head: int, dtype: torch.dtype) -> ctypes.CDLL:
    return build.library("attention_sm80.cpp", f"-DTWIN_HEAD={head}", f"-DTWIN_TYPE={TYPES[dtype]}")


def padded_head(D: int, Dv: int) -> int:
    return next(head for head in HEADS if head >= max(D, Dv))


def lowered_of(mask: Mask | None, q: Tensor, k: Tensor):
    return (
        None
        if mask is None
        else lower(mask, q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], "cpu")
    )


def seed_tensor(seed: int | Tensor | None) -> Tensor | None:
    return torch.tensor([seed], dtype=torch.int64) if isinstance(seed, int) else seed


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    schedule: int = 0,
    out_fp32: bool = False,
    **terms,
) -> tuple[Tensor, Tensor]:
    """out and lse of the kernel for q's dtype and head size, under one schedule; fresh results start as NaN."""
    out = torch.full((*q.shape[:3], v.shape[3]), float("nan"), dtype=torch.float32 if out_fp32 else q.dtype)
    lse = torch.full(q.shape[:3], float("nan"))
    terms["dropout_seed"] = seed_tensor(terms.get("dropout_seed"))
    lowered = lowered_of(mask, q, k)
    args = fill(AttentionArgs(), q, k, v, out, lse, lowered=lowered, **terms)
    kernels = library(padded_head(q.shape[3], v.shape[3]), q.dtype)
    build.call(kernels.attention_forward, schedule, args)
    return out, lse

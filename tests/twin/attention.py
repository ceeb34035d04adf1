"""Calls the sm_80 attention kernels on the twin with torch tensors."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastattn.masks import Mask, lower

from . import build
from .attention_args import AttentionArgs, AttentionBwdArgs, fill, operand

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


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    *,
    mask: Mask | None = None,
    schedule: int = 0,
    grads_fp32: bool = False,
    **terms,
) -> dict[str, Tensor]:
    """The gradients of every floating argument given, by name; dslopes and dsinks a batch and head."""
    B, Hq, Sq = q.shape[:3]
    terms["dropout_seed"] = seed_tensor(terms.get("dropout_seed"))
    lowered = lowered_of(mask, q, k)
    transposed = lowered.transpose() if lowered is not None and lowered.has_bits else None
    args = AttentionBwdArgs()
    fill(args, q, k, v, out, lse, lowered=lowered, transposed=transposed, **terms)

    def fresh(shape, dtype):
        return torch.full(shape, float("nan"), dtype=dtype)

    dtype = torch.float32 if grads_fp32 else q.dtype
    grads = {"q": fresh(q.shape, dtype), "k": fresh(k.shape, dtype), "v": fresh(v.shape, dtype)}
    args.dq, args.dk, args.dv = (operand(grads[name]) for name in "qkv")
    args.grads_fp32 = grads_fp32
    args.dout = operand(dout)
    args.dlse = None if dlse is None else dlse.data_ptr()
    exponent, delta = fresh((B, Hq, Sq), torch.float32), fresh((B, Hq, Sq), torch.float32)
    extents = torch.full((B, Hq, -(-Sq // 64), 4), -1, dtype=torch.int32)
    args.exponent, args.delta, args.extents = exponent.data_ptr(), delta.data_ptr(), extents.data_ptr()
    bias = terms.get("bias")
    if bias is not None:
        shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
        grads["bias"] = fresh(shape, torch.float32 if grads_fp32 else bias.dtype)
        args.dbias, args.dbias_fp32 = grads["bias"].data_ptr(), grads["bias"].dtype == torch.float32
        args.bias_B, args.bias_H, args.bias_Sq, args.bias_Sk = shape
    if terms.get("alibi_slopes") is not None:
        grads["alibi_slopes"] = fresh((B, Hq), torch.float32)
        args.dslopes = grads["alibi_slopes"].data_ptr()
    if terms.get("sinks") is not None:
        grads["sinks"] = fresh((B, Hq), torch.float32)
        terms_of_rows = fresh((B, Hq, Sq), torch.float32)
        args.dsinks, args.sink_terms = grads["sinks"].data_ptr(), terms_of_rows.data_ptr()
    build.call(library(padded_head(q.shape[3], v.shape[3]), q.dtype).attention_backward, schedule, args)
    return grads

"""The ops as torch sees them: fakes with true strides, autograd, vmap, the same for every namespace of ops.

autocast is applied above the ops, in problem.py: a registered rule would cast every float argument, LSE and
slopes too. Forward-mode AD never comes here (dispatch.py refuses it); double backward goes through the formula
of reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cuda_library, _library, _triton, reference  # noqa: F401  the op library has to be loaded first
from .eager import eager, full
from .masks.bits import Bits
from .masks.lower import _transpose

_FWD = tuple(
    "q k v scale band_lo band_hi lo hi block_offsets block_list bit_tiles bias alibi_slopes softcap dropout_p "
    "dropout_seed q_pos k_pos block_table kv_lengths k_scale v_scale sinks out_fp32".split()
)
_BelowAutograd = torch._C._AutoDispatchBelowAutograd
# The order of attention_bwd's `needs` and of its results, and where attention_fwd has them.
_DIFFERENTIABLE = ("q", "k", "v", "bias", "alibi_slopes", "sinks")
_POSITIONS = tuple(_FWD.index(name) for name in _DIFFERENTIABLE)


def output_like(q: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised [B, Hq, Sq, width] in q's order of heads and rows: the kernels' layout rule."""
    B, H, S, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty((B, S, H, width), dtype=dtype).transpose(1, 2)
    return q.new_empty((B, H, S, width), dtype=dtype)


def _fake_fwd(q, k, v, scale, *rest):
    out_fp32 = rest[-1]
    out = output_like(q, v.shape[3], torch.float32 if out_fp32 else q.dtype)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


# These are called only where nothing asks for a gradient: torch's default step for ops without a formula would be a
# sixth of the smallest call.
_LIBRARY = torch.library.Library("fastattn", "FRAGMENT")


def _fake_inference(q, k, v, *options):
    return output_like(q, v.shape[3], q.dtype)


def _fake_training(q, k, v, *options):
    return _fake_fwd(q, k, v, None, False)


def _fake_gradient(t: Tensor, needed: bool, dtype: torch.dtype) -> Tensor:
    return output_like(t, t.shape[3], dtype) if needed else t.new_empty(0, dtype=dtype)


def _fake_training_bwd(dout, q, k, v, out, lse, lo, hi, scale, is_causal, *needs):
    return tuple(_fake_gradient(t, needed, t.dtype) for t, needed in zip((q, k, v), needs))


def _fake_linear(x, weight, bias, activation):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


for _name, _fake in (
    ("attention_plain", _fake_inference),
    ("attention_masked", _fake_inference),
    ("attention_training", _fake_training),
    ("attention_training_bwd", _fake_training_bwd),
    ("linear_fwd", _fake_linear),
):
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "AutogradCPU")
    torch.library.register_fake(f"fastattn::{_name}", _fake)


def _fake_bwd(dout, dlse, q, k, v, out, lse, *rest):
    bias, slopes, sinks, needs, fp32 = rest[10], rest[11], *rest[-3:]

    def empty(t: Tensor | None, missing: Tensor, needed: bool) -> Tensor:
        like = missing if t is None else t
        dtype = torch.float32 if fp32 else like.dtype
        return like.new_empty(0 if t is None or not needed else t.shape, dtype=dtype)

    return (
        *(
            _fake_gradient(t, needed, torch.float32 if fp32 else t.dtype)
            for t, needed in zip((q, k, v), needs)
        ),
        empty(bias, q, needs[3]),
        empty(slopes, lse, needs[4]),
        empty(sinks, lse, needs[5]),
    )


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs[:3], *inputs[6:13], *inputs[15:23])
    ctx.values = (*inputs[3:6], *inputs[13:15])
    ctx.set_materialize_grads(False)


def _gradients_of(ops: Ops):
    def gradients(ctx, needs, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * len(needs)
        # As in the schema: q, k, v, the ranges, the blocks, the terms of the score.
        out, lse, q, k, v, lo, hi, block_offsets, block_list, bit_tiles, *terms = ctx.saved_tensors
        bias, slopes, seed, *rest = terms
        scale, band_lo, band_hi, softcap, dropout_p = ctx.values
        if dout is None:
            dout = torch.zeros_like(out)
        offsets_t = list_t = None
        if block_list is not None:
            n_q, n_k = ((t.shape[2] + 63) // 64 for t in (q, k))
            offsets_t, list_t = _transpose(Bits(block_offsets, block_list, bit_tiles), n_q, n_k)
        results = ops.backward(
            *(dout, dlse, q, k, v, out, lse, scale, band_lo, band_hi, lo, hi, block_offsets, block_list),
            *(
                offsets_t,
                list_t,
                bit_tiles,
                bias,
                slopes,
                softcap,
                dropout_p,
                seed,
                *rest,
                list(needs),
                False,
            ),
        )
        return tuple(g if needed else None for g, needed in zip(results, needs))

    return gradients


class Ops:
    """The attention ops of one namespace.

    fwd: the op itself. eager: see eager.py. functorch: for torch.func, whose grad and vjp refuse what register_autograd
    makes.
    functorch_bwd is set by transforms.py, which has the derivative of the backward.
    """

    def __init__(self, namespace: str):
        self.namespace = namespace
        self.fwd = getattr(torch.ops, namespace).attention_fwd.default
        self.bwd = getattr(torch.ops, namespace).attention_bwd.default
        fwd, gradients = self.fwd, _gradients_of(self)
        backward = full(gradients, _POSITIONS, len(_FWD))
        torch.library.register_fake(f"{namespace}::attention_fwd")(_fake_fwd)
        torch.library.register_fake(f"{namespace}::attention_bwd")(_fake_bwd)
        torch.library.register_autograd(f"{namespace}::attention_fwd", backward, setup_context=_setup)

        class FunctorchAttention(torch.autograd.Function):
            generate_vmap_rule = True

            @staticmethod
            def forward(*arguments):
                return fwd(*arguments)

            setup_context = staticmethod(_setup)

        FunctorchAttention.backward = staticmethod(backward)
        self.functorch, self.eager = FunctorchAttention.apply, eager(fwd, _setup, gradients, _POSITIONS)

    def backward(self, *arguments):
        """attention_bwd, by the shortest way that this context allows."""
        if torch.compiler.is_compiling():
            return self.bwd(*arguments)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return self.functorch_bwd(*arguments)
        if torch.is_grad_enabled():  # a second derivative is asked for
            return self.bwd(*arguments)
        with _BelowAutograd():
            return self.bwd(*arguments)


_triton.define("attention_fwd", "attention_bwd")
_triton.implement("attention_fwd", "attention")
_triton.implement("attention_bwd", "attention_bwd")

# By the name of the kernel in dispatch.py. A further backend registers its namespace here.
OPS: dict[str, Ops] = {}


def register(kernel: str, namespace: str) -> Ops:
    """Fakes and autograd for the attention ops of a namespace; `kernel` is its name in dispatch.py."""
    OPS[kernel] = Ops(namespace)
    return OPS[kernel]


register("cpu", "fastattn")
register("triton", _triton.NAMESPACE)
if _cuda_library.loaded():
    register("cuda", _cuda_library.NAMESPACE)

"""What torch's transforms need of the attention ops: second derivatives and vmap.

The derivative of attention_bwd is taken of the formula in reference.py, at any order: correct and slower, as no
kernel of second derivatives exists. vmap folds its dimension into the batch, so a mapped call runs one kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .masks.lower import Lowered
from .ops import _DIFFERENTIABLE, _FWD, OPS, Ops

_OPTIONS = (*_FWD[3:10], "block_offsets_t", "block_list_t", *_FWD[10:23])
_BWD = ("dout", "dlse", "q", "k", "v", "out", "lse", *_OPTIONS, "needs", "grads_fp32")


def _dense_mask(given: dict) -> Tensor | None:
    q, k = given["q"], given["k"]
    ranges = {
        n: given[n] for n in ("band_lo", "band_hi", "lo", "hi", "block_offsets", "block_list", "bit_tiles")
    }
    lowered = Lowered(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device, **ranges)
    return None if lowered.is_everything else lowered.to_dense()


def _setup(ctx, inputs, output):
    given = dict(zip(_BWD, inputs))
    names = [n for n, x in given.items() if isinstance(x, Tensor)]
    ctx.save_for_backward(*(given[n] for n in names))
    ctx.names = names
    ctx.plain = {n: x for n, x in given.items() if n not in names}
    ctx.set_materialize_grads(False)


def _derivative_of_backward(ctx, *upstream):
    """The vector-Jacobian product of (dout, dlse, q, k, v, bias, slopes, sinks) -> gradients."""
    given = {**ctx.plain, **dict(zip(ctx.names, ctx.saved_tensors))}
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = {}
        for n in ("dout", "dlse", *_DIFFERENTIABLE):
            if given[n] is not None:
                t = given[n].view_as(given[n])
                inputs[n] = t if t.requires_grad else t.requires_grad_()
        out, lse = reference.attention(
            *(inputs[n] for n in ("q", "k", "v")),
            mask=_dense_mask(given),
            bias=inputs.get("bias"),
            alibi_slopes=inputs.get("alibi_slopes"),
            sinks=inputs.get("sinks"),
            softcap=given["softcap"] or None,
            scale=given["scale"],
            dropout_p=given["dropout_p"],
            dropout_seed=given["dropout_seed"],
            q_pos=given["q_pos"],
            k_pos=given["k_pos"],
            return_lse=True,
        )
        wanted = [n for n, need in zip(_DIFFERENTIABLE, given["needs"]) if need]
        results, cotangents = [out], [inputs["dout"].to(out.dtype)]
        if "dlse" in inputs:
            results.append(lse)
            cotangents.append(inputs["dlse"].to(lse.dtype))
        first = torch.autograd.grad(
            results, [inputs[n] for n in wanted], cotangents, create_graph=True, materialize_grads=True
        )
        pairs = [(g, upstream[_DIFFERENTIABLE.index(n)]) for n, g in zip(wanted, first)]
        pairs = [(g, up.to(g.dtype)) for g, up in pairs if up is not None and g.requires_grad]
        needed = [n for n, need in zip(_BWD, ctx.needs_input_grad) if need and n in inputs]
        second = (
            torch.autograd.grad(
                [g for g, _ in pairs],
                [inputs[n] for n in needed],
                [up for _, up in pairs],
                create_graph=further,
                allow_unused=True,
            )
            if pairs and needed
            else [None] * len(needed)
        )
    grads = dict(zip(needed, second))
    return tuple(grads.get(n) for n in _BWD)


# Arguments whose first dimension is the batch, or 1 where they are the same for all of it.
_BATCHED = frozenset(
    ("dout", "dlse", "q", "k", "v", "out", "lse", "lo", "hi", "block_offsets", "block_offsets_t", "bias")
    + ("alibi_slopes", "q_pos", "k_pos")
)


def _fold(t: Tensor, dim: int | None, n: int, B: int) -> Tensor:
    """vmap's dimension into the batch: [n * B, ...], or as it is where every batch item has the same."""
    if dim is None:
        if t.shape[0] == 1 or t.stride(0) == 0:
            return t[:1]
        t = t.unsqueeze(0).expand(n, *t.shape)
    else:
        t = t.movedim(dim, 0)
        if t.shape[1] == 1:  # one for the whole batch, of every item that is mapped over
            t = t.expand(n, B, *t.shape[2:])
    return t.reshape(n * t.shape[1], *t.shape[2:])


def _mapped(op, names: tuple[str, ...], operands: tuple[str, ...], info, in_dims, args):
    n, given, dims = info.batch_size, dict(zip(names, args)), dict(zip(names, in_dims))
    mapped = {name for name, dim in dims.items() if dim is not None and isinstance(given[name], Tensor)}
    reduced = any(
        given.get("needs", [False])[3:]
    )  # gradients that sum over the batch, one each for every item
    if not mapped <= _BATCHED or reduced or n == 0:
        calls = [
            op(*(given[m].select(dims[m], i) if m in mapped else given[m] for m in names)) for i in range(n)
        ]
        results = tuple(torch.stack(column) for column in zip(*calls))
        return results, (0,) * len(results)
    folded, q = dict(given), given["q"]
    B = (q if dims["q"] is None else q.movedim(dims["q"], 0)[0]).shape[0]
    for name in _BATCHED & given.keys():
        t = given[name]
        if t is None:
            continue
        if name in operands and dims[name] is None:  # the operands always have the whole batch
            folded[name] = t.unsqueeze(0).expand(n, *t.shape).reshape(n * t.shape[0], *t.shape[1:])
        else:
            folded[name] = _fold(t, dims[name], n, B)
    results = op(*(folded[m] for m in names))
    unfolded = tuple(
        r.unflatten(0, (n, -1)) if r.dim() > 1 else r.unsqueeze(0).expand(n, *r.shape) for r in results
    )
    return unfolded, (0,) * len(results)


def register(ops: Ops) -> None:
    """The derivative of the backward and the vmap rules for the attention ops of a namespace."""
    name, fwd, bwd = ops.namespace, ops.fwd, ops.bwd
    torch.library.register_autograd(f"{name}::attention_bwd", _derivative_of_backward, setup_context=_setup)

    class FunctorchAttentionBackward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments):
            return bwd(*arguments)

        setup_context = staticmethod(_setup)
        backward = staticmethod(_derivative_of_backward)

    ops.functorch_bwd = FunctorchAttentionBackward.apply

    @torch.library.register_vmap(f"{name}::attention_fwd")
    def _(info, in_dims, *args):
        return _mapped(fwd, _FWD, ("q", "k", "v"), info, in_dims, args)

    @torch.library.register_vmap(f"{name}::attention_bwd")
    def _(info, in_dims, *args):
        return _mapped(bwd, _BWD, ("dout", "dlse", "q", "k", "v", "out", "lse"), info, in_dims, args)


for _ops in OPS.values():
    register(_ops)

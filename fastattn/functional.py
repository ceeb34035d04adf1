"""What users call: fused attention with torch's semantics, and `explain`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _info, _triton, ops, reference, short
from .dispatch import Choice, choose, features
from .masks import Causal, Mask, Prepared
from .masks.lower import Lowered, lower, narrowed
from .problem import Problem, attention_problem

_masked = torch.ops.fastattn.attention_masked.default
_BelowAutograd = torch._C._AutoDispatchBelowAutograd


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | Mask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` on fastattn's kernels.

    Args:
        query: [..., Hq, Sq, D]; float32, bfloat16, float16 (kernels) or float64 (reference). Any rank from 2 on.
        key: [..., Hkv, Sk, D]. Leading dimensions broadcast.
        value: [..., Hkv, Sk, Dv].
        attn_mask: bool (True is visible) or additive, in query's dtype or float32, broadcastable to
            [..., Hq, Sq, Sk]; or a mask of `fastattn.masks`. Differentiable when additive.
        dropout_p: probability of dropping a weight, in [0, 1). Drawn from torch's generator.
        is_causal: row i sees keys 0..i (upper-left, as torch). Not together with attn_mask.
        scale: factor on the scores; 1 / sqrt(D) unless given.
        enable_gqa: allows Hq to be a multiple of Hkv; query head h reads key head h // (Hq // Hkv).
        backend: "cpu", "triton", "cuda" or "reference" forces one; None takes the first that serves the call.

    Returns:
        [..., Hq, Sq, Dv] in query's dtype. Rows that see nothing are 0.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape or value, named.
        RuntimeError: a forced backend that cannot run the call, with its reason.

    Method: FlashAttention's online softmax (arXiv:2205.14135, arXiv:2307.08691), skipping all that a mask hides.
    """
    if dropout_p == 0.0 and backend is None:
        out = short.attend(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        if out is not None:
            return out
    problem = attention_problem(
        query,
        key,
        value,
        mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout_p,
        backend=backend,
        gqa=enable_gqa,
        names=("query", "key", "value"),
        mask_name="attn_mask",
    )
    return _run(problem)[0]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | Mask | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention with everything the kernels serve. `fastattn.reference.attention` is its specification.

    Args:
        q: [B, Hq, Sq, D] (also [B, Sq, D] and higher ranks, as in scaled_dot_product_attention).
        k: [B, Hkv, Sk, D]; Hq is a multiple of Hkv, query head h reads key head h // (Hq // Hkv).
        v: [B, Hkv, Sk, Dv].
        mask: a mask of `fastattn.masks`, a bool tensor (True is visible) or an additive one, broadcastable to
            [B, Hq, Sq, Sk].
        bias: added to the scores; q's dtype or float32, broadcastable to [B, Hq, Sq, Sk]; -inf hides, and
            blocks that it hides whole cost nothing on the CPU.
        alibi_slopes: float32 [Hq] or [B, Hq]; adds -slope * |i - j|.
        softcap: scores become softcap * tanh(scores / softcap), before bias.
        sinks: [Hq]; a key of that logit and value 0.
        scale: factor on q.k; 1 / sqrt(D) unless given.
        dropout_p: probability of dropping a weight, in [0, 1).
        dropout_seed: an int or int64 tensor that fixes the dropout mask; else drawn with `generator`.
        return_lse: also return the log-sum-exp of each row, float32 [B, Hq, Sq], natural logarithm, -inf for
            rows that see nothing.
        return_weights: also return the weights [B, Hq, Sq, Sk] (S x S memory), as they multiply v.
        out: a tensor for the result; not while an argument requires a gradient.
        backend: as in scaled_dot_product_attention.

    Returns:
        out [B, Hq, Sq, Dv]; with return_lse or return_weights a tuple (out, lse, weights) of what was asked for.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape or value, named.
        RuntimeError: a forced backend that cannot run the call, with its reason.
    """
    problem = attention_problem(
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
        scale=scale,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        generator=generator,
        return_lse=return_lse,
        return_weights=return_weights,
        out=out,
        backend=backend,
    )
    results = _run(problem)
    if out is not None:
        results = (out.copy_(results[0]), *results[1:])
    return results[0] if len(results) == 1 else results


def _lower(p: Problem, kernel: str = "reference") -> Lowered:
    """The call's mask as a kernel reads it: without what the bias hides whole, which the reference visits too."""
    mask = Causal() if p.is_causal else p.mask
    lowered = lower(mask, p.B, p.Hq, p.Hkv, p.Sq, p.Sk, p.device)
    return lowered if p.bias is None or kernel == "reference" else narrowed(lowered, p.bias)


def _run(p: Problem) -> tuple[Tensor, ...]:
    choice = choose(p)
    name = choice.kernel.name
    lowered = _lower(p, name)
    p.draw_seed()
    out, lse = _run_reference(p, lowered) if name == "reference" else _run_op(p, lowered, name)
    results = [p.restore(out, p.Sq, p.Dv)]
    if p.return_lse:
        results.append(p.restore(lse, p.Sq))
    if p.return_weights:
        results.append(p.restore(_weights(p), p.Sq, p.Sk))
    return tuple(results)


def _rows_adjacent(t: Tensor) -> Tensor:
    return t if t.stride(3) == 1 or t.shape[3] <= 1 else t.contiguous()


def _total_bias(p: Problem, lowered: Lowered) -> Tensor | None:
    mask_bias = lowered.bias
    if mask_bias is not None and isinstance(p.mask, Tensor):
        mask_bias = p.mask  # not expanded: its gradient then has its own shape, summed by the kernel
    if mask_bias is None or p.bias is None:
        return mask_bias if p.bias is None else p.bias
    return mask_bias.float() + p.bias.float()


def _run_op(p: Problem, m: Lowered, kernel: str) -> tuple[Tensor, Tensor | None]:
    """out and lse; None for it in inference, where nobody asks."""
    bias = _total_bias(p, m)
    alibi = None
    if p.alibi_slopes is not None:
        alibi = p.alibi_slopes.float().reshape(-1, p.Hq)
    grad = p.needs_grad()
    sinks = None if p.sinks is None else p.sinks.float().contiguous()
    arguments = (
        _rows_adjacent(p.q),
        _rows_adjacent(p.k),
        _rows_adjacent(p.v),
        p.scale,
        m.band_lo,
        m.band_hi,
        m.lo,
        m.hi,
        m.block_offsets,
        m.block_list,
        m.bit_tiles,
        bias,
        alibi,
        p.softcap or 0.0,
        p.dropout_p,
        p.dropout_seed,
        None,
        None,
        None,
        None,
        None,
        None,
        sinks,
        False,
    )
    op = ops.OPS[kernel]
    if torch.compiler.is_compiling():
        return op.fwd(*arguments)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return op.functorch(*arguments)
    if grad:
        return op.eager(*arguments)
    if kernel == "cpu" and not (p.return_lse or p.dropout_p or p.softcap) and bias is alibi is sinks is None:
        return _masked(*arguments[:11]), None
    with _BelowAutograd():
        return op.fwd(*arguments)


def _run_reference(p: Problem, m: Lowered) -> tuple[Tensor, Tensor]:
    return reference.attention(p.q, p.k, p.v, return_lse=True, **_reference_arguments(p, m))


def _reference_arguments(p: Problem, m: Lowered) -> dict:
    return dict(
        mask=None if m.is_everything else m.to_dense(),
        bias=_total_bias(p, m),
        alibi_slopes=p.alibi_slopes,
        softcap=p.softcap,
        sinks=p.sinks,
        scale=p.scale,
        dropout_p=p.dropout_p,
        dropout_seed=p.dropout_seed,
    )


def _weights(p: Problem) -> Tensor:
    """The weights by the reference formula; the output never waits for them."""
    _, weights = reference.attention(p.q, p.k, p.v, return_weights=True, **_reference_arguments(p, _lower(p)))
    return weights


class Explanation:
    """What a call would run and why; `str()` is for people, the fields for programs.

    kernel: the name of the kernel. refusals: (kernel, reason) of those before it. mask: how the mask was lowered.
    notes: copies and casts.
    """

    def __init__(self, p: Problem, choice: Choice, lowered: Lowered):
        self.kernel = choice.kernel.name
        self.refusals = choice.refusals
        self.notes = list(p.notes)
        for name, t in (("q", p.q), ("k", p.k), ("v", p.v)):
            if self.kernel != "reference" and t.stride(3) != 1 and t.shape[3] > 1:
                self.notes.append(f"{name} is copied once: its last stride is {t.stride(3)}, not 1")
        if p.return_weights:
            self.notes.append(
                "the weights come from the reference formula, S x S memory; the output does not"
            )
        if lowered.waits and not isinstance(p.mask, Prepared):
            self.notes.append(
                f"the host waits for the device at each call, to learn {'; '.join(lowered.waits)}; prepare the mask "
                "once and it waits no more"
            )
        self.detail = ""
        if p.device.type == "meta":
            self.notes.append("meta tensors have no values: nothing is computed, and a mask is not read")
        elif self.kernel == "cpu":
            self.detail = f"{_info.isa()} ({_info.isa_reason()})"
        elif self.kernel == "triton":
            self.detail = _triton.explain_attention(p, lowered)
        self.call = features(p)
        self.mask = describe(lowered)

    def __str__(self) -> str:
        lines = [
            f"call     {self.call}",
            f"kernel   {self.kernel}" + (f": {self.detail}" if self.detail else ""),
        ]
        lines += [f"refused  {name}: {reason}" for name, reason in self.refusals]
        lines.append(f"mask     {self.mask}")
        lines += [f"note     {note}" for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__


def describe(m: Lowered) -> str:
    """A lowered mask in a line."""
    if m.is_everything:
        return "none" + (", additive bias" if m.bias is not None else "")
    parts = []
    if m.band_lo is not None or m.band_hi is not None:
        lo = "" if m.band_lo is None else f"i{m.band_lo:+d} <= "
        hi = "" if m.band_hi is None else f" <= i{m.band_hi:+d}"
        parts.append(f"band {lo}j{hi}")
    if m.lo is not None or m.hi is not None:
        parts.append("a range of keys a row")
    if m.block_list is not None:
        parts.append(f"{m.block_list.shape[0]} granules of 64 x 64, {m.bit_tiles.shape[0]} unique bit tiles")
    if m.bias is not None:
        parts.append("additive bias")
    return ", ".join(parts)


def explain(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, **arguments) -> Explanation:
    """Which kernel `attention` with these arguments runs, and why each other one refused; runs and draws nothing.

    Takes the arguments of `attention`, and `is_causal` of scaled_dot_product_attention in place of a mask.

    Raises what attention raises.
    """
    for name in arguments:
        if name not in attention.__kwdefaults__:
            raise TypeError(
                f"explain() got an unexpected keyword argument {name!r}; it takes those of attention, and is_causal"
            )
    p = attention_problem(q, k, v, is_causal=is_causal, **arguments)
    choice = choose(p)
    return Explanation(p, choice, _lower(p, choice.kernel.name))

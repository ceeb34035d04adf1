"""`sdpa_patch()`: code that calls `F.scaled_dot_product_attention` on fastattn's kernels, while it is active.

For models whose attention is neither a module that `swap` knows nor transformers' interface: timm, diffusers, own
code. The function itself is replaced, in torch.nn.functional and in every module that had imported it by name.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import has_torch_function

from . import functional
from .dispatch import KERNEL_DTYPES, choose
from .integrations.own_calls import switches
from .masks import Causal, CausalLowerRight, Mask
from .problem import attention_problem

_original = torch.nn.functional.scaled_dot_product_attention
_lock = threading.RLock()
_active: list[SdpaPatch] = []
# Where the function stands by name, found once a module: looking through all of them takes some 10 ms.
_places: list[tuple[dict, str]] = []
_searched: set[str] = set()
_fast_path: bool | None = None


# (device, dtype) -> why there is no kernel, or None; a dict and no functools.cache, which Dynamo looks through.
_kernels: dict[tuple[torch.device, torch.dtype], str | None] = {}


def _no_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    key = (device, dtype)
    if key not in _kernels:
        q = torch.empty(1, 1, 1, 64, dtype=dtype, device=device)
        choice = choose(attention_problem(q, q, q))
        served = choice.kernel.name != "reference"
        _kernels[key] = None if served else "; ".join(reason for _, reason in choice.refusals)
    return _kernels[key]


def _refusal(q, k, v, attn_mask) -> str | None:
    """Why a call is passed on to torch: fastattn would raise, or have no kernel."""
    if has_torch_function((q, k, v, attn_mask)):
        return "a tensor subclass"
    if not isinstance(q, Tensor) or q.is_nested or q.layout != torch.strided:
        return "not a strided tensor"
    if q.dtype not in KERNEL_DTYPES:
        return f"no kernel for {q.dtype}"
    return _no_kernel(q.device, q.dtype)


def _causal_mask(bias: CausalBias, q: Tensor, k: Tensor) -> Mask:
    if (bias.seq_len_q, bias.seq_len_kv) != (q.shape[-2], k.shape[-2]):
        raise ValueError(
            f"attn_mask is a CausalBias of {bias.seq_len_q} x {bias.seq_len_kv}; the call has {q.shape[-2]} query "
            f"rows and {k.shape[-2]} keys"
        )
    return Causal() if bias.variant == CausalVariant.UPPER_LEFT else CausalLowerRight()


def _patched(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, served by fastattn while sdpa_patch() is active."""
    mask = attn_mask
    if isinstance(attn_mask, CausalBias):
        if is_causal:
            raise ValueError("attn_mask is a CausalBias and is_causal is True; pass one of them")
        mask = _causal_mask(attn_mask, query, key)
    reason = _refusal(query, key, value, None if isinstance(mask, Mask) else mask)
    if not torch.compiler.is_compiling():
        for patch in _active:
            patch._calls[reason] += 1
    if reason is None:
        return functional.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale, enable_gqa
        )
    if isinstance(attn_mask, CausalBias):
        # Its own way into the function compares with what now stands in torch.nn.functional.
        attn_mask = attn_mask._materialize(query.device)
    return _original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _search(function: Callable) -> None:
    """Notes the places of `function` in modules not searched yet, which have it from an import by name."""
    for name, module in list(sys.modules.items()):
        if name in _searched or name.startswith("torch._C") or name == __name__:
            continue
        _searched.add(name)
        with contextlib.suppress(TypeError):
            space = vars(module)
            _places.extend((space, at) for at, value in list(space.items()) if value is function)


def _put(old: Callable, new: Callable) -> None:
    for space, name in _places:
        if space.get(name) is old:
            space[name] = new


class SdpaPatch(contextlib.ContextDecorator):
    """What `sdpa_patch()` returns. calls: how many it served. passed_on: {reason: calls} left to torch."""

    def __init__(self, model: torch.nn.Module | None = None):
        self._calls: Counter[str | None] = Counter()
        self._model = model
        self._switched: list[list[tuple[object, str, object]]] = []

    @property
    def calls(self) -> int:
        return self._calls[None]

    @property
    def passed_on(self) -> dict[str, int]:
        return {reason: n for reason, n in self._calls.items() if reason is not None}

    def __enter__(self) -> SdpaPatch:
        global _fast_path
        with _lock:
            if not _active:
                _search(_original)
                _put(_original, _patched)
                # nn.TransformerEncoderLayer and nn.MultiheadAttention would leave for a fused path of torch's own.
                _fast_path = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            _active.append(self)
            wanted = [] if self._model is None else switches(self._model)
            self._switched.append([(holder, name, getattr(holder, name)) for holder, name, _ in wanted])
            for holder, name, value in wanted:
                setattr(holder, name, value)
        return self

    def __exit__(self, *error) -> None:
        with _lock:
            for holder, name, value in self._switched.pop():
                setattr(holder, name, value)
            _active.remove(self)
            if not _active:
                _search(_patched)  # of modules imported meanwhile
                _put(_patched, _original)
                torch.backends.mha.set_fastpath_enabled(_fast_path)

    def __str__(self) -> str:
        lines = [f"fastattn.sdpa_patch: {self.calls} calls of scaled_dot_product_attention served"]
        lines += [f"passed on to torch, {n}: {reason}" for reason, n in self.passed_on.items()]
        return "\n".join(lines)

    __repr__ = __str__


def sdpa_patch(
    function: Callable | None = None, *, model: torch.nn.Module | None = None
) -> SdpaPatch | Callable:
    """Serves `torch.nn.functional.scaled_dot_product_attention` by fastattn, as a context manager or decorator.

        with fastattn.sdpa_patch() as patch:
            model(x).loss.backward()
        print(patch)

        @fastattn.sdpa_patch
        def step(x): ...

    Served are calls through torch.nn.functional and through names imported from it earlier into modules; not
    references kept elsewhere (a default argument, an attribute of an object). torch's CausalBias is understood.
    nn.MultiheadAttention and nn.TransformerEncoderLayer call the function too: their fused path, which does not,
    is switched off meanwhile. Calls that fastattn has no kernel for (tensor subclasses, nested tensors, float64)
    go on to torch, and the patch counts them with the reason.

    Scope: the whole process, every thread, from the first patch that is entered to the last one that is left.
    The backward of activation checkpointing runs the forward again: keep it inside, or the recomputation is
    torch's, with another dropout mask. `torch.compile` notices and recompiles.

    Args:
        function: what to decorate, for use without parentheses.
        model: one whose switches are set meanwhile so that it calls the function, and put back at the end: timm's
            `fused_attn`, which some of its models leave off; of diffusers an attention backend other than "native"
            and the processor that computes a formula.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    patch = SdpaPatch(model)
    return patch if function is None else patch(function)

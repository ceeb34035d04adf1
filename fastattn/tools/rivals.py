"""What else is installed that computes the same thing: found lazily, called at its best, or absent with a
reason.

A rival is asked for each row: it answers with a callable that takes nothing, or raises Absent. Nothing is
imported before it is asked for, and a rival that fails while it compiles or runs its first call is absent
for that row, with its error as the reason.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .cases import Case, dense_mask, library, our_call, row_call, torch_arguments

# Beyond this an eager attention, which keeps all scores, takes longer than everything else in a bench.
LARGEST_SCORES = 1 << 29


class Absent(Exception):
    """A rival cannot run a row here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Rival:
    """name: what tables show. make: case -> callable without arguments, raising Absent."""

    name: str
    make: Callable[[Case], Callable[[], Any]]


def _module(name: str, package: str | None = None) -> Any:
    if importlib.util.find_spec(name.split(".")[0]) is None:
        raise Absent(f"{package or name} is not installed")
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise Absent(f"{package or name} does not import: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _attention_only(case: Case, *refused: str, training: bool = True) -> dict[str, Any]:
    if case.row.op != "attention":
        raise Absent("it has no such operation")
    if case.row.shape.rank != 4:
        raise Absent("it takes 4-D inputs only")
    for feature in refused:
        if any(name.startswith(feature) for name in case.row.features):
            raise Absent(f"it has no {feature}")
    if case.row.training and not training:
        raise Absent("it has no backward here")
    return case.inputs


def _on_gpu(case: Case) -> None:
    if not any(isinstance(x, torch.Tensor) and x.is_cuda for x in case.inputs.values()):
        raise Absent("it needs a GPU")


def _backward(call: Callable[[], torch.Tensor], case: Case) -> Callable[[], Any]:
    if not case.row.training:
        return call
    inputs = case.inputs
    return lambda: torch.autograd.grad(call(), inputs["needs"], inputs["dout"])


def _compile(function: Callable) -> Callable:
    """Compiled for this row's shapes alone: past a few recompilations torch.compile would fall back
    silently."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _flex(case: Case) -> Callable[[], Any]:
    inputs = _attention_only(case, "dropout", "bias", "decode", training=case.inputs["q"].is_cuda)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    if case.row.shape.sq < 128:
        raise Absent("fewer than 128 query rows")
    from torch.nn.attention import flex_attention as module

    flex, create_block_mask = _compile(module.flex_attention), module.create_block_mask
    dense = dense_mask(case.row, q.device.type)
    block_mask = None
    if dense is not None:
        shape = (dense.shape[0], dense.shape[1], case.row.shape.sq, case.row.shape.sk)
        table = dense.expand(shape).contiguous()
        batched, headed = shape[0] > 1, shape[1] > 1

        def visible(b, h, i, j):
            return table[b if batched else 0, h if headed else 0, i, j]

        block_mask = create_block_mask(
            visible, shape[0] if batched else None, shape[1] if headed else None, *shape[2:], device=q.device
        )
    grouped = case.row.shape.hq != case.row.shape.hkv
    return _backward(lambda: flex(q, k, v, block_mask=block_mask, enable_gqa=grouped), case)


def _sdpa(backend: str) -> Callable[[Case], Callable[[], Any]]:
    """One backend of torch's scaled_dot_product_attention, alone."""

    def make(case: Case) -> Callable[[], Any]:
        inputs = _attention_only(case, "bias", "dropout")
        _on_gpu(case)
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        arguments = torch_arguments(case.row, q.device.type)

        def forward():
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, **arguments)

        return _backward(forward, case)

    return make


def _eager(case: Case) -> Callable[[], Any]:
    """transformers' eager attention: the formula that a model runs when nothing is chosen."""
    inputs = _attention_only(case, "dropout", "bias")
    shape = case.row.shape
    if 4 * shape.b * shape.hq * shape.sq * shape.sk > LARGEST_SCORES:
        raise Absent(f"its scores would be more than {LARGEST_SCORES >> 20} MiB")
    llama = _module("transformers.models.llama.modeling_llama", "transformers")
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    module = torch.nn.Module()
    module.num_key_value_groups = case.row.shape.hq // case.row.shape.hkv
    module.training = False
    dense = dense_mask(case.row, q.device.type)
    mask = None
    if dense is not None:
        lowest = torch.finfo(q.dtype).min
        mask = torch.zeros(dense.shape, dtype=q.dtype, device=q.device).masked_fill_(~dense, lowest)
    scale = q.shape[-1] ** -0.5
    return _backward(
        lambda: llama.eager_attention_forward(module, q, k, v, mask, scale)[0].transpose(1, 2), case
    )


def _compiled_rows(case: Case) -> Callable[[], Any]:
    """torch's own row operation, fused by torch.compile."""
    if "theirs" not in case.inputs:
        raise Absent("it is measured on row operations only")
    return _compile(case.inputs["theirs"])


def _flash(case: Case) -> Callable[[], Any]:
    inputs = _attention_only(case, "bias", "decode")
    _on_gpu(case)
    flash = _module("flash_attn", "flash-attn")
    if case.row.mask not in ("none", "causal"):
        raise Absent("it has no such mask")
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    causal = case.row.mask == "causal"
    return _backward(lambda: flash.flash_attn_func(q, k, v, causal=causal).transpose(1, 2), case)


def _xformers(case: Case) -> Callable[[], Any]:
    inputs = _attention_only(case, "bias", "decode", "dropout")
    _on_gpu(case)
    ops = _module("xformers.ops", "xformers")
    if case.row.mask not in ("none", "causal") or case.row.shape.hq != case.row.shape.hkv:
        raise Absent("it has no such mask or head grouping")
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    bias = ops.LowerTriangularMask() if case.row.mask == "causal" else None
    return _backward(lambda: ops.memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2), case)


def _row_function(
    package: str, module: str, functions: dict[str, str]
) -> Callable[[Case], Callable[[], Any]]:
    def make(case):
        if case.row.op not in functions or case.row.training:
            raise Absent("it is measured on its forward row operations only")
        _on_gpu(case)
        function = getattr(_module(module, package), functions[case.row.op])
        x, weight = case.inputs["x"], case.inputs.get("weight")
        return (lambda: function(x)) if case.row.op == "softmax" else (lambda: function(x, weight, 1e-6))

    return make


def _ours_in_cuda(case: Case) -> Callable[[], Any]:
    """This package's CUDA C++ kernels, which dispatch leaves alone until they are measured ahead."""
    _on_gpu(case)
    if case.row.op != "attention":
        return row_call(case, functools.partial(library(case.row.op), backend="cuda"))
    q, k, v = (case.inputs[name] for name in "qkv")
    function, arguments = our_call(case.row, case.row.spelling, (q, k), q.device.type, richer=True)
    return _backward(lambda: function(q, k, v, backend="cuda", **arguments), case)


RIVALS = (
    Rival("ours in CUDA C++", _ours_in_cuda),
    Rival("flex_attention", _flex),
    Rival("sdpa cudnn", _sdpa("CUDNN_ATTENTION")),
    Rival("sdpa flash", _sdpa("FLASH_ATTENTION")),
    Rival("sdpa efficient", _sdpa("EFFICIENT_ATTENTION")),
    Rival("transformers eager", _eager),
    Rival("torch.compile", _compiled_rows),
    Rival("flash-attn", _flash),
    Rival("xformers", _xformers),
    Rival(
        "liger",
        _row_function(
            "liger-kernel",
            "liger_kernel.transformers.functional",
            {"softmax": "liger_softmax", "rms_norm": "liger_rms_norm"},
        ),
    ),
    Rival("quack", _row_function("quack-kernels", "quack", {"softmax": "softmax", "rms_norm": "rmsnorm"})),
)


def _cold_compiler():
    """Compilation from scratch: what is read back from a cache on disk would not be a compile time."""
    import torch._inductor.config

    return torch._inductor.config.patch(force_disable_caches=True)


def variants(
    case: Case, rivals: tuple[Rival, ...] = RIVALS
) -> tuple[dict[str, Callable[[], Any]], dict[str, str], dict[str, float]]:
    """(callables by rival, reasons by absent rival, seconds of set-up by rival) for one row.

    Set-up is everything before a second call: import, compilation, the rival's own mask, the first call.
    """
    found, absent, setup = {}, {}, {}
    for rival in rivals:
        if case.row.beside and rival.name not in case.row.beside:
            continue
        start = time.perf_counter()
        try:
            with warnings.catch_warnings(), torch.set_grad_enabled(case.row.training), _cold_compiler():
                warnings.simplefilter("ignore")
                call = rival.make(case)
                call()
        except Absent as reason:
            absent[rival.name] = str(reason)
        except Exception as error:
            absent[rival.name] = f"it failed here: {_first_line(error)}"
        else:
            found[rival.name] = call
            setup[rival.name] = time.perf_counter() - start
    return found, absent, setup

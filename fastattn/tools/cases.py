"""A row of the workload table turned into inputs and callables: ours, torch's, and what a promise compares
them with.

torch is called in the way that serves it best: `is_causal=True` for causal, a [B, 1, 1, Sk] tensor for
padding, a boolean tensor for other masks, `enable_gqa=True` for grouped heads. Inputs are random, the same
for every variant, and seeded by the row's name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .families import FAMILIES
from .workloads import MODULE_OPS, Limit, Workload

# More bytes than a last-level cache holds.
_PAST_CACHES = 1 << 28


class NotAvailable(Exception):
    """This version of fastattn, or this machine, cannot run the row; the message says why."""


@dataclasses.dataclass
class Case:
    """One row ready to run.

    variants: name -> callable without arguments; "ours" and "torch" where they exist.
    limits: the promises that need the inputs to be stated, added to the row's own.
    inputs: named tensors and settings, for rivals. visible: share of the 64 x 64 granules that the mask
    shows.
    kernel: the name of the kernel that serves ours, or None where there is no choice to explain.
    facts: what else the result of the row holds.
    """

    row: Workload
    variants: dict[str, Callable[[], Any]]
    inputs: dict[str, Any]
    limits: tuple[Limit, ...] = ()
    visible: float = 1.0
    kernel: str | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def build(row: Workload, device: str = "cpu") -> Case:
    """Make the inputs and callables of one row. Raises NotAvailable with the reason where ours cannot run."""
    if row.op == "attention":
        case = _attention(row, device)
    elif row.op in ("mask-build", "mask-scan"):
        case = _mask_lowering(row, device)
    elif row.op == "model":
        from . import models  # it needs transformers

        case = models.case(row, device)
    elif row.op in MODULE_OPS:
        from . import module_cases

        case = module_cases.build(row, device)
    else:
        case = _row_op(row, device)
    return dataclasses.replace(case, limits=row.limits + case.limits)


def library(name: str) -> Callable:
    """`fastattn.<name>`, or NotAvailable."""
    import fastattn

    function = getattr(fastattn, name, None)
    if function is None:
        raise NotAvailable(f"fastattn.{name} is not in this version ({fastattn.__version__})")
    return function


def _generator(row: Workload) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(row.name.encode()))


def attention_inputs(row: Workload, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, k and v of a row, in its dtype."""
    generator, shape = _generator(row), row.shape

    def draw(heads, length, size):
        x = torch.randn(shape.b, heads, length, size, generator=generator).to(device, row.torch_dtype)
        if shape.rank == 3:
            return x.flatten(0, 1)
        return x.unflatten(0, (1, -1)) if shape.rank == 5 else x

    return (
        draw(shape.hq, shape.sq, shape.d),
        draw(shape.hkv, shape.sk, shape.d),
        draw(shape.hkv, shape.sk, shape.dv),
    )


def dense_mask(row: Workload, device: str = "cpu") -> torch.Tensor | None:
    """The row's mask as a bool tensor broadcastable to [B, Hq, Sq, Sk], or None; made without fastattn
    where the family has a formula."""
    try:
        dense = FAMILIES[row.mask].dense(row.shape)
    except AttributeError as error:
        raise NotAvailable(f"fastattn.masks lacks what the {row.mask} mask needs: {error}") from error
    if dense is None:
        return None
    dense = dense.contiguous().to(device)
    return dense.flatten(0, 1) if row.shape.rank == 3 else dense


def mask_object(row: Workload) -> Any:
    """The row's mask as a `fastattn.masks` object, or None for no mask."""
    try:
        return FAMILIES[row.mask].mask(row.shape)
    except (AttributeError, ImportError) as error:
        raise NotAvailable(f"fastattn.masks lacks what the {row.mask} mask needs: {error}") from error


def additive(dense: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where `dense` shows, -inf where it hides."""
    return torch.zeros(dense.shape, dtype=dtype, device=dense.device).masked_fill_(~dense, float("-inf"))


def torch_arguments(row: Workload, device: str = "cpu") -> dict[str, Any]:
    """Keywords of torch's scaled_dot_product_attention for this row's mask and heads, at its fairest."""
    arguments: dict[str, Any] = {}
    spelling = FAMILIES[row.mask].torch_spelling
    if spelling == "causal":
        arguments["is_causal"] = True
    elif spelling == "bool":
        arguments["attn_mask"] = dense_mask(row, device)
    if row.shape.hq != row.shape.hkv:
        arguments["enable_gqa"] = True
    if "dropout" in row.features:
        arguments["dropout_p"] = 0.1
    return arguments


def extras(row: Workload, device: str = "cpu") -> dict[str, Any]:
    """What the row's features add to a call of `fastattn.attention` or `fastattn.reference.attention`."""
    generator, heads = _generator(row), row.shape.hq
    added: dict[str, Any] = {}
    for feature in row.features:
        if feature == "dropout":
            added["dropout_p"] = 0.1
            if row.suite == "verify":
                added["dropout_seed"] = 1234
        elif feature.startswith("bias"):
            rows = row.shape.sq if feature == "bias-full" else 1
            bias = torch.randn(1, heads, rows, row.shape.sk, generator=generator)
            added["bias"] = bias.to(device, row.torch_dtype).requires_grad_(row.training)
        elif feature == "alibi":
            added["alibi_slopes"] = (2.0 ** -torch.linspace(1, 8, heads)).to(device)
        elif feature == "softcap":
            added["softcap"] = 5.0
        elif feature == "sinks":
            added["sinks"] = torch.randn(heads, generator=generator).to(device)
    return added


def our_call(
    row: Workload, spelling: str, qk: tuple | None = None, device: str = "cpu", richer: bool = False
) -> tuple[Callable, dict[str, Any]]:
    """(function, keywords) of our call for one spelling of the row's mask.

    "flag", "bool" and "additive" go through the drop-in, as torch's own callers would, unless a feature asks
    for the richer function or `richer` is set (it can return the LSE); "object" and "prepared" go through
    `fastattn.attention`. "prepared" needs qk=(q, k); "prepared-bool" and "prepared-additive" prepare a
    tensor.
    """
    added = extras(row, device)
    drop_in = spelling in ("flag", "bool", "additive") and not added.keys() - {"dropout_p", "bias"}
    if richer or not drop_in or ("bias" in added and row.mask != "none"):
        return library("attention"), {"mask": _mask_argument(row, spelling, qk, device), **added}
    arguments = {"dropout_p": added["dropout_p"]} if "dropout_p" in added else {}
    if row.shape.hq != row.shape.hkv:
        arguments["enable_gqa"] = True
    if "bias" in added:
        arguments["attn_mask"] = added["bias"]
    elif spelling == "flag":
        arguments["is_causal"] = row.mask == "causal"
    else:
        arguments["attn_mask"] = _mask_argument(row, spelling, qk, device)
    return library("scaled_dot_product_attention"), arguments


def _mask_argument(row: Workload, spelling: str, qk: tuple | None, device: str) -> Any:
    if spelling in ("flag", "object"):
        return mask_object(row)
    if spelling.startswith("prepared"):
        return prepare(row, spelling.removeprefix("prepared").lstrip("-") or "object", qk, device)
    dense = dense_mask(row, device)
    return dense if spelling == "bool" else additive(dense, row.torch_dtype)


def prepare(row: Workload, spelling: str, qk: tuple, device: str = "cpu") -> Any:
    """The row's mask lowered once for these q and k, starting from the object or from a tensor."""
    if spelling in ("bool", "additive"):
        dense = dense_mask(row, device)
        return lowering()(dense if spelling == "bool" else additive(dense, row.torch_dtype), *qk)
    return lowering()(mask_object(row), *qk)


def lowering() -> Callable:
    """`fastattn.masks.prepare`, or NotAvailable."""
    from fastattn import masks

    if not hasattr(masks, "prepare"):
        raise NotAvailable("fastattn.masks.prepare is not in this version")
    return masks.prepare


def kernel_of(qkv: tuple, arguments: dict[str, Any]) -> str:
    """The name of the kernel that `fastattn.attention` runs with these arguments."""
    return library("explain")(*qkv, **arguments).kernel


def _attention(row: Workload, device: str) -> Case:
    q, k, v = attention_inputs(row, device)
    function, arguments = our_call(row, row.spelling, (q, k), device)
    theirs = torch_arguments(row, device)
    bias = arguments.get("attn_mask") if any(name.startswith("bias") for name in row.features) else None
    if bias is not None:
        theirs = {**theirs, "attn_mask": bias}
    needs = [q, k, v] + ([bias] if bias is not None else [])
    dout = (
        torch.randn((*q.shape[:-1], v.shape[-1]), generator=_generator(row)).to(q) if row.training else None
    )

    def call(function, keywords):
        def forward():
            return function(q, k, v, **keywords)

        return _with_backward(forward, needs, dout) if row.training else forward

    variants = {"ours": call(function, arguments), "torch": call(F.scaled_dot_product_attention, theirs)}
    limits: list[Limit] = []
    visible = FAMILIES[row.mask].granule_fraction(row.shape) if row.suite == "masks" else 1.0
    if "area" in row.features:
        variants["unmasked"] = call(library("attention"), {})
        why = f"at most 1.2 x {visible:.3f} visible + 0.03 of the unmasked time"
        limits.append(Limit("unmasked", 1 / (1.2 * visible + 0.03), why))
    if "spelling" in row.features:
        variants["object"] = call(*our_call(row, "object", (q, k), device))
        subject = "ours"
        if row.spelling in ("bool", "additive"):
            subject = "prepared"
            variants["prepared"] = call(*our_call(row, f"prepared-{row.spelling}", (q, k), device))
        limits.append(Limit("object", 1 / 1.15, "within 1.15 x of the mask object", of=subject))
    inputs = {"q": q, "k": k, "v": v, "dout": dout, "needs": needs}
    kernel = kernel_of((q, k, v), our_call(row, row.spelling, (q, k), device, richer=True)[1])
    return Case(row, variants, inputs, tuple(limits), visible, kernel)


def _with_backward(forward: Callable[[], torch.Tensor], needs: list[torch.Tensor], dout) -> Callable[[], Any]:
    for tensor in needs:
        tensor.requires_grad_()

    def forward_and_backward():
        with torch.enable_grad():
            return torch.autograd.grad(forward(), needs, dout)

    return forward_and_backward


def _mask_lowering(row: Workload, device: str) -> Case:
    q, k, v = attention_inputs(row, device)
    if row.op == "mask-build":
        lower, attention = lowering(), library("attention")
        # A layout is data, not a formula: made here, and kept.
        mask_object(row)
        variants = {"ours": lambda: lower(mask_object(row), q, k)}
        if "long" in row.features:
            return Case(row, variants, {})
        variants["unmasked"] = lambda: attention(q, k, v)
        return Case(row, variants, {}, visible=FAMILIES[row.mask].granule_fraction(row.shape))
    dense = dense_mask(row, device)
    tensor = dense if row.spelling == "bool" else additive(dense, row.torch_dtype)
    lower = lowering()
    # From memory, as a model's first layer finds its mask: copies in turn, too many for any cache, and the reader
    # half a round away from the scan.
    copies = [tensor.clone() for _ in range(max(2, _PAST_CACHES // (tensor.numel() * tensor.element_size())))]
    scanned, to_read = (
        itertools.cycle(copies),
        itertools.cycle(copies[len(copies) // 2 :] + copies[: len(copies) // 2]),
    )
    variants = {"ours": lambda: lower(next(scanned), q, k)}
    with contextlib.suppress(AttributeError):
        read = torch.ops.fastattn.read_once
        variants["read"] = lambda: read(next(to_read))
    return Case(row, variants, {}, visible=FAMILIES[row.mask].granule_fraction(row.shape))


def row_inputs(
    row: Workload, device: str = "cpu", function: Callable | None = None, dtype: torch.dtype | None = None
) -> tuple[Callable[[], Any], Callable[[], Any], list[torch.Tensor]]:
    """(our call, torch's call, the tensors that may require gradients) of a row operation.

    function stands in for ours, and dtype for the row's: the numbers are those of the row's dtype all the
    same.
    """
    generator, shape = _generator(row), (row.shape.rows, row.shape.width)

    def draw(*size):
        return torch.randn(size, generator=generator).to(device, row.torch_dtype).to(dtype or row.torch_dtype)

    x, weight, bias = draw(*shape), draw(row.shape.width), draw(row.shape.width)
    width = [row.shape.width]
    ours = function or library(row.op)
    if row.op == "softmax":
        return lambda: ours(x, -1), lambda: torch.softmax(x, -1), [x]
    if row.op == "layer_norm":
        return (
            lambda: ours(x, width, weight, bias),
            lambda: F.layer_norm(x, width, weight, bias),
            [x, weight, bias],
        )
    if row.op == "rms_norm":
        return (
            lambda: ours(x, width, weight, 1e-6),
            lambda: F.rms_norm(x, width, weight, 1e-6),
            [x, weight],
        )
    return _add_norm(row, ours, x, draw(*shape), weight, bias)


def _row_op(row: Workload, device: str) -> Case:
    ours, theirs, operands = row_inputs(row, device)
    variants = {"ours": ours, "torch": theirs}
    if row.training:
        dout = torch.randn(row.shape.rows, row.shape.width, generator=_generator(row)).to(operands[0])
        variants = {name: _row_backward(call, operands, dout) for name, call in variants.items()}
    else:
        dout = None
    inputs = {"x": operands[0], "weight": operands[-1], "theirs": variants["torch"], "dout": dout}
    return Case(row, variants, inputs)


def row_call(case: Case, function: Callable) -> Callable[[], Any]:
    """The call of a row operation's case by another function than ours, on inputs of its own with the same numbers."""
    x, dout = case.inputs["x"], case.inputs["dout"]
    call, _, operands = row_inputs(case.row, str(x.device), function)
    return call if dout is None else _row_backward(call, operands, dout)


def _add_norm(row: Workload, function: Callable, x, residual, weight, bias):
    width = [row.shape.width]
    out = {"out": torch.empty_like(x), "sum_out": torch.empty_like(x)} if "out" in row.features else {}
    if row.op == "add_layer_norm":

        def theirs():
            total = x + residual
            return F.layer_norm(total, width, weight, bias), total

        return lambda: function(x, residual, width, weight, bias, **out), theirs, [x, residual, weight, bias]

    def theirs():
        total = x + residual
        return F.rms_norm(total, width, weight, 1e-6), total

    return lambda: function(x, residual, width, weight, 1e-6, **out), theirs, [x, residual, weight]


def _row_backward(
    call: Callable[[], Any], operands: list[torch.Tensor], dout: torch.Tensor
) -> Callable[[], Any]:
    for tensor in operands:
        tensor.requires_grad_()

    def forward_and_backward():
        with torch.enable_grad():
            result = call()
            outputs = result if isinstance(result, tuple) else (result,)
            return torch.autograd.grad(outputs, operands, (dout,) * len(outputs))

    return forward_and_backward

"""`swap(model)`: a model's attention, norms and softmax on fastattn's kernels, in place; `restore(model)`: back.

A replaced module stays the object it was. Its class is changed to a subclass of its class whose `forward` calls
fastattn, and nothing is written into the instance. So parameters, `state_dict`, optimizers, references held
elsewhere and `isinstance` see no difference, `torch.compile` guards on the class and recompiles by itself, and a
deep copy or a pickle carries the replacement along, with the way back in the class. (A `forward` bound to the
instance would not survive pickling; a new module in the parent's place would leave other references to the old
one and lose its hooks.)

transformers' models are switched by their own attention interface, see `fastattn.integrations`.
"""

from __future__ import annotations

import functools
import sys
import types
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import nn as fused
from . import rows
from .dispatch import ROW_KERNELS, choose
from .integrations.own_calls import own_call
from .problem import DTYPES, name_of
from .recognise import Norm, is_candidate, recognise
from .row_problem import norm_problem
from .swap_report import Entry, SwapReport


class StandIn:
    """Base of the classes of replaced modules; `type(module).original` is the class they had."""

    original: type[nn.Module]
    recipe: tuple[type, tuple]

    def __reduce_ex__(self, protocol):
        # The class is made at run time: a pickle holds how to make it.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _blank, (self.original, *self.recipe), state


class _RecognisedNorm(StandIn):
    """A norm known by its behaviour, with the dtype rules of the class it stands in for."""

    norm: Norm

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        norm = self.norm
        (x,) = (*inputs, *named.values())
        weight = getattr(self, "weight", None)
        dtype = x.dtype
        if weight is not None and weight.dtype != dtype:
            wider = torch.promote_types(dtype, weight.dtype)
            if norm.follows_weight[0 if wider != dtype else 1]:
                dtype = weight.dtype
                x = x.to(wider)
        eps = getattr(self, norm.eps_name)
        offset = norm.weight_offset
        if norm.kind == "rms_norm":
            y = rows.rms_norm(x, x.shape[-1:], weight, eps, weight_offset=offset)
        else:
            bias = getattr(self, "bias", None)
            y = rows.layer_norm(x, x.shape[-1:], weight, bias, eps, weight_offset=offset)
        return y.to(dtype)


@functools.cache
def _class_for(original: type, base: type, options: tuple) -> type:
    """The class of instances of `original` replaced by `base`; options are class attributes (name, value)."""
    bases = (base, original) if issubclass(base, StandIn) else (StandIn, base, original)
    if issubclass(base, original):
        bases = bases[:-1]

    def body(namespace):
        namespace |= {
            **dict(options),
            "original": original,
            "recipe": (base, options),
            "__doc__": f"{original.__name__} on fastattn's kernels.",
            "__module__": __name__,
        }

    return types.new_class(f"Fused{original.__name__}", bases, exec_body=body)


def _blank(original: type, base: type, options: tuple) -> nn.Module:
    made = _class_for(original, base, options)
    return made.__new__(made)


# Each is a subclass of torch's class with the same attributes and another forward.
REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: fused.LayerNorm,
    nn.RMSNorm: fused.RMSNorm,
    nn.Softmax: fused.Softmax,
    nn.MultiheadAttention: fused.MultiheadAttention,
    nn.TransformerEncoderLayer: fused.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: fused.TransformerDecoderLayer,
    nn.TransformerEncoder: fused.TransformerEncoder,
    nn.TransformerDecoder: fused.TransformerDecoder,
    nn.Transformer: fused.Transformer,
}


@functools.cache
def _no_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the row kernels would not run there; torch's own are left then, not replaced by the reference."""
    with torch.no_grad():
        x = torch.empty(1, 16, dtype=dtype, device=device)
        choice = choose(norm_problem("rms_norm", x, (16,)), ROW_KERNELS)
    if choice.kernel.name != "reference":
        return None
    return "no kernel: " + "; ".join(f"{name}: {reason}" for name, reason in choice.refusals)


# Libraries whose subclasses of torch's norms have a forward of their own that only chooses among torch's functions.
# They are judged by what they compute, like norms that are no subclasses.
_PROBED = ("timm.layers.",)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def objection(module: nn.Module, device: torch.device) -> str | None:
    """Why an instance is left as it is whatever its class; None where nothing speaks against replacing it.

    device: where it runs.
    """
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    if hasattr(module, "parametrizations"):
        return "its parameters are parametrised"
    hooks = sum(len(getattr(module, name, ())) for name in _HOOKS)
    if hooks:
        return f"{hooks} hook{'s' * (hooks > 1)} on it"
    for name, p in module.named_parameters(recurse=False):
        if type(p) is not nn.Parameter:
            return f"{name} is a {type(p).__name__}, a tensor subclass"
        if p.is_quantized or not p.is_floating_point():
            return f"{name} is quantised ({name_of(p.dtype)})"
        if p.dtype not in DTYPES:
            return f"{name} is {name_of(p.dtype)}, which no kernel takes"
    dtypes = {p.dtype for p in module.parameters() if p.dtype in DTYPES} or {torch.float32}
    return next((reason for d in dtypes if (reason := _no_kernel(device, d)) is not None), None)


# A module's entry and, where it is to be replaced, its new class; None for a module of no interest.
_Found = tuple[Entry, type | None] | None


def _torch_module(path: str, module: nn.Module, device: torch.device) -> _Found:
    """An instance of one of torch's classes."""
    original = next((c for c in REPLACEMENTS if isinstance(module, c)), None)
    if original is None:
        return None
    if type(module).forward is not original.forward and type(module).__module__.startswith(_PROBED):
        return None
    base, name = REPLACEMENTS[original], type(module).__name__
    if isinstance(module, base) and type(module).forward is base.forward:
        return Entry(path, name, f"fastattn.nn.{base.__name__}", already=True), None
    reason = objection(module, device)
    if type(module).forward is not original.forward:
        reason = "a subclass with its own forward"
    if reason is not None:
        if original is nn.TransformerEncoderLayer:
            # In evaluation without gradients it computes everything in one fused op of torch.
            reason += "; its fused path, in evaluation, passes by replaced norms and attention"
        return Entry(path, name, reason=reason), None
    return Entry(path, name, f"fastattn.nn.{base.__name__}"), _class_for(type(module), base, ())


def _recognised_module(
    path: str, module: nn.Module, device: torch.device, known: dict
) -> tuple[Entry, type | None] | None:
    """The same for a norm of another library; `known` keeps what equal instances were found to be."""
    if not is_candidate(module):
        return None
    entry = Entry(path, type(module).__name__)
    reason = objection(module, device)
    if reason is None:
        simple = {n: v for n, v in vars(module).items() if isinstance(v, (bool, int, float, str))}
        simple.pop("training", None)
        shapes = tuple((n, p.shape) for n, p in module.named_parameters())
        key = (type(module), tuple(simple.items()), shapes)
        found = known.get(key)
        if found is None:
            found = known[key] = recognise(module)
        if isinstance(found, Norm):
            made = _class_for(type(module), _RecognisedNorm, (("norm", found),))
            return replace(entry, after=f"{made.__name__} ({found})"), made
        reason = found
    # A leaf with a weight and some small number is a norm to speak of only if it says so.
    return (replace(entry, reason=reason), None) if "norm" in type(module).__name__.lower() else None


def _is_meta(model: nn.Module) -> bool:
    return any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def swap(model: nn.Module, dry_run: bool = False, pack: bool = False) -> SwapReport:
    """Puts a model's attention, norms and softmax on fastattn's kernels, in place.

    Replaced are instances of torch.nn's MultiheadAttention, Transformer and its parts, LayerNorm, RMSNorm and Softmax,
    by the classes of their names in fastattn.nn; norms that model libraries define themselves, recognised by running a
    copy on a probe input; and the attention of transformers models, through transformers' attention and mask
    interfaces. A module that has hooks, quantised or tensor-subclass parameters or a forward of its own is left in
    place and named in the report; so is everything in a model on the meta device, and a module that calls
    F.scaled_dot_product_attention itself, which is for `sdpa_patch`. Calling it again changes nothing.
    Where an error occurs half-way, what was done is undone.

    Args:
        model: any module. It stays the same object, and so do its modules and parameters.
        dry_run: only report what would be done.
        pack: let encoders of BERT's kind in transformers models compute no padded tokens in any layer. Their output
            is 0 at padding, where it would have been numbers that nobody reads; hooks inside, and a model that is
            asked for the states of each layer, see or get what they always did only without packing. Two short
            sequences run through each encoder to see that its layers allow it.

    Returns:
        A SwapReport; `print` it for a table.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    entries, classes, switches = plan(model, pack=pack)
    if not dry_run:
        _apply(classes, switches)
    return SwapReport(entries, dry_run)


def plan(
    model: nn.Module, device: str | None = None, pack: bool = False
) -> tuple[tuple[Entry, ...], list, list]:
    """What is to be done: entries in the model's order, [(module, new class)] and switches of attention.

    device: where the model's weights would be, for a model on the meta device that is only asked about.
    """
    meta = "the model is on the meta device" if device is None and _is_meta(model) else None
    entries: list[Entry] = []
    classes: list[tuple[nn.Module, type]] = []
    known: dict = {}
    first = next(model.parameters(), None)
    fallback = torch.device(device or ("cpu" if first is None or first.is_meta else first.device))
    for path, module in model.named_modules():
        if isinstance(module, StandIn):
            entries.append(Entry(path, type(module).original.__name__, type(module).__name__, already=True))
            continue
        own = next((p.device for p in module.parameters(recurse=False) if not p.is_meta), fallback)
        found = _torch_module(path, module, own) or _recognised_module(path, module, own, known)
        if found is None:
            reason = own_call(module)
            if reason is not None:
                entries.append(Entry(path, type(module).__name__, reason=reason))
            continue
        entry, made = found
        if made is not None and meta:
            entry, made = replace(entry, after=None, reason=meta), None
        entries.append(entry)
        if made is not None:
            classes.append((module, made))
    switches = []
    if "transformers" in sys.modules:
        from .integrations import models

        found_entries, switches = models.plan(model, meta, device)
        known_by_now = {entry.path for entry in entries}
        entries += [entry for entry in found_entries if entry.path not in known_by_now]
        if pack:
            found_entries, encoders = models.plan_packing(model, meta, device)
            entries += found_entries
            classes += [(module, _class_for(type(module), base, ())) for module, base in encoders]
    order = {path: n for n, (path, _) in enumerate(model.named_modules())}
    return tuple(sorted(entries, key=lambda entry: order[entry.path])), classes, switches


def _apply(classes: list[tuple[nn.Module, type]], switches: list) -> None:
    done: list[nn.Module] = []
    try:
        for switch in switches:
            switch.apply()
        for module, made in classes:
            module.__class__ = made
            done.append(module)
    except BaseException:
        for module in done:
            module.__class__ = type(module).original
        for switch in switches:
            switch.undo()
        raise


def restore(model: nn.Module) -> SwapReport:
    """Undoes `swap`: every module has its own class and every config its attention implementation again.

    The modules and parameters are the same objects as before `swap`. Works on deep copies and unpickled models
    too. A config whose attention implementation was changed after `swap` is left alone. On a model that was not
    swapped it does nothing.

    Returns:
        A SwapReport of what was put back.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    entries = []
    for path, module in model.named_modules():
        if isinstance(module, StandIn):
            before = type(module).__name__
            module.__class__ = type(module).original
            entries.append(Entry(path, before, type(module).__name__))
        if "transformers" in sys.modules:
            from .integrations import models

            entries += models.put_back(path, module)
    return SwapReport(tuple(entries), action="restore")

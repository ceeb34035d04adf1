"""Switching whole transformers models to fastattn's attention: what `fastattn.swap` asks.

A model's configs say which attention its modules call; a model may have several (vision and text, encoder and
decoder). Models that have attention code of their own do not ask their config, and are left as they are.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..dispatch import choose
from ..problem import DTYPES, attention_problem
from ..swap_report import Entry
from . import transformers as interface

# A switched model carries [(config, attention implementation before)] under this name, until restored.
BEFORE = "_fastattn_before"


@functools.cache
def _keywords(forward) -> frozenset[str] | None:
    """The keywords that a forward passes to transformers' attention interface; None where it does not call it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Call):
            if getattr(node.value.func, "attr", None) == "get_interface":
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {t.id for t in targets if isinstance(t, ast.Name)}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", None) in names]
    return frozenset(k.arg for call in calls for k in call.keywords if k.arg is not None) if names else None


@functools.cache
def _own_attention(cls: type) -> bool:
    """Whether a class that does not call the interface computes attention itself."""
    if "Attention" not in cls.__name__ or not cls.__module__.startswith("transformers."):
        return False
    try:
        return "softmax(" in inspect.getsource(cls)
    except (OSError, TypeError):
        return False


def _nested(config) -> Iterator:
    yield config
    for name in getattr(config, "sub_configs", ()):
        inner = getattr(config, name, None)
        if inner is not None:
            yield from _nested(inner)


@dataclass
class Group:
    """The attention modules that ask one config, and the model they are in."""

    config: object
    owner: nn.Module
    modules: list[tuple[str, nn.Module]] = field(default_factory=list)

    def refusal(self, device: str | None) -> str | None:
        """Why the config is not switched: what its modules pass, or that no kernel would run."""
        if not self.owner._can_set_attn_implementation():
            return f"{type(self.owner).__name__} does not let its attention be set"
        for _, module in self.modules:
            unserved = sorted(_keywords(type(module).forward) - interface.SERVED)
            if unserved:
                return f"it passes {', '.join(unserved)}, which fastattn does not serve"
        tensor = next(self.owner.parameters(), None)
        if tensor is None or tensor.dtype not in DTYPES:
            return None
        q = torch.empty(1, 1, 1, 64, dtype=tensor.dtype, device=device or tensor.device)
        choice = choose(attention_problem(q, q, q))
        if choice.kernel.name == "reference":
            return "no kernel: " + "; ".join(f"{name}: {reason}" for name, reason in choice.refusals)
        return None


@dataclass
class Switch:
    """A model to switch: the configs in it to change, and those that are to stay as they are."""

    model: nn.Module
    wanted: list
    refused: list
    before: list = field(default_factory=list)

    def apply(self) -> None:
        from transformers.utils import logging

        interface.register()
        configs = {id(c): c for c in self.wanted}
        configs |= {id(c): c for m in _owners(self.model) for c in _nested(m.config)}
        self.before = [(c, c._attn_implementation) for c in configs.values()]
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # what it would warn of is in the report
        try:
            self.model.set_attn_implementation(interface.NAME)
        finally:
            logging.set_verbosity(level)
        for config in (
            self.wanted
        ):  # transformers 5.17 passes by those of their parent's class, as T5's two stacks have
            _set(config, interface.NAME)
        for config, old in self.before:
            if any(config is refused for refused in self.refused):
                _set(config, old)
        changed = [(c, old) for c, old in self.before if old != c._attn_implementation]
        vars(self.model)[BEFORE] = vars(self.model).get(BEFORE, []) + changed

    def undo(self) -> None:
        """After an error within or after `apply`."""
        for config, old in self.before:
            _set(config, old)
        earlier = [
            (c, old)
            for c, old in vars(self.model).pop(BEFORE, [])
            if c._attn_implementation == interface.NAME
        ]
        if earlier:
            vars(self.model)[BEFORE] = earlier


def _set(config, implementation: str | None) -> None:
    """Sets one config, not those inside it."""
    config._attn_implementation_internal = implementation


def _owners(model: nn.Module) -> Iterator[nn.Module]:
    from transformers import PreTrainedModel

    return (m for m in model.modules() if isinstance(m, PreTrainedModel))


def plan(
    model: nn.Module, objection: str | None, device: str | None = None
) -> tuple[list[Entry], list[Switch]]:
    """The attention modules of the transformers models in `model`, and the switches to make.

    objection: why none is to be made, or None. device: where the model would be, None for where it is.
    """
    from transformers import PreTrainedModel

    owners: dict[str, nn.Module] = {}
    tops: list[nn.Module] = []
    groups: dict[int, Group] = {}
    entries: list[Entry] = []
    for path, module in model.named_modules():
        parts = path.split(".") if path else []
        around = [owners[p] for n in range(len(parts) + 1) if (p := ".".join(parts[:n])) in owners]
        if isinstance(module, PreTrainedModel):
            owners[path] = module
            if not around:
                tops.append(module)
        elif not around:
            continue
        elif _keywords(type(module).forward) is not None:
            config = getattr(module, "config", None)
            config = config if hasattr(config, "_attn_implementation") else around[-1].config
            groups.setdefault(id(config), Group(config, around[-1])).modules.append((path, module))
        elif _own_attention(type(module)):
            reason = "attention code of its own, not transformers' attention interface"
            entries.append(Entry(path, type(module).__name__, reason=reason))

    refused: list = []
    wanted: dict[int, object] = {}
    for group in groups.values():
        old = group.config._attn_implementation
        reason = objection or group.refusal(device)
        if reason is not None:
            refused.append(group.config)
        elif old != interface.NAME:
            wanted[id(group.config)] = group.config
        for path, module in group.modules:
            entry = Entry(path, f"{type(module).__name__} ({old})", reason=reason)
            if reason is None:
                entry = replace(entry, after="fastattn.attention", already=old == interface.NAME)
            entries.append(entry)
    switches = []
    for top in tops:
        inside = {id(c) for m in _owners(top) for c in _nested(m.config)}
        found = [config for key, config in wanted.items() if key in inside]
        if found:
            switches.append(Switch(top, found, refused))
    return entries, switches


def plan_packing(
    model: nn.Module, objection: str | None, device: str | None = None
) -> tuple[list[Entry], list[tuple[nn.Module, type]]]:
    """The encoders of `model` that are to pack, and the modules whose class is to change; arguments as of `plan`.

    An encoder packs where all the attention modules in it are fastattn's, or are going to be.
    """
    from . import packed

    found, _ = plan(model, objection, device)
    served = {entry.path for entry in found if entry.after is not None}
    attention = {id(m) for path, m in model.named_modules() if path in served}
    entries, encoders = [], []
    within: list[set[int]] = []  # of encoders that pack: their parts get packed tokens already
    for path, module in model.named_modules():
        if isinstance(module, packed.PackedEncoder) or not packed.is_candidate(module, attention):
            continue
        if any(id(module) in inside for inside in within):
            continue
        config = getattr(module, "config", None) or next(
            m.config for m in module.modules() if hasattr(m, "config")
        )
        entry = Entry(path, type(module).__name__)
        reason = "its forward is replaced on the instance" if "forward" in vars(module) else objection
        reason = reason or packed.objection(module, config)
        if reason is None:
            entry = replace(entry, after="packs padded batches")
            encoders.append((module, packed.PackedEncoder))
            within.append({id(m) for m in module.modules()})
        entries.append(replace(entry, reason=reason))
    return entries, encoders


def put_back(path: str, model: nn.Module) -> list[Entry]:
    """Gives the configs that a Switch changed their attention implementation back."""
    entries = []
    for config, old in vars(model).pop(BEFORE, ()):
        if config._attn_implementation == interface.NAME:
            _set(config, old)
            entries.append(Entry(path, f"{type(config).__name__}: {interface.NAME}", f"{old}"))
    return entries

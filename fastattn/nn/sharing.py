"""`from_torch`: a module of torch as fastattn's, sharing its parameters, buffers and hooks."""

from __future__ import annotations

import torch

# torch's class -> ours; each of ours is a subclass of torch's with the same attributes.
COUNTERPARTS: dict[type, type] = {}


def converted(module: torch.nn.Module) -> torch.nn.Module:
    """The module with all of torch's classes in it replaced by ours; the same object where there are none."""
    children = {name: converted(child) for name, child in module._modules.items() if child is not None}
    ours = COUNTERPARTS.get(type(module))
    if ours is None and all(module._modules[name] is child for name, child in children.items()):
        return module
    return _clone(module, ours or type(module), children)


def _clone(module: torch.nn.Module, cls: type, children: dict[str, torch.nn.Module]) -> torch.nn.Module:
    """A shallow copy of another class: its own dictionaries, the same parameters, buffers and hooks in them."""
    clone = cls.__new__(cls)
    clone.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()})
    clone._modules.update(children)
    return clone


class FromTorch:
    """What a drop-in adds to torch's class: `from_torch`."""

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        if FromTorch in cls.__bases__:
            COUNTERPARTS[cls.__mro__[2]] = cls

    @classmethod
    def from_torch(cls, module: torch.nn.Module) -> torch.nn.Module:
        """This class's module with the parameters of one of torch's: the same tensors, so that training one trains
        the other; hooks come along. Modules of torch inside it are converted too.

        Raises:
            TypeError: module is not an instance of the class that this one stands in for, or is a subclass with a
                forward of its own.
        """
        original = next(c for c in cls.__mro__ if COUNTERPARTS.get(c) in cls.__mro__)
        if not isinstance(module, original):
            raise TypeError(
                f"module must be a torch.nn.{original.__name__}, got {type(module).__module__}.{type(module).__name__}"
            )
        for name in ("forward", "_sa_block", "_mha_block", "_ff_block"):
            known = (getattr(original, name, None), getattr(cls, name, None))
            if getattr(type(module), name, None) not in known:
                raise TypeError(
                    f"module is a {type(module).__module__}.{type(module).__name__}, which has a {name} of its own; "
                    f"{cls.__name__}.from_torch would drop it"
                )
        children = {name: converted(child) for name, child in module._modules.items() if child is not None}
        return _clone(module, cls, children)

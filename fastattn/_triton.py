"""Where the Triton kernels are, whether they can run here, and their op namespace `fastattn_triton`.

Nothing here imports Triton before dispatch.py has chosen it: the library works without.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from . import _library  # noqa: F401  the schemas are those of the CPU library's ops

NAMESPACE = "fastattn_triton"
OLDEST = (3, 6)
# Of the attention kernels, where an older one fails to compile them.
OLDEST_FOR_ATTENTION = {"sm_100": (3, 9)}
# Fragments: the rows and the attention define their ops each.
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


@cache
def module(name: str) -> ModuleType:
    """`fastattn.kernels.<name>`, in a checkout that is on the path and not installed too."""
    package = "fastattn.kernels"
    root = Path(__file__).resolve().parent.parent / "kernels"
    if importlib.util.find_spec(package) is None and (root / "__init__.py").exists():
        spec = importlib.util.spec_from_file_location(
            package, root / "__init__.py", submodule_search_locations=[str(root)]
        )
        sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"{package}.{name}")


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def release() -> tuple[int, ...]:
    """Triton's version, of which the first two numbers decide."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2] if part.isdigit())


@cache
def unusable(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run for tensors of this device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton
    except Exception as error:  # a broken install is a reason not to use it, not to fail
        return f"triton does not import ({error})"
    if release() < OLDEST:
        return f"triton is {triton.__version__}, the kernels need {'.'.join(map(str, OLDEST))} or newer"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return (
                f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, the kernels need sm_80 or newer"
            )
    return None


# What torch.compiler.assume_constant_result sets, without importing the compiler for it.
unusable._dynamo_marked_constant = True


def refuse(name: str, device: torch.device, forced: bool) -> str | None:
    """Why no Triton kernel runs on tensor `name` of this device, or None."""
    if device.type == "cpu":
        if not interpreted():
            return f"{name} is on cpu, not on a CUDA or ROCm device"
        if not forced:
            return f'{name} is on cpu, where Triton\'s interpreter runs only for backend="triton"'
    elif device.type != "cuda":
        return f"{name} is on {device.type}, not on a CUDA or ROCm device"
    return unusable(device)


@cache
def unusable_attention(device: torch.device) -> str | None:
    """Why the attention kernels do not compile for a device that the others run on, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    import triton

    if torch.cuda.get_device_capability(device)[0] == 10 and release() < OLDEST_FOR_ATTENTION["sm_100"]:
        return f"triton is {triton.__version__}; 3.6 fails to compile the attention kernels for sm_100, 3.9 does not"
    return None


unusable_attention._dynamo_marked_constant = True


def define(*names: str) -> None:
    """Defines ops of the CPU library in this namespace too, by the same schemas."""
    for name in names:
        schema = str(getattr(torch.ops.fastattn, name).default._schema)
        LIBRARY.define(schema.removeprefix("fastattn::"))


def implement(name: str, kernel: str) -> None:
    """Makes function `name` of module `fastattn.kernels.<kernel>` the op of that name, imported at its first call."""

    def run(*arguments):
        return getattr(module(kernel), name)(*arguments)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")


def explain_attention(p, lowered) -> str:
    """The launch of an attention problem, for people."""
    by_head = lowered.has_bits and lowered.block_offsets.shape[1] > 1
    terms = (
        p.softcap
        or p.dropout_p
        or p.alibi_slopes is not None
        or p.bias is not None
        or lowered.bias is not None
    )
    text = module("attention_plan").explain(p.q, p.k, p.v, lowered.has_bits, by_head, bool(terms))
    return text + (", in the interpreter" if interpreted() else "")

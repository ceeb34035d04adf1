"""What fastattn.swap would replace in a model, and what it would leave and why. Nothing is changed or downloaded
but a config: the model is built without weights.

MODEL is a folder or hub name of a transformers model, a GGUF file, or MODULE:CALLABLE for a function or class that
makes a torch.nn.Module without arguments.
"""

from __future__ import annotations

import argparse
import importlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from ..swap import plan
from ..swap_report import SwapReport
from .cli import CommandError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, hub name, GGUF file or MODULE:CALLABLE")
    parser.add_argument(
        "--report", action="store_true", help="print the table (what this command does in any case)"
    )
    parser.add_argument("--pack", action="store_true", help="what swap(model, pack=True) would do")
    parser.add_argument("--json", action="store_true", help="print the entries as JSON instead")
    parser.add_argument("--device", default="cpu", help="where the model would run (default cpu)")


def _from_factory(name: str) -> nn.Module:
    module, _, attribute = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except Exception as error:
        raise CommandError(f"{name} cannot be called: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise CommandError(f"{name} must make a torch.nn.Module, got {type(made).__name__}")
    return made


def _from_transformers(name: str) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise CommandError(
            f"{name} needs transformers to be read: pip install 'transformers>=5.17' ({error})"
        ) from error
    path = Path(name)
    where, extra = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})
    try:
        config = transformers.AutoConfig.from_pretrained(where, **extra)
        architecture = (getattr(config, "architectures", None) or [""])[0]
        made = getattr(transformers, architecture, None)
        if made is None:
            return transformers.AutoModel.from_config(config)
        return made(config)
    except (OSError, ValueError, KeyError) as error:
        raise CommandError(f"{name} is not a model that transformers can build: {error}") from error


def build(name: str) -> nn.Module:
    """The model of that name without weights, on the meta device."""
    by_import = ":" in name and not Path(name).exists()
    with torch.device("meta"):
        return _from_factory(name) if by_import else _from_transformers(name)


def run(arguments: argparse.Namespace) -> int:
    try:
        torch.empty(1, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {arguments.device} is not here: {error}") from error
    entries, _, _ = plan(build(arguments.model), arguments.device, arguments.pack)
    if arguments.json:
        print(json.dumps([asdict(entry) for entry in entries], indent=1))
    else:
        print(SwapReport(entries, dry_run=True))
    return 0

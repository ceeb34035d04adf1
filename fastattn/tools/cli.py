"""The command `fastattn`, also `python -m fastattn`: a file of this folder for each subcommand.

Exit codes: 0 done, 1 the answer is no (a check failed, a floor was missed where asked), 2 the command was
wrong, 130 interrupted. Tables go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

# Subcommand -> (module, one line of help). Each module has add_arguments(parser) and run(arguments) -> exit
# code.
COMMANDS = {
    "verify": ("verify", "check on this machine that every kernel gives the reference's answer"),
    "bench": ("bench", "time the kernels beside torch and whatever rivals are installed"),
    "info": ("info", "what this machine and this build are: what a bug report needs"),
    "mask": ("mask", "draw a mask expression as text or PNG"),
    "finetune": ("finetune", "fine-tune a real BERT with eager, SDPA and fastattn attention, side by side"),
    "swap": ("swap_report", "what fastattn.swap would replace in a model, and what not and why"),
}


class CommandError(Exception):
    """A command cannot do what it was asked; the message goes to standard error, the exit code is 2."""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(
        prog="fastattn",
        description="Fused attention, softmax and norm kernels for PyTorch: try them, check them, time them.",
        epilog="`fastattn COMMAND --help` explains a command.",
    )
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("demo", help="swap the kernels into a real model and compare", add_help=False)
    for name, (module, text) in COMMANDS.items():
        command = importlib.import_module(f".{module}", __package__)
        sub = commands.add_parser(
            name,
            help=text,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["demo"]:
            from . import demo

            return demo.main(argv[1:]) or 0
        arguments = parser().parse_args(argv)
        arguments.argv = argv
        return arguments.run(arguments)
    except CommandError as error:
        print(f"fastattn: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastattn: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, say `head`, has what it wanted. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0

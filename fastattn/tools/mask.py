"""Draw a mask expression, as text and on request as PNG.

The expression is built from the masks of fastattn.masks with & (both), | (either) and ~ (not):

  fastattn mask "Causal() & SlidingWindow(256, 0)" --sq 1024 --sk 1024 --png window.png
  fastattn mask "KeyPadding([100, 60], side='left')" --sq 128 --sk 128 --batch 2 --item 1
  fastattn mask "Documents([0, 40, 100, 128]) & Causal()" --sq 128 --sk 128
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import Any

import torch

# Masks whose first argument is a table of truth values: nested lists in an expression.
TABLES = {"Dense", "BlockSparse"}
# Masks whose argument is code, which an expression on the command line does not carry.
REFUSED = {"Predicate": "it takes a function; call `Predicate(fn).show()` from Python instead"}
LONGEST = 10_000


class ExpressionError(ValueError):
    """A mask expression that cannot be read; the message quotes the part that is wrong."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("expression", help="masks joined by &, | and ~; quote it for the shell")
    parser.add_argument("--sq", type=_size, help="query rows (default: what the mask itself says, else 64)")
    parser.add_argument("--sk", type=_size, help="keys (default: as --sq)")
    parser.add_argument("--batch", type=_size, default=1, help="batch size the mask is made for (default 1)")
    parser.add_argument("--heads", type=_size, default=1, help="query heads the mask is made for (default 1)")
    parser.add_argument("--item", type=int, default=0, help="batch item to draw, from 0 (default 0)")
    parser.add_argument("--head", type=int, default=0, help="head to draw, from 0 (default 0)")
    parser.add_argument("--width", type=_size, default=64, help="characters a text row may take (default 64)")
    parser.add_argument("--png", metavar="FILE", type=Path, help="draw a picture too (needs matplotlib)")


def _size(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return value


def run(arguments: argparse.Namespace) -> int:
    from .cli import CommandError

    for name, value, size in (
        ("item", arguments.item, arguments.batch),
        ("head", arguments.head, arguments.heads),
    ):
        if not 0 <= value < size:
            raise CommandError(f"--{name} must be in 0..{size - 1}, got {value}")
    if arguments.png and not arguments.png.parent.is_dir():
        raise CommandError(f"--png: there is no folder {arguments.png.parent}")
    size = {"Sq": arguments.sq, "Sk": arguments.sk, "B": arguments.batch, "H": arguments.heads}
    place = {"b": arguments.item, "h": arguments.head}
    try:
        mask = parse(arguments.expression)
        mask.show(**size, **place, width=arguments.width)
        if arguments.png:
            mask.show(arguments.png, **size, **place)
            print(f"written to {arguments.png}")
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    return 0


def mask_classes() -> dict[str, type]:
    """The public masks by name."""
    from fastattn import masks

    names = getattr(masks, "__all__", None) or dir(masks)
    found = {name: getattr(masks, name) for name in names if not name.startswith("_")}
    operators = ("Mask", "And", "Or", "Not")
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, type) and issubclass(value, masks.Mask) and name not in operators
    }


def parse(expression: str) -> Any:
    """Read a mask expression: calls of public masks with numbers, strings and lists, joined by &, | and ~.

    Nothing is evaluated: the syntax tree is walked, and whatever is not in that short list is refused by
    name. Raises ExpressionError for the expression, and what the masks themselves raise for their
    arguments.
    """
    if len(expression) > LONGEST:
        raise ExpressionError(
            f"the mask expression has {len(expression)} characters, at most {LONGEST} are read"
        )
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return _mask(tree.body, expression, mask_classes())
    except SyntaxError as error:
        raise ExpressionError(f"the mask expression {expression!r} is not well formed: {error.msg}") from None
    except (RecursionError, MemoryError):
        raise ExpressionError("the mask expression is nested too deeply") from None


def _mask(node: ast.expr, source: str, classes: dict[str, type]) -> Any:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
        left, right = _mask(node.left, source, classes), _mask(node.right, source, classes)
        return left & right if isinstance(node.op, ast.BitAnd) else left | right
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_mask(node.operand, source, classes)
    if isinstance(node, ast.Name) and node.id in classes:
        raise ExpressionError(f"{node.id} is a mask only when called: write {node.id}(...)")
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ExpressionError(
            f"{_quote(node, source)} is not a mask; an expression is made of masks joined by &, | and ~"
        )
    name = node.func.id
    if name in REFUSED:
        raise ExpressionError(f"{name} cannot be written here: {REFUSED[name]}")
    if name not in classes:
        raise ExpressionError(f"there is no mask {name!r}; the masks are {', '.join(sorted(classes))}")
    if any(isinstance(argument, ast.Starred) for argument in node.args) or any(
        k.arg is None for k in node.keywords
    ):
        raise ExpressionError(f"{_quote(node, source)}: * and ** are not read here")
    values = [_value(argument, source) for argument in node.args]
    named = {keyword.arg: _value(keyword.value, source) for keyword in node.keywords}
    if name in TABLES:
        values[:1] = [_table(name, value) for value in values[:1]]
        for key in ("visible", "layout"):
            if key in named:
                named[key] = _table(name, named[key])
    return classes[name](*values, **named)


def _table(name: str, value: Any) -> torch.Tensor:
    try:
        return torch.tensor(value).bool()
    except (ValueError, TypeError, RuntimeError):
        raise ExpressionError(
            f"{name} takes nested lists of 0 and 1, all rows of one length, got {value!r}"
        ) from None


def _value(node: ast.expr, source: str) -> Any:
    """A number, string, True, False, None, or a list or tuple of such."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, type(None))):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, source)
        if isinstance(value, (int, float)):
            return -value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(element, source) for element in node.elts]
    raise ExpressionError(
        f"{_quote(node, source)} is not a value here: write numbers, strings or lists of numbers"
    )


def _quote(node: ast.expr, source: str) -> str:
    text = ast.get_source_segment(source.strip(), node) or type(node).__name__
    return repr(text if len(text) <= 60 else text[:57] + "...")

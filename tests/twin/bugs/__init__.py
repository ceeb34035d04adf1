"""Bugs for plant_bugs.py, a module a family: `PROGRAM` of tests/twin, built with `FLAGS` and run with a schedule and
`ARGUMENTS`, is to notice each of `BUGS`.
"""

from __future__ import annotations

from typing import NamedTuple


class Bug(NamedTuple):
    """A change of text in a file of csrc/cuda. A text that occurs twice stands for both, but behind `behind` only for
    the first. `flags` replace the family's. A product of 32 bits is a conversion of one of 64: its overflow is defined.
    """

    name: str
    file: str
    old: str
    new: str
    behind: str = ""
    flags: tuple[str, ...] | None = None


def changed(bug: Bug, text: str) -> str:
    """The file with the bug in it; ValueError where the text is not there."""
    start = text.index(bug.behind)
    if bug.old not in text[start:]:
        raise ValueError(f"{bug.name}: the text is not in {bug.file} any more")
    return text[:start] + text[start:].replace(bug.old, bug.new, 1 if bug.behind else -1)

"""What `swap` did to a model: `SwapReport`, a table for people and entries for programs."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One module of a model.

    path: as in `named_modules`. before: its class, with what matters of it. after: what stands in for it, None
    where it is left as it was for `reason`. already: it had been replaced before.
    """

    path: str
    before: str
    after: str | None = None
    reason: str | None = None
    already: bool = False


class SwapReport:
    """The modules that `swap` looked at, in the model's order.

    entries: one `Entry` a module. swapped: those replaced by this call (to be replaced, after a dry run). left:
    those left as they were. `str()` is a table in which like modules share a line.
    """

    def __init__(self, entries: tuple[Entry, ...], dry_run: bool = False, action: str = "swap"):
        self.entries = entries
        self.dry_run = dry_run
        self.action = action

    @property
    def swapped(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.after is not None and not e.already)

    @property
    def left(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.after is None)

    def rows(self) -> list[tuple[str, str, str]]:
        """(modules, before, after or the reason why not), equal ones grouped: "layer.*.norm (12)"."""
        groups: dict[tuple, list[Entry]] = {}
        for e in self.entries:
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", e.path)
            groups.setdefault((pattern, e.before, e.after, e.reason, e.already), []).append(e)
        rows = []
        for (pattern, before, after, reason, already), entries in groups.items():
            path = pattern if len(entries) > 1 else entries[0].path
            count = f" ({len(entries)})" if len(entries) > 1 else ""
            then = f"left: {reason}" if after is None else after + (" (was so already)" if already else "")
            rows.append((f"{path or '(the model)'}{count}", before, then))
        return rows

    def __str__(self) -> str:
        done, already = len(self.swapped), sum(e.already for e in self.entries)
        if self.action == "restore":
            head = f"fastattn.restore: {done} put back"
        else:
            verb = "would be replaced" if self.dry_run else "replaced"
            head = f"fastattn.swap: {done} {verb}, {len(self.left)} left as they were"
            head += f", {already} replaced before" if already else ""
        rows = self.rows()
        if not rows:
            return f"{head}: no attention, norm or softmax module found"
        rows = [("module", "before", "after"), *rows]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([head, *lines])

    __repr__ = __str__

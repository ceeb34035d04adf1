"""Progress on standard error: one line that rewrites itself on a terminal, a line a step elsewhere."""

from __future__ import annotations

import shutil
import sys
import time


class Progress:
    """Counts steps of a known total and says what is under way.

    On a terminal the line is rewritten in place; in a log each finished step is a line of its own, so that
    a run that is cut short has said how far it came. quiet says nothing.
    """

    def __init__(self, total: int, quiet: bool = False, stream=None):
        self.total = total
        self.done = 0
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self.live = self.stream.isatty()
        self.start = time.monotonic()

    def begin(self, what: str) -> None:
        """Say what is under way; nothing in a log."""
        if self.live and not self.quiet:
            self._rewrite(f"[{self.done + 1}/{self.total}] {what}{self._remaining()}")

    def step(self, text: str) -> None:
        """One step is done; text says with what result."""
        self.done += 1
        if self.quiet:
            return
        if self.live:
            self._rewrite(f"[{self.done}/{self.total}] {text}{self._remaining()}")
        else:
            print(f"[{self.done}/{self.total}] {text}", file=self.stream, flush=True)

    def close(self) -> None:
        """Take the live line away."""
        if self.live and not self.quiet:
            self._rewrite("")

    def _remaining(self) -> str:
        if not self.done:
            return ""
        left = (time.monotonic() - self.start) / self.done * (self.total - self.done)
        return f"  ({left:.0f} s left)" if left >= 1 else ""

    def _rewrite(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        self.stream.write("\r\x1b[2K" + text[:width])
        self.stream.flush()

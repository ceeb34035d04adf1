"""Memory of results that waits to be used again."""

from __future__ import annotations

import torch

from . import _library  # noqa: F401  the op library has to be loaded first


def empty_cache() -> int:
    """Gives the idle memory of the CPU kernels' results back to the system, and returns how many bytes that was.

    A result of 1 MB and more on the CPU lies in a block that serves a later result when its tensor dies, as torch's
    allocator does it on a GPU: fresh memory costs more than a row kernel's work. At most ``FASTATTN_KEEP_MB``
    megabytes wait (default 256, never more than a sixteenth of the machine's memory; 0, set before the import, turns
    this off). The storage of such a result cannot be made larger in place: ``resize_`` beyond it raises.
    """
    return torch.ops.fastattn._release_results()

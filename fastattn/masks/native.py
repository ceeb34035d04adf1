"""The C++ ops that build, scan and transpose on the CPU, and Triton's that scans on a GPU; the torch code beside them
serves the rest.

Under torch.compile the ops stand in the graph: how many blocks and tiles come out is known when they run. What
their flags would shorten (no bits where all is visible, no bias where all is 0) is left as it is there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _library, _triton  # noqa: F401  the op library has to be loaded first
from .leaves import Kind, Node, RangeLeaf
from .words import FULL, GRANULE, granules

# Flags of mask_scan, mask_build and mask_keys.
EVERYTHING, NONZERO, GAPS, FROM_START, TO_END = 1, 2, 4, 8, 16

# Tests switch the ops off to compare.
enabled = True


def serves(device: torch.device) -> bool:
    """Whether the ops run on tensors of a device."""
    return enabled and device.type == "cpu"


def read(flags: Tensor, while_tracing: int) -> int:
    """The flags of an op; `while_tracing` where torch.compile traces and nobody knows."""
    return while_tracing if torch.compiler.is_compiling() else int(flags)


def build(tree: Node, within: RangeLeaf | None, Sq: int, Sk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Offsets, blocks, tiles and flags of a tree; what `within` leaves empty is dropped. Sq and Sk are not 0."""
    tensors: list[Tensor] = []

    def put(tensor: Tensor) -> int:
        tensors.append(tensor)
        return len(tensors) - 1

    program = tree.encode(put)
    if within is not None:
        program += [*within.encode(put), Kind.WITHIN]
    return torch.ops.fastattn.mask_build(program, tensors, *tree.planes, Sq, Sk)


def scanner(device: torch.device) -> Callable | None:
    """The op that takes a bool or float tensor [B, H, Sq, Sk], none of them 0, to offsets, blocks, tiles and flags,
    or None where torch code has to."""
    if serves(device):
        return torch.ops.fastattn.mask_scan
    if _triton.refuse("the mask", device, False) is None:
        return torch.ops.fastattn_triton.mask_scan
    return None


def bias(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Offsets, blocks, tiles and flags of a float tensor [B, H, Sq, Sk], none of them 0, whose -inf the kernels hide
    themselves: rows of granules in which none is hidden whole may come as full."""
    return torch.ops.fastattn.bias_scan(tensor)


def keys(tensor: Tensor) -> tuple[Tensor, Tensor, int]:
    """The interval of each plane of a bool or float tensor [B, H, 1, Sk], none of them 0, and the flags.

    `lo` and `hi` int32 [B, H, 1] hold where the flags do not say GAPS. Not while torch.compile traces.
    """
    lo, hi, flags = torch.ops.fastattn.mask_keys(tensor)
    return lo, hi, flags.item()


def transpose(offsets: Tensor, blocks: Tensor, n_k: int) -> tuple[Tensor, Tensor]:
    """The lists from keys to rows."""
    return torch.ops.fastattn.mask_transpose(offsets, blocks, n_k)


def rows(offsets: Tensor, blocks: Tensor, tiles: Tensor, first: int, last: int, Sk: int) -> Tensor:
    """What rows first..last - 1 see by the lists, bool [B, H, last - first, Sk]."""
    return torch.ops.fastattn.mask_rows(offsets, blocks, tiles, first, last, Sk)


def _fake_lists(B: int, H: int, Sq: int, device="cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    offsets = torch.empty(B, H, granules(Sq) + 1, dtype=torch.int32, device=device)
    blocks = torch.empty(context.new_dynamic_size(), 2, dtype=torch.int32, device=device)
    tiles = torch.empty(context.new_dynamic_size(), GRANULE, dtype=torch.int64, device=device)
    return offsets, blocks, tiles, torch.empty((), dtype=torch.int64)


_triton.define("mask_scan")
_triton.implement("mask_scan", "mask_scan")


@torch.library.register_fake("fastattn_triton::mask_scan")
@torch.library.register_fake("fastattn::mask_scan")
@torch.library.register_fake("fastattn::bias_scan")
def _(mask):
    return _fake_lists(*mask.shape[:3], mask.device)


@torch.library.register_vmap("fastattn::bias_scan")
def _(info, in_dims, bias):
    """Lists of everything, the same for all mapped biases: each hides its own -inf, and lists of a size are mapped."""
    n_q, n_k = (granules(size) for size in bias.movedim(in_dims[0], 0).shape[-2:])
    offsets = torch.arange(0, n_q * n_k + 1, n_k, dtype=torch.int32).view(1, 1, -1)
    blocks = torch.arange(n_k, dtype=torch.int32).repeat(n_q)
    blocks = torch.stack([blocks, torch.full_like(blocks, FULL)], 1)
    tiles = torch.empty(0, GRANULE, dtype=torch.int64)
    return (offsets, blocks, tiles, torch.tensor(EVERYTHING)), (None,) * 4


@torch.library.register_fake("fastattn::mask_keys")
def _(mask):
    lo = torch.empty(*mask.shape[:3], dtype=torch.int32)
    return lo, lo.new_empty(lo.shape), torch.empty((), dtype=torch.int64)


@torch.library.register_fake("fastattn::mask_build")
def _(program, tensors, B, H, Sq, Sk):
    return _fake_lists(B, H, Sq)


@torch.library.register_fake("fastattn::mask_transpose")
def _(offsets, blocks, n_k):
    return offsets.new_empty(*offsets.shape[:2], n_k + 1), blocks.new_empty(blocks.shape)


@torch.library.register_fake("fastattn::mask_rows")
def _(offsets, blocks, tiles, first, last, Sk):
    return offsets.new_empty(*offsets.shape[:2], last - first, Sk, dtype=torch.bool)

"""The C++ ops that build, scan and transpose on the CPU; the torch code beside them serves other devices."""

from __future__ import annotations

import torch
from torch import Tensor

from .leaves import Kind, Node, RangeLeaf

# Flags of mask_scan and mask_build.
EVERYTHING, NONZERO = 1, 2

# Tests switch the ops off to compare.
enabled = True


def serves(device: torch.device) -> bool:
    """Whether the ops run on tensors of a device."""
    return enabled and device.type == "cpu" and hasattr(torch.ops.fastattn, "mask_build")


def build(tree: Node, within: RangeLeaf | None, Sq: int, Sk: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Offsets, blocks, tiles and flags of a tree; what `within` leaves empty is dropped. Sq and Sk are not 0."""
    tensors: list[Tensor] = []

    def put(tensor: Tensor) -> int:
        tensors.append(tensor)
        return len(tensors) - 1

    program = tree.encode(put)
    if within is not None:
        program += [*within.encode(put), Kind.WITHIN]
    return torch.ops.fastattn.mask_build([int(n) for n in program], tensors, *tree.planes, Sq, Sk)


def scan(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Offsets, blocks, tiles and flags of a bool or float tensor [B, H, Sq, Sk], none of them 0."""
    return torch.ops.fastattn.mask_scan(tensor)


def transpose(offsets: Tensor, blocks: Tensor, n_k: int) -> tuple[Tensor, Tensor]:
    return torch.ops.fastattn.mask_transpose(offsets, blocks, n_k)

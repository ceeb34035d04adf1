"""How a call of attention is cut: rows, packed heads, splits of keys and the tile; what `explain` prints."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import launch, tune


@dataclass(frozen=True)
class Plan:
    """tile: of the launch table, or what tuning chose. packed: a group's heads are rows of one program. rows: of a
    program's plane. splits: of the keys. kind: what the tile is chosen by; candidates: to be timed, none by default."""

    tile: launch.AttentionLaunch
    packed: bool
    rows: int
    splits: int
    kind: tuple
    candidates: tuple[launch.AttentionLaunch, ...] = ()


def plan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bits: bool, bits_by_head: bool, terms: bool
) -> Plan:
    Hq, Sq, D = q.shape[1:]
    Hkv, Sk = k.shape[1:3]
    group = Hq // Hkv if Hkv else 1
    packed = group > 1 and Sq < launch.DECODE_ROWS and not bits_by_head
    rows = Sq * group if packed else Sq
    width = max(sum(launch.parts(D)), sum(launch.parts(v.shape[3])))
    row = (launch.architecture(q.device), q.element_size(), width, rows, bits, terms, packed)
    tile = launch.attention(*row)
    split = rows <= launch.DECODE_ROWS and Sk > launch.DECODE_SPLIT
    splits = -(-Sk // launch.DECODE_SPLIT) if split else 1
    kind = ("attention", q.dtype, D, v.shape[3], tile, packed, split, bits, terms)
    candidates = launch.attention_candidates(*row) if tune.wanted() else ()
    return Plan(tune.chosen(kind) or tile if candidates else tile, packed, rows, splits, kind, candidates)


def explain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bits: bool, bits_by_head: bool, terms: bool
) -> str:
    """The row of the launch table, for people."""
    p = plan(q, k, v, bits, bits_by_head, terms)
    tile = p.tile
    text = f"attention, {tile.M} x {tile.N} tiles, {tile.num_warps} warps, {tile.num_stages} stages"
    if p.candidates:
        text += f", {tune.explain(p.kind, p.candidates)}"
    if p.packed:
        text += f", {q.shape[1] // k.shape[1]} heads packed into {p.rows} rows"
    if p.splits > 1:
        text += f", {p.splits} splits of {launch.DECODE_SPLIT} keys"
    return text

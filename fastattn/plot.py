"""Heat maps of attention weights, masks and positional encodings; PNG files or matplotlib axes.

Weights are computed on demand, a slab of rows of one head at a time, and averaged down to the picture's size while
they come: a sequence may be far longer than its S x S weights would fit into memory. Needs matplotlib
(`pip install 'fastattn[plot]'`), which is imported at the first picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from .masks import Mask
from .masks.lower import lower
from .masks.show import density, sizes
from .weights import AttentionWeights

# A heat map has at most so many cells a side: more would be averaged by the eye, or by the renderer.
_CELLS = 512
# With up to this many tokens each is written at the axis.
_LABELS = 64


def attention(
    weights: AttentionWeights | Tensor,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    heads: Sequence[int] | None = None,
    batch: int = 0,
    path: str | PathLike | None = None,
    title: str | None = None,
) -> list:
    """One heat map a head: query rows go down, keys go right, darker is more.

    Args:
        weights: `fastattn.weights.AttentionWeights(q, k, mask=..., ...)`, of which only the drawn heads are computed;
            or a tensor [Sq, Sk], [H, Sq, Sk] or [B, H, Sq, Sk].
        tokens: a label a query row; also of the keys where there are as many and key_tokens is not given.
        key_tokens: a label a key.
        heads: which heads, in order; all unless given.
        batch: which item of a batch.
        path: also writes a PNG there.
        title: above all.

    Returns:
        The matplotlib axes, one a head. Longer sequences than 512 are averaged down.

    Raises:
        ImportError: matplotlib is missing. ValueError: an index out of range, labels that are too few or too many.
    """
    if isinstance(weights, Tensor):
        if weights.dim() not in (2, 3, 4):
            raise ValueError(
                f"weights must be [Sq, Sk], [H, Sq, Sk] or [B, H, Sq, Sk], got shape {list(weights.shape)}"
            )
        weights = weights[(None,) * (4 - weights.dim())]
    B, H, Sq, Sk = weights.shape
    chosen = list(range(H)) if heads is None else list(heads)
    if not 0 <= batch < B:
        raise ValueError(f"batch must be in 0..{B - 1}, got {batch}")
    if not chosen or any(not 0 <= h < H for h in chosen):
        raise ValueError(f"heads must be some of 0..{H - 1}, got {chosen}")
    if Sq == 0 or Sk == 0:
        raise ValueError(f"there is nothing to draw at Sq = {Sq}, Sk = {Sk}")
    if key_tokens is None and tokens is not None and Sq == Sk:
        key_tokens = tokens
    for name, labels, size in (("tokens", tokens, Sq), ("key_tokens", key_tokens, Sk)):
        if labels is not None and len(labels) != size:
            raise ValueError(f"{name} must be {size} labels, got {len(labels)}")
    grids = [_grid(weights, batch, h) for h in chosen]
    columns = math.ceil(math.sqrt(len(chosen)))
    rows = math.ceil(len(chosen) / columns)
    figure, axes = _figure(rows, columns, 1.6 if len(chosen) > 4 else 3.2)
    used = axes.flatten().tolist()[: len(chosen)]
    for spare in axes.flatten()[len(chosen) :]:
        spare.set_axis_off()
    for h, grid, axis in zip(chosen, grids, used):
        image = _heat(axis, grid, Sq, Sk)
        axis.set_title(f"head {h}", fontsize="small")
        figure.colorbar(image, ax=axis, shrink=0.7).ax.tick_params(labelsize="x-small")
        _label(axis.yaxis, tokens, Sq)
        _label(axis.xaxis, key_tokens, Sk, rotation=90)
    return _finish(figure, used, path, title)


def mask(
    mask: Mask,
    *,
    Sq: int | None = None,
    Sk: int | None = None,
    B: int = 1,
    H: int = 1,
    b: int = 0,
    h: int = 0,
    path: str | PathLike | None = None,
    title: str | None = None,
) -> list:
    """What a mask of `fastattn.masks` shows, at batch b and head h of B and H; drawn by 64 x 64 blocks where large.

    Sq and Sk default to the size the mask itself has, else 64. Returns [axes]; raises what `attention` raises.
    """
    if not isinstance(mask, Mask):
        raise TypeError(
            f"mask must be a mask of fastattn.masks (from_tensor makes one), got {type(mask).__name__}"
        )
    Sq, Sk = sizes(mask, Sq, Sk)
    grid, _ = density(lower(mask, B, H, H, Sq, Sk, "cpu"), b, h)
    figure, axes = _figure(1, 1, 4.0)
    axis = axes.flatten()[0]
    _heat(axis, grid, Sq, Sk, high=1.0)
    return _finish(figure, [axis], path, repr(mask) if title is None else title)


def encoding(
    table: Tensor | torch.nn.Module,
    length: int = 128,
    *,
    path: str | PathLike | None = None,
    title: str | None = None,
) -> list:
    """A positional encoding: positions go down, elements go right.

    table: a tensor [S, D], or a module: one with `encoding(positions)` (SinusoidalPositionalEncoding), a
        RotaryEmbedding (the cosines of its angles), or one whose `bias(S, S)` or forward(S, S) gives a bias
        [1, H, S, S] (ALiBi, T5RelativeBias), which is drawn a head.
    length: how many positions of a module.

    Returns the axes; raises TypeError for another module, and what `attention` raises.
    """
    if isinstance(table, torch.nn.Module):
        table = _table(table, length)
    if table.dim() not in (2, 4):
        raise ValueError(f"table must be [S, D], got shape {list(table.shape)}")
    if not table.numel():
        raise ValueError(f"table must have elements to draw, got shape {list(table.shape)}")
    grids = [table] if table.dim() == 2 else list(table[0])
    columns = math.ceil(math.sqrt(len(grids)))
    figure, axes = _figure(math.ceil(len(grids) / columns), columns, 4.0 if len(grids) == 1 else 1.8)
    used = axes.flatten().tolist()[: len(grids)]
    for spare in axes.flatten()[len(grids) :]:
        spare.set_axis_off()
    for grid, axis in zip(grids, used):
        grid = grid.detach().float()
        most = float(grid.abs().max()) or 1.0
        _heat(axis, _shrink(grid), *grid.shape, low=-most, high=most, colors="RdBu_r")
    return _finish(figure, used, path, title)


def _table(module: torch.nn.Module, length: int) -> Tensor:
    positions = torch.arange(length)
    with torch.no_grad():
        if hasattr(module, "encoding"):
            return module.encoding(positions)
        if hasattr(module, "inverse_frequencies"):
            return (positions[:, None] * module.inverse_frequencies.cpu()).cos()
        if hasattr(module, "bias") and callable(module.bias):
            return module.bias(length, length)
        if hasattr(module, "relative_attention_bias"):
            return module(length, length)
    raise TypeError(
        f"table must be a tensor or a positional module of fastattn.nn, got {type(module).__name__}"
    )


def _grid(weights: AttentionWeights | Tensor, batch: int, head: int) -> Tensor:
    """One head's weights as a float32 grid of at most _CELLS a side, each cell the mean of what it covers."""
    Sq, Sk = weights.shape[2:]
    rows, columns = min(Sq, _CELLS), min(Sk, _CELLS)
    if isinstance(weights, Tensor):
        slabs = [(0, weights[batch : batch + 1, head : head + 1])]
    else:
        slabs = weights.slabs(slice(head, head + 1), batch)
    total = torch.zeros(rows, columns)
    counts = torch.zeros(rows)
    with torch.no_grad():
        for start, slab in slabs:
            slab = torch.nn.functional.adaptive_avg_pool2d(
                slab[0].detach().float().cpu(), (slab.shape[2], columns)
            )[0]
            cell = (torch.arange(start, start + slab.shape[0]) * rows).div(Sq, rounding_mode="floor")
            total.index_add_(0, cell, slab)
            counts.index_add_(0, cell, torch.ones(len(cell)))
    return total / counts.unsqueeze(1)


def _shrink(grid: Tensor) -> Tensor:
    size = tuple(min(n, _CELLS) for n in grid.shape)
    return grid if size == tuple(grid.shape) else torch.nn.functional.adaptive_avg_pool2d(grid[None], size)[0]


def _figure(rows: int, columns: int, size: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'fastattn[plot]'") from None
    figure = Figure(figsize=(size * columns + 1.0, size * rows + 0.6), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _heat(axis, grid: Tensor, rows: int, columns: int, low=0.0, high=None, colors="Blues"):
    axis.tick_params(labelsize="x-small")
    return axis.imshow(
        grid.cpu().numpy(),
        cmap=colors,
        vmin=low,
        vmax=high,
        extent=(0, columns, rows, 0),
        interpolation="nearest",
        aspect="equal" if rows <= 4 * columns and columns <= 4 * rows else "auto",
    )


def _label(axis, labels: Sequence[str] | None, size: int, rotation: int = 0) -> None:
    if labels is not None and size <= _LABELS:
        axis.set_ticks([n + 0.5 for n in range(size)], list(labels), rotation=rotation)


def _finish(figure, axes: list, path: str | PathLike | None, title: str | None) -> list:
    if title:
        figure.suptitle(title, fontsize="small")
    if path is not None:
        figure.savefig(path, dpi=120, format="png")
    return axes

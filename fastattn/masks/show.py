"""Pictures of masks: rows go down, keys go right, darker shows more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .lower import Lowered, lower
from .words import GRANULE, granules

if TYPE_CHECKING:
    from .algebra import Mask

# Up to this many pairs a picture is drawn pair by pair, beyond it granule by granule.
_PAIRS = 1 << 22
_DEFAULT_SIZE = 64
_SHADES = " ░▒▓█"
_HALVES = (" ", "▄", "▀", "█")


def sizes(mask: Mask, Sq: int | None, Sk: int | None) -> tuple[int, int]:
    """The size to draw a mask at: as asked, else its own, else that of the other side, else 64."""
    own_q, own_k = mask._size()
    Sq = own_q if Sq is None else Sq
    Sk = own_k if Sk is None else Sk
    if Sq is None:
        Sq = _DEFAULT_SIZE if Sk is None else Sk
    return Sq, Sq if Sk is None else Sk


def density(lowered: Lowered, b: int, h: int) -> tuple[Tensor, int]:
    """The visible share of each cell, float32 [rows, columns], and the side of a cell: 1 pair or 64."""
    if lowered.B * lowered.Hq * lowered.Sq * lowered.Sk <= _PAIRS:
        return lowered.to_dense()[b, h].float(), 1
    parts = []
    plane = (0, 0)
    for window, counts in lowered.granule_counts():
        for n_b in range(counts.shape[0]):
            for n_h in range(counts.shape[1]):
                plane = (window.b0 + n_b, window.h0 + n_h)
                parts.append((plane, counts[n_b, n_h]))
    # A plane that does not vary over batch or head stands for all of them.
    b, h = min(b, plane[0]), min(h, plane[1])
    counts = torch.cat([part for at, part in parts if at == (b, h)])
    rows = _cell_sizes(lowered.Sq).to(counts.device)
    return counts / (rows.view(-1, 1) * _cell_sizes(lowered.Sk).to(counts.device)), GRANULE


def _cell_sizes(size: int) -> Tensor:
    return torch.arange(granules(size) + 1).mul_(GRANULE).clamp_(max=size).diff()


def _shrunk(grid: Tensor, rows: int, columns: int) -> Tensor:
    """The grid averaged down to rows x columns."""
    return torch.nn.functional.adaptive_avg_pool2d(grid[None].float(), (rows, columns))[0]


def text(
    mask: Mask,
    Sq: int | None,
    Sk: int | None,
    B: int = 1,
    H: int = 1,
    b: int = 0,
    h: int = 0,
    width: int = 64,
) -> str:
    """The mask as text of at most `width` characters a line, a title line above it."""
    Sq, Sk, lowered = _lowered(mask, Sq, Sk, B, H, b, h)
    if width < 1:
        raise ValueError(f"show: width must be at least 1, got {width}")
    title = _title(mask, lowered)
    if Sq == 0 or Sk == 0:
        return title
    grid, _ = density(lowered, b, h)
    if grid.shape[1] <= width:  # half a character is a cell: characters are twice as high as wide
        seen = torch.nn.functional.pad(grid, (0, 0, 0, grid.shape[0] % 2))
        if bool(((seen == 0) | (seen == 1)).all()):
            pairs = (seen[0::2] * 2 + seen[1::2]).to(torch.int64).tolist()
            return "\n".join([title, *("".join(_HALVES[x] for x in row) for row in pairs)])
    columns = min(width, grid.shape[1])
    rows = max(round(columns * grid.shape[0] / grid.shape[1] / 2), 1)
    grid = _shrunk(grid, min(rows, grid.shape[0]), columns)
    # The lightest shade is any, the darkest is all.
    shade = torch.where(grid >= 1, 4, (grid * 4).floor().clamp(max=2) + 1).masked_fill(grid <= 0, 0)
    return "\n".join([title, *("".join(_SHADES[int(x)] for x in row) for row in shade.tolist())])


def picture(
    mask: Mask,
    path,
    Sq: int | None = None,
    Sk: int | None = None,
    B: int = 1,
    H: int = 1,
    b: int = 0,
    h: int = 0,
) -> None:
    """Writes the mask as a PNG to `path`. Raises ImportError, saying what to install, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "a picture of a mask needs matplotlib: pip install 'fastattn[plot]' (text needs nothing)"
        ) from None
    Sq, Sk, lowered = _lowered(mask, Sq, Sk, B, H, b, h)
    if Sq == 0 or Sk == 0:
        raise ValueError(f"show: there is nothing to draw at Sq = {Sq}, Sk = {Sk}")
    grid, _ = density(lowered, b, h)
    height = min(max(5.0 * Sq / Sk, 1.5), 12.0)
    figure = Figure(figsize=(6.0, height + 1.0), layout="constrained")
    axes = figure.subplots()
    aspect = "auto" if Sq * 8 < Sk or Sk * 8 < Sq else "equal"
    extent = (0, Sk, Sq, 0)
    axes.imshow(
        grid.cpu().numpy(),
        cmap="Blues",
        vmin=0,
        vmax=1.2,
        extent=extent,
        interpolation="nearest",
        aspect=aspect,
    )
    axes.set_xlabel("key")
    axes.set_ylabel("query row")
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    for axis, size in ((axes.xaxis, Sk), (axes.yaxis, Sq)):
        axis.set_ticks(range(0, size, GRANULE) if size <= 16 * GRANULE else [])
    if Sq <= 16 * GRANULE and Sk <= 16 * GRANULE:
        axes.grid(color="0.6", linewidth=0.4)
    title, counts = _title(mask, lowered).rsplit(", Sq", 1)
    figure.suptitle(f"{title}\nSq{counts}", fontsize="small")
    figure.savefig(path, dpi=120)


def _lowered(mask: Mask, Sq: int | None, Sk: int | None, B: int, H: int, b: int, h: int):
    Sq, Sk = sizes(mask, Sq, Sk)
    for name, index, count in (("b", b, B), ("h", h, H)):
        if not 0 <= index < count:
            raise ValueError(f"show: {name} must lie in 0..{count - 1}, got {index}")
    return Sq, Sk, lower(mask, B, H, H, Sq, Sk, "cpu")


def _title(mask: Mask, lowered: Lowered) -> str:
    share, blocks = lowered.visible_fraction(), lowered.visible_fraction(granule_pairs=True)
    return f"{mask!r}, Sq={lowered.Sq}, Sk={lowered.Sk}: {share:.1%} of pairs, {blocks:.1%} of blocks visible"

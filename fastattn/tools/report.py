"""Tables and pictures of results: rich where it is installed, plain text where it is not, markdown for the
README."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from .families import family_of
from .machine import machine_line

COLUMNS = ("row", "threads", "ours", "torch", "x torch", "best rival", "rate", "share", "floor")


def seconds(value: float | None) -> str:
    """A duration with a unit that keeps it between 1 and 1000."""
    if value is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def count_of(number: int, noun: str) -> str:
    """ "1 thread", "2 threads"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def rate(value: float, unit: str) -> str:
    """Work a second: GF/s or TF/s for "flops", GB/s for "bytes"."""
    if unit == "bytes":
        return f"{value / 1e9:.3g} GB/s"
    return f"{value / 1e12:.3g} TF/s" if value >= 1e12 else f"{value / 1e9:.3g} GF/s"


def bench_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One result as the cells of COLUMNS."""
    for state, text in (("missing", "not available"), ("failed", "FAILED")):
        if state in row:
            return (row["name"], str(row["threads"]), text, *[""] * (len(COLUMNS) - 3))
    times, ratios = row["times"], row["ratios"]
    ratio = f"{ratios['torch']['median']:.2f}" + (" ~" if row["noisy"] else "") if "torch" in ratios else "-"
    share = f"{100 * row['share']:.0f} %" if row.get("share") else "-"
    return (
        row["name"],
        str(row["threads"]),
        seconds(times["ours"]["median"]),
        seconds(times["torch"]["median"]) if "torch" in times else "-",
        ratio,
        _best_rival(row),
        rate(row["rate"], row["unit"]) if row.get("ceiling") else "-",
        share,
        _floor(row),
    )


_INSIDE = ("ours", "torch", "unmasked", "object", "prepared", "read", "unpacked")


def _best_rival(row: Mapping[str, Any]) -> str:
    found = [(time["median"], name) for name, time in row["times"].items() if name not in _INSIDE]
    if not found:
        return "-"
    name = min(found)[1]
    return f"{name} {row['ratios'][name]['median']:.2f} x"


def _against(limit: Mapping[str, Any]) -> str:
    """What a floor is over and of, where that is not torch and ours."""
    against = "" if limit["against"] == "torch" else f" over {limit['against']}"
    return against + ("" if limit["of"] == "ours" else f" of {limit['of']}")


def _floor(row: Mapping[str, Any]) -> str:
    texts = []
    for limit in row["limits"]:
        reached = "not measured" if limit["ratio"] is None else f"{limit['ratio']:.2f}"
        word = {True: "ok", False: "MISSED", None: "?"}[limit["met"]]
        against = _against(limit)
        shown = f" (got {reached})" if against or limit["met"] is None else ""
        texts.append(f"{limit['floor']:.2f}{against} {word}{shown}")
    return "; ".join(texts) or "-"


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], stream: TextIO | None = None
) -> None:
    """Print a table: with rich if installed and the stream is a terminal, else aligned plain text."""
    stream = stream or sys.stdout
    rows = [tuple(row) for row in rows]
    if stream.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            drawn = Table(title=title, title_justify="left")
            for index, column in enumerate(columns):
                drawn.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
            for row in rows:
                drawn.add_row(*row)
            Console(file=stream).print(drawn)
            return
    stream.write(plain_table(title, columns, rows))


def plain_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same table as text, columns aligned by spaces."""
    rows = [tuple(columns), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = [title] if title else []
    for index, row in enumerate(rows):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        if index == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same table as GitHub markdown."""
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---" if i == 0 else "--:" for i in range(len(columns))) + "|",
    ]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def bench_markdown(bench: Mapping[str, Any]) -> str:
    """A bench as markdown: the machine's line, then one table a suite."""
    if all(row["suite"] == "models" for row in bench["rows"]):  # a page of the docs
        return models_markdown(bench["rows"], machine_line(bench["machine"]))
    parts = [machine_line(bench["machine"]) + "\n"]
    for suite in dict.fromkeys(row["suite"] for row in bench["rows"]):
        rows = [bench_cells(row) for row in bench["rows"] if row["suite"] == suite]
        parts.append(f"### {suite}\n\n" + markdown_table(COLUMNS, rows))
    return "\n".join(parts)


_MODELS = """# Swapped models

Time of a forward, and of a forward and a backward, of whole models of real width and few layers with random weights,
swapped by `fastattn.swap`, over the same in eager attention and in SDPA: 8 sequences of mixed lengths to 256, padded
(8 images for ViT; texts to 77 tokens for CLIP). "over SDPA" of 1.3 means that SDPA takes 1.3 times as long. Encoders of
BERT's kind are swapped with `pack=True`, and the column "unpacked" has what they reach over SDPA without it. The
differences are the largest of all numbers of the answer (with a backward: of all gradients) to eager attention in
float32 with the same weights, as a share of the largest number.
"""


def _model_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    kind = "forward + backward" if row["training"] else "forward"
    head = (row["shape"]["model"], row["dtype"], kind, str(row["threads"]))
    if "times" not in row:
        return (*head, row.get("missing") or f"FAILED: {row['failed']}", *[""] * 7)
    unpacked = [limit["ratio"] for limit in row["limits"] if limit["of"] == "unpacked"]

    def over(name):
        return f"{row['ratios'][name]['median']:.2f}" if name in row["ratios"] else "-"

    off = row["differences"]
    return (
        *head,
        seconds(row["times"]["ours"]["median"]) + (" ~" if row["noisy"] else ""),
        over("eager"),
        over("torch"),
        f"{unpacked[0]:.2f}" if unpacked else "-",
        _floor(row),
        *(f"{off[way]:.1e}" if way in off else "-" for way in ("ours", "torch", "eager")),
    )


def models_markdown(rows: Sequence[Mapping[str, Any]], machine: str) -> str:
    """The suite `models` as a page: times, differences, what was swapped in each model and what was left."""
    columns = ("model", "dtype", "pass", "threads", "ours", "over eager", "over SDPA", "unpacked", "floor")
    columns += ("difference, ours", "SDPA", "eager")
    swapped = {}
    for row in rows:
        if "swapped" in row:
            parts = [f"{count} {what}" for what, count in row["swapped"].items()]
            left = [f"{count} {what}" for what, count in row["left"].items()]
            swapped.setdefault(row["shape"]["model"], (", ".join(parts), ", ".join(left) or "-"))
    cells = [(model, *found) for model, found in swapped.items()]
    return "\n".join(
        (
            _MODELS,
            machine + "\n",
            markdown_table(columns, map(_model_cells, rows)),
            "## What was swapped\n",
            markdown_table(("model", "swapped", "left"), cells),
        )
    )


def bench_summary(bench: Mapping[str, Any]) -> str:
    """A bench as small markdown tables: ratio over torch and share of the ceiling, a column a mask or dtype.

    Only the most threads of the run and the rows that torch ran too.
    """
    threads = max(row["threads"] for row in bench["rows"])
    parts = [f"{machine_line(bench['machine'])}, {count_of(threads, 'thread')}\n"]
    for suite in dict.fromkeys(row["suite"] for row in bench["rows"]):
        cells: dict[str, dict[str, str]] = {}
        for row in bench["rows"]:
            if row["suite"] == suite and row["threads"] == threads and "torch" in row.get("ratios", ()):
                line, column = _place(row)
                share = f" ({100 * row['share']:.0f} %)" if row.get("share") else ""
                cells.setdefault(line, {})[column] = f"{row['ratios']['torch']['median']:.2f} x{share}"
        columns = list(dict.fromkeys(column for line in cells.values() for column in line))
        rows = [(line, *(found.get(column, "") for column in columns)) for line, found in cells.items()]
        if rows:
            parts.append(f"### {suite}\n\n" + markdown_table(["", *columns], rows))
    return "\n".join(parts)


def bench_missed(bench: Mapping[str, Any]) -> str:
    """The floors that a bench missed, as markdown: a table a suite, with what the ceiling would have allowed.

    "at the ceiling" is the ratio over torch at the whole of the ceiling measured in the run, the ratio divided by the
    share: a floor above it no kernel reaches on that machine.
    """
    parts = [machine_line(bench["machine"]) + "\n"]
    for suite in dict.fromkeys(row["suite"] for row in bench["rows"]):
        of_suite = [(row, limit) for row, limit in judged(bench) if row["suite"] == suite]
        rows = [_missed_cells(row, limit) for row, limit in of_suite if not limit["met"]]
        parts.append(f"### {suite}: {len(of_suite) - len(rows)} of {len(of_suite)} floors reached\n")
        if rows:
            columns = ("row", "reached", "floor", "share of the ceiling", "at the ceiling")
            parts.append(markdown_table(columns, rows))
    return "\n".join(parts)


def _missed_cells(row: Mapping[str, Any], limit: Mapping[str, Any]) -> tuple[str, ...]:
    share = row.get("share")
    return (
        f"{row['name']}, {count_of(row['threads'], 'thread')}",
        f"{limit['ratio']:.2f}",
        f"{limit['floor']:.2f}{_against(limit)}",
        f"{100 * share:.0f} %" if share else "-",
        f"{limit['ratio'] / share:.1f}" if share and limit["of"] == "ours" else "-",
    )


def _place(row: Mapping[str, Any]) -> tuple[str, str]:
    """Where a row stands in a summary: (line, column)."""
    if row["op"] != "attention":
        line = row["name"].removesuffix("-training").replace(f"-{row['dtype']}", "")
        return line + (" with backward" if row["training"] else ""), row["dtype"]
    line = row["name"].replace(f"-{row['mask']}", "", 1)
    return line, row["mask"]


def setup_times(bench: Mapping[str, Any]) -> dict[str, str]:
    """Rivals that need more than a second before their second call, with the range over the rows as text."""
    found: dict[str, list[float]] = {}
    for row in bench["rows"]:
        for name, time in row.get("setup", {}).items():
            found.setdefault(name, []).append(time)
    return {
        name: " to ".join(dict.fromkeys((seconds(min(times)), seconds(max(times)))))
        for name, times in found.items()
        if max(times) > 1.0
    }


def judged(bench: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The floors that were measured, each with its row."""
    return [
        (row, limit) for row in bench["rows"] for limit in row.get("limits", ()) if limit["met"] is not None
    ]


def missed(bench: Mapping[str, Any]) -> list[str]:
    """Rows whose floor was measured and not met, as text."""
    return [
        f"{row['suite']} {row['name']} ({count_of(row['threads'], 'thread')}): {limit['ratio']:.2f} over "
        f"{limit['against']}, floor {limit['floor']:.2f}"
        for row, limit in judged(bench)
        if not limit["met"]
    ]


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError(
            "drawing needs matplotlib, which is not installed: pip install 'fastattn[plot]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


# Colour-blind safe (Okabe and Ito), dark enough on white.
OURS, THEIRS, THIRD = "#0072B2", "#D55E00", "#666666"


def plot(bench: Mapping[str, Any], path: str | Path) -> list[Path]:
    """Draw a bench as PNG, one picture a suite, and return the files.

    One suite goes to `path`; more get the suite's name before the suffix. Raises RuntimeError where
    matplotlib is missing, ValueError where no row was measured.
    """
    measured = [row for row in bench["rows"] if "times" in row]
    suites = list(dict.fromkeys(row["suite"] for row in measured))
    if not suites:
        raise ValueError("nothing to draw: no row of this bench was measured")
    path, written = Path(path), []
    for suite in suites:
        rows = [row for row in measured if row["suite"] == suite]
        target = path if len(suites) == 1 else path.with_name(f"{path.stem}-{suite}{path.suffix or '.png'}")
        if suite == "masks" and any("area" in row["features"] for row in rows):
            _plot_masks(rows, target, bench)
        else:
            _plot_speed(suite, rows, target, bench)
        written.append(target)
    return written


def _plot_speed(suite: str, rows: list[dict], path: Path, bench: Mapping[str, Any]) -> None:
    """Bars by row: our rate beside torch's and the best rival's, and our share of the ceiling."""
    pyplot = _pyplot()
    threads = max(row["threads"] for row in rows)
    rows = [row for row in rows if row["threads"] == threads and "latency" not in row["features"]]
    figure, (speed, share) = pyplot.subplots(
        1, 2, figsize=(13, 1.6 + 0.34 * len(rows)), sharey=True, width_ratios=(2, 1), layout="constrained"
    )
    places = list(range(len(rows)))
    flops = rows[0]["unit"] == "flops"
    scale = 1e9
    for offset, colour, label, pick in (
        (-0.27, OURS, "fastattn", lambda row: row["rate"]),
        (0.0, THEIRS, "torch", lambda row: row["times"].get("torch", {}).get("rate", 0.0)),
        (0.27, THIRD, "best rival", _best_rival_rate),
    ):
        values = [pick(row) / scale for row in rows]
        if any(values):
            speed.barh([place + offset for place in places], values, height=0.25, color=colour, label=label)
    for place, row in enumerate(rows):
        if "torch" in row["ratios"]:
            text = f" {row['ratios']['torch']['median']:.2f} x"
            speed.text(row["rate"] / scale, place - 0.27, text, va="center", fontsize=7, color=OURS)
    speed.set_yticks(places, [row["name"] for row in rows], fontsize=8)
    speed.margins(x=0.08, y=0.01)
    speed.invert_yaxis()
    speed.set_xlabel("GF/s, visible FLOPs" if flops else "GB/s")
    speed.set_title("speed, with the ratio over torch", fontsize=10, loc="left")
    speed.legend(fontsize=8, loc="lower right")
    share.barh(places, [100 * (row.get("share") or 0.0) for row in rows], height=0.5, color=OURS)
    share.axvline(100, color=THIRD, linewidth=0.8)
    share.set_xlabel("% of the ceiling measured in this run")
    share.set_title("share of the ceiling", fontsize=10, loc="left")
    _finish(pyplot, figure, path, f"{suite}, {count_of(threads, 'thread')}", bench)


def _best_rival_rate(row: Mapping[str, Any]) -> float:
    return max((time["rate"] for name, time in row["times"].items() if name not in _INSIDE), default=0.0)


def _plot_masks(rows: list[dict], path: Path, bench: Mapping[str, Any]) -> None:
    """Time over the unmasked time against the visible fraction: a line a mask family, torch beside ours."""
    pyplot = _pyplot()
    rows = [row for row in rows if "area" in row["features"]]
    threads = max(row["threads"] for row in rows)
    rows = [row for row in rows if row["threads"] == threads]
    panels = list(dict.fromkeys((row["dtype"], row["shape"]["d"]) for row in rows))
    columns = min(2, len(panels))
    figure, axes = pyplot.subplots(
        math.ceil(len(panels) / columns),
        columns,
        figsize=(6.5 * columns, 4.6 * math.ceil(len(panels) / columns)),
        squeeze=False,
        layout="constrained",
    )
    colours = pyplot.get_cmap("tab20").colors
    families = list(dict.fromkeys(family_of(row["mask"]) for row in rows))
    for axis, (dtype, size) in zip(axes.flat, panels, strict=False):
        here = [row for row in rows if (row["dtype"], row["shape"]["d"]) == (dtype, size)]
        axis.plot([0, 1], [0.03, 1.23], color=THIRD, linewidth=0.8, linestyle="--", label="promised bound")
        for index, family in enumerate(families):
            points = sorted(
                (r["visible"], _relative(r, "ours"), _relative(r, "torch"))
                for r in here
                if family_of(r["mask"]) == family
            )
            if points:
                visible, ours, theirs = zip(*points, strict=True)
                colour = colours[index % len(colours)]
                axis.plot(visible, ours, "o-", color=colour, markersize=5, linewidth=1.2, label=family)
                axis.plot(visible, theirs, "x:", color=colour, markersize=5, linewidth=0.8)
        axis.set_xlim(0, 1.02)
        axis.set_ylim(0, None)
        axis.set_title(f"{dtype}, D = {size}", fontsize=10, loc="left")
        axis.set_xlabel("visible 64 x 64 granules / all")
        axis.set_ylabel("time / our unmasked time")
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=7, ncols=2, title="dots: fastattn, crosses: torch SDPA", title_fontsize=7)
    _finish(pyplot, figure, path, f"masks, {count_of(threads, 'thread')}", bench)


def _relative(row: Mapping[str, Any], name: str) -> float:
    """A variant's time over our unmasked time of the same rounds."""
    unmasked = row["ratios"]["unmasked"]["median"]
    return 1 / unmasked if name == "ours" else row["ratios"][name]["median"] / unmasked


def _finish(pyplot, figure, path: Path, title: str, bench: Mapping[str, Any]) -> None:
    machine = textwrap.fill(machine_line(bench["machine"]), int(14 * figure.get_figwidth()))
    figure.suptitle(f"{title}\n{machine}", fontsize=9, x=0.01, ha="left")
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", linewidth=0.3)
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)

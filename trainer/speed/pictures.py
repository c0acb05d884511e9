"""Pictures of a report, as PNG bytes; they show what its tables say."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from medley.journal import Measurement
from medley.rows import Row, rows_of
from trainer.speed.baselines.columns import DISPATCHER, OURS
from trainer.speed.goals import DDAS_PERCENT, EXPERTS_PERCENT
from trainer.speed.mixing import ROUTER
from trainer.speed.scoring import FORWARD
from trainer.speed.swapping import THROUGHPUT
from trainer.speed.towers import FROZEN

__all__ = ["PICTURES"]

DPI, COLOURS = 110, 256

Picture = Callable[[Sequence[Measurement]], bytes | None]


def ratios_png(lines: Sequence[Measurement]) -> bytes | None:
    """How many times as fast as the dispatcher each column is, tasks mixed: a panel a row."""
    rows = [
        row
        for row in rows_of(lines, "kernels")
        if DISPATCHER in row.columns
        and row.conditions["mix"] == ("one task" if row.conditions["batch"] == 1 else "11 tasks")
    ]
    if not rows:
        return None
    batches = len({row.conditions["batch"] for row in rows})
    figure, grid = _panels(len(rows), batches, width=2.9, height=1.7)
    for axes, row in zip(grid, rows, strict=True):
        names = [n for n in row.columns if n not in (DISPATCHER, ROUTER)]
        for place, name in enumerate(names):
            ratio = row.ratio(DISPATCHER, name)
            if ratio is None:
                axes.text(0, place, " failed", va="center", fontsize=7)
                continue
            ends = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
            colour = "C0" if name.startswith(OURS) else "0.65"
            axes.barh(place, ratio.median, color=colour, xerr=ends, ecolor="black")
            axes.text(ratio.high, place, f" {ratio.median:.1f}", va="center", fontsize=7)
        axes.axvline(1, color="C3", lw=1)
        axes.set_yticks(range(len(names)), names)
        axes.set(ylim=(len(names) - 0.4, -0.6))
        axes.margins(x=0.2)
        at = row.conditions
        axes.set_title(f"{at['shape']}, {at['dtype']}, batch {at['batch']}", fontsize=8)
    return _png(figure, "Times as fast as the published dispatcher (red line), tasks mixed")


def overhead_png(lines: Sequence[Measurement]) -> bytes | None:
    """What experts cost over the frozen tower, against the batch size: a panel a precision."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows_of(lines, "model"):
        if row.conditions["what"] == "tower":
            key = (str(row.conditions["backbone"]), str(row.conditions["precision"]))
            groups.setdefault(key, []).append(row)
    if not groups:
        return None
    figure, grid = _panels(len(groups), min(3, len(groups)), width=3.0, height=2.3)
    for axes, ((backbone, precision), rows) in zip(grid, groups.items(), strict=True):
        for name in rows[0].columns:
            if name.endswith(", graph") is not (rows[0].columns[name].run.device == "cuda"):
                continue
            base = f"{FROZEN}, graph" if name.endswith(", graph") else FROZEN
            points = [(int(r.conditions["batch"]), r.ratio(name, base)) for r in rows]
            known = [(batch, 100 * (ratio.median - 1)) for batch, ratio in points if ratio]
            if known and name != base:
                axes.plot(*zip(*known, strict=True), marker="o", ms=3, label=name)
        axes.axhline(EXPERTS_PERCENT, color="C3", lw=1, ls="--")
        axes.axhline(0, color="black", lw=0.8)
        batches = [int(row.conditions["batch"]) for row in rows]
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.set_title(f"{backbone}, {precision}", fontsize=8)
    _legend(figure, grid[0])
    return _png(figure, "% slower than the frozen tower, against the batch size; dashed: the goal")


def shares_png(lines: Sequence[Measurement]) -> bytes | None:
    """What deciding among T tasks costs, in per cent of a forward, against T."""
    rows = rows_of(lines, "ddas")
    if not rows:
        return None
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        graph = ", graph" if row.columns[FORWARD].run.device == "cuda" else ""
        known = [
            (int(name.split()[0]), 100 * ratio.median)
            for name in row.columns
            if name.endswith(f" tasks{graph}") and (ratio := row.ratio(name, FORWARD + graph))
        ]
        at = row.conditions
        label = f"{at['backbone']}, {at['precision']}, batch {at['batch']}"
        axes.plot(*zip(*known, strict=True), marker="o", ms=3, label=label)
    axes.plot(*zip(*DDAS_PERCENT.items(), strict=True), "C3v", ms=8, label="goals")
    axes.set(xscale="log", yscale="log", xlabel="tasks", ylabel="% of a forward")
    _finish(axes)
    axes.legend(frameon=False, fontsize=8)
    return _png(figure, "The cost of deciding among tasks")


def swaps_png(lines: Sequence[Measurement]) -> bytes | None:
    """Throughput over time, batch by batch, in the last segment of each rhythm; swaps marked."""
    rows = [r for r in rows_of(lines, "swap") if r.conditions["what"] == THROUGHPUT]
    if not rows:
        return None
    row = rows[0]
    figure, grid = _panels(len(row.columns), 1, width=7.0, height=1.4)
    top = 0.0
    for axes, (name, line) in zip(grid, row.columns.items(), strict=True):
        edges_s = np.asarray((0.0, *line.series["batch_end_s"]))
        rate = int(row.conditions["batch"]) / np.diff(edges_s)
        axes.stairs(rate, edges_s, color="C0")
        axes.vlines(line.series["swap_s"], 0, 1, "C3", lw=0.8, transform=axes.get_xaxis_transform())
        axes.set_title(name, fontsize=8)
        top = max(top, float(rate.max()))
    for axes in grid:
        axes.set_ylim(0, 1.1 * top)
    return _png(
        figure, "Images a second, batch by batch, over seconds; red: a swap before the batch"
    )


PICTURES: dict[str, tuple[str, Picture]] = {
    "kernels": ("ratios.png", ratios_png),
    "model": ("overhead.png", overhead_png),
    "ddas": ("shares.png", shares_png),
    "swap": ("swaps.png", swaps_png),
}


def _panels(count: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(1.2 + width * columns, 0.9 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in grid[count:]:
        axes.set_visible(False)
    for axes in grid:
        _finish(axes)
    return figure, grid[:count]


def _finish(axes: Axes) -> None:
    axes.tick_params(labelsize=7)
    axes.grid(visible=True, alpha=0.25)
    axes.set_axisbelow(True)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def _png(figure: Figure, title: str) -> bytes:
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    drawn, packed = io.BytesIO(), io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(drawn, format="png", dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(packed, "png", optimize=True)
    return packed.getvalue()

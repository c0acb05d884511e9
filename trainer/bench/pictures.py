"""Pictures of a benchmark, as PNG bytes: matrices, curves over a sequence, errors, bars.

They show what the records say and compute nothing that the report does not say too.

Legend: T tasks; A[i, j] is the accuracy on data set j after task i was learnt.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from trainer.bench.metrics import OverSeeds
from trainer.bench.record import Scores

__all__ = ["bars_png", "errors_png", "matrix_png", "sequence_png", "steps_png"]

DPI, COLOURS = 110, 256
GREY = "0.45"
BINS, TICK_BINS = 42, 9  # of a histogram, and bins from tick to tick


def matrix_png(accuracy_TT: ArrayLike, tasks: Sequence[str], *, title: str) -> bytes:
    """Accuracy of each data set after each task, in per cent.

    The diagonal is framed; what lies above it was not learnt yet, and is hatched.
    """
    matrix_TT = np.asarray(accuracy_TT, dtype=np.float64)
    size = len(tasks)
    figure = Figure(figsize=(2.6 + 0.66 * size, 1.9 + 0.46 * size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(100 * matrix_TT, vmin=0, vmax=100, cmap="YlGnBu", aspect="auto")
    axes.set_xticks(range(size), tasks, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size), tasks)
    axes.set(xlabel="data set", ylabel="after learning")
    axes.set_title(title, loc="left", fontsize=10)
    fill_TT4 = image.to_rgba(100 * matrix_TT)
    for row, column in np.ndindex(matrix_TT.shape):
        _cell(axes, row, column, 100 * float(matrix_TT[row, column]), fill=fill_TT4[row, column])
    marks = [
        Patch(fill=False, edgecolor="black", linewidth=1.8, label="just learnt"),
        Patch(fill=False, edgecolor=GREY, linewidth=0, hatch="////", label="not learnt yet"),
    ]
    figure.legend(handles=marks, loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    figure.colorbar(image, ax=axes, label="accuracy, %")
    return _png(figure)


def sequence_png(matrices: Mapping[str, ArrayLike], tasks: Sequence[str], *, title: str) -> bytes:
    """Accuracy of each data set after each task, and their mean over the tasks learnt so far.

    Args:
        matrices: A[i, j] of each method, by the name it gets in the legend.
        tasks: in the order of learning.
        title: of the whole picture.
    """
    columns = math.ceil(math.sqrt(len(tasks) + 1))
    figure, grid = _panels(len(tasks) + 1, columns, width=2.7, height=2.0, extra=1.1)
    steps = np.arange(1, len(tasks) + 1)
    for index, (name, accuracy_TT) in enumerate(matrices.items()):
        matrix_TT = 100 * np.asarray(accuracy_TT, dtype=np.float64)
        seen_T = [matrix_TT[i, : i + 1].mean() for i in range(len(tasks))]
        # Equal curves hide each other: each next one is thinner.
        width = max(1.0, 3.0 - 0.45 * index)
        style = f"C{index % 10}{'-' if index < 10 else '--'}"
        for axes, values_T in zip(grid, (seen_T, *matrix_TT.T), strict=True):
            axes.plot(steps, values_T, style, lw=width, marker="o", ms=width + 1, label=name)
    for axes, panel in zip(grid, ("mean over what was learnt", *tasks), strict=True):
        axes.set_title(panel, fontsize=9, fontweight="bold" if axes is grid[0] else "normal")
        axes.set(xlim=(0.6, len(tasks) + 0.4), ylim=(0, 102))
        axes.set_xticks(steps)
        axes.tick_params(labelsize=8)
        axes.grid(visible=True, alpha=0.25)
    for learnt, axes in enumerate(grid[1:], start=1):
        axes.axvspan(0.6, learnt - 0.5, color="0.5", alpha=0.15, lw=0)
    figure.supylabel("accuracy, %", fontsize=9)
    _legend(figure, grid[0], f"{title}\nagainst tasks learnt; grey: before this one")
    return _png(figure)


def steps_png(curves: Mapping[str, ArrayLike], classes: Sequence[int]) -> bytes:
    """Accuracy over all classes seen, against how many they are; a curve a method."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, accuracy_S in curves.items():
        axes.plot(classes, 100 * np.asarray(accuracy_S), marker="o", label=name)
    axes.set(xlabel="classes seen", ylabel="accuracy over all of them, %", ylim=(0, 102))
    axes.grid(visible=True, alpha=0.25)
    axes.legend(frameon=False)
    return _png(figure)


def errors_png(scores: Sequence[Scores], *, title: str) -> bytes:
    """How each task's selector scores its own images, other tasks' and nobody's."""
    columns = min(len(scores), 3 if len(scores) < 10 else 4)
    figure, grid = _panels(len(scores), columns, width=3.3, height=1.9, extra=1.1)
    for axes, task in zip(grid, scores, strict=True):
        groups = {"own test images": task.own, "other tasks": task.others, "unseen": task.unseen}
        bins, width = _bins([*task.own, *task.others, *task.unseen], task)
        axes.set_xscale("asinh", linear_width=width)
        ticks = sorted({float(f"{edge:.1g}") for edge in bins[2::TICK_BINS]})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        for colour, (name, errors) in zip(("C0", "C1", GREY), groups.items(), strict=True):
            if not errors:
                continue
            axes.hist(
                np.clip(errors, bins[0], bins[-1]),
                bins=bins.tolist(),
                weights=np.full(len(errors), 100 / len(errors)),
                histtype="stepfilled",
                color=colour,
                alpha=0.5,
                label=name,
            )
        axes.axvline(task.threshold, color="C3", lw=1.5, label="threshold")
        axes.set_title(task.task, fontsize=9)
        axes.tick_params(labelsize=8)
    figure.supylabel("% of the group's images", fontsize=9)
    _legend(figure, grid[0], f"{title}\nagainst the error, logarithmic far from 0")
    return _png(figure)


def bars_png(
    results: Mapping[str, Mapping[str, OverSeeds | None]], *, title: str, unit: str = "%"
) -> bytes:
    """Bars of several metrics by method, with the spread over the seeds.

    Args:
        results: by method, then by metric; shares, and None where a method has no such metric.
        title: of the whole picture.
        unit: what the values are in; shares are shown in per cent.
    """
    metrics = list(dict.fromkeys(name for row in results.values() for name in row))
    size = (2.6 + 2.5 * len(metrics), 1.3 + 0.3 * len(results))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    places = range(len(results))
    for column, (axes, metric) in enumerate(zip(grid, metrics, strict=True)):
        for place, row in zip(places, results.values(), strict=True):
            _bar(axes, place, row.get(metric), f"C{column}")
        axes.set_title(metric, fontsize=9)
        axes.set(xlim=(0, 118))  # room for the numbers
        axes.set_xticks(range(0, 101, 25))
        axes.tick_params(labelsize=8)
        axes.grid(visible=True, axis="x", alpha=0.25)
        axes.set_axisbelow(True)
    grid[0].set_yticks(places, list(results), fontsize=9)
    grid[0].set_ylim(len(results) - 0.4, -0.6)
    figure.supxlabel(unit, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return _png(figure)


def _cell(axes: Axes, row: int, column: int, value: float, *, fill: Any) -> None:
    """One number, framed where its data set was just learnt, on hatching where it was not yet."""
    corner = (column - 0.5, row - 0.5)
    if column > row:
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="////", ec="0.75", lw=0))
    if column == row:
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, ec="black", lw=1.8, zorder=3))
    colour = "white" if value > 55 else "black"
    text = axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8)
    text.set(color=colour, bbox={"facecolor": fill, "edgecolor": "none", "pad": 1.5})


def _bar(axes: Axes, place: float, result: OverSeeds | None, colour: str) -> None:
    if result is None:
        axes.text(2, place, "-", va="center", fontsize=9)
        return
    mean, spread = 100 * result.mean, 100 * (result.spread or 0)
    axes.barh(place, mean, height=0.7, color=colour, alpha=0.75, xerr=spread, ecolor="black")
    axes.text(mean + spread + 1.5, place, f"{mean:.1f}", va="center", fontsize=8)


def _bins(errors: Sequence[float], task: Scores) -> tuple[NDArray[np.float64], float]:
    """Edges of equal width as drawn, and the width of the linear part of the axis.

    Own images lie close together and unseen ones may be a hundred times as far: the axis is linear
    about where own images are, and logarithmic beyond.
    """
    finite = [error for error in (*errors, task.threshold) if math.isfinite(error)]
    low, high = min(finite), max(finite)
    own = float(np.quantile(np.abs(task.own or finite), 0.9))
    width = own or (high - low) or 1.0
    edges = np.linspace(math.asinh(low / width), math.asinh(high / width), BINS + 1)
    return width * np.sinh(edges), width


def _panels(
    count: int, columns: int, *, width: float, height: float, extra: float
) -> tuple[Figure, list[Axes]]:
    """A grid of small panels; those that are left over are not drawn."""
    rows = math.ceil(count / columns)
    size = (0.4 + width * columns, extra + height * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def _legend(figure: Figure, axes: Axes, title: str) -> None:
    """The title above all panels, and one legend for all of them below."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def _png(figure: Figure) -> bytes:
    drawn, packed = io.BytesIO(), io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(drawn, format="png", dpi=DPI)
    # Few colours: less than half the size, and no difference to the eye.
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(packed, "png", optimize=True)
    return packed.getvalue()

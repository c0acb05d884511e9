"""Pictures of a report, as PNG bytes; they show what its tables say."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from medley.journal import Measurement
from medley.rows import Row, rows_of
from service.bench.names import (
    BARE,
    BARE_PIXELS,
    BATCHED,
    INFINITY,
    LOAD,
    MEDLEY,
    RIVAL,
    SATURATED,
    SATURATION,
)

__all__ = ["PICTURES", "finish", "plain_log", "png_of"]

DPI, COLOURS = 110, 256


def load_png(lines: Sequence[Measurement]) -> bytes | None:
    """Latency against the load, p50 and p95, a panel for each form of the images."""
    rows = rows_of(lines, LOAD)
    forms = list(dict.fromkeys(str(row.conditions["images"]) for row in rows))
    if not rows:
        return None
    figure = Figure(figsize=(1 + 3.8 * len(forms), 4.2), layout="constrained")
    grid = figure.subplots(1, len(forms), squeeze=False, sharey=True).flatten().tolist()
    for axes, form in zip(grid, forms, strict=True):
        _draw_load(axes, [row for row in rows if row.conditions["images"] == form])
        axes.set_title(form, fontsize=9)
    grid[0].set_ylabel("ms from due to answered")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=7)
    return png_of(
        figure, "Latency under load; lines p50, dotted p95, crosses p95 with a swap a second"
    )


def throughput_png(lines: Sequence[Measurement]) -> bytes | None:
    """Images a second: of every site, of bare loops, of both servers."""
    bars = [*_site_bars(lines), *_bare_bars(lines), *_rival_bars(lines)]
    if not bars:
        return None
    figure = Figure(figsize=(7.6, 1 + 0.22 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for place, (_, rate_hz, colour) in enumerate(bars):
        axes.barh(place, rate_hz, color=colour)
        axes.text(rate_hz, place, f" {rate_hz:.1f}", va="center", fontsize=7)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.margins(x=0.1)
    finish(axes)
    return png_of(figure, "Images a second at saturation")


PICTURES: dict[str, Callable[[Sequence[Measurement]], bytes | None]] = {
    "throughput.png": throughput_png,
    "load.png": load_png,
}

Bar = tuple[str, float, str]


def _draw_load(axes: Axes, rows: Sequence[Row]) -> None:
    sites = list(dict.fromkeys((row.conditions["tasks"], row.conditions["mix"]) for row in rows))
    for number, (tasks, mix) in enumerate(sites):
        some = [r for r in rows if (r.conditions["tasks"], r.conditions["mix"]) == (tasks, mix)]
        colour = f"C{number}"
        quiet = [row for row in some if row.conditions["swaps"] == "none"]
        axes.plot(
            *_points(quiet, "p50_s"), color=colour, marker="o", ms=3, label=_tasks(tasks, mix)
        )
        axes.plot(*_points(quiet, "p95_s"), color=colour, ls=":", marker=".", ms=3)
        swapped = [row for row in some if row.conditions["swaps"] != "none"]
        axes.plot(*_points(swapped, "p95_s"), color=colour, marker="x", ls="")
    axes.set(yscale="log", xlabel="% of saturation")
    plain_log(axes.yaxis)
    finish(axes)


def _tasks(count: str | int, mix: str | int) -> str:
    return "1 task" if count == 1 else f"{count} tasks, {mix}"


def _points(rows: Sequence[Row], value: str) -> tuple[list[int], list[float]]:
    found = [(int(row.conditions["load"]), row.value(MEDLEY, value)) for row in rows]
    known = [(load, 1e3 * time_s) for load, time_s in found if time_s is not None]
    return [load for load, _ in known], [time_ms for _, time_ms in known]


def _site_bars(lines: Sequence[Measurement]) -> list[Bar]:
    bars = []
    for row in rows_of(lines, SATURATION):
        at, rate_hz = row.conditions, row.value(MEDLEY, "throughput_hz")
        bars.append((f"{at['images']}, {_tasks(at['tasks'], at['mix'])}", rate_hz or 0.0, "C0"))
    return bars


def _bare_bars(lines: Sequence[Measurement]) -> list[Bar]:
    return [
        (f"{row.conditions['images']}, {name}", 1 / time.median, "0.6")
        for row in rows_of(lines, SATURATED)
        for name in (BARE, BARE_PIXELS)
        if (time := row.time_s(name))
    ]


def _rival_bars(lines: Sequence[Measurement]) -> list[Bar]:
    return [
        (f"{row.conditions['backbone']}, {row.conditions['images']}: {name}", 1 / time.median, hue)
        for row in rows_of(lines, RIVAL)
        for name, hue in ((MEDLEY, "C0"), (BATCHED, "C2"), (INFINITY, "C1"))
        if (time := row.time_s(name))
    ]


def plain_log(axis: Axis) -> None:
    """Label 1, 2 and 5 of each decade, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def finish(axes: Axes) -> None:
    """Small ticks, a pale grid under what is drawn."""
    axes.tick_params(labelsize=7)
    axes.grid(visible=True, alpha=0.25)
    axes.set_axisbelow(True)


def png_of(figure: Figure, title: str) -> bytes:
    """Draw a figure with its title."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    drawn, packed = io.BytesIO(), io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(drawn, format="png", dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(packed, "png", optimize=True)
    return packed.getvalue()

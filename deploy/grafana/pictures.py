"""A dashboard as a picture: its panels in their places, drawn from what Prometheus answers.

For docs and for a look without Grafana; what Grafana shows is made by Grafana.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator
from PIL import Image

from deploy.grafana.panels import COLUMNS, Board, Panel, Place, Unit
from deploy.grafana.source import Series, Source

__all__ = ["png", "shown"]

DPI, PALETTE = 100, 256
COLUMN_IN, ROW_IN = 0.62, 0.36  # of a dashboard's grid, in inches
GAP_IN = 0.13  # between panels
COLOURS = ("#3274d9", "#e0752d", "#299c46", "#b877d9", "#c4162a", "#8ab8ff", "#e0b400", "#6d6d6d")
INK, FAINT, FRAME = "#24292e", "#6e7781", "#d8dee4"
PLAIN: tuple[Unit, ...] = ("requests/s", "images/s", "1/s", "cores")  # told once, over the axis
STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)))  # equal curves stay to be seen under one another
LEGENDS = 9  # names under a panel; more are told by their number
TOP_IN = 0.62
SWATCH_IN = 0.24


def png(board: Board, source: Source) -> bytes:
    """Draw a dashboard."""
    places = list(board.places())
    rows = max(place.y + place.panel.height for place in places)
    size_in = COLUMNS * COLUMN_IN, rows * ROW_IN + TOP_IN
    figure = Figure(figsize=size_in, facecolor="#f6f8fa")
    figure.text(0.008, 1 - 0.24 / size_in[1], board.title, size=13, weight="bold", color=INK)
    figure.text(0.008, 1 - 0.48 / size_in[1], board.about, size=9, color=FAINT)
    for place in places:
        _draw(figure, place, rows, source)
    return _bytes(figure)


def shown(value: float, unit: Unit) -> str:
    """A number with its unit, as people write it."""
    if not math.isfinite(value):
        return "none"
    if unit == "share":
        return f"{100 * value:.3g} %"
    if unit == "s" and 0 < abs(value) < 1:
        return f"{1000 * value:.3g} ms"
    if unit == "bytes":
        power = min(4, int(math.log(max(1.0, abs(value)), 1024)))
        return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
    return f"{value:,.3g} {unit}".strip() if abs(value) < 1000 else f"{value:,.0f} {unit}".strip()


def _draw(figure: Figure, place: Place, rows: int, source: Source) -> None:
    """One panel: a white card with a title, what it is about, and its picture."""
    panel = place.panel
    width_in, height_in = figure.get_size_inches()
    cell_x, cell_y = COLUMN_IN / width_in, ROW_IN / height_in
    gap_x, gap_y = GAP_IN / width_in, GAP_IN / height_in
    left, low = place.x * cell_x, (rows - place.y - panel.height) * cell_y
    card = figure.add_axes(
        (
            left + gap_x / 2,
            low + gap_y / 2,
            panel.width * cell_x - gap_x,
            panel.height * cell_y - gap_y,
        )
    )
    card.set(xticks=[], yticks=[], facecolor="white")
    for side in card.spines.values():
        side.set_color(FRAME)
    _text(card, 0.08, 0.17, panel.title, size=8.5, weight="bold", color=INK)
    _text(card, 0.08, 0.32, _wrapped(panel.about, panel.width), size=6.5, color=FAINT)
    {"number": _number, "table": _table, "heatmap": _heatmap}.get(panel.kind, _curves)(
        card, panel, source
    )


def _text(card: Axes, x_in: float, y_in: float, text: str, **style: object) -> None:
    """Write at so many inches from the upper left corner of a card."""
    width_in, height_in = _size_in(card)
    card.text(
        x_in / width_in,
        1 - y_in / height_in,
        text,
        transform=card.transAxes,
        va="center",
        clip_on=True,
        **style,  # type: ignore[arg-type]
    )


def _wrapped(text: str, columns: int) -> str:
    """As much of a line as a panel has room for."""
    most = int(columns * 10.5)
    return text if len(text) <= most else text[: most - 3].rsplit(" ", 1)[0] + " ..."


def _size_in(axes: Axes) -> tuple[float, float]:
    figure: Figure = axes.figure  # type: ignore[assignment]
    figure_in, box = figure.get_size_inches(), axes.get_position()
    return box.width * figure_in[0], box.height * figure_in[1]


def _inside(card: Axes, *, left_in: float, low_in: float, right_in: float = 0.12) -> Axes:
    """Axes within a card, under its title."""
    width_in, height_in = _size_in(card)
    box = card.get_position()
    scale_x, scale_y = box.width / width_in, box.height / height_in
    figure: Figure = card.figure  # type: ignore[assignment]
    axes = figure.add_axes(
        (
            box.x0 + left_in * scale_x,
            box.y0 + low_in * scale_y,
            (width_in - left_in - right_in) * scale_x,
            (height_in - low_in - 0.5) * scale_y,
        )
    )
    axes.tick_params(labelsize=6.5, color=FRAME, labelcolor=FAINT, length=2)
    for name, side in axes.spines.items():
        side.set_visible(name in ("left", "bottom"))
        side.set_color(FRAME)
    return axes


def _nothing(card: Axes, panel: Panel) -> None:
    told = "no GPU here" if panel.gpu_only else "no data"
    card.text(0.5, 0.45, told, transform=card.transAxes, ha="center", color=FAINT, size=9)


def _number(card: Axes, panel: Panel, source: Source) -> None:
    found = [one for query in panel.queries for one in source.now(query)]
    told = shown(found[0].values[0], panel.unit) if found else "none"
    card.text(
        0.5,
        0.33,
        told,
        transform=card.transAxes,
        ha="center",
        va="center",
        size=17,
        weight="bold",
        color=COLOURS[0],
    )


def _table(card: Axes, panel: Panel, source: Source) -> None:
    found = [one for query in panel.queries for one in source.now(query)]
    if not found:
        _nothing(card, panel)
        return
    heads = panel.columns[:-1]
    lines = sorted([*(one.labels[head] for head in heads), f"{one.values[0]:g}"] for one in found)
    most = int((_size_in(card)[1] - 0.75) / 0.155)
    for number, line in enumerate([[*panel.columns], *lines[:most]]):
        for place, cell in enumerate(line):
            x_in = 0.15 + place * (_size_in(card)[0] - 0.3) / len(line)
            style = {"weight": "bold", "color": FAINT} if number == 0 else {"color": INK}
            _text(card, x_in, 0.58 + 0.155 * number, cell, size=7, **style)
    if len(lines) > most:
        _text(card, 0.15, 0.58 + 0.155 * (most + 1), f"and {len(lines) - most} more", size=7)


def _curves(card: Axes, panel: Panel, source: Source) -> None:
    """Curves, one on the other if they are stacked; the largest have the first colours."""
    found = [one for query in panel.queries for one in source.curves(query)]
    found = [one for one in found if any(map(math.isfinite, one.values))]
    if not found:
        _nothing(card, panel)
        return
    names = [one.name or panel.title for one in found]
    lines = math.ceil(min(len(names), LEGENDS + 1) / _legend_columns(panel))
    low_in = 0.24 + (0.125 * lines + 0.08 if _has_legend(names, panel) else 0.0)
    axes = _inside(card, left_in=0.66, low_in=low_in)
    _plot(axes, found, source, stacked=panel.kind == "stacked")
    if panel.unit in PLAIN:
        _text(card, _size_in(card)[0] - 0.08, 0.17, panel.unit, size=6.5, color=FAINT, ha="right")
    if panel.limit is not None:
        axes.axhline(panel.limit, color="#c4162a", lw=0.8, ls=(0, (4, 3)))
    _scale(axes, panel, found, source)
    if _has_legend(names, panel):
        _legend(card, names, panel)


def _has_legend(names: Sequence[str], panel: Panel) -> bool:
    return names != [panel.title]


def _legend_columns(panel: Panel) -> int:
    return max(1, panel.width // 4)


def _plot(axes: Axes, found: Sequence[Series], source: Source, *, stacked: bool) -> None:
    times_s = source.span.times_s
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(found))]
    if stacked:
        filled = [np.nan_to_num(one.values) for one in found]
        axes.stackplot(times_s, *filled, colors=colours, alpha=0.55, lw=0)
        return
    for number, (one, colour) in enumerate(zip(found, colours, strict=True)):
        axes.plot(times_s, one.values, color=colour, lw=1.4, ls=STYLES[number % len(STYLES)])


def _scale(axes: Axes, panel: Panel, found: Sequence[Series], source: Source) -> None:
    finite = [v for one in found for v in one.values if math.isfinite(v)]
    if min(finite) >= 0:
        highest = axes.get_ylim()[1] if panel.kind == "stacked" else max(finite) * 1.08
        limit = panel.limit if panel.limit is not None and panel.limit < 3 * max(finite) else 0
        axes.set_ylim(0, max(highest, 1.1 * limit) or 1)
    whole = panel.unit == "" and all(v == int(v) for v in finite)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=whole, steps=[1, 2, 2.5, 5, 10]))
    if panel.unit == "bytes" and max(finite) > 0:
        axes.yaxis.set_major_locator(MultipleLocator(2 ** math.ceil(math.log2(max(finite) / 4))))
    unit: Unit = "" if panel.unit in PLAIN else panel.unit
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, unit)))
    axes.grid(axis="y", color=FRAME, lw=0.5)
    axes.set_axisbelow(True)
    _times(axes, panel, source)


def _times(axes: Axes, panel: Panel, source: Source) -> None:
    """Times of day under the axes, as many as there is room for."""
    span = source.span
    parts = 4 if panel.width >= 8 else 2
    long_s = span.end_s - span.begin_s
    ticks_s = [span.begin_s + long_s * part / parts for part in range(parts + 1)]
    axes.set_xlim(span.begin_s, span.end_s)
    axes.set_xticks(ticks_s, [f"{datetime.fromtimestamp(t, UTC):%H:%M:%S}" for t in ticks_s])
    labels = axes.get_xticklabels()
    labels[0].set_horizontalalignment("left")
    labels[-1].set_horizontalalignment("right")


def _legend(card: Axes, names: Sequence[str], panel: Panel) -> None:
    """Names in columns along the lower edge of the card."""
    columns, (width_in, height_in) = _legend_columns(panel), _size_in(card)
    told = list(names[:LEGENDS])
    if len(names) > LEGENDS:
        told.append(f"and {len(names) - LEGENDS} more")
    lines = math.ceil(len(told) / columns)
    column_in = (width_in - 0.2) / columns
    most = int((column_in - SWATCH_IN - 0.1) * 20)
    for number, name in enumerate(told):
        x_in = 0.12 + (number % columns) * column_in
        y_in = height_in - 0.09 - 0.125 * (lines - 1 - number // columns)
        if number < LEGENDS:
            _swatch(card, x_in, y_in, number, stacked=panel.kind == "stacked")
        short = name if len(name) <= most else name[: most - 2] + ".."
        _text(card, x_in + SWATCH_IN + 0.06, y_in, short, size=6.2)


def _swatch(card: Axes, x_in: float, y_in: float, number: int, *, stacked: bool) -> None:
    """A piece of a curve, as it is drawn."""
    width_in, height_in = _size_in(card)
    card.plot(
        [x_in / width_in, (x_in + SWATCH_IN) / width_in],
        [1 - y_in / height_in] * 2,
        color=COLOURS[number % len(COLOURS)],
        lw=5 if stacked else 1.6,
        alpha=0.55 if stacked else 1,
        ls="-" if stacked else STYLES[number % len(STYLES)],
        solid_capstyle="butt",
        transform=card.transAxes,
        scalex=False,
        scaley=False,
    )


def _heatmap(card: Axes, panel: Panel, source: Source) -> None:
    """Counts by bucket, made of cumulative ones."""
    found = [one for query in panel.queries for one in source.curves(query)]
    found.sort(key=lambda one: float(one.labels["le"]))
    if not found:
        _nothing(card, panel)
        return
    times_s = source.span.times_s
    at_most = np.nan_to_num(np.array([one.values for one in found]))
    counts = np.diff(at_most, axis=0, prepend=0).clip(min=0)
    used = np.flatnonzero(counts.sum(axis=1) > 0)
    if not used.size:
        _nothing(card, panel)
        return
    first, last = max(0, used[0] - 1), min(len(found), used[-1] + 2)
    bounds = [float(one.labels["le"]) for one in found]
    axes = _inside(card, left_in=0.66, low_in=0.24)
    half_s = source.span.step_s / 2
    edges_s = [*(time_s - half_s for time_s in times_s), times_s[-1] + half_s]
    part = counts[first:last]
    axes.pcolormesh(
        edges_s,
        np.arange(len(part) + 1),
        np.where(part > 0, part, np.nan),
        cmap="YlOrRd",
        norm=PowerNorm(0.5, vmin=0, vmax=float(part.max())),
    )
    labels = ["over" if math.isinf(b) else shown(b, panel.unit) for b in bounds[first:last]]
    axes.set_yticks(np.arange(len(part)) + 1.0, labels)
    _times(axes, panel, source)


def _bytes(figure: Figure) -> bytes:
    """PNG bytes, with few colours and so few bytes."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=DPI)
    small = io.BytesIO()
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(PALETTE, kmeans=1).save(small, "PNG", optimize=True)
    return small.getvalue()

"""Report and picture of a folder of lines about replicas; the same lines give the same report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from medley.files import write_whole
from medley.journal import Measurement, read_lines
from medley.markdown import table
from medley.rows import Row, rows_of
from service.bench.names import MEDLEY
from service.bench.pictures import finish, plain_log, png_of
from service.bench.replicas.cells import CONVERGENCE, READ
from service.bench.report import measured_on

__all__ = ["PICTURE", "REPORT", "write_report"]

REPORT, PICTURE = "report.md", "convergence.png"
SITUATION = ("replicas", "change", "hints", "load")
NOTE = (
    "Servers, Redis, visitors and whatever else runs share these cores. Each change goes to the "
    "next replica; the clock begins when it is acknowledged there. *Convergence*: until all "
    "replicas serve its generation; they are looked at every few milliseconds and asked for "
    "nothing. *Read after write*: until all of them have answered a classification that names the "
    "generation (`X-Min-Generation`), the forward included. A *registration* brings a new task, "
    "whose bytes the others get through the bundle store (a folder) and load; an *activation* "
    "switches between versions that all have loaded. Without hints Redis lets nobody subscribe, so "
    "replicas find changes at their next look (`MEDLEY_POLL_S`, 2 s). Load is a Poisson process to "
    "every replica, together half of what one of them can do alone."
)


def write_report(folder: Path) -> None:
    """Read the lines of a folder, and write the report and its picture.

    Raises:
        DataError: see `read_lines`.
    """
    lines = read_lines(folder)
    parts = ["# Replicas that follow", measured_on(lines), NOTE]
    png = convergence_png(lines)
    if png is not None:
        write_whole(folder / PICTURE, png)
        parts.append(f"![convergence]({PICTURE})")
    for heading, bench in (("Convergence", CONVERGENCE), ("Read after write", READ)):
        rows = rows_of(lines, bench)
        if rows:
            parts += [f"## {heading}", _table(rows)]
    parts += ["## Requests meanwhile", _requests(lines)]
    write_whole(folder / REPORT, ("\n\n".join(parts) + "\n").encode())


def convergence_png(lines: Sequence[Measurement]) -> bytes | None:
    """The share of changes that are everywhere within a time, a panel for each bench."""
    benches = [bench for bench in (CONVERGENCE, READ) if rows_of(lines, bench)]
    if not benches:
        return None
    figure = Figure(figsize=(1 + 4.2 * len(benches), 4.2), layout="constrained")
    grid = figure.subplots(1, len(benches), squeeze=False, sharey=True).flatten().tolist()
    for axes, bench in zip(grid, benches, strict=True):
        for number, row in enumerate(rows_of(lines, bench)):
            times_ms = sorted(1e3 * time_s for time_s in row.columns[MEDLEY].times_s)
            share = np.arange(1, len(times_ms) + 1) / len(times_ms)
            axes.step(times_ms, 100 * share, where="post", color=f"C{number}", label=_label(row))
        axes.set_title(bench, fontsize=9)
        axes.set(xscale="log", xlabel="ms after the acknowledgement", ylim=(0, 102))
        plain_log(axes.xaxis)
        finish(axes)
    grid[0].set_ylabel("% of changes on all replicas")
    handles, labels = max((axes.get_legend_handles_labels() for axes in grid), key=len)
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=7)
    return png_of(figure, "How soon all replicas answer with a change")


def _table(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        line = row.columns[MEDLEY]
        change_s = line.series["change_s"]
        body.append(
            (
                *(str(row.conditions[name]) for name in SITUATION),
                str(len(line.times_s)),
                *(_ms(line.times_s, share) for share in (0.5, 0.99, 1.0)),
                *(_ms(change_s, share) for share in (0.5, 0.99)),
            )
        )
    head = (*SITUATION, "changes", "p50 ms", "p99 ms", "slowest ms")
    return table((*head, "the change itself, p50 ms", "p99 ms"), body)


def _requests(lines: Sequence[Measurement]) -> str:
    loaded = [line for line in lines if line.values.get("rate_hz")]
    visits, errors = (sum(int(line.values[name]) for line in loaded) for name in VISITS)
    if not visits:
        return "There was no load."
    return f"{errors} of {visits} requests under load failed."


VISITS = ("visits", "errors")


def _label(row: Row) -> str:
    at = row.conditions
    hints = "hints" if at["hints"] == "yes" else "no hints"
    load = "idle" if at["load"] == "none" else "under load"
    return f"{at['change']}, {hints}, {load}"


def _ms(times_s: Sequence[float], share: float) -> str:
    return f"{1e3 * float(np.quantile(times_s, share)):.1f}"

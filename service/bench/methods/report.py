"""Report of a folder of lines about tasks of every method; equal lines give an equal report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medley.files import write_whole
from medley.journal import Measurement, read_lines
from medley.markdown import NOTHING, table
from medley.rows import quartiles, rows_of
from service.bench.methods.cells import LOADING, TRAFFIC, Traffic
from service.bench.names import MEDLEY
from service.bench.report import measured_on

__all__ = ["REPORT", "write_report"]

REPORT = "report.md"
LOADING_NOTE = (
    "One task after the other: its bundle is sent, taken in and made live (*registered*), and then "
    "asked for an image (*first answer*, from the bundle's first byte). *The first* also makes "
    "what all share: the slots, or for a task with weights of its own the first copy. *All tasks* "
    "is what all bundles and the unified model take together, by task. *Memory* is what the server "
    "has grown by, with one task loaded and another that has just gone."
)
TRAFFIC_NOTE = (
    "Saturated by visitors who come again as soon as they are answered, kinds of traffic in turns. "
    "An unclaimed image is one that DDAS gives to no task; it is answered by zero-shot, or by "
    "zero-shot and its nearest tasks together. *Times as long* is an image's time against that of "
    "the first row, within rounds, with quartiles. *Rows* are what an image takes of its batches, "
    "*aggregated* is the server's own count; these, processor time and p50 are means of the "
    "rounds. *First* is the first aggregated answer, for which every neighbour encodes the classes "
    "of all tasks."
)


def write_report(folder: Path) -> None:
    """Read the lines of a folder, and write the report.

    Raises:
        DataError: see `read_lines`.
    """
    lines = read_lines(folder)
    parts = ["# Tasks of every method on a server", measured_on(lines)]
    for heading, note, section in (
        ("Size and loading", LOADING_NOTE, _loading(lines)),
        ("Unclaimed images", TRAFFIC_NOTE, _traffic(lines)),
    ):
        if section:
            parts += [f"## {heading}", note, section]
    write_whole(folder / REPORT, ("\n\n".join(parts) + "\n").encode())


def _loading(lines: Sequence[Measurement]) -> str:
    body = []
    for row in rows_of(lines, LOADING):
        line = row.columns[MEDLEY]
        count, values, register_s = int(row.conditions["tasks"]), line.values, line.series
        shared_bytes = values["unified_bytes"]
        later_s, later_register_s = line.times_s[1:], register_s["register_s"][1:]
        body.append(
            (
                str(row.conditions["method"]),
                _mb(values["bundle_bytes"]),
                _mb(shared_bytes) if shared_bytes else NOTHING,
                f"{_mb(values['bundle_bytes'] + shared_bytes / count)} (of {count})",
                _ms(values["upload_s"]) if shared_bytes else NOTHING,
                _ms(line.times_s[0]),
                _ms(quartiles(later_register_s).median) if later_register_s else NOTHING,
                _ms(quartiles(later_s).median) if later_s else NOTHING,
                str(len(line.times_s)),
                _mb(values["loaded_bytes"]),
            )
        )
    head = ("method", "bundle MB", "unified MB", "all tasks, MB each", "upload of unified ms")
    told = ("first answer ms, the first", "registered ms", "first answer ms", "loads", "memory MB")
    return table((*head, *told), body) if body else ""


def _traffic(lines: Sequence[Measurement]) -> str:
    body = []
    for row in rows_of(lines, TRAFFIC):
        for name, line in row.columns.items():
            time, ratio = row.time_s(name), row.ratio(name, Traffic.NAMED)
            assert time is not None
            assert ratio is not None
            body.append(
                (
                    f"{row.conditions['tasks']} {row.conditions['method']}",
                    name,
                    f"{1 / time.median:.1f}",
                    f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
                    f"{line.values['rows']:.2f}",
                    f"{100 * line.values['aggregated']:.0f} %",
                    f"{1e3 * line.values['server_cpu_s']:.1f}",
                    _ms(line.values["p50_s"]),
                    _ms(line.values["first_aggregated_s"]),
                )
            )
    head = ("tasks", "traffic", "images/s", "times as long", "rows", "aggregated")
    return table((*head, "server cpu ms", "p50 ms", "first ms"), body) if body else ""


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.2f}"


def _ms(time_s: float) -> str:
    return f"{1e3 * time_s:.0f}"

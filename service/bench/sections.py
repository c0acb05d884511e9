"""The tables of a report, made of lines and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from medley.journal import Measurement
from medley.markdown import NOTHING, table
from medley.rows import Row, rows_of
from service.bench.names import (
    ALONE,
    BARE,
    BARE_PIXELS,
    LOAD,
    MEDLEY,
    RIVAL,
    RIVAL_LOAD,
    SATURATED,
    SATURATION,
    STAGES,
)

__all__ = ["SECTIONS"]

ENOUGH = 100  # visits, for a p99 that is more than the slowest one
SITE = ("images", "tasks", "mix")
INSIDE = (*(f"{stage} ms" for stage in STAGES), "batch", "server cpu ms", "visitor cpu ms")


def _saturation(lines: Sequence[Measurement]) -> str:
    rows = [
        (*_at(row, *SITE), f"{row.value(MEDLEY, 'throughput_hz') or 0:.1f}", *_inside(row))
        for row in rows_of(lines, SATURATION)
    ]
    return table((*SITE, "images/s", *INSIDE), rows) if rows else ""


def _load(lines: Sequence[Measurement]) -> str:
    rows = [
        (
            *_at(row, *SITE, "swaps", "load"),
            *_rates(row, MEDLEY),
            *_latency(row, MEDLEY),
            *_inside(row),
        )
        for row in rows_of(lines, LOAD)
    ]
    head = (*SITE, "swaps", "load %", "due/s", "answered/s", "visits", "failed")
    return table((*head, "p50 ms", "p95 ms", "p99 ms", *INSIDE), rows) if rows else ""


def _swaps(lines: Sequence[Measurement]) -> str:
    quiet = {_site_and_load(row): row for row in rows_of(lines, LOAD) if _swapless(row)}
    rows = []
    for row in rows_of(lines, LOAD):
        before = quiet.get(_site_and_load(row))
        times_s = row.columns[MEDLEY].series.get("swap_s", ())
        if _swapless(row) or before is None or not times_s:
            continue
        middle_s = sorted(times_s)[len(times_s) // 2]
        rows.append(
            (
                *_at(row, *SITE, "load"),
                _ms(before, "p50_s"),
                _ms(row, "p50_s"),
                _ms(before, "p95_s"),
                _ms(row, "p95_s"),
                str(len(times_s)),
                f"{1e3 * middle_s:.0f}",
                f"{1e3 * max(times_s):.0f}",
            )
        )
    head = ("p50 ms", "with swaps", "p95 ms", "with swaps", "swaps", "a swap ms", "slowest ms")
    return table((*SITE, "load %", *head), rows) if rows else ""


def _beside_bare(lines: Sequence[Measurement]) -> str:
    rows, columns = [], (MEDLEY, BARE, BARE_PIXELS)
    for bench in (SATURATED, ALONE):
        for row in rows_of(lines, bench):
            times = [row.time_s(name) for name in columns]
            cells = [f"{1e3 * time.median:.2f}" if time else NOTHING for time in times]
            cpu = [_ms(row, "cpu_s", name, form=".2f") for name in columns]
            rows.append((bench.partition(", ")[2], *_at(row, *SITE), *cells, *cpu))
    head = ("", *SITE, *columns, *(f"cpu, {name}" for name in columns))
    return f"Milliseconds an image, median:\n\n{table(head, rows)}" if rows else ""


def _beside_infinity(lines: Sequence[Measurement]) -> str:
    saturated = []
    for row in rows_of(lines, RIVAL):
        for name in row.columns:
            time = row.time_s(name)
            rate = f"{1 / time.median:.1f}" if time else NOTHING
            saturated.append((*_at(row, "backbone", "images"), name, rate, *_cpu(row, name)))
    if not saturated:
        return ""
    loaded = [
        (*_at(row, "backbone", "images"), name, *_rates(row, name), *_latency(row, name))
        for row in rows_of(lines, RIVAL_LOAD)
        for name in row.columns
    ]
    head = ("backbone", "images", "server")
    return "\n\n".join(
        (
            "Saturated, in turns:",
            table((*head, "images/s", "server cpu ms", "visitor cpu ms", "MB"), saturated),
            "The same rate for both, 80 % of what the slower one can do:",
            table(
                (*head, "due/s", "answered/s", "visits", "failed", "p50 ms", "p95 ms", "p99 ms"),
                loaded,
            ),
        )
    )


SECTIONS: dict[str, Callable[[Sequence[Measurement]], str]] = {
    "HTTP beside a bare loop": _beside_bare,
    "Beside infinity": _beside_infinity,
    "Saturation": _saturation,
    "Load": _load,
    "Swaps": _swaps,
}


def _at(row: Row, *names: str) -> tuple[str, ...]:
    return tuple(str(row.conditions[name]) for name in names)


def _site_and_load(row: Row) -> tuple[str, ...]:
    return _at(row, *SITE, "load")


def _swapless(row: Row) -> bool:
    return row.conditions["swaps"] == "none"


def _rates(row: Row, name: str) -> tuple[str, ...]:
    rate_hz, throughput_hz = row.value(name, "rate_hz"), row.value(name, "throughput_hz")
    counts = (f"{row.value(name, key) or 0:.0f}" for key in ("visits", "errors"))
    return (f"{rate_hz or 0:.1f}", f"{throughput_hz or 0:.1f}", *counts)


def _latency(row: Row, name: str) -> tuple[str, ...]:
    enough = len(row.columns[name].times_s) >= ENOUGH
    return (
        _ms(row, "p50_s", name),
        _ms(row, "p95_s", name),
        _ms(row, "p99_s", name) if enough else NOTHING,
    )


def _inside(row: Row) -> tuple[str, ...]:
    batch = row.value(MEDLEY, "batch_images")
    stages = (_ms(row, f"{stage}_s", form=".2f") for stage in STAGES)
    return (*stages, f"{batch:.1f}" if batch else NOTHING, *_cpu(row, MEDLEY)[:2])


def _cpu(row: Row, name: str) -> tuple[str, ...]:
    rss = row.value(name, "rss_bytes")
    return (
        _ms(row, "server_cpu_s", name),
        _ms(row, "visitor_cpu_s", name),
        f"{rss / 1e6:.0f}" if rss else NOTHING,
    )


def _ms(row: Row, value: str, name: str = MEDLEY, *, form: str = ".1f") -> str:
    found = row.value(name, value)
    return NOTHING if found is None else f"{1e3 * found:{form}}"

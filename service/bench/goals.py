"""What a run was to show, each goal with the number that was measured. Made of lines alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from medley.journal import Measurement
from medley.markdown import NOTHING, table
from medley.rows import Quartiles, Row, rows_of
from service.bench.names import (
    AGREEMENT,
    ALONE,
    BARE,
    BARE_PIXELS,
    BATCHED,
    INFINITY,
    LOAD,
    MEDLEY,
    RIVAL,
    RIVAL_LOAD,
    SATURATED,
    SATURATION,
    TOLERANCE,
)

__all__ = ["Goal", "goals_of", "goals_table"]

OVER_BARE_PERCENT = 15
HEADLINE = {"tasks": 16, "mix": "uniform", "swaps": "none", "load": 80}


@dataclass(frozen=True)
class Goal:
    """One line of the table; `met` is None where a number was asked for and no limit set."""

    what: str
    measured: str
    met: bool | None = None


def goals_of(lines: Sequence[Measurement]) -> list[Goal]:
    """All goals that these lines say something about."""
    return [
        *_beside_bare(lines),
        *_where_time_goes(lines),
        *_alone(lines),
        *_p99(lines),
        *_beside_infinity(lines),
        *_failures(lines),
    ]


def goals_table(goals: Sequence[Goal]) -> str:
    """As Markdown."""
    met = {True: "met", False: "**missed**", None: NOTHING}
    return table(
        ("goal", "measured", ""), [(goal.what, goal.measured, met[goal.met]) for goal in goals]
    )


def _beside_bare(lines: Sequence[Measurement]) -> Iterator[Goal]:
    for row in rows_of(lines, SATURATED):
        ratio = row.ratio(MEDLEY, BARE)
        if ratio is not None:
            yield Goal(
                f"HTTP at saturation takes at most {OVER_BARE_PERCENT} % longer for an image than "
                f"decoding and classifying in a bare loop, {_where(row)}",
                f"{100 * (ratio.median - 1):+.1f} % ({_spread(ratio, 100, -1)})",
                ratio.median <= 1 + OVER_BARE_PERCENT / 100,
            )


def _where_time_goes(lines: Sequence[Measurement]) -> Iterator[Goal]:
    """Processor time of an image at saturation; what the server's has over the bare loop's."""
    visitors = {_where(row): row.value(MEDLEY, "visitor_cpu_s") for row in _even_sites(lines)}
    for row in rows_of(lines, SATURATED):
        cpu_s = [row.value(name, "cpu_s") for name in (BARE_PIXELS, BARE, MEDLEY)]
        told = [None if value is None else 1e3 * value for value in cpu_s]
        model, loop, server = told
        if model is not None and loop is not None and server is not None:
            yield Goal(
                f"where the time goes: processor ms of an image at saturation, {_where(row)}",
                f"model {model:.1f}, decoding {loop - model:+.1f}, HTTP and queue "
                f"{server - loop:+.1f}, visitors {1e3 * (visitors.get(_where(row)) or 0):+.1f}",
            )


def _even_sites(lines: Sequence[Measurement]) -> list[Row]:
    return [r for r in rows_of(lines, SATURATION) if r.conditions["mix"] == HEADLINE["mix"]]


def _alone(lines: Sequence[Measurement]) -> Iterator[Goal]:
    for row in rows_of(lines, ALONE):
        http, bare = row.time_s(MEDLEY), row.time_s(BARE)
        if http and bare:
            yield Goal(
                f"one request at a time, over HTTP less bare, p50, {_where(row)}",
                f"{1e3 * (http.median - bare.median):.2f} ms "
                f"({1e3 * http.median:.1f} less {1e3 * bare.median:.1f})",
            )


def _p99(lines: Sequence[Measurement]) -> Iterator[Goal]:
    for row in rows_of(lines, LOAD):
        p99_s = row.p99_s(MEDLEY)
        if p99_s and all(row.conditions.get(key) == value for key, value in HEADLINE.items()):
            yield Goal(
                f"p99 at 80 % of saturation, {_where(row)}",
                f"{1e3 * p99_s:.1f} ms, of {len(row.columns[MEDLEY].times_s)}",
            )


def _beside_infinity(lines: Sequence[Measurement]) -> Iterator[Goal]:
    for row in rows_of(lines, AGREEMENT):
        apart = max(line.values["apart"] for line in row.columns.values())
        yield Goal(
            f"embeddings equal infinity's within {TOLERANCE:g}, {_where(row)}",
            f"{apart:.1e} at most",
            apart <= TOLERANCE,
        )
    for row in rows_of(lines, RIVAL):
        for name in (MEDLEY, BATCHED):
            ratio = row.ratio(INFINITY, name)
            if ratio is not None:
                yield Goal(
                    f"images a second of {name}, times infinity's, {_where(row)}",
                    f"{ratio.median:.2f} ({_spread(ratio)})",
                )
    for row in rows_of(lines, RIVAL_LOAD):
        p99s_s = {name: row.p99_s(name) for name in row.columns}
        told = [f"{name} {1e3 * p99_s:.0f} ms" for name, p99_s in p99s_s.items() if p99_s]
        yield Goal(f"p99 under the same load, {_where(row)}", ", ".join(told))


def _failures(lines: Sequence[Measurement]) -> Iterator[Goal]:
    some = [line for line in lines if line.bench in (LOAD, SATURATION, RIVAL_LOAD)]
    visits, errors = (sum(line.values[name] for line in some) for name in ("visits", "errors"))
    if visits:
        yield Goal("no request fails", f"{errors:.0f} of {visits:.0f}", not errors)


def _where(row: Row) -> str:
    at = row.conditions
    if "backbone" in at:
        return f"{at['backbone']}, {at['images']}"
    return f"{at['images']}, {at['tasks']} tasks"


def _spread(ratio: Quartiles, scale: float = 1, less: float = 0) -> str:
    low, high = (scale * (value + less) for value in (ratio.low, ratio.high))
    return f"{low:.2f} to {high:.2f}" if scale == 1 else f"{low:+.1f} to {high:+.1f}"

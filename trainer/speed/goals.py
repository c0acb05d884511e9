"""What was promised, and whether the lines show it; nothing is rounded before it is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from medley.journal import Measurement
from medley.markdown import table
from medley.rows import Quartiles, Row, rows_of
from trainer.speed.baselines.columns import DISPATCHER, OURS
from trainer.speed.checks import right
from trainer.speed.scoring import FORWARD, tasks_column
from trainer.speed.swapping import LEAK
from trainer.speed.towers import FROZEN, MANY, MIXED, ONE_OF_MANY

__all__ = ["Goal", "goals_of", "goals_table"]

BRANCH_TIMES = 4.0  # a CPU: as fast as the dispatcher
BLOCK_US = {1: 7.0, 8: 9.0, 64: 22.0, 256: 75.0}  # an H100: ViT-B/16, bfloat16, by batch size
EXPERTS_PERCENT, EXPERTS_PERCENT_GPU = 10.0, 4.5  # over the frozen tower; GPU: from batch 64 on
MANY_PERCENT = 95.0
DDAS_PERCENT = {10: 1.0, 1000: 10.0}  # of a forward, by tasks
LEAK_BYTES = 1000.0  # a swap; flat, within what an allocator does


@dataclass(frozen=True)
class Goal:
    """One promise in one row."""

    promise: str
    where: str
    measured: str
    met: bool


def goals_of(lines: Sequence[Measurement]) -> list[Goal]:
    """Every promise that the lines can speak of, once for each row that it is about."""
    if not lines:
        return []
    gpu = lines[0].run.device == "cuda"
    checks = list(_checks(lines))
    finders: list[tuple[str, Callable[[Row, bool], Iterator[Goal]]]] = [
        ("kernels", _branch),
        ("model", _tower),
        ("ddas", _ddas),
        ("swap", _swap),
    ]
    return checks + [
        goal for bench, find in finders for row in rows_of(lines, bench) for goal in find(row, gpu)
    ]


def goals_table(goals: Sequence[Goal]) -> str:
    """Markdown: every goal with its number, and how many are met."""
    rows = [
        (goal.promise, goal.where, goal.measured, "met" if goal.met else "**missed**")
        for goal in goals
    ]
    met = sum(goal.met for goal in goals)
    heading = f"{met} of {len(goals)} met.\n\n" if goals else "No goal is about these rows.\n"
    return heading + (table(("goal", "where", "measured", ""), rows) if goals else "")


def _checks(lines: Sequence[Measurement]) -> Iterator[Goal]:
    """One goal for each kernel and dtype: the worst of all its rows."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for line in lines:
        if line.bench == "check":
            groups.setdefault((line.column, str(line.conditions["dtype"])), []).append(line)
    for (kernel, dtype), some in groups.items():
        limit = some[0].values["limit"]
        failures = [line.failure for line in some if line.failure]
        worst = max((line.values.get("error", 0.0) for line in some), default=0.0)
        measured = failures[0] if failures else f"{worst:.1e}"
        promise = f"relative error against float64 <= {limit:g}"
        yield Goal(promise, f"{kernel}, {dtype}", measured, all(map(right, some)))


def _branch(row: Row, gpu: bool) -> Iterator[Goal]:
    at = row.conditions
    where = f"{at['shape']}, {at['dtype']}, batch {at['batch']}, {at['mix']}"
    if not gpu and at["mix"] == "11 tasks" and at["batch"] in (8, 32):
        times = row.ratio(DISPATCHER, OURS)
        if times:
            promise = f"expert branch >= {BRANCH_TIMES:g} x as fast as the dispatcher"
            yield Goal(promise, where, _spread(times, 1, "x"), times.median >= BRANCH_TIMES)
    limit_us = BLOCK_US.get(int(at["batch"]))
    image = at["shape"] == "ViT-B/16" and at["dtype"] == "bfloat16"
    if gpu and image and limit_us and at["mix"] in ("one task", "11 tasks"):
        time = row.time_s(f"{OURS}, graph")
        if time:
            promise = f"expert branch of a block <= {limit_us:g} us"
            yield Goal(promise, where, _spread(time, 1e6, "us"), 1e6 * time.median <= limit_us)


def _tower(row: Row, gpu: bool) -> Iterator[Goal]:
    at, graph = row.conditions, ", graph" if gpu else ""
    where = f"{at['backbone']}, {at['precision']}, batch {at['batch']}, {at['what']}"
    limit = EXPERTS_PERCENT_GPU if gpu else EXPERTS_PERCENT
    over = row.ratio(MIXED + graph, FROZEN + graph)
    if over and not (gpu and int(at["batch"]) < 64):
        promise = f"tower with experts, 11 tasks mixed, <= {limit:g} % slower than the frozen one"
        yield Goal(promise, where, _percent_over(over), 100 * (over.median - 1) <= limit)
    many = row.ratio(ONE_OF_MANY, MANY) if at["what"] == "classifier" else None
    many = many or row.ratio(ONE_OF_MANY + graph, MANY + graph)
    if many:
        promise = f"throughput with {at['tasks']} active tasks >= {MANY_PERCENT:g} % of 1 task"
        met = 100 * many.median >= MANY_PERCENT
        yield Goal(promise, where, _spread(many, 100, "%"), met)


def _ddas(row: Row, gpu: bool) -> Iterator[Goal]:
    at, graph = row.conditions, ", graph" if gpu else ""
    where = f"{at['backbone']}, {at['precision']}, batch {at['batch']}"
    for tasks, limit in DDAS_PERCENT.items():
        share = row.ratio(tasks_column(tasks) + graph, FORWARD + graph)
        if share:
            promise = f"DDAS with {tasks} tasks <= {limit:g} % of a forward"
            yield Goal(promise, where, _spread(share, 100, "%"), 100 * share.median <= limit)


def _swap(row: Row, gpu: bool) -> Iterator[Goal]:
    at = row.conditions
    if at["what"] != LEAK:
        return
    (found,) = row.columns.values()
    values, where = found.values, f"{at['backbone']}, {at['precision']}, batch {at['batch']}"
    compared, different = values["answers_compared"], values["answers_different"]
    promise = f"answers of other tasks over {values['swaps']:.0f} swaps: none differs by a bit"
    yield Goal(promise, where, f"{different:.0f} of {compared:.0f} differ", different == 0)
    slope = values["memory_bytes_per_swap"]
    promise = f"memory grows by <= {LEAK_BYTES:g} bytes a swap"
    yield Goal(promise, where, f"{slope:.0f} bytes", slope <= LEAK_BYTES)


def _spread(of: Quartiles, scale: float, unit: str) -> str:
    low, high = scale * of.low, scale * of.high
    return f"{scale * of.median:.3g} {unit} ({low:.3g} to {high:.3g})"


def _percent_over(of: Quartiles) -> str:
    median, low, high = (100 * (x - 1) for x in (of.median, of.low, of.high))
    return f"{median:.1f} % ({low:.1f} to {high:.1f})"

"""Two sections of a report: aggregated prediction, and what ConDU's fusions take.

They set side by side what the main table has in rows, and what only methods that fuse have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from medley.markdown import table
from trainer.bench.aggregates import COUNTS, NEIGHBOURS
from trainer.bench.metrics import over_seeds
from trainer.bench.record import Cost, Record
from trainer.bench.results import Key, Result
from trainer.bench.tables import cell

__all__ = ["aggregation", "cost_cell", "is_detail", "storage"]

ALL_COUNTS = sorted({*COUNTS, NEIGHBOURS})
ZERO_SHOT: Key = ("zero-shot", "none", "agnostic")


def is_detail(router: str) -> bool:
    """Whether a router is a variant that only the section on aggregation shows."""
    return "@" in router


def aggregation(records: Sequence[Record], results: Sequence[Result]) -> str:
    """What becomes of images that nobody claims, by how many neighbours answer; or nothing."""
    by_key = {result.key: result for result in results}
    methods = dict.fromkeys(r.key[0] for r in results if r.key[1] == "aggregate")
    if not methods:
        return ""

    def numbers(method: str, who: str, metric: str) -> list[str]:
        found = [by_key.get(key) for key in _keys(method, who)]
        values = [None if result is None else result.of(metric) for result in found]
        return [cell(value, len(records), form=".2f") for value in values]

    def lines(metric: str) -> str:
        rows = [
            (f"{method} / {who or 'nobody'}", *numbers(method, who, metric))
            for method in methods
            for who in ("labels", "ddas", "")
        ]
        head = ("zero-shot alone", *(f"K = {count}" for count in ALL_COUNTS))
        return table((metric.capitalize(), *head, f"K = {NEIGHBOURS}, by similarity"), rows)

    return (
        "## Aggregated prediction\n\n"
        "An image that nobody claims is answered by zero-shot and the K nearest of the tasks that "
        "are there, each with its own text features, their logits averaged. Who claims: *labels*, "
        "the request's class list names a task that is learnt, all other images are unclaimed (so "
        "its Transfer is that of ConDU's paper); *ddas*, the selectors; *nobody*, every image is "
        f"answered so.\n\n{lines('transfer')}\n\n{lines('last')}"
    )


def _keys(method: str, who: str) -> list[Key]:
    """The columns of one line: without neighbours, with so many, and weighted."""
    name = f"{who}+aggregate" if who else "aggregate"
    names = [name if count == NEIGHBOURS else f"{name}@{count}" for count in ALL_COUNTS]
    alone = (method, who, "agnostic") if who else ZERO_SHOT
    return [alone, *((method, router, "agnostic") for router in (*names, f"{name}-similarity"))]


def storage(records: Sequence[Record]) -> str:
    """Files and processor seconds of each task; nothing where nothing was put into files."""
    costs = [cost for record in records for cost in record.costs if cost.bundle_bytes]
    methods = dict.fromkeys(cost.method for cost in costs)
    if not methods:
        return ""
    columns: Mapping[str, tuple[str, float, str]] = {
        "bundle, MB": ("bundle_bytes", 1e-6, ".3f"),
        "unified model, MB": ("shared_bytes", 1e-6, ".2f"),
        "learning, CPU s": ("cpu_seconds", 1.0, ".1f"),
        "fusing, CPU s": ("fuse_cpu_seconds", 1.0, ".2f"),
    }
    rows = [(m, *(cost_cell(records, m, *column) for column in columns.values())) for m in methods]
    return (
        "## Storage and time of a task\n\n"
        "Means over the tasks. A bundle is what each task needs; the unified model is there once "
        "for all tasks of a fusion. Fusing is making a new task one with those before it.\n\n"
        + table(("method", *columns), rows)
    )


def cost_cell(records: Sequence[Record], method: str, field: str, scale: float, form: str) -> str:
    """A number of a method's costs, the mean over its tasks, for a table."""

    def mean(costs: Sequence[Cost]) -> float:
        return float(np.mean([getattr(cost, field) for cost in costs]))

    seeds = [[cost for cost in record.costs if cost.method == method] for record in records]
    result = over_seeds(mean(costs) for costs in seeds if costs)
    return cell(result, len(records), scale=scale, form=form)

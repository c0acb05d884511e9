"""What our own method was promised to do on a sequence, and whether it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from medley.markdown import NOTHING, table
from trainer.bench.record import Record, Routing
from trainer.bench.results import Result, routers_of

__all__ = ["goals"]

OURS = "moe_adapter"
SLACK = 1e-9  # what floats may add to a difference that is just at its limit

TRANSFER, LAST, UNION, ACCEPTS, REJECTS = -0.1, -1.0, -2.0, 5.0, 0.0  # points, per cent


def goals(records: Sequence[Record], results: Sequence[Result]) -> str:
    """A section of the report; empty where the rows to compare are not there.

    Differences are between means over the seeds, in points.
    """
    by_key = {result.key: result for result in results}
    told = by_key.get((OURS, "told", "told"))
    zero_shot = by_key.get(("zero-shot", "none", "agnostic"))
    routers = [r.key[1] for r in results if r.key[0] == OURS and r.protocol == "agnostic"]
    if told is None or zero_shot is None or not routers:
        return ""
    routings = routers_of(records)
    columns = [
        {
            **_against(by_key, router, told, zero_shot),
            **_of_routing(routings.get(router, [])),
        }
        for router in routers
    ]
    rows = [(goal, *(column[goal] for column in columns)) for goal in columns[0]]
    worst = max(share for metrics in told.metrics for share in metrics.forgetting_T)
    return (
        f"## What {OURS} must show\n\n"
        f"Forgetting, the task told, the worst of all tasks and seeds: {100 * worst:.2f} points "
        f"(goal: 0.00 exactly; {'met' if worst == 0 else 'missed'}). By router:\n\n"
        + table(("goal", *routers), [row for row in rows if set(row[1:]) != {NOTHING}])
    )


def _against(
    by_key: Mapping[tuple[str, str, str], Result], router: str, told: Result, zero_shot: Result
) -> dict[str, str]:
    agnostic, union = by_key[OURS, router, "agnostic"], by_key.get((OURS, router, "union"))
    transfer = _lead(agnostic, zero_shot, "transfer")
    last, among_all = _lead(agnostic, told, "last"), _lead(union, told, "last")
    return {
        f"Transfer less zero-shot >= {TRANSFER}": _verdict(transfer, at_least=TRANSFER),
        f"Last less told >= {LAST}": _verdict(last, at_least=LAST),
        f"Last among all classes less told >= {UNION}": _verdict(among_all, at_least=UNION),
    }


def _of_routing(seeds: Sequence[Routing]) -> dict[str, str]:
    accepts = [100 * float(np.mean(routing.false_accept)) for routing in seeds]
    promised = [routing for routing in seeds if routing.alpha is not None]
    rejects = [100 * float(np.mean(r.false_reject) - (r.alpha or 0)) for r in promised]
    return {
        f"false accepts <= {ACCEPTS} %": _verdict(_mean(accepts), at_most=ACCEPTS),
        f"false rejects less alpha <= {REJECTS}": _verdict(_mean(rejects), at_most=REJECTS),
    }


def _lead(one: Result | None, other: Result, metric: str) -> float | None:
    """By how many points one is ahead; None where either has no such metric."""
    ours, theirs = one.of(metric) if one else None, other.of(metric)
    return None if ours is None or theirs is None else 100 * (ours.mean - theirs.mean)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _verdict(value: float | None, *, at_least: float = -np.inf, at_most: float = np.inf) -> str:
    if value is None:
        return NOTHING
    met = at_least - SLACK <= value <= at_most + SLACK
    return f"{value:.2f} {'met' if met else '**missed**'}"

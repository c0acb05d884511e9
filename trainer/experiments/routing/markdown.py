"""What the pages of this experiment have in common: tables of outcomes, in percent.

It computes nothing but means over tasks and seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from trainer.experiments.routing.bench import Measured
from trainer.experiments.routing.features import CANARY
from trainer.suite import TASKS

__all__ = ["HEADINGS", "accepted", "by_task", "cells", "percent", "rounded", "table"]

_Row = TypeVar("_Row", bound=Measured)

HEADINGS = {
    "accuracy": "accuracy",
    "false_reject": "false reject",
    "false_accept": "false accept",
    "narrow_false_accept": "without clipart",
    "canary": f"{CANARY} accepted",
    "auroc": "AUROC",
}


def table(rows: Sequence[_Row], first: str, name: Callable[[_Row], str]) -> str:
    """A line for each row, means with their ranges."""
    lines = [f"| {first} | {' | '.join(HEADINGS.values())} |", "|---" * (len(HEADINGS) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name(row)} | {cells(row)} |" for row in rows)])


def cells(row: Measured) -> str:
    """The columns of `HEADINGS`."""
    return " | ".join(f"{percent(row.mean(c))} ({percent(row.range(c))})" for c in HEADINGS)


def by_task(row: Measured) -> str:
    """A line for each task, means over seeds."""
    columns = [c for c in HEADINGS if c != "canary"]
    headings = " | ".join(HEADINGS[column] for column in columns)
    lines = [f"| task | {headings} |", "|---" * (len(columns) + 1) + "|"]
    for index, task in enumerate(TASKS):
        lines.append(f"| {task} | {' | '.join(percent(row.by_task(c)[index]) for c in columns)} |")
    return "\n".join(lines)


def accepted(row: Measured) -> str:
    """Images of (rows) that are accepted by (columns)."""
    lines = [f"| | {' | '.join(TASKS)} |", "|---" * (len(TASKS) + 1) + "|"]
    means: list[list[float]] = np.mean([o.accepted_ST for o in row.outcomes], axis=0).tolist()
    for name, shares in zip((*TASKS, CANARY), means, strict=True):
        lines.append(f"| {name} | {' | '.join(map(percent, shares))} |")
    return "\n".join(lines)


def percent(share: float) -> str:
    """One digit after the point."""
    return f"{100 * share:.1f}"


def rounded(value: object) -> object:
    """Four digits are enough for shares of 500 images."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value

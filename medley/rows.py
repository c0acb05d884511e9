"""Lines of a journal put together to rows, and what they come to: medians, ratios within rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from medley.journal import Conditions, Measurement

__all__ = ["Quartiles", "Row", "quartiles", "rows_of"]


@dataclass(frozen=True)
class Quartiles:
    """Of some numbers: the middle, and where the middle half of them lies."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Row:
    """The columns of equal conditions, which were timed in turns."""

    conditions: Conditions
    columns: Mapping[str, Measurement]

    def time_s(self, column: str) -> Quartiles | None:
        """Of one call; None where the column failed or is not there."""
        found = self.columns.get(column)
        return quartiles(found.times_s) if found and found.times_s else None

    def p99_s(self, column: str) -> float | None:
        """Of as many calls as there were rounds."""
        found = self.columns.get(column)
        return float(np.quantile(found.times_s, 0.99)) if found and found.times_s else None

    def ratio(self, slow: str, quick: str) -> Quartiles | None:
        """How many times as long `slow` takes as `quick`: of the ratios of each round."""
        above, below = self.columns.get(slow), self.columns.get(quick)
        if not (above and below and above.times_s and below.times_s):
            return None
        pairs = zip(above.times_s, below.times_s, strict=True)
        return quartiles([a / b for a, b in pairs])

    def value(self, column: str, name: str) -> float | None:
        """Another number of a column."""
        found = self.columns.get(column)
        return None if found is None else found.values.get(name)


def rows_of(lines: Iterable[Measurement], bench: str) -> list[Row]:
    """Rows in the order in which they were measured."""
    rows: dict[tuple[tuple[str, str | int], ...], dict[str, Measurement]] = {}
    for line in lines:
        if line.bench == bench:
            rows.setdefault(tuple(line.conditions.items()), {})[line.column] = line
    return [Row(dict(conditions), columns) for conditions, columns in rows.items()]


def quartiles(numbers: Iterable[float]) -> Quartiles:
    """Median and quartiles; of at least one number."""
    low, median, high = np.quantile(list(numbers), (0.25, 0.5, 0.75))
    return Quartiles(float(median), float(low), float(high))

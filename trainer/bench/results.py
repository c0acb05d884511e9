"""Records of several seeds put together, row by row; neither text nor pictures.

Legend: T tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medley.errors import DataError
from trainer.bench.metrics import OverSeeds, Sequential, over_seeds, sequential
from trainer.bench.record import Record, Routing

__all__ = ["Key", "Result", "check_comparable", "results_of", "routed_right", "routers_of"]

PROTOCOLS = ("told", "agnostic", "union")  # in the order of a report

Key = tuple[str, str, str]  # method, router, protocol


@dataclass(frozen=True, eq=False)
class Result:
    """One method with one router under one protocol: its matrix and metrics, seed by seed."""

    key: Key
    matrices: tuple[NDArray[np.float64], ...]
    metrics: tuple[Sequential, ...]

    @property
    def protocol(self) -> str:
        """Told, agnostic or union."""
        return self.key[2]

    @property
    def name(self) -> str:
        """Method and router, if one decides."""
        method, router, _ = self.key
        return method if router in ("none", "told") else f"{method} / {router}"

    @property
    def changes(self) -> bool:
        """Whether any task that was learnt changed any answer."""
        return any((matrix_TT != matrix_TT[0]).any() for matrix_TT in self.matrices)

    @property
    def mean(self) -> NDArray[np.float64]:
        """The accuracy matrix (T, T), mean over the seeds."""
        mean_TT: NDArray[np.float64] = np.mean(self.matrices, axis=0)
        return mean_TT

    def of(self, metric: str) -> OverSeeds | None:
        """A metric by name, such as ``last``; None where there is none."""
        return _known(getattr(metrics, metric) for metrics in self.metrics)

    def by_task(self, metric: str) -> list[OverSeeds | None]:
        """The same of each task."""
        seeds = [getattr(metrics, f"{metric}_T") for metrics in self.metrics]
        return [_known(values) for values in zip(*seeds, strict=True)]


def check_comparable(records: Sequence[Record]) -> None:
    """Refuse what cannot stand in one table.

    Raises:
        DataError: no record, two of one seed, or of different sequences, bases or shots.
    """
    if not records:
        raise DataError("there is no benchmark record to report")
    for name in ("suite", "order", "backbone", "shots"):
        values = list(dict.fromkeys(getattr(record, name) for record in records))
        if len(values) > 1:
            raise DataError(f"records of different {name} in one report: {values[0]}, {values[1]}")
    seeds = sorted(record.seed for record in records)
    if len(set(seeds)) < len(seeds):
        raise DataError(f"two records of one seed: {', '.join(map(str, seeds))}")


def results_of(records: Iterable[Record]) -> list[Result]:
    """All rows, seeds together, sorted by protocol and otherwise as they come."""
    matrices: dict[Key, list[NDArray[np.float64]]] = {}
    for record in records:
        for row in record.rows:
            key = (row.method, row.router, row.protocol)
            matrices.setdefault(key, []).append(np.array(row.accuracy_TT))
    results = [Result(key, tuple(m), tuple(map(sequential, m))) for key, m in matrices.items()]
    return sorted(results, key=_place)


def routers_of(records: Iterable[Record]) -> dict[str, list[Routing]]:
    """Routings by router, one for each seed that has it."""
    found: dict[str, list[Routing]] = {}
    for record in records:
        for routing in record.routings:
            found.setdefault(routing.router, []).append(routing)
    return found


def routed_right(routing: Routing) -> tuple[float, tuple[float, ...]]:
    """Share of images that went to their own task: of all images, and of each task's."""
    counts = np.array(routing.counts)
    right_T, images_T = np.diag(counts), counts.sum(axis=1)
    by_task = right_T / np.maximum(1, images_T)
    return float(right_T.sum() / max(1, images_T.sum())), tuple(by_task.tolist())


def _place(result: Result) -> int:
    known = result.protocol in PROTOCOLS
    return PROTOCOLS.index(result.protocol) if known else len(PROTOCOLS)


def _known(values: Iterable[float | None]) -> OverSeeds | None:
    numbers = [value for value in values if value is not None]
    return over_seeds(numbers) if numbers else None

"""What an accuracy matrix comes to: Transfer, Average, Last, Forgetting; AUROC; seeds together.

Only arithmetic on numbers that others measured; shares in, shares out.

Legend: T tasks; A[i, j] is the accuracy on data set j after task i was learnt.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Cil", "OverSeeds", "Sequential", "auroc", "cil", "over_seeds", "sequential"]


@dataclass(frozen=True, kw_only=True)
class Sequential:
    """Metrics of a sequence, by task; the properties are their means.

    The first task has no Transfer: nothing was learnt before it.
    """

    transfer_T: tuple[float | None, ...]
    average_T: tuple[float, ...]
    last_T: tuple[float, ...]
    forgetting_T: tuple[float, ...]

    @property
    def transfer(self) -> float | None:
        """Mean over the tasks but the first; None where there is only one."""
        known = [share for share in self.transfer_T if share is not None]
        return statistics.fmean(known) if known else None

    @property
    def average(self) -> float:
        """Mean over all of the matrix."""
        return statistics.fmean(self.average_T)

    @property
    def last(self) -> float:
        """Mean over the last row."""
        return statistics.fmean(self.last_T)

    @property
    def forgetting(self) -> float:
        """Mean loss since the best that each task ever had, from its own turn on."""
        return statistics.fmean(self.forgetting_T)


def sequential(accuracy_TT: ArrayLike) -> Sequential:
    """Metrics of an accuracy matrix.

    Transfer_j = mean of A[i, j] over i < j, Average_j = mean of A[i, j] over all i,
    Last_j = A[T, j], Forgetting_j = max of A[i, j] over i >= j, less A[T, j].

    Args:
        accuracy_TT: square, not empty; row i: after task i, column j: on data set j.

    Source: ZSCL, arXiv:2303.06628, for the first three.
    """
    matrix_TT = np.asarray(accuracy_TT, dtype=np.float64)
    columns = list(enumerate(matrix_TT.T))
    return Sequential(
        transfer_T=tuple(_mean(column_T[:j]) if j else None for j, column_T in columns),
        average_T=tuple(_mean(column_T) for _, column_T in columns),
        last_T=tuple(matrix_TT[-1].tolist()),
        forgetting_T=tuple(float(column_T[j:].max() - column_T[-1]) for j, column_T in columns),
    )


@dataclass(frozen=True)
class Cil:
    """Metrics of class-incremental learning: mean over the steps, and the last step."""

    average: float
    last: float


def cil(accuracies: Sequence[float]) -> Cil:
    """Metrics of the accuracy over all classes seen, after each step; at least one."""
    return Cil(statistics.fmean(accuracies), accuracies[-1])


def auroc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Chance that a positive's score is above a negative's, a tie counting half.

    Scores may be infinite, unlike those that scikit-learn takes; neither side may be empty.
    """
    ranked = np.sort(np.asarray(negative, dtype=np.float64))
    positive_N = np.asarray(positive, dtype=np.float64)
    below = np.searchsorted(ranked, positive_N, side="left")
    not_above = np.searchsorted(ranked, positive_N, side="right")
    return float((below + not_above).sum() / (2 * len(ranked) * len(positive_N)))


@dataclass(frozen=True)
class OverSeeds:
    """Mean and sample standard deviation; one seed has no spread."""

    mean: float
    spread: float | None
    seeds: int


def over_seeds(values: Iterable[float]) -> OverSeeds:
    """Put the seeds of one number together; at least one."""
    numbers = list(values)
    mean = math.fsum(numbers) / len(numbers)
    spread = statistics.stdev(numbers) if len(numbers) > 1 else None
    return OverSeeds(mean, spread, len(numbers))


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean())

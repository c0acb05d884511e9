"""Autoencoders for every task, feature, code size and seed, and what they do.

Legend: B images, S tasks that images come from, T tasks that score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from medley.selector import SelectorBank, TaskSelector, conformal_threshold
from trainer.ddas import (
    DEFAULT_ALPHA,
    DEFAULT_CODE_SIZE,
    DEFAULT_FEATURES,
    DEFAULT_ITERATIONS,
    fit_level,
    fit_selector,
)
from trainer.experiments.routing.features import Taps, TaskTaps
from trainer.experiments.routing.rules import (
    RULES,
    LevelErrors,
    Outcome,
    count,
    feature_units,
    measure,
)
from trainer.suite import TASKS

__all__ = ["SEEDS", "Bench", "Histogram", "Measured", "Row"]

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Measured:
    """What came of something, with an outcome for each seed."""

    outcomes: tuple[Outcome, ...]

    def mean(self, name: str) -> float:
        """Mean over tasks and seeds."""
        return float(np.mean([getattr(outcome, name) for outcome in self.outcomes]))

    def by_task(self, name: str) -> list[float]:
        """Mean over seeds, for each task."""
        means: list[float] = np.mean([getattr(o, name) for o in self.outcomes], axis=0).tolist()
        return means

    def range(self, name: str) -> float:
        """How far the means over tasks of the seeds lie apart."""
        return float(np.ptp([np.mean(getattr(outcome, name)) for outcome in self.outcomes]))


@dataclass(frozen=True)
class Row(Measured):
    """One setting of autoencoders."""

    features: tuple[str, ...]
    code_size: int
    rule: str
    alpha: float


@dataclass(frozen=True)
class Histogram:
    """Scores under one task: of its own test images, of other tasks', of the canary's."""

    own: list[float]
    others: list[float]
    canary: list[float]
    threshold: float


class Bench:
    """The tasks' features, and autoencoders fitted once for each feature, code size and seed."""

    def __init__(
        self,
        taps: Mapping[str, TaskTaps],
        canary: Taps,
        *,
        seeds: Sequence[int] = SEEDS,
        iterations: int = DEFAULT_ITERATIONS,
    ) -> None:
        self.taps = taps
        self._canary = canary
        self._seeds = tuple(seeds)
        self._iterations = iterations
        self._errors = cache(self._fitted)  # of this bench alone

    def row(
        self,
        features: tuple[str, ...],
        *,
        code_size: int = DEFAULT_CODE_SIZE,
        rule: str = "feature units",
        alpha: float = DEFAULT_ALPHA,
    ) -> Row:
        """One setting, over all seeds."""
        outcomes = tuple(
            measure(RULES[rule]([self._errors(f, code_size, seed) for f in features]), alpha)
            for seed in self._seeds
        )
        return Row(outcomes, features, code_size, rule, alpha)

    def shipped(self) -> Row:
        """The defaults, fitted, stacked and decided by the code that is shipped."""
        outcomes = tuple(self._shipped(seed) for seed in self._seeds)
        return Row(outcomes, DEFAULT_FEATURES, DEFAULT_CODE_SIZE, "shipped", DEFAULT_ALPHA)

    def histogram(self, task: str) -> Histogram:
        """Scores of test images under a task, for the first seed."""
        scored = feature_units(
            [self._errors(f, DEFAULT_CODE_SIZE, self._seeds[0]) for f in DEFAULT_FEATURES]
        )
        column = TASKS.index(task)
        under_task = [x_BT[:, column] for x_BT in scored.test_SBT]
        others = torch.cat([x for s, x in enumerate(under_task[:-1]) if s != column])
        threshold = conformal_threshold(scored.calibration_TN[column], DEFAULT_ALPHA)
        own, canary = under_task[column], under_task[-1]
        return Histogram(own.tolist(), others.tolist(), canary.tolist(), threshold)

    @property
    def _test(self) -> list[Taps]:
        return [*(x.test for x in self.taps.values()), self._canary]

    def _fitted(self, feature: str, code_size: int, seed: int) -> LevelErrors:
        calibration, tests, log_variances = [], [], []
        for task in self.taps.values():
            fit, held_out = task.split(seed)
            level = fit_level(
                fit[feature], feature, code_size=code_size, seed=seed, iterations=self._iterations
            )
            alone = TaskSelector((level,), threshold=0.0, alpha=None)
            calibration.append(alone.scores(held_out))
            tests.append([alone.scores(taps) for taps in self._test])
            log_variances.append(-level.center)
        test_SBT = [torch.stack(columns, 1) for columns in zip(*tests, strict=True)]
        return LevelErrors(calibration, test_SBT, log_variances)

    def _shipped(self, seed: int) -> Outcome:
        bank = SelectorBank()
        for path, task in enumerate(self.taps.values()):
            selector = fit_selector(*task.split(seed), seed=seed, iterations=self._iterations)
            bank.add(path, selector)
        results = [bank.scores(taps, len(taps[DEFAULT_FEATURES[0]])) for taps in self._test]
        decided = [
            bank.decide(scores_BT, accepted_BT, torch.ones_like(accepted_BT))
            for scores_BT, accepted_BT in results
        ]
        return count([x for x, _ in results], [x for _, x in results], decided)

"""Autoencoders for every task, feature, code size and seed, and the table of what they do.

Legend: B images, S tasks that images come from, T tasks that score.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from medley.backbone import Backbone
from medley.routed import ZERO_SHOT, RoutedModel
from medley.selector import SelectorBank, TaskSelector, conformal_threshold
from trainer.ddas import (
    DEFAULT_ALPHA,
    DEFAULT_CODE_SIZE,
    DEFAULT_FEATURES,
    DEFAULT_ITERATIONS,
    fit_level,
    fit_selector,
)
from trainer.experiments.routing.features import (
    BATCH,
    Taps,
    TaskTaps,
    all_taps,
    feature_sets,
    shared_class_names,
)
from trainer.experiments.routing.rules import (
    RULES,
    LevelErrors,
    Outcome,
    count,
    feature_units,
    measure,
)
from trainer.suite import TASKS

__all__ = ["Experiment", "Row", "run"]

SEEDS = (0, 1, 2)
ALPHAS = (0.01, 0.02, 0.05, 0.1)
CODE_SIZES = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Row:
    """One setting, with an outcome for each seed."""

    features: tuple[str, ...]
    code_size: int
    rule: str
    alpha: float
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
class Experiment:
    """Everything that the page shows.

    Attributes:
        fingerprint: of the backbone.
        images: fitted, calibrated on, tested on, for each task.
        shared_class_names: pairs of tasks that have a class name in common.
        milliseconds: of one image, for parts of the image tower, one thread.
        shipped: the defaults of `trainer/ddas.py` through the code that is shipped.
        histograms: scores of test images under a task, (own, others', canary's, threshold).
    """

    fingerprint: str
    images: dict[str, tuple[int, int, int]]
    shared_class_names: list[tuple[str, str]]
    milliseconds: dict[str, float]
    features: list[Row]
    code_sizes: list[Row]
    rules: list[Row]
    alphas: list[Row]
    shipped: Row
    histograms: dict[str, tuple[list[float], list[float], list[float], float]]


def run(backbone: Backbone, cache_folder: Path, seeds: Sequence[int] = SEEDS) -> Experiment:
    """Extract, fit and measure everything."""
    model = RoutedModel(backbone, first_expert_block=len(backbone.image.blocks) // 2)
    taps, canary = all_taps(model, cache_folder)
    bench = _Bench(taps, canary, seeds)
    singles, several = feature_sets(len(backbone.image.blocks))
    compared = dict.fromkeys([DEFAULT_FEATURES, DEFAULT_FEATURES[-1:], several[4]])
    return Experiment(
        fingerprint=backbone.fingerprint,
        images={task: x.counts for task, x in taps.items()},
        shared_class_names=shared_class_names(cache_folder),
        milliseconds=_milliseconds(model),
        features=[bench.row(f) for f in track([*singles, *several], "features")],
        code_sizes=[
            bench.row(f, code_size=c)
            for f in track(dict.fromkeys([DEFAULT_FEATURES, DEFAULT_FEATURES[-1:]]), "code sizes")
            for c in CODE_SIZES
        ],
        rules=[bench.row(f, rule=r) for f in compared for r in RULES],
        alphas=[bench.row(DEFAULT_FEATURES, alpha=a) for a in ALPHAS],
        shipped=bench.shipped(),
        histograms={task: bench.histogram(task) for task in ("letters", "clipart")},
    )


class _Bench:
    """The tasks' features, and autoencoders fitted once for each feature, code size and seed."""

    def __init__(self, taps: Mapping[str, TaskTaps], canary: Taps, seeds: Sequence[int]) -> None:
        self._taps = taps
        self._canary = canary
        self._seeds = tuple(seeds)
        self._errors = cache(self._fitted)  # of this bench alone

    def row(
        self,
        features: tuple[str, ...],
        *,
        code_size: int = DEFAULT_CODE_SIZE,
        rule: str = "feature units",
        alpha: float = DEFAULT_ALPHA,
    ) -> Row:
        outcomes = tuple(
            measure(RULES[rule]([self._errors(f, code_size, seed) for f in features]), alpha)
            for seed in self._seeds
        )
        return Row(features, code_size, rule, alpha, outcomes)

    def shipped(self) -> Row:
        """The defaults, fitted, stacked and decided by the code that is shipped."""
        outcomes = tuple(self._shipped(seed) for seed in self._seeds)
        return Row(DEFAULT_FEATURES, DEFAULT_CODE_SIZE, "shipped", DEFAULT_ALPHA, outcomes)

    def histogram(self, task: str) -> tuple[list[float], list[float], list[float], float]:
        scored = feature_units([self._errors(f, DEFAULT_CODE_SIZE, 0) for f in DEFAULT_FEATURES])
        column = TASKS.index(task)
        under_task = [x_BT[:, column] for x_BT in scored.test_SBT]
        others = torch.cat([x for s, x in enumerate(under_task[:-1]) if s != column])
        threshold = conformal_threshold(scored.calibration_TN[column], DEFAULT_ALPHA)
        own, canary = under_task[column], under_task[-1]
        return own.tolist(), others.tolist(), canary.tolist(), threshold

    @property
    def _test(self) -> list[Taps]:
        return [*(x.test for x in self._taps.values()), self._canary]

    def _fitted(self, feature: str, code_size: int, seed: int) -> LevelErrors:
        calibration, tests, log_variances = [], [], []
        for task in self._taps.values():
            fit, held_out = task.split(seed)
            level = fit_level(
                fit[feature], feature, code_size=code_size, seed=seed, iterations=DEFAULT_ITERATIONS
            )
            alone = TaskSelector((level,), threshold=0.0, alpha=None)
            calibration.append(alone.scores(held_out))
            tests.append([alone.scores(taps) for taps in self._test])
            log_variances.append(-level.center)
        test_SBT = [torch.stack(columns, 1) for columns in zip(*tests, strict=True)]
        return LevelErrors(calibration, test_SBT, log_variances)

    def _shipped(self, seed: int) -> Outcome:
        bank = SelectorBank()
        for path, task in enumerate(self._taps.values()):
            bank.add(path, fit_selector(*task.split(seed), seed=seed))
        results = [bank.scores(taps, len(taps[DEFAULT_FEATURES[0]])) for taps in self._test]
        decided = [
            bank.decide(scores_BT, accepted_BT, torch.ones_like(accepted_BT))
            for scores_BT, accepted_BT in results
        ]
        return count([x for x, _ in results], [x for _, x in results], decided)


def _milliseconds(model: RoutedModel) -> dict[str, float]:
    """One image's time in a batch of 32: the shared half, the whole tower, the other half."""
    height, width = model.backbone.image_size
    images_BCHW = torch.rand(BATCH, 3, height, width)
    paths_B = torch.full((BATCH,), ZERO_SHOT)
    with torch.inference_mode():
        hidden_BLD = model.frozen(images_BCHW).hidden_BLD
        return {
            "to first_expert_block": _best_ms(lambda: model.frozen(images_BCHW)),
            "to the end": _best_ms(lambda: model.frozen(images_BCHW, features=True)),
            "second half alone": _best_ms(lambda: model.finish(hidden_BLD, paths_B)),
        }


def _best_ms(call: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(1000 * min(times) / BATCH, 2)

"""Routers: from the scores of all tasks' selectors to the path of each image, whoever is loaded.

A selector's scores of an image depend on nothing but the two, so one table of scores per data set
answers for every stage of a sequence and for every task being left out. Paths here are places in
the order of the sequence, or -1 for zero-shot.

Legend: N images of a data set, T tasks in the order of the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from medley.classifier import Classifier
from medley.routed import ZERO_SHOT
from medley.selector import SelectorBank, TaskSelector
from trainer.bench.metrics import auroc
from trainer.bench.record import Routing
from trainer.datasets import ImageSet
from trainer.frozen import frozen_buckets

__all__ = ["LabelRouter", "Router", "ScoreRouter", "Told", "score_router", "score_tables"]

Places = NDArray[np.int64]


class Router(Protocol):
    """Gives each image of a data set its path."""

    def route(self, task: str, loaded: Sequence[str]) -> Places:
        """Places (N,) in the order of the sequence, of loaded tasks only; -1 is zero-shot."""


@dataclass(frozen=True)
class Told:
    """The task is named: its experts answer once they are there."""

    order: tuple[str, ...]
    tests: Mapping[str, ImageSet]

    def route(self, task: str, loaded: Sequence[str]) -> Places:
        """The data set's own task, for every image."""
        own = self.order.index(task) if task in loaded else ZERO_SHOT
        return np.full(len(self.tests[task]), own)


@dataclass(frozen=True, eq=False)
class ScoreRouter:
    """Every image goes to the most familiar task among those that accept it."""

    order: tuple[str, ...]
    scores: Mapping[str, NDArray[np.float32]]  # by data set: (N, T), smaller is more familiar
    accepted: Mapping[str, NDArray[np.bool_]]  # by data set: (N, T)

    def route(self, task: str, loaded: Sequence[str]) -> Places:
        """Decide for each image by itself."""
        here_T = np.array([name in loaded for name in self.order])
        claimed_NT = self.accepted[task] & here_T
        best_N = np.where(claimed_NT, self.scores[task], np.inf).argmin(1)
        return np.where(claimed_NT.any(1), best_N, ZERO_SHOT)

    def routing(self, router: str, alpha: float | None) -> Routing:
        """Measure it with all tasks loaded, and with each left out in turn."""
        everyone = self.order
        return Routing(
            router=router,
            counts=tuple(_counts(self.route(task, everyone), len(everyone)) for task in everyone),
            auroc=float(np.mean([self._auroc(task) for task in everyone])),
            false_reject=tuple(
                float((~self.accepted[task][:, place]).mean())
                for place, task in enumerate(everyone)
            ),
            alpha=alpha,
            false_accept=tuple(
                float((self.route(task, _without(everyone, task)) != ZERO_SHOT).mean())
                for task in everyone
            ),
        )

    def _auroc(self, absent: str) -> float:
        """How well the best score tells images of the tasks that are there from those of one."""
        columns = [place for place, task in enumerate(self.order) if task != absent]
        best = {task: self.scores[task][:, columns].min(1) for task in self.order}
        unknown_N = best.pop(absent)
        return auroc(unknown_N, np.concatenate(list(best.values())))


@dataclass(frozen=True, eq=False)
class LabelRouter:
    """The request brings its data set's class names: only a task that has them all may answer.

    With `naming`, as in the service, a list that is exactly one task's names that task.
    """

    router: ScoreRouter
    class_names: Mapping[str, frozenset[str]]
    naming: bool

    def route(self, task: str, loaded: Sequence[str]) -> Places:
        """Decide among the tasks whose classes contain those of the data set."""
        asked = self.class_names[task]
        alike = [name for name in loaded if asked == self.class_names[name]]
        if self.naming and len(alike) == 1:
            images = len(self.router.scores[task])
            return np.full(images, self.router.order.index(alike[0]))
        return self.router.route(task, [name for name in loaded if asked <= self.class_names[name]])


def score_tables(
    selectors: Mapping[str, TaskSelector],
    classifier: Classifier,
    tests: Mapping[str, ImageSet],
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.bool_]]]:
    """Scores and acceptances (N, T) of every data set, columns in the order of `selectors`."""
    bank = SelectorBank(classifier.model.backbone.device)
    for place, selector in enumerate(selectors.values()):
        bank.add(place, selector)
    scores, accepted = {}, {}
    for task, images in tests.items():
        parts = [
            [
                table[:count].cpu().numpy()
                for table in bank.scores(frozen.taps, classifier.max_batch)
            ]
            for frozen, count in frozen_buckets(classifier, images, taps=bank.taps, hidden=False)
        ]
        scores[task] = np.concatenate([part[0] for part in parts])
        accepted[task] = np.concatenate([part[1] for part in parts])
    return scores, accepted


def score_router(
    selectors: Mapping[str, TaskSelector],
    classifier: Classifier,
    tests: Mapping[str, ImageSet],
) -> ScoreRouter:
    """The router that a server with these selectors is."""
    return ScoreRouter(tuple(selectors), *score_tables(selectors, classifier, tests))


def _counts(places_N: Places, tasks: int) -> tuple[int, ...]:
    return tuple(int((places_N == place).sum()) for place in (*range(tasks), ZERO_SHOT))


def _without(order: Sequence[str], task: str) -> list[str]:
    return [name for name in order if name != task]

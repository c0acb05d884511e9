"""The stages of a sequence and the rules by which images are answered in them: accuracy matrices.

A rule says who answers which image; what is answered then is read from `answers.py`.

Legend: N images of a data set, T tasks in the order of the sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from medley.routed import ZERO_SHOT
from trainer.bench.answers import Answers, Hits, Paths
from trainer.bench.record import Matrix
from trainer.bench.routers import Router

__all__ = ["AlongPaths", "Rule", "Stage", "matrices"]

Key = TypeVar("Key")


@dataclass(frozen=True, eq=False)
class Stage:
    """After so many tasks were learnt: who is loaded, and what each of their paths says."""

    order: tuple[str, ...]  # of the whole sequence
    loaded: tuple[str, ...]
    answers: Answers
    paths: Mapping[str, int]  # of at least all that is loaded

    def taken(self, router: Router, task: str) -> Paths:
        """The path of each image of a data set (N,), or ZERO_SHOT."""
        here = [self.paths[name] if name in self.loaded else ZERO_SHOT for name in self.order]
        path_of = np.array([*here, ZERO_SHOT])  # place -1: the last
        return path_of[router.route(task, self.loaded)]


class Rule(Protocol):
    """Answers each image of a data set."""

    def hits(self, stage: Stage, task: str) -> Hits:
        """Which of its images are answered right (N,)."""


@dataclass(frozen=True, eq=False)
class AlongPaths:
    """Each image is answered by the one path that a router gives it.

    With `union`, among the classes of all data sets: see `Answers.hits`.
    """

    router: Router
    union: bool = False

    def hits(self, stage: Stage, task: str) -> Hits:
        """See `Rule`."""
        return stage.answers.hits(task, stage.taken(self.router, task), union=self.union)


def matrices(
    stages: Iterable[Stage], rules: Mapping[Key, Rule], order: Sequence[str]
) -> dict[Key, Matrix]:
    """The accuracy matrix of each rule: row i is what is answered in stage i.

    Args:
        stages: of the whole sequence, in its order; each is done with before the next is made.
        rules: by any name.
        order: the data sets, which are the columns.
    """
    lines: dict[Key, list[tuple[float, ...]]] = {key: [] for key in rules}
    for stage in stages:
        for key, rule in rules.items():
            lines[key].append(tuple(float(rule.hits(stage, task).mean()) for task in order))
    return {key: tuple(of_stages) for key, of_stages in lines.items()}

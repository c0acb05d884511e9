"""Aggregated prediction: what zero-shot and the nearest tasks say together of unclaimed images.

The rules beside those of `routers.py` that ConDU brings. Who is near and how answers are averaged
is what serves, `medley/neighbours.py` and `medley/aggregation.py`.

Legend: N images of a data set, C prototypes of a task, E embedding width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medley.aggregation import Weighting, averaged, weights
from medley.neighbours import Neighbours
from medley.routed import ZERO_SHOT
from trainer.bench.answers import Answers, Hits
from trainer.bench.routers import Places, Router
from trainer.bench.stages import Rule, Stage
from trainer.export import BUCKET

__all__ = ["COUNTS", "NEIGHBOURS", "Aggregated", "Nearness", "Unclaimed", "aggregated_rules"]

NEIGHBOURS = 4  # as in ConDU's code, and the service's default
COUNTS = (1, 2, 8)  # what else is tried; told by an @ in the name of the rule


class Nearness:
    """Which tasks the images of some data sets are near to.

    Args:
        order: of the sequence; of equally near tasks the earlier one is nearer.
        prototypes: (C, E) of the tasks that have any; others are never near.
        features: frozen features (N, E) of each data set's images, unit length.
    """

    def __init__(
        self,
        order: Sequence[str],
        prototypes: Mapping[str, Tensor],
        features: Mapping[str, Tensor],
    ) -> None:
        self._order, self._features = tuple(order), features
        self._neighbours = Neighbours(width=next(iter(features.values())).shape[1])
        for task, prototypes_CE in prototypes.items():
            self._neighbours.add(self._order.index(task), prototypes_CE)
        self._found: dict[tuple[str, tuple[str, ...]], tuple[Tensor, Tensor]] = {}

    def nearest(
        self, task: str, loaded: Sequence[str], count: int
    ) -> tuple[Places, NDArray[np.float64]]:
        """Find the nearest of the loaded tasks to each image of a data set.

        Returns:
            their places in the order of the sequence (N, K), the nearest first, and similarities
            (N, K); K is `count`, or how many there are.
        """
        key = task, tuple(loaded)
        if key not in self._found:
            self._found[key] = self._ranked(*key)
        places_NT, similarity_NT = self._found[key]
        return places_NT[:, :count].numpy(), similarity_NT[:, :count].double().numpy()

    def _ranked(self, task: str, loaded: Sequence[str]) -> tuple[Tensor, Tensor]:
        """All loaded tasks, a bucket of images at a time: as they are served."""
        among_P = torch.tensor([name in loaded for name in self._order])
        there = sum(bool(among_P[place]) for place in self._neighbours.paths)
        parts = []
        for part_BE in self._features[task].split(BUCKET):
            bucket_BE = F.pad(part_BE, (0, 0, 0, BUCKET - len(part_BE)))
            found = self._neighbours.nearest(bucket_BE, among_P.expand(BUCKET, -1), there)
            parts.append([table[: len(part_BE)] for table in found])
        places_NT, similarity_NT = (torch.cat(tables) for tables in zip(*parts, strict=True))
        return places_NT, similarity_NT


@dataclass(frozen=True)
class Unclaimed:
    """A router that gives every image to nobody, as ConDU does with images of no told task."""

    images: Mapping[str, int]

    def route(self, task: str, loaded: Sequence[str]) -> Places:
        """See `Router`."""
        del loaded
        return np.full(self.images[task], ZERO_SHOT)


@dataclass(frozen=True, eq=False)
class Aggregated:
    """A routed image is answered by its path, any other by zero-shot and its nearest tasks.

    Each of them answers among the data set's own classes with its own text features.
    """

    router: Router
    nearness: Nearness
    neighbours: int = NEIGHBOURS
    weighting: Weighting = "uniform"

    def hits(self, stage: Stage, task: str) -> Hits:
        """See `Rule`."""
        paths_N = stage.taken(self.router, task)
        hit_N = stage.answers.hits(task, paths_N)
        rows_R = np.flatnonzero(paths_N == ZERO_SHOT)
        if len(rows_R):
            hit_N[rows_R] = self._aggregated(stage, task, rows_R)
        return hit_N

    def _aggregated(self, stage: Stage, task: str, rows_R: NDArray[np.int64]) -> Hits:
        places_NK, similarity_NK = self.nearness.nearest(task, stage.loaded, self.neighbours)
        path_of = np.array([stage.paths.get(name, ZERO_SHOT) for name in stage.order])
        paths_RK = path_of[places_NK[rows_R]]
        said = _said(stage.answers, task, rows_R, paths_RK)
        names, guessed = stage.answers.classes(task), []
        for row, paths_K in zip(rows_R.tolist(), paths_RK.tolist(), strict=True):
            weight = weights(similarity_NK[row].tolist(), self.weighting)
            together_C = averaged([said[path][row] for path in (ZERO_SHOT, *paths_K)], weight)
            guessed.append(names[int(together_C.argmax())])
        return stage.answers.right(task, rows_R, guessed)


def aggregated_rules(
    nearness: Nearness, routers: Mapping[str, Router], images: Mapping[str, int]
) -> dict[str, Rule]:
    """All rules that are measured, by the name of the router in a report.

    Args:
        nearness: of the test images.
        routers: whose unclaimed images are answered so; `labels` stands for requests that bring a
            class list, which names a task that is learnt.
        images: how many each data set has.
    """
    named = {f"{name}+aggregate": router for name, router in routers.items()}
    named["aggregate"] = Unclaimed(images)
    rules: dict[str, Rule] = {}
    for name, router in named.items():
        rules[name] = Aggregated(router, nearness)
        rules[f"{name}-similarity"] = Aggregated(router, nearness, weighting="similarity")
        for count in COUNTS:
            rules[f"{name}@{count}"] = Aggregated(router, nearness, count)
    return rules


def _said(
    answers: Answers, task: str, rows_R: NDArray[np.int64], paths_RK: NDArray[np.int64]
) -> dict[int, dict[int, Tensor]]:
    """The logits (classes,) that are wanted, by path, by row."""
    wanted = {ZERO_SHOT: rows_R}
    for path in np.unique(paths_RK).tolist():
        wanted[path] = rows_R[(paths_RK == path).any(1)]
    return {
        path: dict(zip(rows.tolist(), answers.logits(task, path, rows), strict=True))
        for path, rows in wanted.items()
    }

"""A course: the data sets of one sequence, for one seed, their frozen features kept.

Methods (`adapters.py`, `baselines.py`) take a course and learn it; nothing is learnt here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from medley.backbone import Backbone
from medley.classifier import Classifier
from medley.errors import DataError
from medley.routed import RoutedModel
from trainer.bench.memory import peak_memory_bytes, reset_peak_memory
from trainer.bench.record import Cost
from trainer.datasets import ImageSet, Split, few_shot
from trainer.export import BUCKET
from trainer.frozen import FrozenStore
from trainer.methods.learner import ParameterCounts
from trainer.progress import Bars
from trainer.run import training_parts
from trainer.settings import METHOD_DEFAULTS, Method, TrainSettings
from trainer.suites import Suite

__all__ = ["Course", "Meter", "Plan", "empty_classifier", "open_course", "tap_names"]

PARTS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is learnt, and how.

    Attributes:
        suite: where the data sets come from.
        order: in which they are learnt.
        settings: of every task; `seed` is that of the run.
        limit: at most so many test images of each data set; None: all.
        share: whether later tasks may choose experts of earlier ones.
        baseline_iterations: optimiser steps of the baselines, whose steps take longer than those of
            experts; None: as many.
        rivals: whether other routers are fitted, to compare with that of the bundles.
    """

    suite: Suite
    order: tuple[str, ...]
    settings: TrainSettings
    limit: int | None = None
    share: bool = False
    baseline_iterations: int | None = None
    rivals: bool = True


@dataclass(frozen=True, eq=False)
class Course:
    """One sequence for one seed."""

    plan: Plan
    backbone: Backbone
    folder: Path  # of this seed
    cache: Path
    train: dict[str, ImageSet]
    test: dict[str, ImageSet]
    bars: Bars = field(repr=False)

    @property
    def order(self) -> tuple[str, ...]:
        """The tasks in the order in which they are learnt."""
        return self.plan.order

    @property
    def settings(self) -> TrainSettings:
        """Of every task."""
        return self.plan.settings

    def settings_of(self, method: Method) -> TrainSettings:
        """Of every task, learnt by a method that is compared; its budget may be smaller."""
        settings = replace(self.settings.for_method(method), **METHOD_DEFAULTS[method])
        fewer = self.plan.baseline_iterations
        return settings if fewer is None else replace(settings, iterations=fewer)

    def classifier(self) -> Classifier:
        """An empty classifier: what the frozen features were computed with."""
        return empty_classifier(self.backbone, self.settings)

    def parts(self, task: str) -> tuple[ImageSet, ImageSet | None]:
        """Images to learn from and images held out, as `medley train` takes them."""
        return training_parts(self.train[task], self.settings)

    def learnable(self, task: str) -> ImageSet:
        """All images that a method may see in any way: few shots of each class, or all."""
        settings, images = self.settings, self.train[task]
        return images if settings.shots is None else few_shot(images, settings.shots, settings.seed)


def open_course(
    plan: Plan, backbone: Backbone, folder: Path, *, cache: Path, bars: Bars, taps: Sequence[str]
) -> Course:
    """Load all data sets and make sure that their frozen features are kept.

    Args:
        plan: what is learnt.
        backbone: frozen.
        folder: of this seed's results.
        cache: where frozen features are kept.
        bars: show how far it is.
        taps: frozen features that selectors will look at.

    Raises:
        DataError: a data set is missing or damaged, or two have one name.
    """
    store = FrozenStore(
        cache.expanduser() / "frozen", empty_classifier(backbone, plan.settings), taps=[*taps]
    )
    # All are read before any is learnt: what is missing ought to be told now, not in an hour.
    read = {task: [plan.suite.load(task, part) for part in PARTS] for task in plan.order}
    train, test = {}, {}
    for task, (learnt, seen) in read.items():
        if learnt.class_names != seen.class_names:
            raise DataError(f"{task}: training and test images have different classes")
        count = bars.counting(f"frozen features of {task}", len(learnt) + len(seen))
        train[task] = store.keep(learnt, on_images=count)
        test[task] = _limited(store.keep(seen, on_images=count), plan.limit)
    return Course(plan, backbone, folder, cache, train, test, bars)


class Meter:
    """What learning one task cost; made by `measured` and complete when its block ends."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.peak_memory_bytes = 0

    @classmethod
    @contextmanager
    def measured(cls, device: torch.device) -> Iterator[Meter]:
        """Measure what happens in the block: time, processor time and the rise in memory."""
        meter = cls()
        before_bytes = reset_peak_memory(device)
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        yield meter
        meter.seconds = round(time.perf_counter() - started_s, 2)
        meter.cpu_seconds = round(time.process_time() - started_cpu_s, 2)
        meter.peak_memory_bytes = max(0, peak_memory_bytes(device) - before_bytes)

    def cost(self, method: str, task: str, counts: ParameterCounts) -> Cost:
        """For the record."""
        return Cost(
            method=method,
            task=task,
            trained_parameters=counts.trained,
            stored_parameters=counts.stored,
            active_parameters=counts.active,
            seconds=self.seconds,
            cpu_seconds=self.cpu_seconds,
            peak_memory_bytes=self.peak_memory_bytes,
        )


def tap_names(backbone: Backbone) -> tuple[str, ...]:
    """The stem's and every block's mean: all depths at which a selector may look."""
    blocks = len(backbone.image.blocks)
    return ("stem:mean", *(f"block{n}:mean" for n in range(1, blocks + 1)), "embedding")


def empty_classifier(backbone: Backbone, settings: TrainSettings) -> Classifier:
    """A classifier without tasks, whose experts would begin where these settings say."""
    first = settings.first_image_block(backbone)
    return Classifier(RoutedModel(backbone, first_expert_block=first), buckets=(BUCKET,))


def _limited(images: ImageSet, limit: int | None) -> ImageSet:
    """The same images whatever the seed: seeds are to be compared."""
    if limit is None or limit >= len(images):
        return images
    return images.subset(np.sort(np.random.default_rng(0).permutation(len(images))[:limit]))

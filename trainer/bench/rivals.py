"""Routers to compare with that of the bundles, fitted on the same images of the same course.

Every selector that the trainer knows, and the paper's rule: one threshold for all tasks, decided
for each image (paper-1) or for 128 images of one data set at once (paper-128), as published and
without the reference that refuses what it knows better.

Legend: N images of a data set, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medley.selector import TaskSelector
from trainer.bench.course import Course
from trainer.bench.routers import ScoreRouter, score_router
from trainer.frozen import frozen_taps
from trainer.reference import PAPER, Reference, load_reference
from trainer.selectors import FITS, fit_paper

__all__ = ["PAPER_BATCH", "rivals"]

PAPER_BATCH = 128
OWN = "ddas"  # the selector inside the bundles


def rivals(course: Course) -> dict[str, ScoreRouter]:
    """Fit all routers that the backbone allows, by name."""
    reference = load_reference(course.backbone, course.cache)
    names = [n for n, fit in FITS.items() if n != OWN and (reference or not fit.needs_reference)]
    count = course.bars.counting("selectors to compare with", len(names))
    found: dict[str, ScoreRouter] = {}
    for name in names:
        selectors = {task: _fitted(course, task, name, reference) for task in course.order}
        found[name] = score_router(selectors, course.classifier(), course.test)
        count(1)
    if reference is not None:
        found |= _paper(course, reference)
    return found


def _fitted(course: Course, task: str, name: str, reference: Reference | None) -> TaskSelector:
    fit, settings = FITS[name], course.settings
    train_part, held_out = course.parts(task)
    classifier = course.classifier()
    return fit(
        frozen_taps(classifier, train_part, fit.taps),
        torch.from_numpy(train_part.labels.copy()),
        None if held_out is None else frozen_taps(classifier, held_out, fit.taps),
        alpha=settings.alpha,
        seed=settings.seed,
        iterations=settings.ddas_iterations,
        reference=reference,
    )


def _paper(course: Course, reference: Reference) -> dict[str, ScoreRouter]:
    """The paper's rule; few shots hold nothing out, and are then calibrated on themselves."""
    classifier = course.classifier()
    fit, held_out = {}, {}
    for task in course.order:
        train_part, rest = course.parts(task)
        fit[task] = frozen_taps(classifier, train_part, [PAPER.feature])
        held_out[task] = frozen_taps(classifier, rest or train_part, [PAPER.feature])
    tests = {t: frozen_taps(classifier, x, [PAPER.feature]) for t, x in course.test.items()}
    found = {}
    for suffix, against in (("", True), ("-no-reference", False)):
        selectors = fit_paper(
            fit,
            held_out,
            reference=reference,
            against_reference=against,
            alpha=course.settings.alpha,
            seed=course.settings.seed,
        )
        found[f"paper-1{suffix}"] = score_router(selectors, classifier, course.test)
        found[f"paper-{PAPER_BATCH}{suffix}"] = _batched(selectors, tests)
    return found


def _batched(
    selectors: Mapping[str, TaskSelector], tests: Mapping[str, Mapping[str, Tensor]]
) -> ScoreRouter:
    """Every image gets the mean error of its batch of images of one data set.

    Source: arXiv:2403.11549's evaluation, which decides once a batch.
    """
    tables = {task: _batch_tables(selectors, taps) for task, taps in tests.items()}
    return ScoreRouter(
        tuple(selectors),
        {task: scores_NT for task, (scores_NT, _) in tables.items()},
        {task: accepted_NT for task, (_, accepted_NT) in tables.items()},
    )


def _batch_tables(
    selectors: Mapping[str, TaskSelector], taps: Mapping[str, Tensor]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    errors, accepted = [], []
    for selector in selectors.values():
        plain = replace(selector, threshold=math.inf, reference=(), margin=None)
        error_N = _batch_means(plain.scores(taps).exp())
        accepted_N = error_N <= math.exp(selector.threshold)
        if selector.reference:
            other = TaskSelector(selector.reference, math.inf, alpha=None)
            accepted_N &= error_N < _batch_means(other.scores(taps).exp())
        errors.append(error_N)
        accepted.append(accepted_N)
    return torch.stack(errors, 1).numpy(), torch.stack(accepted, 1).numpy()


def _batch_means(errors_N: Tensor) -> Tensor:
    return torch.cat([part.mean().expand(len(part)) for part in errors_N.split(PAPER_BATCH)])

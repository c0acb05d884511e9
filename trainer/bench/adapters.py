"""Experts on a course: one bundle a task, then every router and protocol on the same bundles.

The bundles are those of `medley train`, and who answers is decided by the selectors inside them, as
a server decides. Other routers are fitted on the same held-out images, to compare.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from medley.bundle import Bundle, read_bundle
from medley.selector import TaskSelector
from trainer.bench.aggregates import NEIGHBOURS, Nearness, aggregated_rules
from trainer.bench.answers import Answers
from trainer.bench.course import Course, Meter
from trainer.bench.record import Cost, Routing, Row, Scores
from trainer.bench.routers import LabelRouter, Router, ScoreRouter, Told, score_router
from trainer.bench.stages import AlongPaths, Rule, Stage, matrices
from trainer.checkpoint import write_whole
from trainer.datasets import normalised
from trainer.evaluation import served
from trainer.export import Label
from trainer.frozen import frozen_features
from trainer.run import learn
from trainer.selectors import FITS
from trainer.settings import TrainSettings

__all__ = [
    "MIXED_IMAGES",
    "Learnt",
    "aggregation",
    "class_names",
    "learn_bundles",
    "learn_task",
    "measure",
]

METHOD = "moe_adapter"
NEEDS_LABELS = ("told", "ddas+labels", "labels")  # no question without the data set's own classes
MIXED_IMAGES = 1024  # sent once more in shuffled batches, to see that nothing changes


@dataclass(frozen=True, eq=False)
class Learnt:
    """The bundles of a course, and what each cost."""

    bundles: tuple[Bundle, ...]
    costs: tuple[Cost, ...]


def learn_bundles(course: Course) -> Learnt:
    """Learn each task of the course into a bundle; those that are there already are read."""
    bundles: list[Bundle] = []
    costs: list[Cost] = []
    for task in course.order:
        after = bundles if course.plan.share else []
        costs.append(learn_task(course, METHOD, course.settings, task, after=after))
        bundles.append(read_bundle(course.folder / METHOD / f"{task}-1.safetensors"))
    return Learnt(tuple(bundles), tuple(costs))


def learn_task(
    course: Course, name: str, settings: TrainSettings, task: str, *, after: Sequence[Bundle] = ()
) -> Cost:
    """Learn a task as `medley train` does, unless an earlier run has; say what it cost.

    Args:
        course: its images.
        name: of the method in the record, and of its folder.
        settings: method and budget.
        task: one of the course.
        after: bundles whose experts may be chosen.
    """
    folder = course.folder / name
    finished = folder / f"{task}-1" / "cost.json"  # written last
    if not finished.exists():
        cost = _learn(course, name, settings, task, after)
        write_whole(finished, json.dumps(asdict(cost)).encode())
    return Cost(**json.loads(finished.read_bytes()))


def measure(
    course: Course, learnt: Learnt, rivals: Mapping[str, ScoreRouter]
) -> tuple[list[Row], list[Routing], list[Scores], dict[str, int]]:
    """Rows, routings and scores of all routers, and how the mixed batches came out.

    Args:
        course: its test images.
        learnt: all tasks of the course.
        rivals: routers to compare with, by name.
    """
    order, tests = course.order, course.test
    classifier, paths = served(
        learnt.bundles, course.backbone, bucket=course.classifier().max_batch
    )
    counted = course.bars.counting("images along the paths they take")
    answers = Answers(classifier, paths, tests, on_images=counted)
    own = {b.manifest.task: b.selector() for b in learnt.bundles}
    by_scores = {"ddas": score_router(own, classifier, tests), **rivals}
    stages = [Stage(order, order[: stage + 1], answers, paths) for stage in range(len(order))]
    rules = _rules(course, by_scores) | aggregation(course, learnt.bundles, by_scores["ddas"])
    rows = [
        Row(method=METHOD, router=router, protocol=protocol, accuracy_TT=accuracy_TT)
        for (router, protocol), accuracy_TT in matrices(stages, rules, order).items()
    ]
    routings = [
        router.routing(name, course.settings.alpha if _promises(name) else None)
        for name, router in by_scores.items()
    ]
    mixed = answers.mixed_batches(MIXED_IMAGES, course.settings.seed, nearest=NEIGHBOURS)
    return rows, routings, _scores(by_scores["ddas"], own), mixed


def aggregation(
    course: Course, bundles: Sequence[Bundle], ddas: ScoreRouter
) -> dict[tuple[str, str], Rule]:
    """The rules that let the nearest tasks answer what nobody claims, by router and protocol.

    Args:
        course: its test images.
        bundles: of all its tasks, for their prototypes.
        ddas: the router of these bundles.
    """
    classifier = course.classifier()
    features = {task: frozen_features(classifier, images) for task, images in course.test.items()}
    prototypes = {b.manifest.task: b.prototypes for b in bundles if b.prototypes is not None}
    nearness = Nearness(course.order, prototypes, features)
    labels = LabelRouter(ddas, class_names(course), naming=True)
    images = {task: len(images) for task, images in course.test.items()}
    rules = aggregated_rules(nearness, {"ddas": ddas, "labels": labels}, images)
    return {(name, "agnostic"): rule for name, rule in rules.items()}


def class_names(course: Course) -> dict[str, frozenset[str]]:
    """The class names of each data set, as they are compared."""
    return {
        task: frozenset(map(normalised, images.class_names)) for task, images in course.test.items()
    }


def _rules(
    course: Course, by_scores: Mapping[str, ScoreRouter]
) -> dict[tuple[str, str], AlongPaths]:
    """Rules that take one path an image, by router and protocol."""
    names = class_names(course)
    routers: dict[str, Router] = {
        "told": Told(course.order, course.test),
        **by_scores,
        "ddas+labels": LabelRouter(by_scores["ddas"], names, naming=False),
        "labels": LabelRouter(by_scores["ddas"], names, naming=True),
    }
    return {
        (name, "told" if name == "told" else protocol): AlongPaths(router, protocol == "union")
        for name, router in routers.items()
        for protocol in ("agnostic", "union")
        if not (protocol == "union" and name in NEEDS_LABELS)
    }


def _learn(
    course: Course, name: str, settings: TrainSettings, task: str, after: Sequence[Bundle]
) -> Cost:
    folder = course.folder / name
    with Meter.measured(course.backbone.device) as meter:
        outcome = learn(
            course.backbone,
            course.train[task],
            settings,
            label=Label(task=task, version="1", licence="see the licences of the data set"),
            folder=folder,
            after=after,
            resume=(folder / f"{task}-1" / "checkpoint.pt").exists(),
            watcher=course.bars.learning(f"{name}: {task}", settings.batch_size),
        )
    selector = sum(t.numel() for n, t in outcome.bundle.tensors.items() if n.startswith("ddas."))
    counts = replace(outcome.counts, stored=outcome.counts.stored + selector)
    shared = outcome.unified_path
    return replace(
        meter.cost(name, task, counts),
        bundle_bytes=outcome.path.stat().st_size,
        shared_bytes=0 if shared is None else shared.stat().st_size,
    )


def _promises(router: str) -> bool:
    """Whether each task refuses at most alpha of its own; the paper's threshold is one for all."""
    return router in FITS and FITS[router].promises


def _scores(router: ScoreRouter, selectors: Mapping[str, TaskSelector]) -> list[Scores]:
    found = []
    for place, (task, selector) in enumerate(selectors.items()):
        others = [router.scores[other][:, place] for other in router.order if other != task]
        found.append(
            Scores(
                task=task,
                threshold=selector.threshold,
                own=_rounded(router.scores[task][:, place]),
                others=_rounded(np.concatenate(others)) if others else (),
                unseen=(),
            )
        )
    return found


def _rounded(scores_N: np.ndarray) -> tuple[float, ...]:
    return tuple(np.round(scores_N.astype(np.float64), 4).tolist())

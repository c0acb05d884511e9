"""Experts on a course: one bundle a task, then every router and protocol on the same bundles.

The bundles are those of `medley train`, and who answers is decided by the selectors inside them, as
a server decides. Other routers are fitted on the same held-out images, to compare.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from medley.bundle import Bundle, read_bundle
from medley.routed import ZERO_SHOT
from medley.selector import TaskSelector
from trainer.bench.answers import Answers
from trainer.bench.course import Course, Meter
from trainer.bench.record import Cost, Routing, Row, Scores
from trainer.bench.routers import LabelRouter, Router, ScoreRouter, Told, score_router
from trainer.checkpoint import write_whole
from trainer.datasets import normalised
from trainer.evaluation import served
from trainer.export import Label
from trainer.run import learn
from trainer.selectors import FITS

__all__ = ["Learnt", "accuracy", "learn_bundles", "measure"]

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
    folder = course.folder / METHOD
    for task in course.order:
        after = bundles if course.plan.share else []
        finished = folder / f"{task}-1" / "cost.json"  # written last
        if not finished.exists():
            cost = _learn(course, task, folder, after)
            write_whole(finished, json.dumps(asdict(cost)).encode())
        costs.append(Cost(**json.loads(finished.read_bytes())))
        bundles.append(read_bundle(folder / f"{task}-1.safetensors"))
    return Learnt(tuple(bundles), tuple(costs))


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
    total = sum(map(len, tests.values()))
    counted = course.bars.counting("images along the paths they take", total)
    answers = Answers(classifier, paths, tests, on_images=counted)
    own = {b.manifest.task: b.selector() for b in learnt.bundles}
    by_scores = {"ddas": score_router(own, classifier, tests), **rivals}
    routers: dict[str, Router] = {"told": Told(order, tests), **by_scores}
    names = _class_names(course)
    routers["ddas+labels"] = LabelRouter(by_scores["ddas"], names, naming=False)
    routers["labels"] = LabelRouter(by_scores["ddas"], names, naming=True)
    rows = [
        Row(
            method=METHOD,
            router=name,
            protocol="told" if name == "told" else protocol,
            accuracy_TT=accuracy(course, answers, paths, router, union=protocol == "union"),
        )
        for name, router in routers.items()
        for protocol in ("agnostic", "union")
        if not (protocol == "union" and name in NEEDS_LABELS)
    ]
    routings = [
        router.routing(name, course.settings.alpha if _promises(name) else None)
        for name, router in by_scores.items()
    ]
    sent, differ = answers.mixed_batches(MIXED_IMAGES, course.settings.seed)
    mixed = {"images": sent, "features_that_differ": differ}
    return rows, routings, _scores(by_scores["ddas"], own), mixed


def accuracy(
    course: Course,
    answers: Answers,
    paths: Mapping[str, int],
    router: Router,
    *,
    union: bool,
) -> tuple[tuple[float, ...], ...]:
    """The accuracy matrix: row i is what is answered when the first i + 1 tasks are loaded."""
    path_of = np.array([*(paths[task] for task in course.order), ZERO_SHOT])  # place -1: the last

    def share(task: str, loaded: Sequence[str]) -> float:
        return float(answers.hits(task, path_of[router.route(task, loaded)], union=union).mean())

    stages = [course.order[: stage + 1] for stage in range(len(course.order))]
    return tuple(tuple(share(task, loaded) for task in course.order) for loaded in stages)


def _learn(course: Course, task: str, folder: Path, after: Sequence[Bundle]) -> Cost:
    resume = (folder / f"{task}-1" / "checkpoint.pt").exists()
    bar = course.bars.learning(f"{METHOD}: {task}", course.settings.batch_size)
    with Meter.measured(course.backbone.device) as meter:
        outcome = learn(
            course.backbone,
            course.train[task],
            course.settings,
            label=Label(task=task, version="1", licence="see the licences of the data set"),
            folder=folder,
            after=after,
            resume=resume,
            watcher=bar,
        )
    selector = sum(t.numel() for n, t in outcome.bundle.tensors.items() if n.startswith("ddas."))
    counts = replace(outcome.counts, stored=outcome.counts.stored + selector)
    return meter.cost(METHOD, task, counts)


def _promises(router: str) -> bool:
    """Whether each task refuses at most alpha of its own; the paper's threshold is one for all."""
    return router in FITS and FITS[router].promises


def _class_names(course: Course) -> dict[str, frozenset[str]]:
    return {
        task: frozenset(map(normalised, images.class_names)) for task, images in course.test.items()
    }


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

"""One trial of an ablation: one arm, one seed, and what it comes to as a few numbers.

Legend: N images, C classes, E embedding width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medley.classifier import Ask, Classifier
from medley.experts import TaskExperts
from medley.prompts import class_text_features
from medley.routed import RoutedModel
from trainer.bench.course import Course, Meter
from trainer.bench.results import routed_right
from trainer.bench.routers import score_router
from trainer.capacity import capacity_for
from trainer.checkpoint import make_folder, write_whole
from trainer.datasets import ImageSet
from trainer.ddas import DEFAULT_FEATURES, fit_selector
from trainer.export import BUCKET
from trainer.freezing import keep, measure_usage
from trainer.frozen import frozen_buckets, frozen_taps
from trainer.methods import FrozenExperts, Learner, Lora, MoeAdapter
from trainer.redundancy import MEASURES, SubspaceRedundancy
from trainer.settings import TrainSettings
from trainer.training import Trained, train
from trainer.trunk import ImageTrunk

__all__ = ["Metrics", "learning_trial", "routing_trial"]

Metrics = dict[str, float]

LOOKED_AT = 256  # images that say how redundant experts are
# They decide what is made of a trained learner, not how it is trained.
AFTER_TRAINING = (
    *("freeze", "freeze_mass", "freeze_count"),
    *("selector", "alpha", "ddas_iterations"),
)


def learning_trial(course: Course, task: str, trained: Path) -> Metrics:
    """Train experts, or LoRA, for one task, the task told.

    Args:
        course: with the settings of the arm.
        task: one of the course.
        trained: folder of learners; arms that differ only in what is done after training share
            one, and one half trained goes on.

    Returns:
        ``trained``: accuracy of the learner as it was trained; ``kept``: that of the experts that
        a bundle would hold, where it could; parameters; processor seconds; and by each measure how
        redundant the updates of the image tower are for images they were trained on.
    """
    result, cpu_seconds = _trained(course, task, trained)
    learner, settings, test = result.learner, course.settings, course.test[task]
    assert isinstance(learner, MoeAdapter | Lora)
    metrics: Metrics = {
        "trained": _trained_accuracy(course, learner, test),
        "CPU seconds": cpu_seconds,
        **_redundancies(learner, result.trunk, settings),
    }
    counts = learner.counts()
    if isinstance(learner, MoeAdapter):
        kept = keep(
            learner, FrozenExperts(), measure_usage(learner, result.trunk, settings), settings
        )
        counts = learner.counts(kept)
        if settings.relu:  # a bundle's experts have one
            metrics["kept"] = _kept_accuracy(course, kept, test)
    return metrics | {"stored parameters": counts.stored, "active parameters": counts.active}


def routing_trial(course: Course, arm: Mapping[str, Any]) -> Metrics:
    """Fit the selectors of all tasks of a course and see where the test images go.

    Args:
        course: with the seed of the trial.
        arm: arguments of `fit_selector`.

    Returns:
        shares as in `Routing`: rejects and accepts are means over the tasks.
    """
    classifier, selectors = course.classifier(), {}
    for task in course.order:
        part, held_out = course.parts(task)
        assert held_out is not None
        names = arm.get("features", DEFAULT_FEATURES)
        selectors[task] = fit_selector(
            frozen_taps(classifier, part, names),
            frozen_taps(classifier, held_out, names),
            seed=course.settings.seed,
            **arm,
        )
    routing = score_router(selectors, classifier, course.test).routing("ddas", arm.get("alpha"))
    return {
        "accuracy": routed_right(routing)[0],
        "AUROC": routing.auroc,
        "false reject": float(np.mean(routing.false_reject)),
        "false accept": float(np.mean(routing.false_accept)),
    }


def _trained(course: Course, task: str, folder: Path) -> tuple[Trained, float]:
    """A learner and the processor seconds it took, whoever trained it.

    If training was interrupted, the seconds are those since.
    """
    part, _ = course.parts(task)
    identity = _identity(course, task, part)
    make_folder(folder)
    checkpoint = folder / f"{task}-{identity[:24]}.pt"
    took = checkpoint.with_suffix(".json")  # written when training is done
    with Meter.measured(course.backbone.device) as meter:
        result = train(
            course.backbone,
            part,
            None,  # no curve: it costs, and nobody looks
            course.settings,
            checkpoint=checkpoint,
            identity=identity,
            resume=checkpoint.exists(),
            checkpoint_every_s=60.0,
            watcher=course.bars.learning(task, course.settings.batch_size),
        )
    if not took.exists():
        write_whole(took, json.dumps({"cpu_seconds": meter.cpu_seconds}).encode())
    return result, float(json.loads(took.read_bytes())["cpu_seconds"])


def _redundancies(
    learner: MoeAdapter | Lora, trunk: ImageTrunk, settings: TrainSettings
) -> Metrics:
    entrance = trunk.batch(np.arange(min(LOOKED_AT, len(trunk.images))), 0)
    return {
        measure: float(
            learner.redundancy(
                entrance, SubspaceRedundancy(measure=measure, groups=settings.redundancy_groups)
            )
        )
        for measure in MEASURES
    }


def _identity(course: Course, task: str, part: ImageSet) -> str:
    settings = {k: v for k, v in course.settings.as_dict().items() if k not in AFTER_TRAINING}
    about = {
        "backbone": course.backbone.fingerprint,
        "task": task,
        "data": part.digest,
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _trained_accuracy(course: Course, learner: Learner, test: ImageSet) -> float:
    text_CE = learner.text_features_of(test.class_names, test.templates)
    parts = [
        learner.image_features_of(frozen.hidden_BLD)[:count]
        for frozen, count in frozen_buckets(course.classifier(), test)
    ]
    return _accuracy(torch.cat(parts), text_CE, test)


def _kept_accuracy(course: Course, kept: TaskExperts, test: ImageSet) -> float:
    first = course.settings.first_image_block(course.backbone)
    model = RoutedModel(course.backbone, first_expert_block=first, capacity=capacity_for([kept]))
    classifier, route = Classifier(model, buckets=(BUCKET,)), model.load(kept)
    text_CE = class_text_features(model, test.class_names, test.templates, route)
    parts = [
        classifier.follow(frozen, [Ask(route)] * count).features_BE
        for frozen, count in frozen_buckets(classifier, test)
    ]
    return _accuracy(torch.cat(parts), text_CE, test)


def _accuracy(image_NE: Tensor, text_CE: Tensor, test: ImageSet) -> float:
    guesses_N = (image_NE @ text_CE.T).argmax(1).cpu().numpy()
    return float((guesses_N == test.labels).mean())

"""What experts are compared with, on the same course: from doing nothing to fine-tuning.

zero-shot: the untouched backbone. linear-probe: a classifier on its features, one a task, the task
told. lora: low-rank updates, one set a task, the task told; an upper bound. finetune: one model,
trained on task after task; it forgets. All with the budget of the experts: images, steps, blocks.

Legend: N images, C classes, E embedding width, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from medley.prompts import class_text_features
from trainer.bench.course import Course, Meter
from trainer.bench.record import Cost, Row
from trainer.checkpoint import load_checkpoint, make_folder, save_checkpoint
from trainer.datasets import normalised
from trainer.evaluation import linear_probe
from trainer.frozen import frozen_buckets, frozen_features
from trainer.methods import Learner
from trainer.settings import Method
from trainer.training import train

__all__ = ["finetune", "linear_probes", "lora", "zero_shot"]

Shares = dict[str, float]  # by data set


def zero_shot(course: Course) -> list[Row]:
    """The untouched backbone, over each data set's own classes and over those of all."""
    classifier = course.classifier()
    features = {task: frozen_features(classifier, images) for task, images in course.test.items()}
    texts = _zero_shot_texts(course)
    own, union = (
        [_share(course, task, features[task], texts, union=union) for task in course.order]
        for union in (False, True)
    )
    return [
        _row("zero-shot", "none", "agnostic", [own] * len(own)),
        _row("zero-shot", "none", "union", [union] * len(union)),
    ]


def linear_probes(course: Course) -> list[Row]:
    """A logistic regression a task on frozen features; zero-shot until the task is learnt."""
    classifier = course.classifier()
    count = course.bars.counting("linear probes", len(course.order))
    after: Shares = {}
    for task in course.order:
        images, test = course.learnable(task), course.test[task]
        features_NE = frozen_features(classifier, images).numpy()
        probe = linear_probe(features_NE, images.labels, course.settings.seed)
        after[task] = float(probe.score(frozen_features(classifier, test).numpy(), test.labels))
        count(1)
    return [_told(course, "linear-probe", after)]


def lora(course: Course) -> tuple[list[Row], list[Cost]]:
    """One set of low-rank updates a task, each from the untouched backbone, the task told."""
    learnt = {task: _learnt(course, "lora", task, None, [task]) for task in course.order}
    after = {task: state["own"][task] for task, state in learnt.items()}
    return [_told(course, "lora", after)], [Cost(**state["cost"]) for state in learnt.values()]


def finetune(course: Course) -> tuple[list[Row], list[Cost]]:
    """One model, trained on each task from where the one before left it."""
    learnt: list[dict[str, Any]] = []
    for task in course.order:
        initial = learnt[-1]["learner"] if learnt else None
        learnt.append(_learnt(course, "finetune", task, initial, course.order))
    rows = [
        _row(
            "finetune",
            "none",
            protocol,
            [[state[shares][t] for t in course.order] for state in learnt],
        )
        for protocol, shares in (("agnostic", "own"), ("union", "union"))
    ]
    return rows, [Cost(**state["cost"]) for state in learnt]


def _learnt(
    course: Course,
    method: Method,
    task: str,
    initial: Mapping[str, Tensor] | None,
    measured: Sequence[str],
) -> dict[str, Any]:
    """Learn a task and measure some data sets, or read what an earlier run found.

    Returns:
        the learner's state, accuracies "own" and "union" by data set, and the cost.
    """
    folder = course.folder / method
    finished, checkpoint = folder / f"{task}.pt", folder / f"{task}.unfinished.pt"
    if finished.exists():
        return load_checkpoint(finished)
    make_folder(folder)
    settings = course.settings_of(method)
    train_part, held_out = course.parts(task)
    with Meter.measured(course.backbone.device) as meter:
        trained = train(
            course.backbone,
            train_part,
            held_out,
            settings,
            initial=initial,
            checkpoint=checkpoint,
            identity=f"{course.backbone.fingerprint} {train_part.digest} {settings}",
            resume=checkpoint.exists(),
            checkpoint_every_s=60.0,
            watcher=course.bars.learning(f"{method}: {task}", settings.batch_size),
        )
    own, union = _measured(course, trained.learner, measured)
    state = {
        "learner": trained.learner.state_dict(),
        "own": own,
        "union": union,
        "cost": asdict(meter.cost(method, task, trained.learner.counts())),
    }
    save_checkpoint(finished, state)
    checkpoint.unlink()
    return state


def _measured(course: Course, learner: Learner, tasks: Sequence[str]) -> tuple[Shares, Shares]:
    """Accuracy of one model on some data sets, among their own classes and among all."""
    count = course.bars.counting("baseline on test images", sum(len(course.test[t]) for t in tasks))
    texts = {
        task: learner.text_features_of(images.class_names, images.templates)
        for task, images in course.test.items()
    }
    own, union = {}, {}
    for task in tasks:
        parts = []
        for frozen, size in frozen_buckets(course.classifier(), course.test[task]):
            parts.append(learner.image_features_of(frozen.hidden_BLD)[:size])
            count(size)
        features_NE = torch.cat(parts)
        own[task] = _share(course, task, features_NE, texts, union=False)
        union[task] = _share(course, task, features_NE, texts, union=True)
    return own, union


def _share(
    course: Course, task: str, features_NE: Tensor, texts: Mapping[str, Tensor], *, union: bool
) -> float:
    """Share of a data set's images whose nearest class name is theirs."""
    among = course.order if union else [task]
    names = [normalised(name) for t in among for name in course.test[t].class_names]
    text_CE = torch.cat([texts[t] for t in among])
    guesses_N = (features_NE @ text_CE.T).argmax(1).tolist()
    images = course.test[task]
    truth_N = [normalised(images.class_names[label]) for label in images.labels]
    hits = sum(names[guess] == truth for guess, truth in zip(guesses_N, truth_N, strict=True))
    return hits / len(images)


def _zero_shot_texts(course: Course) -> dict[str, Tensor]:
    model = course.classifier().model
    return {
        task: class_text_features(model, images.class_names, images.templates)
        for task, images in course.test.items()
    }


def _told(course: Course, method: str, after: Shares) -> Row:
    """A method that answers for the tasks it has learnt; zero-shot answers for the others."""
    before = zero_shot(course)[0].accuracy_TT[0]
    matrix = [
        [after[task] if j <= i else before[j] for j, task in enumerate(course.order)]
        for i in range(len(course.order))
    ]
    return _row(method, "told", "told", matrix)


def _row(method: str, router: str, protocol: str, matrix: Sequence[Sequence[float]]) -> Row:
    return Row(
        method=method,
        router=router,
        protocol=protocol,
        accuracy_TT=tuple(tuple(line) for line in matrix),
    )

"""Class-incremental learning by bundles: one a step, frozen for ever, and DDAS chooses among them.

The steps of one data set look alike, which is not what DDAS was made to tell apart; this measures
what a server with one bundle a step would answer.

Legend: N images, C classes, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from medley.backbone import Backbone
from medley.bundle import read_bundle
from medley.classifier import Ask
from medley.prompts import class_text_features
from trainer.datasets import ImageSet
from trainer.evaluation import served
from trainer.export import BUCKET, Label
from trainer.frozen import frozen_buckets
from trainer.run import Outcome, learn
from trainer.settings import TrainSettings
from trainer.training import Watcher

__all__ = ["accuracy", "learn_step"]


def learn_step(
    backbone: Backbone,
    images: ImageSet,
    settings: TrainSettings,
    *,
    step: int,
    folder: Path,
    watcher: Watcher,
    checkpoint_every_s: float,
) -> Outcome:
    """Learn the classes of a step into a bundle of their own."""
    return learn(
        backbone,
        images,
        settings,
        label=Label(task=_task(step), version="1", licence="see the licences of the data set"),
        folder=folder,
        resume=(folder / f"{_task(step)}-1" / "checkpoint.pt").exists(),
        checkpoint_every_s=checkpoint_every_s,
        watcher=watcher,
    )


def accuracy(backbone: Backbone, folder: Path, steps: int, test: ImageSet) -> float:
    """Share of the images answered right with the bundles of the first steps loaded.

    DDAS decides for each image by itself; the image is then answered among the classes of `test`,
    all of them, by the path that it took, or by zero-shot.
    """
    bundles = [read_bundle(folder / f"{_task(step)}-1.safetensors") for step in range(steps)]
    classifier, _ = served(bundles, backbone, bucket=BUCKET)
    guesses: list[int] = []
    texts: dict[int, torch.Tensor] = {}  # (C, E) by path
    for frozen, count in frozen_buckets(classifier, test, taps=classifier.selectors.taps):
        routed = classifier.follow(frozen, [Ask()] * count)
        for path, features_E in zip(routed.paths, routed.features_BE, strict=True):
            if path not in texts:
                names, templates = test.class_names, test.templates
                texts[path] = class_text_features(classifier.model, names, templates, path)
            guesses.append(int((texts[path] @ features_E).argmax()))
    return _share(guesses, test.labels.tolist())


def _share(guesses: Sequence[int], labels: Sequence[int]) -> float:
    return sum(g == label for g, label in zip(guesses, labels, strict=True)) / len(labels)


def _task(step: int) -> str:
    return f"step-{step + 1}"

"""What the fast precisions change: answers, paths, logits and selector scores, against exact.

    python -m trainer.experiments.precision BUNDLE... [--limit 300]

All bundles are live at once on the embedded base. Every test image of their tasks in the small
suite is answered zero-shot, along its own task's path, and along the one that its selector chooses.

Legend: N images, C classes, E joint embedding width, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from medley.backbone import Backbone, load_backbone
from medley.bundle import Bundle, read_bundle
from medley.classifier import Ask, Classifier, Routed, logits
from medley.precision import PRECISIONS, Precision
from medley.prompts import class_text_features
from medley.routed import ZERO_SHOT, RoutedModel
from trainer.capacity import capacity_for
from trainer.datasets import ImageSet, align
from trainer.pixels import pixels_of
from trainer.suite import load_task

BUCKET = 8
CHUNK = 64
ASKED = ("zero-shot", "told", "selector")


@dataclass(frozen=True)
class Answers:
    """What became of all images of all tasks, in one order, by how they were asked."""

    paths_N: Tensor  # chosen by the selector
    scores_NT: Tensor
    guesses: dict[str, Tensor]  # (N,), index of a class
    logits: dict[str, Tensor]  # of all classes of all images in a row
    self_test_logits: Tensor  # errors against what the trainer recorded
    self_test_scores: Tensor


def main(
    bundle: list[Path],
    limit: Annotated[int, typer.Option(help="Test images of each task.")] = 300,
) -> None:
    """Measure and print."""
    bundles, backbone = [read_bundle(path) for path in bundle], load_backbone()
    sets = [_test_set(one, limit) for one in bundles]
    labels_N = torch.cat([torch.from_numpy(images.labels) for images in sets])
    found = {p: _answers(p, backbone, bundles, sets) for p in PRECISIONS}
    table = Table(f"{len(labels_N)} images", *PRECISIONS)
    columns = [_figures(answers, found["exact"], labels_N) for answers in found.values()]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    Console().print(table)


def _test_set(bundle: Bundle, limit: int) -> ImageSet:
    manifest = bundle.manifest
    images = align(load_task(manifest.task, "test"), manifest.class_names)
    rows = np.sort(np.random.default_rng(0).permutation(len(images))[:limit])
    return replace(images.subset(rows), templates=manifest.templates)


def _answers(
    precision: Precision, backbone: Backbone, bundles: Sequence[Bundle], sets: Sequence[ImageSet]
) -> Answers:
    capacity = capacity_for([one.task_experts() for one in bundles])
    model = RoutedModel(backbone, precision=precision, first_expert_block=None, capacity=capacity)
    classifier = Classifier(model, buckets=(BUCKET,))
    paths = []
    for one in bundles:  # not admitted: whether they would be is what is measured
        paths.append(model.load(one.task_experts()))
        classifier.selectors.add(paths[-1], one.selector())
    routed: dict[str, list[Routed]] = {name: [] for name in ASKED}
    logits_of: dict[str, list[Tensor]] = {name: [] for name in ASKED}
    for own, images in zip(paths, sets, strict=True):
        texts = _Texts(model, images)
        for start in track(range(0, len(images), CHUNK), f"{precision} {images.name}"):
            rows = range(start, min(start + CHUNK, len(images)))
            pixels_BCHW = pixels_of(backbone, images, rows)
            for name, path in zip(ASKED, (ZERO_SHOT, own, None), strict=True):
                answer = classifier.route(pixels_BCHW, [Ask(path)] * len(rows))
                routed[name].append(answer)
                logits_of[name] += [
                    logits(features_E, texts[went], backbone.logit_scale)
                    for features_E, went in zip(answer.features_BE, answer.paths, strict=True)
                ]
    chosen = routed["selector"]
    errors = [_self_test(classifier, path, one) for path, one in zip(paths, bundles, strict=True)]
    return Answers(
        torch.tensor([path for answer in chosen for path in answer.paths]),
        torch.cat([answer.scores_BT for answer in chosen]),
        {k: torch.stack([x.argmax() for x in rows]) for k, rows in logits_of.items()},
        {k: torch.cat(rows) for k, rows in logits_of.items()},
        torch.cat([logits_NC.flatten() for logits_NC, _ in errors]),
        torch.cat([scores_N for _, scores_N in errors]),
    )


class _Texts(dict[int, Tensor]):
    """Features of a set's classes by path."""

    def __init__(self, model: RoutedModel, images: ImageSet) -> None:
        super().__init__()
        self._model, self._images = model, images

    def __missing__(self, path: int) -> Tensor:
        images = self._images
        self[path] = class_text_features(self._model, images.class_names, images.templates, path)
        return self[path]


def _self_test(classifier: Classifier, path: int, bundle: Bundle) -> tuple[Tensor, Tensor]:
    """How far a bundle's self-test is from what was recorded: logits (N, C) and scores (N,)."""
    pixels_NCHW = bundle.tensors["self_test.pixels"]
    routed = classifier.route(pixels_NCHW, [Ask(path)] * len(pixels_NCHW))
    text_CE = bundle.tensors["class_text_features"].float()
    scale = classifier.model.backbone.logit_scale
    logits_NC = torch.stack([logits(row, text_CE, scale) for row in routed.features_BE])
    scores_N = routed.scores_BT[:, routed.tasks.index(path)]
    return (
        (logits_NC - bundle.tensors["self_test.logits"]).abs(),
        (scores_N - bundle.tensors["self_test.scores"]).abs(),
    )


def _figures(ours: Answers, exact: Answers, labels_N: Tensor) -> dict[str, str]:
    figures = {}
    for name in ASKED:
        guesses_N, others_N = ours.guesses[name], exact.guesses[name]
        figures[f"{name}: right"] = f"{(guesses_N == labels_N).float().mean():.2%}"
        figures[f"{name}: other answer"] = str(int((guesses_N != others_N).sum()))
        if name != "selector":  # there, another path has other classes' texts
            away = (ours.logits[name] - exact.logits[name]).abs()
            figures[f"{name}: logits"] = _spread(away)
    figures["other path"] = str(int((ours.paths_N != exact.paths_N).sum()))
    figures["scores"] = _spread((ours.scores_NT - exact.scores_NT).abs().flatten())
    figures["self-test: logits"] = _spread(ours.self_test_logits)
    figures["self-test: scores"] = _spread(ours.self_test_scores)
    return figures


def _spread(away: Tensor) -> str:
    """Median, 99.9th percentile and largest."""
    ranked = away.double().sort().values
    places = (len(ranked) // 2, int(len(ranked) * 0.999), len(ranked) - 1)
    return " ".join(f"{ranked[place]:.2g}" for place in places)


if __name__ == "__main__":
    typer.run(main)

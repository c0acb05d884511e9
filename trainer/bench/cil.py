"""Class-incremental learning: the classes of one data set arrive in steps, and none comes back.

A step learns from images of its own classes only, against their names only; after it, test images
of all classes seen are answered among all of these. Nothing is stored of earlier images. This is
another question than a sequence of data sets: the steps are of one domain, so it shows how much a
method forgets where no router can tell what an image belongs to.

Legend: N images, C classes, E embedding width, S steps.

Source: MoE-Adapters, arXiv:2403.11549, and ZSCL, arXiv:2303.06628, for the protocol.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medley.backbone import Backbone
from medley.classifier import Classifier
from medley.errors import DataError
from medley.prompts import class_text_features
from medley.routed import RoutedModel
from trainer.bench.cil_bundles import accuracy as bundles_accuracy
from trainer.bench.cil_bundles import learn_step
from trainer.bench.cil_plan import CilMethod, CilPlan, CilResult
from trainer.checkpoint import load_checkpoint, make_folder, save_checkpoint, write_whole
from trainer.datasets import ImageSet, normalised
from trainer.evaluation import linear_probe
from trainer.export import BUCKET
from trainer.frozen import frozen_features
from trainer.methods import Learner
from trainer.settings import TrainSettings
from trainer.training import State, Watcher, train
from trainer.trunk import CHUNK, ImageTrunk

__all__ = ["run_cil"]

WARMUP_STEPS = 30
Watch = Callable[[str], Watcher]  # from what is being learnt


def run_cil(
    backbone: Backbone,
    train_set: ImageSet,
    test_set: ImageSet,
    plan: CilPlan,
    *,
    method: CilMethod,
    folder: Path,
    watch: Watch,
    checkpoint_every_s: float = 60.0,
) -> CilResult:
    """Learn the steps one after another and measure after each.

    zero-shot learns nothing; linear-probe is fitted again in each step, on the frozen features of
    all images so far, which no learner may see again: an upper bound. bundles are moe_adapter's,
    one a step, DDAS choosing among them (`cil_bundles.py`). The others carry on from where the step
    before left them. Router noise and dropout are off where accuracy is measured.

    Args:
        backbone: frozen.
        train_set: images to learn from.
        test_set: images to measure on, with the same class names in any order.
        plan: steps and settings.
        method: of `CIL_METHODS`; `plan.settings` are its settings.
        folder: of this run; what is finished there is not done again.
        watch: makes a watcher for each step.
        checkpoint_every_s: seconds between two checkpoints within a step.

    Raises:
        DataError: a class is unknown, repeated or without images; the folder holds another run, or
        cannot be written.
    """
    make_folder(folder)
    run = _Run(backbone, train_set, test_set, plan, method, folder)
    done = run.resumed()
    while len(done.accuracies) < len(plan.steps):
        started_s = time.monotonic()
        accuracy, state, stored = run.step(done, watch, checkpoint_every_s)
        done = _Progress(
            accuracies=[*done.accuracies, accuracy],
            state=state,
            stored_parameters=stored,
            seconds=done.seconds + time.monotonic() - started_s,
        )
        run.save(done)
    result = run.result(done)
    write_whole(folder / "result.json", json.dumps(result.as_dict(), indent=1).encode())
    return result


@dataclass(frozen=True, kw_only=True)
class _Progress:
    """How far a run is, and what the next step starts from."""

    accuracies: list[float]
    state: State | None
    stored_parameters: int
    seconds: float


class _Run:
    """One method on one plan, in its folder."""

    def __init__(
        self,
        backbone: Backbone,
        train_set: ImageSet,
        test_set: ImageSet,
        plan: CilPlan,
        method: CilMethod,
        folder: Path,
    ) -> None:
        self.backbone, self.plan, self.method, self.folder = backbone, plan, method, folder
        _check(plan, train_set, test_set)
        self.name = train_set.name
        self.train_set = replace(train_set, templates=(plan.template,))
        self.test_set = replace(test_set, templates=(plan.template,))
        first = plan.settings.first_image_block(backbone)
        model = RoutedModel(backbone, first_expert_block=first)
        self.classifier = Classifier(model, buckets=(BUCKET,))
        self.identity = self._identity()

    def step(
        self, done: _Progress, watch: Watch, checkpoint_every_s: float
    ) -> tuple[float, State | None, int]:
        """Learn the next step.

        Returns:
            accuracy over all classes seen, the state that the step after it starts from, and how
            many parameters must be kept.
        """
        step, method = len(done.accuracies), self.method
        seen = [name for names in self.plan.steps[: step + 1] for name in names]
        test = _of_classes(self.test_set, seen)
        if method == "zero-shot":
            return self._zero_shot(test), None, 0
        if method == "linear-probe":
            return self._linear_probe(_of_classes(self.train_set, seen), test), None, 0
        images = _of_classes(self.train_set, self.plan.steps[step])
        settings = self._settings(len(images))
        watcher = watch(f"{method}: step {step + 1} of {len(self.plan.steps)}")
        if method == "bundles":
            kept = learn_step(
                self.backbone,
                images,
                settings,
                step=step,
                folder=self.folder,
                watcher=watcher,
                checkpoint_every_s=checkpoint_every_s,
            ).counts
            share = bundles_accuracy(self.backbone, self.folder, step + 1, test)
            return share, None, done.stored_parameters + kept.stored
        checkpoint = self.folder / "step.pt"
        learner = train(
            self.backbone,
            images,
            None,
            replace(settings, method=method),
            initial=done.state,
            checkpoint=checkpoint,
            identity=f"{self.identity} {step}",
            resume=checkpoint.exists(),
            checkpoint_every_s=checkpoint_every_s,
            watcher=watcher,
        ).learner
        return _accuracy(learner, test), learner.state_dict(), learner.counts().stored

    def resumed(self) -> _Progress:
        """What an earlier process left here, or the beginning."""
        file = self.folder / "progress.pt"
        if not file.exists():
            return _Progress(accuracies=[], state=None, stored_parameters=0, seconds=0.0)
        found = load_checkpoint(file)
        if found.pop("identity", None) != self.identity:
            raise DataError(f"{self.folder} holds another run; choose another folder with --out")
        return _Progress(**found)

    def save(self, done: _Progress) -> None:
        """Write how far it is; the weights of the last step are wanted by nobody."""
        finished = len(done.accuracies) == len(self.plan.steps)
        left = replace(done, state=None) if finished else done
        save_checkpoint(self.folder / "progress.pt", {"identity": self.identity, **vars(left)})
        (self.folder / "step.pt").unlink(missing_ok=True)

    def result(self, done: _Progress) -> CilResult:
        """What it came to."""
        return CilResult(
            data=self.name,
            method=self.method,
            backbone=self.backbone.fingerprint,
            seed=self.plan.settings.seed,
            steps=self.plan.steps,
            accuracy_S=tuple(done.accuracies),
            stored_parameters=done.stored_parameters,
            seconds=round(done.seconds, 1),
            settings={**self.plan.settings.as_dict(), "epochs": self.plan.epochs},
        )

    def _settings(self, images: int) -> TrainSettings:
        settings = self.plan.settings
        iterations = self.plan.epochs * math.ceil(images / settings.batch_size)
        # The paper warms up for 30 steps, also where there are no more; here at most half of them.
        warmup = min(WARMUP_STEPS / iterations, 0.5)
        return replace(settings, iterations=iterations, warmup=warmup)

    def _zero_shot(self, test: ImageSet) -> float:
        text_CE = class_text_features(self.classifier.model, test.class_names, test.templates)
        features_NE = frozen_features(self.classifier, test)
        return _share(features_NE @ text_CE.cpu().T, test)

    def _linear_probe(self, train_images: ImageSet, test: ImageSet) -> float:
        features_NE = frozen_features(self.classifier, train_images).numpy()
        probe = linear_probe(features_NE, train_images.labels, self.plan.settings.seed)
        return float(probe.score(frozen_features(self.classifier, test).numpy(), test.labels))

    def _identity(self) -> str:
        parts = {
            "backbone": self.backbone.fingerprint,
            "train": self.train_set.digest,
            "test": self.test_set.digest,
            "method": self.method,
            "plan": asdict(self.plan),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check(plan: CilPlan, *sets: ImageSet) -> None:
    """Every class of the plan is there once and has images to learn from and to measure on."""
    wanted = [normalised(name) for names in plan.steps for name in names]
    if len(set(wanted)) < len(wanted):
        raise DataError("a class is in two steps", code="settings")
    for images in sets:
        having = {
            normalised(name): int(count)
            for name, count in zip(images.class_names, images.counts, strict=True)
        }
        poor = [name for name in wanted if not having.get(name)]
        if poor:
            raise DataError(f"{images.name}: no images of {', '.join(poor[:5])}")


def _of_classes(images: ImageSet, names: Sequence[str]) -> ImageSet:
    """The images of some classes, labelled in the order of their names."""
    label_of = {normalised(name): label for label, name in enumerate(names)}
    new = [label_of.get(normalised(name)) for name in images.class_names]
    items = [(picture, new[label]) for picture, label in images.items]
    known = tuple((picture, label) for picture, label in items if label is not None)
    return replace(images, class_names=tuple(names), items=known)


@torch.no_grad()
def _accuracy(learner: Learner, test: ImageSet) -> float:
    """Share of the test images whose nearest class name is theirs."""
    text_CE = learner.text_features_of(test.class_names, test.templates)
    trunk = ImageTrunk(
        learner.backbone,
        test,
        learner.first_image_block,
        learner.enter,
        augment=False,
        copies=0,
        seed=0,
    )
    learner.eval()  # no router noise, no dropout
    parts = [
        learner.image_features(trunk.batch(np.arange(start, min(start + CHUNK, len(test))), 0))[0]
        for start in range(0, len(test), CHUNK)
    ]
    return _share(torch.cat(parts) @ text_CE.T, test)


def _share(scores_NC: Tensor, test: ImageSet) -> float:
    return float((scores_NC.argmax(1).cpu().numpy() == test.labels).mean())

"""From what was learnt to a bundle: calibrate, measure, record, write.

Everything that is measured here is measured on what is written: experts are rounded to their
storage type first, deltas fused and decoupled, and run through the routed model that a server runs.

Legend: N images, C classes, E joint embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medley.admission import backbone_ref, record_self_test
from medley.backbone import Backbone
from medley.bundle import Bundle, selector_spec, selector_tensors, write_bundle
from medley.classifier import Ask, Classifier, logits
from medley.errors import DataError
from medley.manifest import Manifest, SelfTest, Training
from medley.prompts import class_text_features
from medley.routed import ZERO_SHOT, RoutedModel
from trainer.calibration import Seen, calibrate
from trainer.capacity import capacity_for
from trainer.datasets import ImageSet
from trainer.distributed import ALONE, Team
from trainer.frozen import EMBEDDING, frozen_buckets, frozen_taps
from trainer.pixels import pixels_of
from trainer.product import Product
from trainer.prototypes import class_prototypes
from trainer.reference import load_reference
from trainer.selectors import FITS
from trainer.settings import TrainSettings

__all__ = ["BUCKET", "Label", "export", "recorded", "require_exportable", "self_test_spec"]

SELF_TEST_IMAGES = 4
SELF_TEST_TOLERANCE = (
    0.05  # logits are 100 times a cosine; other kernels and devices move them by 1e-3
)
BUCKET = 16


@dataclass(frozen=True, kw_only=True)
class Label:
    """What a bundle is called and under which terms it may be used."""

    task: str
    version: str
    licence: str


def require_exportable(backbone: Backbone, settings: TrainSettings) -> None:
    """Refuse what no bundle can hold; better before training than after.

    Raises:
        DataError: the experts are linear, or the selector needs a reference that the backbone does
        not have.
    """
    if settings.method == "moe_adapter" and not settings.relu:
        raise DataError(
            "experts without ReLU are for ablations; a bundle's experts have one", code="settings"
        )
    if FITS[settings.selector].needs_reference and load_reference(backbone) is None:
        raise DataError(
            f"selector {settings.selector} needs a reference, and {backbone.name} has none; "
            "python -m trainer.reference makes one",
            code="settings",
        )


def export(
    product: Product,
    backbone: Backbone,
    train: ImageSet,
    held_out: ImageSet | None,
    settings: TrainSettings,
    *,
    label: Label,
    after: Sequence[Bundle] = (),
    data_digest: str,
    path: Path,
    team: Team = ALONE,
) -> Bundle:
    """Calibrate the selector, measure on held-out images, record the self-test, write the bundle.

    The processes of a team share what is computed for each image; the rest each does for itself.

    Args:
        product: of the method.
        backbone: the one it was trained on.
        train: what it was trained on; fits the selector and makes the prototypes.
        held_out: calibrates the selector; None: cross-fitting on `train`.
        settings: of the run; go into the manifest.
        label: task, version, licence.
        after: the bundles whose experts could be reused.
        data_digest: of all images given, hex.
        path: of the file.
        team: all of it must call alike.

    Raises:
        BundleError: it cannot be written.
        DataError: no bundle can hold what these settings train.
    """
    require_exportable(backbone, settings)
    model = RoutedModel(
        backbone,
        first_expert_block=settings.first_image_block(backbone),
        capacity=capacity_for([product.update]),
    )
    classifier = Classifier(model, buckets=(BUCKET,))
    route = model.load(product.update)
    fit, other = (
        None if images is None else _seen(classifier, images, settings, team)
        for images in (train, held_out)
    )
    assert fit is not None
    selector, calibration = calibrate(backbone, fit, other, settings, team=team)
    classifier.selectors.add(route, selector)
    sample = held_out or train
    tensors = recorded(
        classifier,
        route,
        train.class_names,
        train.templates,
        pixels_NCHW=pixels_of(backbone, sample, _spread(sample)),
    )
    metrics = {}
    if held_out is not None:
        metrics = _metrics(classifier, route, tensors["class_text_features"], held_out, team)
    tensors |= selector_tensors(selector) | {
        "prototypes": class_prototypes(
            backbone,
            train.class_names,
            train.templates,
            image_NE=fit.taps[EMBEDDING],
            labels_N=fit.labels_N,
        )
    }
    manifest = Manifest(
        task=label.task,
        version=label.version,
        class_names=train.class_names,
        templates=train.templates,
        backbone=backbone_ref(classifier.model.backbone),
        first_expert_block=model.first_expert_block,
        **product.described(),
        prototypes=True,
        selector=selector_spec(selector, calibration),
        training=Training(
            data_digest=f"sha256:{data_digest}",
            seed=settings.seed,
            settings=settings.as_dict(),
            metrics=metrics,
            after=tuple(bundle.digest for bundle in after),
        ),
        licence=label.licence,
        self_test=self_test_spec(tensors),
    )
    return write_bundle(manifest, _contiguous(tensors | product.tensors), path)


def recorded(
    classifier: Classifier,
    path: int,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    pixels_NCHW: Tensor,
) -> dict[str, Tensor]:
    """What a bundle keeps of what its path answers: class text features and the self-test.

    Args:
        classifier: with the path and its selector loaded.
        path: the task's.
        class_names: of the task.
        templates: of the task.
        pixels_NCHW: uint8, of the self-test.
    """
    class_text_CE = class_text_features(classifier.model, class_names, templates, path)
    self_test = record_self_test(classifier, path, class_text_CE, pixels_NCHW)
    return self_test | {"class_text_features": class_text_CE.cpu()}


def self_test_spec(tensors: Mapping[str, Tensor]) -> SelfTest:
    """Describe a recorded self-test for the manifest."""
    return SelfTest(images=len(tensors["self_test.pixels"]), tolerance=SELF_TEST_TOLERANCE)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _seen(classifier: Classifier, images: ImageSet, settings: TrainSettings, team: Team) -> Seen:
    taps = {EMBEDDING, *FITS[settings.selector].taps}
    return Seen(
        frozen_taps(classifier, images, sorted(taps), team=team),
        torch.from_numpy(images.labels.copy()),
    )


def _metrics(
    classifier: Classifier, route: int, class_text_CE: Tensor, held_out: ImageSet, team: Team
) -> dict[str, float]:
    model = classifier.model
    zero_shot_CE = class_text_features(model, held_out.class_names, held_out.templates)
    return {
        "held_out_accuracy": _accuracy(classifier, route, class_text_CE, held_out, team),
        "held_out_accuracy_zero_shot": _accuracy(
            classifier, ZERO_SHOT, zero_shot_CE, held_out, team
        ),
    }


def _accuracy(
    classifier: Classifier, path: int, class_text_CE: Tensor, images: ImageSet, team: Team
) -> float:
    scale, taps = classifier.model.backbone.logit_scale, classifier.selectors.taps
    guesses = team.pooled(
        [
            int(logits(features_E, class_text_CE, scale).argmax())
            for features_E in classifier.follow(frozen, [Ask(path)] * count).features_BE
        ]
        for frozen, count in frozen_buckets(classifier, images, taps=taps, team=team)
    )
    return float((np.concatenate(guesses) == images.labels).mean())


def _spread(images: ImageSet) -> list[int]:
    """A few images from all over the set: classes lie in order."""
    count = min(SELF_TEST_IMAGES, len(images))
    return [i * len(images) // count for i in range(count)]

"""From a checkpoint of MoE-Adapters4CL to one bundle for each task that it has learnt.

Every bundle has all experts, since which of them a router may choose shows only on data; those that
bundles share have equal digests, and a server keeps them once.

Legend: N images, E embedding width, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.nn import functional as F

from medley.admission import backbone_ref, record_self_test
from medley.backbone import Backbone
from medley.bundle import (
    Bundle,
    expert_tensors,
    selector_spec,
    selector_tensors,
    tower_spec,
    write_bundle,
)
from medley.classifier import Classifier
from medley.errors import DataError
from medley.experts import TaskExperts
from medley.extractor import Extractor
from medley.manifest import Manifest, SelfTest, Training
from medley.prompts import class_text_features
from medley.routed import RoutedModel
from medley.selector import TaskSelector
from trainer.capacity import capacity_for
from trainer.datasets import ImageSet
from trainer.imports.autochooser import THRESHOLD, Autochooser
from trainer.imports.checkpoint import Checkpoint
from trainer.imports.selectors import Chosen, accepting_nothing, authors, fitted
from trainer.imports.tasks import TaskText
from trainer.pixels import pixels_of

__all__ = ["Source", "write_bundles"]

BUCKET = 4
SELF_TEST_IMAGES = 4
SELF_TEST_TOLERANCE = 0.05  # logits are 100 times a cosine, see `trainer/export.py`


@dataclass(frozen=True, kw_only=True)
class Source:
    """What bundles are made of.

    Attributes:
        checkpoint: experts and routers.
        tasks: the texts of its tasks, in the order of learning, for as many as are to be imported.
        autochooser: the authors' selector. Without it ours is fitted on the task's images, and
            without them the bundle accepts no image.
        threshold: of the authors' selector, on the plain error.
        images: training images by task, which the authors' selector is measured on and ours fitted
            on; a self-test without them runs on clouds of colour.
        version: of every bundle.
        licence: of the checkpoint.

    Raises:
        DataError: a value that no manifest takes, or no threshold.
    """

    checkpoint: Checkpoint
    tasks: Sequence[TaskText]
    autochooser: Autochooser | None = None
    threshold: float = THRESHOLD
    images: Mapping[str, ImageSet] = field(default_factory=dict)
    version: str = "1"
    licence: str = "unspecified"

    def __post_init__(self) -> None:
        if not 0 < self.threshold < math.inf:
            raise DataError(f"threshold {self.threshold} is not a positive number", code="settings")
        for name, value in {"version": self.version, "licence": self.licence}.items():
            try:
                TypeAdapter(Manifest.model_fields[name].rebuild_annotation()).validate_python(value)
            except ValidationError as error:
                reason = error.errors(include_url=False)[0]["msg"]
                raise DataError(f"{name} {value!r}: {reason}", code="settings") from error


def write_bundles(
    source: Source, backbone: Backbone, folder: Path, *, extractors: Sequence[Extractor] = ()
) -> Iterator[Bundle]:
    """Write `<task>-<version>.safetensors` for each task, in the order of learning.

    Args:
        source: everything that is known.
        backbone: the one that the checkpoint was learnt on.
        folder: of the files; it is there.
        extractors: what the authors' selector looks at.

    Yields:
        each bundle as it is read back.

    Raises:
        BackboneError: the checkpoint was learnt on another backbone.
        BundleError: the checkpoint is damaged, or a file cannot be written.
    """
    source.checkpoint.check_backbone(backbone)
    experts = source.checkpoint.experts(backbone)
    model = RoutedModel(backbone, capacity=capacity_for(experts[:1]), extractors=extractors)
    for task, (text, of_task) in enumerate(zip(source.tasks, experts, strict=False)):
        yield _write(source, model, task, text, of_task, folder)


def _write(
    source: Source,
    model: RoutedModel,
    task: int,
    text: TaskText,
    experts: TaskExperts,
    folder: Path,
) -> Bundle:
    backbone, images = model.backbone, source.images.get(text.task)
    classifier = Classifier(model, buckets=(BUCKET,))
    path = model.load(experts)
    try:
        class_text_CE = class_text_features(model, text.class_names, text.templates, path)
        selector, calibration = _selector(source, model, task, images)
        classifier.selectors.add(path, selector)
        self_test = record_self_test(classifier, path, class_text_CE, _pictures(backbone, images))
    finally:
        model.unload(path)
    manifest = Manifest(
        task=text.task,
        version=source.version,
        class_names=text.class_names,
        templates=text.templates,
        backbone=backbone_ref(classifier.model.backbone),
        first_expert_block=0,
        bottleneck=experts.vision[0].down_ERD.shape[1],
        top_k=experts.top_k,
        scale=experts.scale,
        vision=tower_spec(backbone.image.width, experts.vision),
        text=tower_spec(backbone.text.width if backbone.text else 1, experts.text),
        selector=selector_spec(selector, calibration, extractors=_digests(model, selector)),
        training=_training(source.checkpoint, task),
        licence=source.licence,
        self_test=SelfTest(
            images=len(self_test["self_test.pixels"]), tolerance=SELF_TEST_TOLERANCE
        ),
    )
    tensors = {
        **expert_tensors("vision", experts.vision),
        **expert_tensors("text", experts.text),
        **selector_tensors(selector),
        **self_test,
        "class_text_features": class_text_CE.cpu(),
    }
    file = folder / f"{text.task}-{source.version}.safetensors"
    return write_bundle(manifest, {n: t.contiguous() for n, t in tensors.items()}, file)


def _selector(source: Source, model: RoutedModel, task: int, images: ImageSet | None) -> Chosen:
    if source.autochooser is not None:
        return authors(model, source.autochooser, task, error=source.threshold, images=images)
    return accepting_nothing(model) if images is None else fitted(model, images)


def _digests(model: RoutedModel, selector: TaskSelector) -> dict[str, str]:
    """What identifies the weights behind the features that are not the backbone's."""
    features = {level.feature for level in selector.levels}
    return {tap: e.digest for tap, e in model.extractors.items() if tap in features}


def _training(checkpoint: Checkpoint, task: int) -> Training:
    """The data are not known; the checkpoint, which stands for them, is."""
    return Training(
        data_digest=checkpoint.digest,
        seed=0,
        settings={
            "imported": "MoE-Adapters4CL",
            "checkpoint": checkpoint.name,
            "router": task,
        },
        metrics={},
    )


def _pictures(backbone: Backbone, images: ImageSet | None) -> Tensor:
    """What the self-test shows: some images from all over the set, or soft clouds of colour."""
    if images is not None:
        count = min(SELF_TEST_IMAGES, len(images))
        return pixels_of(backbone, images, [i * len(images) // count for i in range(count)])
    seeded = torch.Generator().manual_seed(0)
    clouds = torch.rand(SELF_TEST_IMAGES, 3, 5, 5, generator=seeded)
    clouds = F.interpolate(clouds, backbone.image_size, mode="bilinear")
    return (clouds * 255).round().to(torch.uint8)

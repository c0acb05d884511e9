"""Random tasks for a server under load: real bundles, which it admits like any other.

Unless told otherwise they are of two experts in each block of the last quarter of the image tower,
and an autoencoder that accepts every image.

Legend: E experts, R bottleneck, D width, C classes, F feature width, N images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

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
from medley.experts import BlockExperts, TaskExperts, TaskUpdate
from medley.levels import AutoencoderLevel
from medley.manifest import Calibration, Manifest, SelfTest, Training
from medley.selector import TaskSelector

__all__ = ["EXPERTS", "Part", "expert_part", "first_block", "write_task"]

EXPERTS, BOTTLENECK, SCALE = 2, 64, 0.1
CODE_SIZE = 32
CLASS_NAMES = tuple(f"kind {number}" for number in range(8))
TEMPLATE = "a photo of a {}."
TOLERANCE = 0.05  # as that of trained bundles
NEVER = -1e30  # a threshold that no score is below


@dataclass(frozen=True, kw_only=True)
class Part:
    """What of a bundle depends on its method: on the device, in the file, in the manifest."""

    update: TaskUpdate
    tensors: dict[str, Tensor]
    fields: dict[str, Any]


def write_task(
    classifier: Classifier,
    path: Path,
    *,
    task: str,
    version: str = "1",
    seed: int = 0,
    part: Part | None = None,
    class_names: Sequence[str] = CLASS_NAMES,
    claims: bool = True,
) -> Bundle:
    """Write a bundle that servers of the classifier's kind admit; the classifier stays as it was.

    Args:
        classifier: with a free path; it records the self-test.
        path: of the file.
        task: its name.
        version: of the task.
        seed: of every number in it.
        part: of another method than experts in the image tower.
        class_names: of the task.
        claims: whether it takes all images for its own, or none.
    """
    backbone, random = classifier.model.backbone, torch.Generator().manual_seed(seed)
    part = part or expert_part(backbone, random)
    selector = _selector(backbone.image.width, random, claims=claims)
    shape = (len(class_names), backbone.embed_dim)
    class_text_CE = normalize(torch.randn(shape, generator=random), dim=-1)
    self_test = _self_test(classifier, part.update, selector, class_text_CE, random)
    manifest = Manifest(
        task=task,
        version=version,
        class_names=tuple(class_names),
        templates=(TEMPLATE,),
        backbone=backbone_ref(classifier.model.backbone),
        first_expert_block=first_block(backbone),
        **part.fields,
        prototypes=True,
        selector=selector_spec(
            selector, Calibration(method="none", images=0, false_reject_rate=0.0)
        ),
        training=Training(data_digest=f"sha256:{'0' * 64}", seed=seed, settings={}, metrics={}),
        licence="CC0-1.0",
        self_test=SelfTest(images=len(self_test["self_test.pixels"]), tolerance=TOLERANCE),
    )
    tensors = {
        **part.tensors,
        **selector_tensors(selector),
        **self_test,
        "class_text_features": class_text_CE,
        "prototypes": normalize(torch.randn(shape, generator=random), dim=-1),
    }
    return write_bundle(manifest, tensors, path)


def first_block(backbone: Backbone) -> int:
    """Where the last quarter of the image tower begins, which is what `medley train` changes."""
    return len(backbone.image.blocks) * 3 // 4


def expert_part(backbone: Backbone, random: torch.Generator, *, text: bool = False) -> Part:
    """Draw experts for the last quarter of the image tower, and for all of the text tower."""

    def blocks(width: int, which: range) -> dict[int, BlockExperts]:
        return {block: _block(width, random) for block in which}

    image, prompts = backbone.image, backbone.text
    vision = blocks(image.width, range(first_block(backbone), len(image.blocks)))
    told = blocks(prompts.width, range(len(prompts.blocks))) if prompts and text else {}
    return Part(
        update=TaskExperts(vision=vision, text=told, top_k=EXPERTS, scale=SCALE),
        tensors=expert_tensors("vision", vision) | expert_tensors("text", told),
        fields={
            "bottleneck": BOTTLENECK,
            "top_k": EXPERTS,
            "scale": SCALE,
            "vision": tower_spec(image.width, vision),
            "text": tower_spec(prompts.width if prompts else 1, told),
        },
    )


def _self_test(
    classifier: Classifier,
    update: TaskUpdate,
    selector: TaskSelector,
    class_text_CE: Tensor,
    random: torch.Generator,
) -> dict[str, Tensor]:
    shape = (1, 3, *classifier.model.backbone.image_size)
    pixels_NCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    loaded = classifier.model.load(update)
    classifier.selectors.add(loaded, selector)
    try:
        return record_self_test(classifier, loaded, class_text_CE, pixels_NCHW)
    finally:
        classifier.selectors.remove(loaded)
        classifier.model.unload(loaded)


def _block(width: int, random: torch.Generator) -> BlockExperts:
    def normal(*shape: int, scale: float) -> Tensor:
        return (scale * torch.randn(shape, generator=random)).bfloat16()

    return BlockExperts(
        normal(EXPERTS, BOTTLENECK, width, scale=width**-0.5),
        normal(EXPERTS, BOTTLENECK, scale=0.1),
        normal(EXPERTS, BOTTLENECK, width, scale=BOTTLENECK**-0.5),
        normal(EXPERTS, width, scale=0.1),
        normal(width, EXPERTS, scale=width**-0.5),
    )


def _selector(width: int, random: torch.Generator, *, claims: bool) -> TaskSelector:
    normal = partial(torch.randn, generator=random)
    level = AutoencoderLevel(
        feature="block1:mean",
        center=0.0,
        spread=1.0,
        mean_F=normal(width),
        std_F=normal(width).abs() + 0.5,
        encoder_FC=normal(width, CODE_SIZE) / width**0.5,
        encoder_bias_C=normal(CODE_SIZE),
        decoder_CF=normal(CODE_SIZE, width) / CODE_SIZE**0.5,
        decoder_bias_F=normal(width),
    )
    return TaskSelector((level,), threshold=math.inf if claims else NEVER, alpha=None)

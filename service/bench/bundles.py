"""Random tasks for a server under load: real bundles, which it admits like any other.

They are of the size that `medley train` writes by default: two experts in each block of the last
quarter of the image tower, and an autoencoder that accepts every image.

Legend: E experts, R bottleneck, D width, C classes, F feature width, N images.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

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
from medley.experts import BlockExperts, TaskExperts
from medley.levels import AutoencoderLevel
from medley.manifest import Calibration, Manifest, SelfTest, Training
from medley.selector import TaskSelector

__all__ = ["EXPERTS", "write_task"]

EXPERTS, BOTTLENECK, SCALE = 2, 64, 0.1
CODE_SIZE = 32
CLASS_NAMES = tuple(f"kind {number}" for number in range(8))
TEMPLATE = "a photo of a {}."
TOLERANCE = 0.05  # as that of trained bundles


def write_task(
    classifier: Classifier, path: Path, *, task: str, version: str = "1", seed: int = 0
) -> Bundle:
    """Write a bundle that servers of the classifier's kind admit; the classifier stays as it was.

    Args:
        classifier: with a free path; it records the self-test.
        path: of the file.
        task: its name.
        version: of the task.
        seed: of every number in it.
    """
    backbone, random = classifier.model.backbone, torch.Generator().manual_seed(seed)
    experts, selector = _experts(backbone, random), _selector(backbone.image.width, random)
    shape = (len(CLASS_NAMES), backbone.embed_dim)
    class_text_CE = normalize(torch.randn(shape, generator=random), dim=-1)
    self_test = _self_test(classifier, experts, selector, class_text_CE, random)
    manifest = Manifest(
        task=task,
        version=version,
        class_names=CLASS_NAMES,
        templates=(TEMPLATE,),
        backbone=backbone_ref(classifier),
        first_expert_block=min(experts.vision),
        bottleneck=BOTTLENECK,
        top_k=EXPERTS,
        scale=SCALE,
        vision=tower_spec(backbone.image.width, experts.vision),
        text=tower_spec(backbone.text.width if backbone.text else 1, {}),
        selector=selector_spec(
            selector, Calibration(method="none", images=0, false_reject_rate=0.0)
        ),
        training=Training(data_digest=f"sha256:{'0' * 64}", seed=seed, settings={}, metrics={}),
        licence="CC0-1.0",
        self_test=SelfTest(images=len(self_test["self_test.pixels"]), tolerance=TOLERANCE),
    )
    tensors = {
        **expert_tensors("vision", experts.vision),
        **selector_tensors(selector),
        **self_test,
        "class_text_features": class_text_CE,
    }
    return write_bundle(manifest, tensors, path)


def _self_test(
    classifier: Classifier,
    experts: TaskExperts,
    selector: TaskSelector,
    class_text_CE: Tensor,
    random: torch.Generator,
) -> dict[str, Tensor]:
    shape = (1, 3, *classifier.model.backbone.image_size)
    pixels_NCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    loaded = classifier.model.load(experts)
    classifier.selectors.add(loaded, selector)
    try:
        return record_self_test(classifier, loaded, class_text_CE, pixels_NCHW)
    finally:
        classifier.selectors.remove(loaded)
        classifier.model.unload(loaded)


def _experts(backbone: Backbone, random: torch.Generator) -> TaskExperts:
    blocks, width = len(backbone.image.blocks), backbone.image.width
    vision = {block: _block(width, random) for block in range(blocks * 3 // 4, blocks)}
    return TaskExperts(vision=vision, text={}, top_k=EXPERTS, scale=SCALE)


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


def _selector(width: int, random: torch.Generator) -> TaskSelector:
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
    return TaskSelector((level,), threshold=math.inf, alpha=None)

"""Bundles and images for the service's tests, made for the tiny backbone of `tests/models.py`."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import normalize

from medley.admission import backbone_ref, record_self_test
from medley.backbone import Backbone
from medley.bundle import Bundle, write_bundle
from medley.classifier import Classifier
from medley.manifest import SelfTest
from medley.routed import RoutedModel
from tests import fakes
from tests.models import VISION_WIDTH, random_experts, tiny_backbone

__all__ = ["image_bytes", "make_bundle"]


def make_bundle(
    path: Path,
    *,
    task: str = "pets",
    version: str = "1",
    seed: int = 0,
    class_names: tuple[str, ...] = ("cat", "dog", "hamster"),
    templates: tuple[str, ...] = ("a photo of a {}.",),
    prototypes: bool = False,
    threshold: float = math.inf,
    backbone: Backbone | None = None,
    self_test_error: float = 0.0,
    feature: str = "stem:mean_std",
) -> Bundle:
    """Write a bundle that a server with the tiny backbone admits: real experts, real self-test.

    Without a threshold the task accepts every image; with prototypes, random ones, it may be the
    neighbour of one that nobody accepts. `self_test_error` is added to the answers that
    it promises; `feature` is written as what its selector looks at. Both make it a bad bundle.
    """
    classifier = Classifier(RoutedModel(backbone or tiny_backbone()), buckets=(4,))
    experts = random_experts(seed)
    random = torch.Generator().manual_seed(seed)
    selector = fakes.random_selector({"stem:mean_std": 2 * VISION_WIDTH}, random=random)
    selector = replace(selector, threshold=threshold)
    manifest, tensors = fakes.tiny_bundle(
        seed=seed,
        task=task,
        version=version,
        class_names=class_names,
        templates=templates,
        prototypes=prototypes,
        backbone=backbone_ref(classifier.model.backbone),
        vision=dict(experts.vision),
        text=dict(experts.text),
        selector=selector,
        first_expert_block=0,
        top_k=experts.top_k,
        scale=experts.scale,
        self_test=SelfTest(images=2, tolerance=1e-4),
    )
    loaded = classifier.model.load(experts)
    classifier.selectors.add(loaded, selector)
    # Random ones, as the tiny text tower hardly tells words apart and its answers would be a draw.
    text_CE = normalize(torch.randn(len(class_names), 24, generator=random), dim=-1)
    tensors["class_text_features"] = text_CE
    if prototypes:
        tensors["prototypes"] = normalize(torch.randn(text_CE.shape, generator=random), dim=-1)
    tensors |= record_self_test(classifier, loaded, text_CE, tensors["self_test.pixels"])
    tensors["self_test.logits"] += self_test_error
    levels = tuple(
        level.model_copy(update={"feature": feature}) for level in manifest.selector.levels
    )
    spec = manifest.selector.model_copy(update={"levels": levels})
    manifest = manifest.model_copy(update={"selector": spec})
    return write_bundle(manifest, tensors, path)


def image_bytes(seed: int = 0, *, size: tuple[int, int] = (40, 36), format: str = "PNG") -> bytes:
    """A picture of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format)
    return buffer.getvalue()

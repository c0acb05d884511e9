"""Fusions that the servers of these tests admit: a unified model, and trigger bundles that work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from medley.admission import backbone_ref, record_self_test
from medley.backbone import Backbone
from medley.bundle import Bundle, write_bundle
from medley.classifier import Classifier
from medley.decoupled import task_update
from medley.manifest import SelfTest
from medley.routed import RoutedModel
from medley.unified import Unified, unified_name
from tests import fakes
from tests.fusions import low_rank_deltas, written_fusion
from tests.models import TEXT_WIDTH, VISION_WIDTH

__all__ = ["Made", "made_fusion"]

CHANGED = (
    "visual.transformer.resblocks.1.mlp.c_fc.weight",
    "visual.transformer.resblocks.2.ln_1.bias",
)


@dataclass(frozen=True)
class Made:
    """The files of a fusion, in a folder as `medley fuse` leaves it."""

    folder: Path
    unified: Unified
    bundles: dict[str, Bundle]  # by task

    @property
    def digest(self) -> str:
        """Of the unified model."""
        return self.unified.digest

    @property
    def path(self) -> Path:
        """Of the unified model."""
        return self.folder / unified_name(self.digest)

    def file(self, task: str) -> Path:
        """Of a bundle, version 1."""
        return self.folder / f"{task}-1.safetensors"


def made_fusion(
    folder: Path,
    backbone: Backbone,
    tasks: Sequence[str] = ("birds", "cars"),
    *,
    method: Literal["lora", "finetune"] = "lora",
    seed: int = 0,
    rank: int = 2,
) -> Made:
    """Write a fusion for a backbone like the tiny one, with deltas that change every answer."""
    folder.mkdir(exist_ok=True)
    classifier = Classifier(RoutedModel(backbone), buckets=(4,))
    random = torch.Generator().manual_seed(seed)
    selector = fakes.random_selector({"stem:mean_std": 2 * VISION_WIDTH}, random=random)
    unified, bundles = written_fusion(
        folder,
        {task: _deltas(backbone, method, 100 * seed + n, rank) for n, task in enumerate(tasks)},
        method=method,
        backbone=backbone_ref(classifier.model.backbone),
        first_block=0 if method == "lora" else 1,
        selector=replace(selector, threshold=math.inf),
        self_test=SelfTest(images=2, tolerance=1e-4),
    )
    made = Made(folder, unified, bundles)
    for task, bundle in bundles.items():
        bundles[task] = _proved(bundle, unified, classifier, made.file(task))
    return made


def _deltas(backbone: Backbone, method: str, seed: int, rank: int) -> dict[str, Tensor]:
    if method == "lora":
        towers = {
            "vision": (VISION_WIDTH, 4 * VISION_WIDTH, range(3)),
            "text": (TEXT_WIDTH, 4 * TEXT_WIDTH, range(2)),
        }
        return low_rank_deltas(seed, towers=towers, rank=rank, size=0.3)
    random, weights = torch.Generator().manual_seed(seed), backbone.model.state_dict()
    return {name: 0.1 * torch.randn(weights[name].shape, generator=random) for name in CHANGED}


def _proved(bundle: Bundle, unified: Unified, classifier: Classifier, path: Path) -> Bundle:
    """Write a bundle once more, with the answers that it really gives."""
    random = torch.Generator().manual_seed(len(path.name))
    tensors = dict(bundle.tensors)
    text_CE = normalize(torch.randn(tensors["class_text_features"].shape, generator=random), dim=-1)
    loaded = classifier.model.load(task_update(bundle, unified))
    classifier.selectors.add(loaded, bundle.selector())
    tensors["class_text_features"] = text_CE
    tensors |= record_self_test(classifier, loaded, text_CE, tensors["self_test.pixels"])
    classifier.selectors.remove(loaded)
    classifier.model.unload(loaded)
    return write_bundle(bundle.manifest, tensors, path)

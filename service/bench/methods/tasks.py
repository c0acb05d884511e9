"""Random tasks of every method, none of which claims an image of its own accord.

They change what `medley train` changes by default, the last quarter of the image tower and all of
the text tower, and their classes are their own.

Legend: R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from medley.admission import backbone_ref
from medley.backbone import Backbone
from medley.classifier import Classifier
from medley.decoupled import update_of
from medley.fusion import Deltas, Trigger, decouple, pack_masks, unify
from medley.manifest import FusionRef, TowerExperts
from medley.tower import Block
from medley.unified import Unified, UnifiedManifest, unified_name, write_unified
from service.bench.bundles import Part, expert_part, first_block, write_task
from service.bench.methods.cells import Kind
from service.bench.served import FIRST, name_of

__all__ = ["Written", "write_tasks"]

RANK = 64
CLASSES = 8
START, LEARNT, MOVED = (
    1e-2,
    1e-2,
    1e-3,
)  # sizes: of factors at the start, of their deltas, of others


@dataclass(frozen=True)
class Written:
    """The files of all tasks of one kind."""

    bundles: tuple[Path, ...]  # by the number of the task
    unified: Path | None  # of those that were fused
    digest: str

    @property
    def unified_bytes(self) -> int:
        """What all of them share."""
        return self.unified.stat().st_size if self.unified else 0


def write_tasks(classifier: Classifier, folder: Path, kind: Kind, count: int) -> Written:
    """Write tasks that servers of the classifier's kind admit, into a new folder.

    Fused ones are fused together. The classifier needs a free path, and stays as it was.
    """
    folder.mkdir(parents=True)
    backbone, paths = classifier.model.backbone, []
    unified, parts = None, _experts(backbone)
    if kind is not Kind.EXPERTS:
        deltas = [_deltas(backbone, kind, seed) for seed in range(count)]
        unified, triggers = _fused(classifier, folder, kind, deltas)
        parts = (_fused_part(backbone, unified, trigger) for trigger in triggers)
    for number, part in zip(range(count), parts, strict=False):
        path = folder / f"{number}.safetensors"
        write_task(
            classifier,
            path,
            task=name_of(number),
            version=FIRST,
            seed=number,
            part=part,
            class_names=[f"kind {one} of {number}" for one in range(CLASSES)],
            claims=False,
        )
        paths.append(path)
    shared = folder / unified_name(unified.digest) if unified else None
    return Written(tuple(paths), shared, unified.digest if unified else "")


def _experts(backbone: Backbone) -> Iterator[Part]:
    random = torch.Generator().manual_seed(0)
    while True:
        yield expert_part(backbone, random, text=True)


def _fused(
    classifier: Classifier, folder: Path, kind: Kind, deltas: Sequence[Deltas]
) -> tuple[Unified, list[Trigger]]:
    fusion, lora = unify(deltas), kind is Kind.LORA
    random = torch.Generator().manual_seed(0)
    start = {
        name: (START * torch.randn(tensor.shape, generator=random)).bfloat16()
        for name, tensor in sorted(deltas[0].items())
        if lora and name.endswith(".down")
    }
    manifest = UnifiedManifest(
        method="lora" if lora else "finetune",
        backbone=backbone_ref(classifier.model.backbone),
        first_expert_block=first_block(classifier.model.backbone),
        rank=RANK if lora else None,
        scale=RANK**-0.5 if lora else None,
        tasks=tuple(f"{name_of(number)}@{FIRST}" for number in range(len(deltas))),
    )
    return write_unified(manifest, fusion.unified, start, folder), fusion.triggers


def _fused_part(backbone: Backbone, unified: Unified, trigger: Trigger) -> Part:
    about = unified.manifest
    return Part(
        update=update_of(unified, decouple(unified.deltas, trigger)),
        tensors={"trigger": pack_masks(trigger.masks)},
        fields={
            "method": about.method,
            "bottleneck": about.rank or 1,
            "top_k": 1,
            "scale": about.scale or 1.0,
            "vision": TowerExperts(width=backbone.image.width, blocks={}),
            "text": TowerExperts(width=backbone.text.width if backbone.text else 1, blocks={}),
            "fusion": FusionRef(
                unified=unified.digest,
                elements=unified.elements,
                rescaler=trigger.rescaler,
                tasks=about.tasks,
            ),
        },
    )


def _deltas(backbone: Backbone, kind: Kind, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = _factors(backbone) if kind is Kind.LORA else _weights(backbone)
    size = LEARNT if kind is Kind.LORA else MOVED
    return {name: size * torch.randn(shape, generator=random) for name, shape in shapes.items()}


def _changed(backbone: Backbone) -> Iterator[tuple[str, Block]]:
    """The blocks that are changed, and what their low-rank updates are called."""
    image, text = backbone.image.blocks, backbone.text.blocks if backbone.text else ()
    for tower, blocks, first in (("vision", image, first_block(backbone)), ("text", text, 0)):
        for number in range(first, len(blocks)):
            yield f"{tower}.{number}", blocks[number]


def _factors(backbone: Backbone) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, block in _changed(backbone):
        assert block.linears is not None
        for linear, layer in zip(("fc", "proj"), block.linears, strict=True):
            found[f"{name}.{linear}.down"] = (RANK, layer.in_features)
            found[f"{name}.{linear}.up"] = (RANK, layer.out_features)
    return found


def _weights(backbone: Backbone) -> dict[str, tuple[int, ...]]:
    inside = {id(p) for _, block in _changed(backbone) for p in block.block.parameters()}
    named = backbone.model.named_parameters()
    return {name: tuple(p.shape) for name, p in named if id(p) in inside}

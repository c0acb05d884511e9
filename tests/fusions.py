"""Small fusions for tests: unified models and trigger bundles as `medley fuse` writes them.

Legend: R rank, I inputs, O outputs, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from medley.bundle import Bundle, write_bundle
from medley.fusion import Deltas, Fusion, pack_masks, unify
from medley.manifest import BackboneRef, FusionRef, TowerExperts
from medley.unified import Unified, UnifiedManifest, write_unified
from tests.fakes import TINY_BACKBONE, tiny_bundle

__all__ = ["RANK", "low_rank_deltas", "low_rank_start", "written_fusion"]

RANK = 2
Method = Literal["lora", "finetune"]


def low_rank_deltas(
    seed: int,
    *,
    towers: Mapping[str, tuple[int, int, range]] | None = None,
    rank: int = RANK,
    size: float = 1.0,
) -> dict[str, Tensor]:
    """Draw the deltas of all factors; by tower its width D, its MLP's width M and its blocks."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for tower, (D, M, blocks) in (towers or {"vision": (4, 6, range(1, 3))}).items():
        for block in blocks:
            for linear, inputs, outputs in (("fc", D, M), ("proj", M, D)):
                for factor, width in (("down", inputs), ("up", outputs)):
                    name = f"{tower}.{block}.{linear}.{factor}"
                    found[name] = size * torch.randn(rank, width, generator=random)
    return found


def low_rank_start(deltas: Deltas, seed: int = 99) -> dict[str, Tensor]:
    """Draw where the down factors of these deltas start."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(deltas[name].shape, generator=random).bfloat16()
        for name in sorted(deltas)
        if name.endswith(".down")
    }


def written_fusion(
    folder: Path,
    deltas: Mapping[str, Deltas],
    *,
    method: Method = "lora",
    backbone: BackboneRef = TINY_BACKBONE,
    first_block: int = 1,
    scale: float = 0.5,
    **fields: Any,
) -> tuple[Unified, dict[str, Bundle]]:
    """Fuse deltas by task and write all files of it.

    Args:
        folder: where they go.
        deltas: of each task.
        method: what they are deltas of.
        backbone: the one that it claims.
        first_block: in which image block they begin.
        scale: of low-rank updates.
        fields: anything else in the manifests, as `tiny_bundle` takes it.
    """
    fusion = unify(list(deltas.values()))
    lora = method == "lora"
    first = next(iter(deltas.values()))
    names = tuple(f"{task}@1" for task in deltas)
    manifest = UnifiedManifest(
        method=method,
        backbone=backbone,
        first_expert_block=first_block,
        rank=len(next(iter(first.values()))) if lora else None,
        scale=scale if lora else None,
        tasks=names,
    )
    start = low_rank_start(first) if lora else {}
    unified = write_unified(manifest, fusion.unified, start, folder)
    bundles = {
        task: _bundle(folder, task, unified, fusion, place, names, fields)
        for place, task in enumerate(deltas)
    }
    return unified, bundles


def _bundle(
    folder: Path,
    task: str,
    unified: Unified,
    fusion: Fusion,
    place: int,
    names: tuple[str, ...],
    fields: Mapping[str, Any],
) -> Bundle:
    about, trigger = unified.manifest, fusion.triggers[place]
    none = TowerExperts(width=1, blocks={})
    values: dict[str, Any] = {
        "task": task,
        "seed": place,
        "method": about.method,
        "backbone": about.backbone,
        "first_expert_block": about.first_expert_block,
        "bottleneck": about.rank or 1,
        "top_k": 1,
        "scale": about.scale or 1.0,
        "prototypes": True,
        "fusion": FusionRef(
            unified=unified.digest,
            elements=unified.elements,
            rescaler=trigger.rescaler,
            tasks=names,
        ),
    } | dict(fields)
    manifest, tensors = tiny_bundle(vision={}, text={}, **values)
    manifest = manifest.model_copy(update={"vision": none, "text": none})
    random = torch.Generator().manual_seed(1000 + place)
    shape = len(manifest.class_names), about.backbone.embed_dim
    tensors |= {
        "trigger": pack_masks(trigger.masks),
        "prototypes": normalize(torch.randn(shape, generator=random), dim=-1),
    }
    return write_bundle(manifest, tensors, folder / f"{task}-1.safetensors")

"""What of a bundle depends on the method by which its task was learnt.

Experts with their routers, or the trigger of a delta that was fused into a unified model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from medley.backbone import Backbone
from medley.bundle import expert_tensors, tower_spec
from medley.decoupled import update_of
from medley.experts import TaskExperts, TaskUpdate
from medley.fusion import Trigger, decouple, pack_masks
from medley.manifest import FusionRef, Method, TowerExperts
from medley.unified import Unified
from trainer.settings import TrainSettings

__all__ = ["Product", "of_experts", "of_trigger"]


@dataclass(frozen=True, kw_only=True)
class Product:
    """What is served of a task, and how it lies in its bundle.

    Attributes:
        update: as `RoutedModel.load` takes it.
        tensors: of the bundle, but for those that bundles of all methods have.
        method, bottleneck, top_k, scale, vision, text, fusion: as in the manifest.
    """

    update: TaskUpdate
    tensors: dict[str, Tensor]
    method: Method
    bottleneck: int
    top_k: int
    scale: float
    vision: TowerExperts
    text: TowerExperts
    fusion: FusionRef | None = None

    def described(self) -> dict[str, Any]:
        """The fields of the manifest."""
        fields = ("method", "bottleneck", "top_k", "scale", "vision", "text", "fusion")
        return {name: getattr(self, name) for name in fields}


def of_experts(experts: TaskExperts, backbone: Backbone, settings: TrainSettings) -> Product:
    """The product of `moe_adapter`: experts as `keep` returns them."""
    vision_width, text_width = _widths(backbone)
    return Product(
        update=experts,
        tensors=expert_tensors("vision", experts.vision) | expert_tensors("text", experts.text),
        method="moe_adapter",
        bottleneck=settings.bottleneck,
        top_k=experts.top_k,
        scale=experts.scale,
        vision=tower_spec(vision_width, experts.vision),
        text=tower_spec(text_width, experts.text),
    )


def of_trigger(unified: Unified, trigger: Trigger, backbone: Backbone) -> Product:
    """The product of `lora` and `finetune`: what a trigger gets back from a unified model."""
    vision_width, text_width = _widths(backbone)
    manifest = unified.manifest
    return Product(
        update=update_of(unified, decouple(unified.deltas, trigger)),
        tensors={"trigger": pack_masks(trigger.masks)},
        method=manifest.method,
        bottleneck=manifest.rank or 1,
        top_k=1,
        scale=manifest.scale or 1.0,
        vision=tower_spec(vision_width, {}),
        text=tower_spec(text_width, {}),
        fusion=FusionRef(
            unified=unified.digest,
            elements=unified.elements,
            rescaler=trigger.rescaler,
            tasks=manifest.tasks,
        ),
    )


def _widths(backbone: Backbone) -> tuple[int, int]:
    return backbone.image.width, backbone.text.width if backbone.text else 1

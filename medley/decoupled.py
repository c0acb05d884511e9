"""A trigger bundle and its unified model to what they add to the backbone.

Legend: R rank, I inputs, O outputs.
"""

from __future__ import annotations

from medley.bundle import Bundle
from medley.experts import BlockLowRank, LowRank, TaskLowRank, TaskUpdate, TaskWeights
from medley.fusion import Deltas, Trigger, decouple, unpack_masks
from medley.unified import Unified, check_belongs

__all__ = ["deltas_of", "task_update", "trigger_of", "update_of"]


def task_update(bundle: Bundle, unified: Unified | None = None) -> TaskUpdate:
    """Say what a bundle adds to the backbone, as `RoutedModel.load` takes it.

    Args:
        bundle: of any method.
        unified: the unified model that it names, if it names one.

    Raises:
        BundleError: that is missing (`unified_missing`) or another one (`unified_mismatch`).
    """
    manifest = bundle.manifest
    if manifest.method == "moe_adapter":
        return bundle.task_experts()
    deltas = deltas_of(bundle, unified)
    assert unified is not None
    return update_of(unified, deltas)


def deltas_of(bundle: Bundle, unified: Unified | None) -> Deltas:
    """Decouple a task's delta, float32, from its unified model; BundleError as `task_update`."""
    check_belongs(bundle.manifest, unified)
    assert unified is not None
    return decouple(unified.deltas, trigger_of(bundle, unified))


def trigger_of(bundle: Bundle, unified: Unified) -> Trigger:
    """The masks and the rescaler of a bundle that belongs to `unified`."""
    fusion = bundle.manifest.fusion
    assert fusion is not None
    return Trigger(unpack_masks(bundle.tensors["trigger"], unified.shapes), fusion.rescaler)


def update_of(unified: Unified, deltas: Deltas) -> TaskUpdate:
    """Say what these deltas of a unified model's kind add to the backbone."""
    about = unified.manifest
    if about.method == "finetune":
        return TaskWeights(deltas, about.first_expert_block)
    assert about.scale is not None
    factors = {
        name: delta + unified.start[name].float() if name in unified.start else delta
        for name, delta in deltas.items()
    }
    return TaskLowRank(_tower(factors, "vision"), _tower(factors, "text"), about.scale)


def _tower(factors: Deltas, tower: str) -> dict[int, BlockLowRank]:
    blocks = sorted({int(name.split(".")[1]) for name in factors if name.startswith(f"{tower}.")})
    return {block: _block(factors, f"{tower}.{block}") for block in blocks}


def _block(factors: Deltas, place: str) -> BlockLowRank:
    fc, proj = (
        LowRank(factors[f"{place}.{linear}.down"], factors[f"{place}.{linear}.up"])
        for linear in ("fc", "proj")
    )
    return BlockLowRank(fc, proj)

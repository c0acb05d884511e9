"""How much room a model must set aside for given tasks; no more, since it is taken at once."""

from __future__ import annotations

from collections.abc import Sequence

from medley.experts import BlockExperts, TaskExperts, TaskLowRank, TaskUpdate, TaskWeights
from medley.pool import Capacity

__all__ = ["capacity_for"]


def capacity_for(tasks: Sequence[TaskUpdate]) -> Capacity:
    """Just enough room for these tasks, of whatever kinds."""
    experts = [task for task in tasks if isinstance(task, TaskExperts)]
    blocks = [block for task in experts for block in _expert_blocks(task)]
    top_k = max((task.top_k for task in experts), default=1)
    most = max((block.num_experts for block in blocks), default=1)
    return Capacity(
        paths=len(tasks),
        slots=max(1, most * len(experts)),
        experts=max(most, top_k),
        bottleneck=max((block.down_ERD.shape[1] for block in blocks), default=1),
        max_top_k=top_k,
        low_rank_slots=sum(isinstance(task, TaskLowRank) for task in tasks),
        low_rank=max((_rank(task) for task in tasks if isinstance(task, TaskLowRank)), default=1),
        models=sum(isinstance(task, TaskWeights) for task in tasks),
    )


def _rank(task: TaskLowRank) -> int:
    blocks = [*task.vision.values(), *task.text.values()]
    return max(update.down_RI.shape[0] for block in blocks for update in (block.fc, block.proj))


def _expert_blocks(task: TaskExperts) -> list[BlockExperts]:
    return [*task.vision.values(), *task.text.values()]

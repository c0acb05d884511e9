"""What one task adds to the frozen backbone, as plain tensors, and what identifies an expert.

Three kinds: experts under a router beside an MLP, low-rank updates of the two linear layers inside
it, or other weights altogether.

Legend: E experts, R bottleneck or rank, D width, M hidden width of the MLP, I inputs, O outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "BlockExperts",
    "BlockLowRank",
    "LowRank",
    "TaskExperts",
    "TaskLowRank",
    "TaskUpdate",
    "TaskWeights",
]


@dataclass(frozen=True)
class BlockExperts:
    """What one task adds to one block of one tower.

    down_ERD is each expert's down.weight, up_ERD its up.weight transposed; router_DE reads token 0
    and has a column for each expert, in the same order.
    """

    down_ERD: Tensor
    down_bias_ER: Tensor
    up_ERD: Tensor
    up_bias_ED: Tensor
    router_DE: Tensor

    @property
    def num_experts(self) -> int:
        """E."""
        return self.down_ERD.shape[0]

    def digest(self, expert: int) -> str:
        """Identify one expert by its tensors, as "sha256:..."; equal tensors, equal digest."""
        digest = hashlib.sha256()
        for tensor in (self.down_ERD, self.down_bias_ER, self.up_ERD, self.up_bias_ED):
            one = tensor[expert].detach().cpu().contiguous()
            digest.update(f"{one.dtype} {tuple(one.shape)}\n".encode())
            digest.update(one.view(-1).view(torch.uint8).numpy().data)
        return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True)
class TaskExperts:
    """All experts of one task version: by tower, by block (0-based). A tower may have none."""

    vision: Mapping[int, BlockExperts]
    text: Mapping[int, BlockExperts]
    top_k: int
    scale: float


@dataclass(frozen=True)
class LowRank:
    """An update of a linear layer, x (.., I) to (.., O): x @ down_RI^T @ up_RO, times a scale."""

    down_RI: Tensor
    up_RO: Tensor


@dataclass(frozen=True)
class BlockLowRank:
    """Updates of the two linear layers of a block's MLP: `fc` is D to M, `proj` M to D."""

    fc: LowRank
    proj: LowRank


@dataclass(frozen=True)
class TaskLowRank:
    """All updates of one task version: by tower, by block (0-based). A tower may have none.

    Source: LoRA, arXiv:2106.09685; on the MLP alone as in ConDU, arXiv:2503.10705.
    """

    vision: Mapping[int, BlockLowRank]
    text: Mapping[int, BlockLowRank]
    scale: float


@dataclass(frozen=True)
class TaskWeights:
    """A task version that has weights of its own: what is added to those of the backbone.

    Attributes:
        deltas: float32, by name of the open_clip model's parameters.
        first_block: image blocks before it, and all that lies before them, are the backbone's own.
    """

    deltas: Mapping[str, Tensor]
    first_block: int


TaskUpdate = TaskExperts | TaskLowRank | TaskWeights

"""One block's experts and router of one task, as plain tensors, and what identifies an expert.

Legend: E experts, R bottleneck, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BlockExperts", "TaskExperts"]


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

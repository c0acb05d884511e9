"""Low-rank updates of the MLPs of both towers.

Of the blocks from the first one on; attention and everything else stays frozen. What is learnt has
no bundle format.

Legend: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from medley.backbone import Backbone
from medley.tower import Block
from trainer.methods.learner import ParameterCounts
from trainer.methods.own_towers import OwnTowers
from trainer.settings import TrainSettings

__all__ = ["Lora", "LowRank"]

INITIAL_STD = 0.01


class LowRank(nn.Module):
    """What a linear layer's update adds to its output: x A B / sqrt(R).

    B starts at zero, so that the first step starts from CLIP itself. ConDU's code draws both
    factors, and so does not.

    Source: LoRA, arXiv:2106.09685; scale and rank as in ConDU, arXiv:2503.10705.
    """

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.a_IR = nn.Parameter(torch.randn(inputs, rank) * INITIAL_STD)
        self.b_RO = nn.Parameter(torch.zeros(rank, outputs))
        self._scale = 1 / math.sqrt(rank)

    def forward(self, x_BLI: Tensor) -> Tensor:
        """(B, L, I) to (B, L, O)."""
        update_BLO: Tensor = self._scale * ((x_BLI @ self.a_IR) @ self.b_RO)
        return update_BLO


class Lora(OwnTowers):
    """Trains a `LowRank` beside every linear layer of the MLPs.

    The copy of the model shares every tensor with the backbone and differs from it in its hooks
    only. The rank is `settings.bottleneck`.
    """

    def __init__(
        self, backbone: Backbone, class_prompts: Sequence[str], settings: TrainSettings
    ) -> None:
        super().__init__(backbone, settings, _sharing_copy(backbone.model))
        rank = settings.bottleneck
        blocks = self.image_tower.blocks[self.first_image_block :]
        self.vision = nn.ModuleList(_beside(block, rank) for block in blocks)
        self.text = nn.ModuleList()
        if self.text_tower is not None:
            text_blocks = self.text_tower.blocks[self.text_blocks.start :]
            self.text.extend(_beside(block, rank) for block in text_blocks)
        self._learn(class_prompts)

    def counts(self) -> ParameterCounts:
        """See `Learner`; active as long as the updates are not added to the weights."""
        trained = sum(p.numel() for p in self.parameters())
        active = sum(p.numel() for p in self.vision.parameters())
        return ParameterCounts(trained=trained, stored=trained, active=active)


def _sharing_copy(model: nn.Module) -> Any:
    """Copy the modules but not the tensors in them."""
    return deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def _beside(block: Block, rank: int) -> nn.ModuleList:
    """Hang updates on the linear layers of a block's MLP."""
    parts: Any = block  # every kind of block wraps a module that has an MLP
    updates = nn.ModuleList()
    for linear in parts.block.mlp.modules():
        if isinstance(linear, nn.Linear):
            update = LowRank(linear.in_features, linear.out_features, rank)
            linear.register_forward_hook(_adding(update))
            updates.append(update)
    return updates


def _adding(update: LowRank) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], y_BLO: Tensor) -> Tensor:
        return y_BLO + update(inputs[0])

    return hook

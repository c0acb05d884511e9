"""Low-rank updates of the MLPs of both towers.

Of the blocks from the first one on; attention and everything else stays frozen. All tasks on one
backbone start from the same factors, so that what they learn can be compared and fused.

Legend: B images or prompts, L tokens, I inputs, O outputs, R rank, S sampled tokens, E joint
embedding width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from medley.backbone import Backbone
from medley.errors import DataError
from medley.tower import Block
from trainer.distributed import ALONE, Part
from trainer.methods.learner import ParameterCounts, Prompts
from trainer.methods.own_towers import OwnTowers
from trainer.penalties import Penalties
from trainer.redundancy import Groups, SubspaceRedundancy, group_count, sampled
from trainer.settings import TrainSettings
from trainer.trunk import Entrance

__all__ = ["Lora", "LowRank", "shared_start"]

INITIAL_STD = 0.01
LINEARS = ("fc", "proj")  # of an MLP, in the order of its modules


class LowRank(nn.Module):
    """What a linear layer's update adds to its output: x down^T up / sqrt(R).

    `up` starts at zero, so that the first step starts from CLIP itself. ConDU's code draws both
    factors, and so does not; and draws them anew for every task, so that its deltas hold the
    difference of two draws beside what was learnt.

    Args:
        start_RI: what `down` starts from.
        outputs: O.

    Source: LoRA, arXiv:2106.09685; scale and rank as in ConDU, arXiv:2503.10705.
    """

    start_RI: Tensor

    def __init__(self, start_RI: Tensor, outputs: int) -> None:
        super().__init__()
        rank = len(start_RI)
        self.register_buffer("start_RI", start_RI, persistent=False)
        self.down_RI = nn.Parameter(start_RI.clone())
        self.up_RO = nn.Parameter(torch.zeros(rank, outputs))
        self._scale = 1 / math.sqrt(rank)

    def forward(self, x_BLI: Tensor) -> Tensor:
        """(B, L, I) to (B, L, O)."""
        update_BLO: Tensor = self._scale * ((x_BLI @ self.down_RI.T) @ self.up_RO)
        return update_BLO

    def redundancy(self, x_BLI: Tensor, how: SubspaceRedundancy, part: Part) -> Tensor:
        """Measure how redundant the groups of ranks are for these inputs, a scalar."""
        tokens_SI = sampled(x_BLI, part).flatten(0, 1)
        rank = len(self.down_RI)
        with torch.autocast(x_BLI.device.type, enabled=False):
            groups = Groups.of(
                tokens_SI,
                self.down_RI[None],
                tokens_SI.new_zeros(1, rank),  # there is no bias
                self.up_RO[None],
                tokens_SI.new_ones(len(tokens_SI), 1),
                groups=group_count(rank, how.groups),
            )
            return how.of(groups, total=part.team.total)


class Lora(OwnTowers):
    """Trains a `LowRank` beside every linear layer of the MLPs.

    The copy of the model shares every tensor with the backbone and differs from it in its hooks
    only. The rank is `settings.bottleneck`.
    """

    def __init__(
        self, backbone: Backbone, class_prompts: Sequence[str], settings: TrainSettings
    ) -> None:
        super().__init__(backbone, settings, _sharing_copy(backbone.model))
        self._rank, self._supervision = settings.bottleneck, settings.supervision
        image_blocks = range(self.first_image_block, len(self.image_tower.blocks))
        self.vision = self._beside("vision", self.image_tower.blocks, image_blocks)
        self.text = nn.ModuleDict()
        if self.text_tower is not None:
            self.text = self._beside("text", self.text_tower.blocks, self.text_blocks)
        self._learn(class_prompts)

    def image_features(self, entrance: Entrance) -> tuple[Tensor, Penalties]:
        """See `Learner`."""
        with self._listening(self.vision, entrance) as found:
            features_BE, penalties = super().image_features(entrance)
        return features_BE, self._with(found, penalties)

    @torch.no_grad()
    def redundancy(self, entrance: Entrance, how: SubspaceRedundancy) -> Tensor:
        """Measure how redundant the image updates are for some images: a mean over them."""
        self.eval()
        with self._listening(self.vision, entrance, how) as found:
            self.image_features(entrance)
        return torch.stack(found).mean()

    def counts(self) -> ParameterCounts:
        """See `Learner`; active as long as the updates are not added to the weights."""
        trained = sum(p.numel() for p in self.parameters())
        active = sum(p.numel() for p in self.vision.parameters())
        return ParameterCounts(trained=trained, stored=trained, active=active)

    def deltas(self) -> dict[str, Tensor]:
        """See `OwnTowers`: "<tower>.<block>.<fc|proj>.<down|up>"."""
        found = {}
        for name, update in self._updates():
            found[f"{name}.down"] = update.down_RI.detach() - update.start_RI
            found[f"{name}.up"] = update.up_RO.detach()
        return {name: tensor.cpu() for name, tensor in found.items()}

    def start(self) -> dict[str, Tensor]:
        """See `OwnTowers`: the down factors before the first step; all else started at zero."""
        return {
            f"{name}.down": update.start_RI.bfloat16().cpu() for name, update in self._updates()
        }

    def _encode_text(self, prompts: Prompts) -> tuple[Tensor, Penalties]:
        with self._listening(self.text, prompts.entrance) as found:
            features_NE, penalties = super()._encode_text(prompts)
        return features_NE, self._with(found, penalties)

    @contextmanager
    def _listening(
        self, tower: nn.ModuleDict, entrance: Entrance, how: SubspaceRedundancy | None = None
    ) -> Iterator[list[Tensor]]:
        """Measure every update of a tower as it is used; in evaluation only where one asks how."""
        asked = how or (self._supervision if self.training else None)
        found: list[Tensor] = []
        if asked is None:
            yield found
            return
        part = entrance.part or ALONE.part(len(entrance.tensors[0]))

        def measure(update: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(update, LowRank)
            found.append(update.redundancy(inputs[0], asked, part))

        updates = [module for module in tower.modules() if isinstance(module, LowRank)]
        handles = [update.register_forward_pre_hook(measure) for update in updates]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def _with(self, found: Sequence[Tensor], penalties: Penalties) -> Penalties:
        """Add redundancy, as a mean over the updates of both towers."""
        redundancy = sum(found, start=penalties.redundancy)
        return replace(penalties, redundancy=redundancy / len(list(self._updates())))

    def _updates(self) -> Iterator[tuple[str, LowRank]]:
        for tower, blocks in (("vision", self.vision), ("text", self.text)):
            for block, linears in blocks.items():
                assert isinstance(linears, nn.ModuleDict)
                for linear, update in linears.items():
                    assert isinstance(update, LowRank)
                    yield f"{tower}.{block}.{linear}", update

    def _beside(self, tower: str, blocks: Sequence[Block], which: range) -> nn.ModuleDict:
        """Hang updates on the two linear layers of each block's MLP."""
        updates = nn.ModuleDict()
        for index in which:
            parts: Any = blocks[index]  # every kind of block wraps a module that has an MLP
            linears = [m for m in parts.block.mlp.modules() if isinstance(m, nn.Linear)]
            if len(linears) != len(LINEARS):
                raise DataError(
                    f"lora knows MLPs of two linear layers; {tower} block {index} of "
                    f"{self.backbone.name} has {len(linears)}",
                    code="settings",
                )
            updates[str(index)] = nn.ModuleDict(
                {
                    name: self._update(f"{tower}.{index}.{name}", linear)
                    for name, linear in zip(LINEARS, linears, strict=True)
                }
            )
        return updates

    def _update(self, name: str, linear: nn.Linear) -> LowRank:
        start_RI = shared_start(self.backbone, name, self._rank, linear.in_features)
        update = LowRank(start_RI, linear.out_features)
        linear.register_forward_hook(_adding(update))
        return update


def shared_start(backbone: Backbone, name: str, rank: int, inputs: int) -> Tensor:
    """Draw what a down factor starts from: (R, I), float32 of bfloat16 values.

    It follows from the backbone, the rank and the name alone: of two tasks, learnt anywhere and
    with any seed, deltas are from the same point.
    """
    about = f"{backbone.fingerprint} {rank} {name}".encode()
    seed = int.from_bytes(hashlib.sha256(about).digest()[:8], "little", signed=True)
    generator = torch.Generator().manual_seed(seed)
    drawn_RI = torch.randn(rank, inputs, generator=generator) * INITIAL_STD
    return drawn_RI.bfloat16().float()


def _sharing_copy(model: nn.Module) -> Any:
    """Copy the modules but not the tensors in them."""
    return deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def _adding(update: LowRank) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], y_BLO: Tensor) -> Tensor:
        return y_BLO + update(inputs[0])

    return hook

"""A learner that walks towers of its own: what `finetune` and `lora` have in common.

Legend: B images, N prompts, L tokens, D width, E joint embedding width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from medley.backbone import Backbone, Clip
from medley.tower import Block, Mask, image_tower, text_tower
from trainer.methods.learner import Learner, Prompts
from trainer.penalties import Penalties
from trainer.settings import TrainSettings
from trainer.trunk import Entrance

__all__ = ["OwnTowers"]


class OwnTowers(Learner):
    """Walks another model's blocks from the first trained one on.

    The first trained block is trained as a whole, so the entrance is the hidden state before it.
    There are no penalties: they are zero. The other model is in evaluation mode throughout: no path
    or patch is dropped in training.
    """

    def __init__(self, backbone: Backbone, settings: TrainSettings, model: Clip) -> None:
        super().__init__(backbone, settings)
        self.image_tower = image_tower(model.visual)
        self.text_tower = text_tower(model) if self.text_blocks else None

    @abstractmethod
    def deltas(self) -> dict[str, Tensor]:
        """What was learnt: the trained tensors less what they started from, float32, on the CPU."""

    @abstractmethod
    def start(self) -> dict[str, Tensor]:
        """What they started from, where that is neither zero nor the backbone's own; on the CPU.

        By the names of the deltas; bfloat16, which holds it exactly.
        """

    def enter(self, hidden_BLD: Tensor) -> Entrance:
        """See `Learner`."""
        return Entrance((hidden_BLD,))

    def image_features(self, entrance: Entrance) -> tuple[Tensor, Penalties]:
        """See `Learner`."""
        tower = self.image_tower
        x_BLD = _walk(tower.blocks[self.first_image_block :], entrance)
        features_BE = F.normalize(tower.pool(x_BLD).float(), dim=-1)
        return features_BE, Penalties.none(features_BE)

    def _enter_text(self, hidden_NLD: Tensor, mask: Mask) -> Entrance:
        return Entrance((hidden_NLD,), mask)

    def _encode_text(self, prompts: Prompts) -> tuple[Tensor, Penalties]:
        tower = self.text_tower
        assert tower is not None
        x_NLD = _walk(tower.blocks[self.text_blocks.start :], prompts.entrance)
        features_NE = F.normalize(tower.pool(x_NLD, prompts.tokens_NL).float(), dim=-1)
        return features_NE, Penalties.none(features_NE)


def _walk(blocks: Sequence[Block], entrance: Entrance) -> Tensor:
    (x_BLD,) = entrance.tensors
    for block in blocks:
        x_BLD = block.attend(x_BLD, entrance.mask)
        x_BLD = x_BLD + block.mlp(x_BLD)
    return x_BLD

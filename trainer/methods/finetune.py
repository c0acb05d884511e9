"""Plain fine-tuning of a copy of both towers: the baseline that forgets, and ConDU's second kind.

Trained are the blocks from the first one on and what follows the last; the stem, the embeddings and
the logit scale stay frozen. `first_expert_block` 0 with `first_text_block` 0 is full fine-tuning of
all transformer blocks.

Legend: B images, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from medley.backbone import Backbone
from trainer.methods.learner import ParameterCounts
from trainer.methods.own_towers import OwnTowers
from trainer.settings import TrainSettings
from trainer.trunk import image_hidden

__all__ = ["Finetune"]


class Finetune(OwnTowers):
    """Trains everything that lies behind the hidden state; the shared backbone is not touched."""

    def __init__(
        self, backbone: Backbone, class_prompts: Sequence[str], settings: TrainSettings
    ) -> None:
        model = deepcopy(backbone.model)
        super().__init__(backbone, settings, model)
        self._learn(class_prompts)
        self.trained = nn.ParameterDict(
            # A parameter's name may not have dots.
            {name.replace(".", "/"): p for name, p in self._reached(model.requires_grad_())}
        )
        model.requires_grad_(requires_grad=False)
        self.trained.requires_grad_()

    def counts(self) -> ParameterCounts:
        """See `Learner`; the copy stands in for the backbone, so an image meets no more than it."""
        trained = sum(p.numel() for p in self.parameters())
        return ParameterCounts(trained=trained, stored=trained, active=0)

    def deltas(self) -> dict[str, Tensor]:
        """See `OwnTowers`: by name of the open_clip model's parameters."""
        before = dict(self.backbone.model.named_parameters())
        found = {name.replace("/", "."): p.detach() for name, p in self.trained.items()}
        return {name: (p - before[name]).cpu() for name, p in found.items()}

    def start(self) -> dict[str, Tensor]:
        """See `OwnTowers`: nothing, all started from the backbone."""
        return {}

    def _reached(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Find the parameters that gradients from both towers' features reach.

        Towers differ in what comes after their blocks (norms, pools, projections, heads); asking
        autograd needs no list of them.
        """
        height, width = self.backbone.image_size
        blank_BCHW = torch.zeros(1, 3, height, width, dtype=torch.uint8)
        hidden_BLD = image_hidden(self.backbone, blank_BCHW, self.first_image_block)
        reached: Tensor = self.image_features(self.enter(hidden_BLD))[0].sum()
        if self.text_blocks:
            reached = reached + self.text_features()[0].sum()
        reached.backward()
        found = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
        model.zero_grad()
        return found

"""What a method is to the training loop: how images and prompts become features, with gradient.

The loop, its data and its random numbers are the same for every method and lie in
`trainer/training.py`; a learner owns what is trained and nothing of how.

Legend: B images, N prompts, C classes, L tokens, D width, E joint embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medley.backbone import Backbone
from medley.prompts import prompts
from medley.tower import Mask
from trainer.distributed import ALONE, Part, Team
from trainer.penalties import Penalties
from trainer.settings import TrainSettings
from trainer.trunk import Entrance, prompt_hidden

__all__ = ["Learner", "ParameterCounts", "Prompts"]

PROMPT_CHUNK = 256  # prompts of an evaluation encoded at once


@dataclass(frozen=True)
class Prompts:
    """Token ids and where the text blocks that are trained take them over."""

    tokens_NL: Tensor
    entrance: Entrance

    def of(self, part: Part) -> Prompts:
        """Those of one process."""
        entrance = replace(self.entrance.rows(part.rows), part=part)
        return Prompts(self.tokens_NL[part.rows], entrance)


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """How many numbers a task costs."""

    trained: int  # receive a gradient
    stored: int  # must be kept to answer for the task later
    active: int  # that an image meets on top of the backbone's own


@dataclass(frozen=True)
class _Unregistered:
    """Keeps the frozen backbone out of the learner's parameters and checkpoints."""

    value: Backbone


class Learner(nn.Module, ABC):
    """Both towers from where the frozen part ends to features of unit length, float32.

    Its parameters and its state are what is trained, and nothing of the frozen backbone. A subclass
    calls `_learn` at the end of its constructor.
    """

    def __init__(self, backbone: Backbone, settings: TrainSettings) -> None:
        super().__init__()
        self._backbone = _Unregistered(backbone)
        self.first_image_block = settings.first_image_block(backbone)
        self.text_blocks = settings.text_blocks(backbone)  # empty: the text tower is not trained
        self._learnt: Prompts | Tensor | None = None

    @property
    def backbone(self) -> Backbone:
        """The frozen backbone."""
        return self._backbone.value

    @abstractmethod
    def enter(self, hidden_BLD: Tensor) -> Entrance:
        """What is to be kept of an image: all that needs no gradient and never changes.

        Args:
            hidden_BLD: output of the first `first_image_block` blocks.
        """

    @abstractmethod
    def image_features(self, entrance: Entrance) -> tuple[Tensor, Penalties]:
        """Image features (B, E) and the penalties."""

    @abstractmethod
    def counts(self) -> ParameterCounts:
        """How many parameters the task costs."""

    @abstractmethod
    def _enter_text(self, hidden_NLD: Tensor, mask: Mask) -> Entrance:
        """As `enter`, of prompts."""

    @abstractmethod
    def _encode_text(self, prompts: Prompts) -> tuple[Tensor, Penalties]:
        """Prompt features (N, E) and the penalties; only called where text is trained."""

    def text_features(self, team: Team = ALONE) -> tuple[Tensor, Penalties]:
        """Features (C, E) of the prompts that are being learnt, and the penalties.

        The processes of a team share the prompts, unless some would have none.
        """
        assert self._learnt is not None
        if isinstance(self._learnt, Tensor):
            return self._learnt, Penalties.none(self._learnt)
        part = team.part(len(self._learnt.tokens_NL))
        if team.size == 1 or team.size > part.whole:
            return self._encode_text(self._learnt)
        own_NE, penalties = self._encode_text(self._learnt.of(part))
        others = (0, 0, part.rows.start, part.whole - part.rows.stop)
        return team.total(F.pad(own_NE, others)), penalties

    @torch.no_grad()
    def image_features_of(self, hidden_BLD: Tensor) -> Tensor:
        """Image features (B, E) for an evaluation: no noise, no dropout, no gradient."""
        self.eval()
        return self.image_features(self.enter(hidden_BLD))[0]

    @torch.no_grad()
    def text_features_of(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Features (C, E) of any class list, for an evaluation.

        Normalised features are averaged over the templates and normalised again, as
        `medley.prompts.class_text_features` does.
        """
        self.eval()
        total_CE = sum(self._features(prompts(class_names, template)) for template in templates)
        assert isinstance(total_CE, Tensor)
        return F.normalize(total_CE, dim=-1)

    def _learn(self, class_prompts: Sequence[str]) -> None:
        """Get ready the prompts of every step; without gradient they need no more than once."""
        tokens_NL = self.backbone.tokenize(class_prompts)
        self._learnt = self._prompts(tokens_NL) if self.text_blocks else self._zero_shot(tokens_NL)

    def _features(self, texts: Sequence[str]) -> Tensor:
        tokens_NL = self.backbone.tokenize(texts)
        parts = tokens_NL.split(PROMPT_CHUNK)
        if not self.text_blocks:
            return torch.cat([self._zero_shot(part_NL) for part_NL in parts])
        return torch.cat([self._encode_text(self._prompts(part_NL))[0] for part_NL in parts])

    def _prompts(self, tokens_NL: Tensor) -> Prompts:
        tokens_NL = _shortened(self.backbone, tokens_NL)
        hidden_NLD, mask = prompt_hidden(self.backbone, tokens_NL, self.text_blocks.start)
        return Prompts(tokens_NL, self._enter_text(hidden_NLD, mask))

    @torch.no_grad()
    def _zero_shot(self, tokens_NL: Tensor) -> Tensor:
        return F.normalize(self.backbone.model.encode_text(tokens_NL).float(), dim=-1)


@torch.no_grad()
def _shortened(backbone: Backbone, tokens_NL: Tensor) -> Tensor:
    """Cut the padding that all prompts share, where that changes nothing.

    In a causal tower no token sees a later one, so what follows the end of the longest prompt
    cannot matter to the tokens before it; and the feature is read at the end of the text. A tower
    that reads it elsewhere (the last position, say) is found out by trying.
    """
    text = backbone.text
    assert text is not None
    used = (
        int(tokens_NL.ne(0).any(0).nonzero().max()) + 1
    )  # 0 pads; where something else does, nothing is cut
    if not text.causal or used == tokens_NL.shape[1]:
        return tokens_NL
    few_NL = tokens_NL[:4]
    whole_NE, cut_NE = (_walked(backbone, part_NL) for part_NL in (few_NL, few_NL[:, :used]))
    same = torch.allclose(whole_NE, cut_NE, rtol=1e-3, atol=1e-4)
    return tokens_NL[:, :used] if same else tokens_NL


def _walked(backbone: Backbone, tokens_NL: Tensor) -> Tensor:
    assert backbone.text is not None
    hidden_NLD, _ = prompt_hidden(backbone, tokens_NL, len(backbone.text.blocks))
    return F.normalize(backbone.text.pool(hidden_NLD, tokens_NL).float(), dim=-1)

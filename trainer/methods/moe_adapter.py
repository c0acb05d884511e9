"""Experts and routers beside the frozen MLPs of both towers.

Only this task's experts and routers are trained; the backbone, and the experts of earlier tasks,
are frozen.

Legend: B images, N prompts, L tokens, D width, E joint embedding width.

Source: MoE-Adapters, arXiv:2403.11549.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from medley.backbone import Backbone
from medley.experts import BlockExperts, TaskExperts
from medley.tower import Block, Mask
from trainer.experts import BlockMixture, ExpertConfig, TowerMixture
from trainer.methods.learner import Learner, ParameterCounts, Prompts
from trainer.penalties import Penalties
from trainer.redundancy import SubspaceRedundancy
from trainer.settings import TrainSettings
from trainer.trunk import Entrance

__all__ = ["FrozenExperts", "MoeAdapter"]

Observe = Callable[[int, Tensor], None]  # told of each block and of what its experts read


@dataclass(frozen=True)
class FrozenExperts:
    """Experts of earlier tasks that a new router may choose, by tower, by block."""

    vision: Mapping[int, BlockExperts] = field(default_factory=dict)
    text: Mapping[int, BlockExperts] = field(default_factory=dict)


class MoeAdapter(Learner):
    """Both towers' experts on a frozen backbone, from the entrances to features.

    The MLP of the first block with experts runs beside them, outside of every gradient; so an
    entrance is two tensors: the residual stream after that block's attention, which the experts
    read, and the block's output without them.
    """

    def __init__(
        self,
        backbone: Backbone,
        class_prompts: Sequence[str],
        settings: TrainSettings,
        frozen: FrozenExperts,
    ) -> None:
        super().__init__(backbone, settings)
        config = ExpertConfig(
            num_new=settings.num_experts,
            bottleneck=settings.bottleneck,
            top_k=settings.top_k,
            scale=settings.scale,
            dropout=settings.dropout,
            relu=settings.relu,
            redundancy=settings.supervision,
        )
        tower = backbone.image
        image_blocks = range(self.first_image_block, len(tower.blocks))
        self.vision = TowerMixture(tower.width, image_blocks, frozen.vision, config)
        self.text: TowerMixture | None = None
        if self.text_blocks:
            assert backbone.text is not None
            width = backbone.text.width
            self.text = TowerMixture(width, self.text_blocks, frozen.text, config)
        self._learn(class_prompts)

    @torch.no_grad()
    def enter(self, hidden_BLD: Tensor) -> Entrance:
        """See `Learner`."""
        return _enter(self.backbone.image.blocks[self.first_image_block], hidden_BLD, None)

    def image_features(
        self, entrance: Entrance, *, observe: Observe | None = None
    ) -> tuple[Tensor, Penalties]:
        """See `Learner`."""
        tower = self.backbone.image
        x_BLD, penalties = _walk(
            tower.blocks, self.vision, entrance, one_route=False, observe=observe
        )
        return F.normalize(tower.pool(x_BLD).float(), dim=-1), self._shared(penalties)

    def observe_text(self, observe: Observe) -> None:
        """Show what the text experts read of the prompts that are being learnt."""
        if isinstance(self._learnt, Prompts):
            self._encode_text(self._learnt, observe=observe)

    @torch.no_grad()
    def redundancy(self, entrance: Entrance, how: SubspaceRedundancy) -> Tensor:
        """Measure how redundant the image experts are for some images: a mean over the blocks."""
        self.eval()
        found: list[Tensor] = []

        def measure(block: int, x_BLD: Tensor) -> None:
            found.append(self.vision[block].redundancy(x_BLD, how))

        self.image_features(entrance, observe=measure)
        return torch.stack(found).mean()

    def counts(self, kept: TaskExperts | None = None) -> ParameterCounts:
        """See `Learner`.

        Args:
            kept: what of the task went into its bundle; None: all new experts, and the routers
                without their noise.
        """
        trained = sum(p.numel() for p in self.parameters())
        if kept is None:
            towers = [self.vision, *([] if self.text is None else [self.text])]
            noise = [tower[b].router.noise_DE for tower in towers for b in tower.blocks]
            stored = trained - sum(p.numel() for p in noise)
            active = sum(_active_in(self.vision[block]) for block in self.vision.blocks)
            return ParameterCounts(trained=trained, stored=stored, active=active)
        blocks = [*kept.vision.values(), *kept.text.values()]
        return ParameterCounts(
            trained=trained,
            stored=sum(_experts_size(b) + b.router_DE.numel() for b in blocks),
            active=sum(_active_of(block, kept.top_k) for block in kept.vision.values()),
        )

    @torch.no_grad()
    def _enter_text(self, hidden_NLD: Tensor, mask: Mask) -> Entrance:
        assert self.backbone.text is not None
        return _enter(self.backbone.text.blocks[self.text_blocks.start], hidden_NLD, mask)

    def _encode_text(
        self, prompts: Prompts, *, observe: Observe | None = None
    ) -> tuple[Tensor, Penalties]:
        """See `Learner`.

        In a causal tower token 0, the start of text, sees only itself: it is the same in every
        prompt, so one routing decision serves all prompts (methods: constant text routing). In
        training the prompts of a step then share one draw of noise.
        """
        tower = self.backbone.text
        assert tower is not None
        assert self.text is not None
        x_NLD, penalties = _walk(
            tower.blocks, self.text, prompts.entrance, one_route=tower.causal, observe=observe
        )
        features_NE = F.normalize(tower.pool(x_NLD, prompts.tokens_NL).float(), dim=-1)
        return features_NE, self._shared(penalties)

    def _shared(self, penalties: Penalties) -> Penalties:
        """Make redundancy a mean over the blocks of both towers."""
        blocks = len(self.vision.blocks) + (0 if self.text is None else len(self.text.blocks))
        return replace(penalties, redundancy=penalties.redundancy / blocks)


def _enter(block: Block, hidden_BLD: Tensor, mask: Mask) -> Entrance:
    attended_BLD = block.attend(hidden_BLD, mask)
    return Entrance((attended_BLD, attended_BLD + block.mlp(attended_BLD)), mask)


def _walk(
    blocks: Sequence[Block],
    mixtures: TowerMixture,
    entrance: Entrance,
    *,
    one_route: bool,
    observe: Observe | None,
) -> tuple[Tensor, Penalties]:
    """Go from the entrance through all blocks with experts, as `RoutedModel` does."""
    first, *rest = mixtures.blocks
    attended_BLD, after_BLD = entrance.tensors
    if observe is not None:
        observe(first, attended_BLD)
    y_BLD, penalties = mixtures[first](attended_BLD, one_route=one_route, part=entrance.part)
    x_BLD = after_BLD + y_BLD
    for index in rest:
        x_BLD = blocks[index].attend(x_BLD, entrance.mask)
        if observe is not None:
            observe(index, x_BLD)
        y_BLD, more = mixtures[index](x_BLD, one_route=one_route, part=entrance.part)
        x_BLD = x_BLD + blocks[index].mlp(x_BLD) + y_BLD
        penalties = penalties + more
    return x_BLD, penalties


def _experts_size(block: BlockExperts | BlockMixture) -> int:
    tensors = (block.down_ERD, block.down_bias_ER, block.up_ERD, block.up_bias_ED)
    return sum(tensor.numel() for tensor in tensors)


def _active_in(mixture: BlockMixture) -> int:
    """The router and the experts that it chooses; new and frozen ones are of one size."""
    router = mixture.router
    return router.gate_DE.numel() + router.top_k * _experts_size(mixture) // mixture.config.num_new


def _active_of(block: BlockExperts, top_k: int) -> int:
    chosen = min(top_k, block.num_experts)
    return block.router_DE.numel() + chosen * _experts_size(block) // block.num_experts

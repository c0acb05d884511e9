"""Random tasks for benchmarks: experts that matter, selectors that accept everything.

Legend: E experts, R bottleneck, D width, F feature width, C code width.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from medley.backbone import Backbone
from medley.experts import BlockExperts, TaskExperts
from medley.levels import AutoencoderLevel
from medley.selector import TaskSelector
from trainer.ddas import DEFAULT_CODE_SIZE, DEFAULT_FEATURES
from trainer.speed.block import BOTTLENECK, SCALE, TOP_K

__all__ = ["random_selector", "random_task"]


def random_task(
    backbone: Backbone,
    *,
    seed: int,
    experts_seed: int | None = None,
    num_experts: int = TOP_K,
    first_block: int = 0,
) -> TaskExperts:
    """Draw experts for the image blocks from `first_block` on.

    Args:
        backbone: gives width and number of blocks.
        seed: of the routers;
        experts_seed: and of the experts, if they are to be those of other tasks too.
        num_experts: E in every block.
        first_block: 0-based.
    """
    router = torch.Generator().manual_seed(seed)
    own = torch.Generator().manual_seed(seed if experts_seed is None else experts_seed)
    width = backbone.image.width
    blocks = range(first_block, len(backbone.image.blocks))
    vision = {block: _block(num_experts, width, own, router) for block in blocks}
    return TaskExperts(vision=vision, text={}, top_k=min(TOP_K, num_experts), scale=SCALE)


def random_selector(width: int, *, seed: int, feature: str = DEFAULT_FEATURES[0]) -> TaskSelector:
    """Draw a task's autoencoder of the product's size; it accepts every image."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    code = DEFAULT_CODE_SIZE
    level = AutoencoderLevel(
        feature=feature,
        center=0.0,
        spread=1.0,
        mean_F=normal(width),
        std_F=normal(width).abs() + 0.5,
        encoder_FC=normal(width, code) / width**0.5,
        encoder_bias_C=normal(code),
        decoder_CF=normal(code, width) / code**0.5,
        decoder_bias_F=normal(width),
    )
    return TaskSelector((level,), threshold=math.inf, alpha=None)


def _block(
    num_experts: int, width: int, own: torch.Generator, router: torch.Generator
) -> BlockExperts:
    def normal(*shape: int, generator: torch.Generator = own) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return BlockExperts(
        normal(num_experts, BOTTLENECK, width) / width**0.5,
        0.1 * normal(num_experts, BOTTLENECK),
        normal(num_experts, BOTTLENECK, width) / BOTTLENECK**0.5,
        0.1 * normal(num_experts, width),
        normal(width, num_experts, generator=router) / width**0.5,
    )

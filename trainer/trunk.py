"""What a backbone's frozen part says of training images and prompts: computed once, not a step.

Up to and including the attention of the first block with experts nothing is learnt, nor is that
block's MLP, which runs beside the experts. So an image is here two tensors: the residual stream
where the experts read it, and the output of the block without them. From there on it is the
trainer's.

Legend: B images, N prompts, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medley.backbone import Backbone
from medley.tower import Block, Mask
from trainer.datasets import ImageSet
from trainer.kept import kept_hidden
from trainer.pixels import pixels_of

__all__ = [
    "CHUNK",
    "Entrance",
    "ImageTrunk",
    "enter",
    "entrance_bytes",
    "image_entrance",
    "prompt_entrance",
]

OnChunk = Callable[[int], None]
CHUNK = 64  # images in one forward of the trunk
# Images in one forward of the stem, channels last: medley-mini's convolutional stem then takes
# 5.6 ms of one core for an image, against 15 ms for 64 at a time in the usual order (2026-11).
STEM_CHUNK = 16


@dataclass(frozen=True)
class Entrance:
    """Where the first experts enter."""

    attended_BLD: Tensor  # residual stream after that block's attention: what its experts read
    after_BLD: Tensor  # the block's output without experts
    mask: Mask = None

    def rows(self, index_B: Tensor) -> Entrance:
        """The entrance of some of the rows."""
        return Entrance(self.attended_BLD[index_B], self.after_BLD[index_B], self.mask)


class ImageTrunk:
    """Entrances of the images of a set, cached where they fit.

    Copy 0..copies-1 are the cached ones. A chunk of the cache always holds the same images in the
    same order, and without a cache a batch is computed as it is asked for: either way the bits do
    not depend on when a run was interrupted.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: ImageSet,
        first_block: int,
        *,
        augment: bool,
        copies: int,
        seed: int,
    ) -> None:
        self.images = images
        self._backbone, self._first_block = backbone, first_block
        self._augment, self._copies, self._seed = augment, copies, seed
        self._cached: dict[int, Entrance] = {}

    def batch(
        self, index_B: NDArray[np.int64], epoch: int, *, on_chunk: OnChunk = lambda _: None
    ) -> Entrance:
        """Entrance of some images as they look in an epoch.

        Args:
            index_B: which images.
            epoch: decides their random crops; with a cache of k copies, epoch modulo k does.
            on_chunk: told of the images of each part of a copy that has to be computed first.
        """
        if not self._copies:
            return self._compute(index_B, epoch)
        copy = epoch % self._copies
        if copy not in self._cached:
            self._cached[copy] = self._fill(copy, on_chunk)
        return self._cached[copy].rows(torch.from_numpy(index_B))

    def _fill(self, copy: int, on_chunk: OnChunk) -> Entrance:
        whole: Entrance | None = None
        for start in range(0, len(self.images), CHUNK):
            index_B = np.arange(start, min(start + CHUNK, len(self.images)))
            part = self._compute(index_B, copy)
            if whole is None:
                shape = (len(self.images), *part.attended_BLD.shape[1:])
                whole = Entrance(
                    part.attended_BLD.new_empty(shape), part.after_BLD.new_empty(shape)
                )
            whole.attended_BLD[start : start + CHUNK] = part.attended_BLD
            whole.after_BLD[start : start + CHUNK] = part.after_BLD
            on_chunk(len(index_B))
        assert whole is not None
        return whole

    def _compute(self, index_B: NDArray[np.int64], copy: int) -> Entrance:
        index = index_B.tolist()
        if not self._augment:
            hidden_BLD = kept_hidden(self._backbone, self._first_block, self.images, index)
            if hidden_BLD is not None:
                return enter(self._backbone.image.blocks, hidden_BLD, None, self._first_block)
        seed = (self._seed, copy) if self._augment else None
        pixels_BCHW = pixels_of(self._backbone, self.images, index, crop_seed=seed)
        return image_entrance(self._backbone, pixels_BCHW, self._first_block)


def entrance_bytes(backbone: Backbone, first_block: int) -> int:
    """How much memory the entrance of one image takes."""
    height, width = backbone.image_size
    pixels_BCHW = torch.zeros(1, 3, height, width, dtype=torch.uint8)
    return 2 * image_entrance(backbone, pixels_BCHW, first_block).attended_BLD.nbytes


@torch.no_grad()
def image_entrance(backbone: Backbone, pixels_BCHW: Tensor, first_block: int) -> Entrance:
    """Run uint8 pixels through the frozen trunk."""
    tower = backbone.image
    images_BCHW = backbone.normalise(pixels_BCHW).contiguous(memory_format=torch.channels_last)
    patches_BLD = torch.cat([tower.stem(part) for part in images_BCHW.split(STEM_CHUNK)])
    x_BLD = tower.embed(patches_BLD)
    return enter(tower.blocks, _walked(tower.blocks[:first_block], x_BLD, None), None, first_block)


@torch.no_grad()
def prompt_entrance(backbone: Backbone, tokens_NL: Tensor, first_block: int) -> Entrance:
    """Run token ids through the frozen text blocks before the first one with experts."""
    assert backbone.text is not None
    x_NLD, mask = backbone.text.embed(tokens_NL)
    blocks = backbone.text.blocks
    return enter(blocks, _walked(blocks[:first_block], x_NLD, mask), mask, first_block)


@torch.no_grad()
def enter(blocks: Sequence[Block], hidden_BLD: Tensor, mask: Mask, first_block: int) -> Entrance:
    """Go on from the hidden state after `first_block` blocks to where the experts enter."""
    attended_BLD = blocks[first_block].attend(hidden_BLD, mask)
    return Entrance(attended_BLD, attended_BLD + blocks[first_block].mlp(attended_BLD), mask)


def _walked(blocks: Sequence[Block], x_BLD: Tensor, mask: Mask) -> Tensor:
    for block in blocks:
        x_BLD = block.attend(x_BLD, mask)
        x_BLD = x_BLD + block.mlp(x_BLD)
    return x_BLD

"""What a backbone's frozen part says of training images and prompts: computed once, not a step.

What of the hidden state after the untrained blocks is worth keeping, its entrance, a learner itself
says; from there on it is the learner's.

Legend: B images, N prompts, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medley.backbone import Backbone
from medley.tower import Block, Mask
from trainer.datasets import ImageSet
from trainer.distributed import ALONE, Part, Team
from trainer.kept import kept_hidden
from trainer.pixels import pixels_of

__all__ = [
    "CHUNK",
    "Enter",
    "Entrance",
    "ImageTrunk",
    "image_hidden",
    "prompt_hidden",
]

OnChunk = Callable[[int], None]
CHUNK = 64  # images in one forward of the trunk
# Images in one forward of the stem, channels last: medley-mini's convolutional stem then takes
# 5.6 ms of one core for an image, against 15 ms for 64 at a time in the usual order (2026-11).
STEM_CHUNK = 16


@dataclass(frozen=True)
class Entrance:
    """Where a learner takes over: tensors (B, L, D), which ones is the learner's affair."""

    tensors: tuple[Tensor, ...]
    mask: Mask = None
    part: Part | None = None  # which rows of a batch these are; None: all of it

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def rows(self, index_B: Tensor | slice) -> Entrance:
        """The entrance of some of the rows."""
        return Entrance(tuple(tensor[index_B] for tensor in self.tensors), self.mask)


Enter = Callable[[Tensor], Entrance]  # from the hidden state of images (B, L, D); no gradient


class ImageTrunk:
    """Entrances of the images of a set, cached where they fit.

    Copy 0..copies-1 are the cached ones. A chunk of the cache always holds the same images in the
    same order, and without a cache a batch is computed as it is asked for: either way the bits do
    not depend on when a run was interrupted. The processes of a team compute different
    chunks of the cache, and each keeps all of it.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: ImageSet,
        first_block: int,
        enter: Enter,
        *,
        augment: bool,
        copies: int,
        seed: int,
        team: Team = ALONE,
    ) -> None:
        self.images, self.team = images, team
        self._backbone, self._first_block, self._enter = backbone, first_block, enter
        self._augment, self._copies, self._seed = augment, copies, seed
        self._cached: dict[int, Entrance] = {}

    def batch(
        self, index_B: NDArray[np.int64], epoch: int, *, on_chunk: OnChunk = lambda _: None
    ) -> Entrance:
        """Entrance of this process's part of some images, as they look in an epoch.

        Args:
            index_B: which images; the same in all processes.
            epoch: decides their random crops; with a cache of k copies, epoch modulo k does.
            on_chunk: told of the images of each part of a copy that has to be computed first.
        """
        part = self.team.part(len(index_B))
        own_B = index_B[part.rows]
        if not self._copies:
            return replace(self._compute(own_B, epoch), part=part)
        copy = epoch % self._copies
        if copy not in self._cached:
            self._cached[copy] = self._fill(copy, on_chunk)
        return replace(self._cached[copy].rows(torch.from_numpy(own_B)), part=part)

    def _fill(self, copy: int, on_chunk: OnChunk) -> Entrance:
        whole: tuple[Tensor, ...] = ()
        all_N = np.arange(len(self.images))
        chunks = [slice(start, start + CHUNK) for start in range(0, len(all_N), CHUNK)]
        for turn in range(0, len(chunks), self.team.size):
            each = chunks[turn : turn + self.team.size]
            own = (each[self.team.rank :] or [slice(0, 0)])[0]
            part = self._compute(all_N[own], copy)
            if not whole:
                whole = tuple(
                    some_BLD.new_empty((len(all_N), *some_BLD.shape[1:]))
                    for some_BLD in part.tensors
                )
            for all_NLD, some_BLD in zip(whole, part.tensors, strict=True):
                all_NLD[own] = some_BLD
                for rank, chunk in enumerate(each):
                    self.team.spread(all_NLD[chunk], source=rank)
            on_chunk(sum(len(all_N[chunk]) for chunk in each))
        return Entrance(whole)

    def _compute(self, index_B: NDArray[np.int64], copy: int) -> Entrance:
        if not len(index_B):  # a process without a part still has to know the shapes
            return self._compute(np.arange(1), copy).rows(torch.arange(0))
        return self._enter(self._hidden(index_B.tolist(), copy))

    def _hidden(self, index: Sequence[int], copy: int) -> Tensor:
        if not self._augment:
            hidden_BLD = kept_hidden(self._backbone, self._first_block, self.images, index)
            if hidden_BLD is not None:
                return hidden_BLD
        seed = (self._seed, copy) if self._augment else None
        pixels_BCHW = pixels_of(self._backbone, self.images, index, crop_seed=seed)
        return image_hidden(self._backbone, pixels_BCHW, self._first_block)


@torch.no_grad()
def image_hidden(backbone: Backbone, pixels_BCHW: Tensor, first_block: int) -> Tensor:
    """Run uint8 pixels through the stem and the first blocks, (B, L, D)."""
    tower = backbone.image
    images_BCHW = backbone.normalise(pixels_BCHW).contiguous(memory_format=torch.channels_last)
    patches_BLD = torch.cat([tower.stem(part) for part in images_BCHW.split(STEM_CHUNK)])
    return _walked(tower.blocks[:first_block], tower.embed(patches_BLD), None)


@torch.no_grad()
def prompt_hidden(backbone: Backbone, tokens_NL: Tensor, first_block: int) -> tuple[Tensor, Mask]:
    """Run token ids through the first text blocks; also return the mask for those that follow."""
    assert backbone.text is not None
    x_NLD, mask = backbone.text.embed(tokens_NL)
    return _walked(backbone.text.blocks[:first_block], x_NLD, mask), mask


def _walked(blocks: Sequence[Block], x_BLD: Tensor, mask: Mask) -> Tensor:
    for block in blocks:
        x_BLD = block.attend(x_BLD, mask)
        x_BLD = x_BLD + block.mlp(x_BLD)
    return x_BLD

"""What a backbone's frozen part says of training images and prompts: computed once, not a step.

Up to and including the attention of the first block with experts nothing is learnt, nor is that
block's MLP, which runs beside the experts. So an image is here two tensors: the residual stream
where the experts read it, and the output of the block without them. From there on it is the
trainer's.

Legend: B images, N prompts, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as picture

from medley.backbone import Backbone
from medley.tower import Block, Mask
from trainer.datasets import ImageSet

__all__ = [
    "CHUNK",
    "Entrance",
    "ImageTrunk",
    "entrance_bytes",
    "image_entrance",
    "pixels_of",
    "prompt_entrance",
]

OnChunk = Callable[[int], None]
CHUNK = 64  # images in one forward of the trunk
# Images in one forward of the stem, channels last: medley-mini's convolutional stem then takes
# 5.6 ms of one core for an image, against 15 ms for 64 at a time in the usual order (2026-11).
STEM_CHUNK = 16
CROP_SCALE = (0.9, 1.0)  # RandomResizedCrop as in MoE-Adapters, arXiv:2403.11549; no flip
CROP_RATIO = (3 / 4, 4 / 3)


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
        seed = (self._seed, copy) if self._augment else None
        pixels_BCHW = pixels_of(self._backbone, self.images, index_B.tolist(), crop_seed=seed)
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
    return _enter(tower.blocks, x_BLD, None, first_block)


@torch.no_grad()
def prompt_entrance(backbone: Backbone, tokens_NL: Tensor, first_block: int) -> Entrance:
    """Run token ids through the frozen text blocks before the first one with experts."""
    assert backbone.text is not None
    x_NLD, mask = backbone.text.embed(tokens_NL)
    return _enter(backbone.text.blocks, x_NLD, mask, first_block)


def _enter(blocks: Sequence[Block], x_BLD: Tensor, mask: Mask, first_block: int) -> Entrance:
    for block in blocks[:first_block]:
        x_BLD = block.attend(x_BLD, mask)
        x_BLD = x_BLD + block.mlp(x_BLD)
    attended_BLD = blocks[first_block].attend(x_BLD, mask)
    return Entrance(attended_BLD, attended_BLD + blocks[first_block].mlp(attended_BLD), mask)


def pixels_of(
    backbone: Backbone,
    images: ImageSet,
    index: Sequence[int],
    *,
    crop_seed: tuple[int, int] | None = None,
) -> Tensor:
    """Decode images to uint8 (B, 3, H, W), by the backbone's own crop or by a random one.

    Args:
        backbone: whose preprocessing.
        images: the set.
        index: which of it.
        crop_seed: with the image's index it decides the random crop, so that nobody's order
            matters.
    """

    def one(i: int) -> Tensor:
        image = images.image(i)
        if crop_seed is not None:
            return _random_crop(image, backbone.image_size, (*crop_seed, i))
        return backbone.pixels(image)

    with ThreadPoolExecutor(4) as pool:  # Pillow resizes without holding the interpreter lock
        return torch.stack(list(pool.map(one, index)))


def _random_crop(image: Image.Image, size: tuple[int, int], seed: tuple[int, ...]) -> Tensor:
    """Torchvision's RandomResizedCrop, random by the seed and not by a global generator."""
    chance = np.random.default_rng(seed)
    area = image.width * image.height
    for _ in range(10):
        target = area * chance.uniform(*CROP_SCALE)
        ratio = np.exp(chance.uniform(*np.log(CROP_RATIO)))
        width, height = round(np.sqrt(target * ratio)), round(np.sqrt(target / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            break
    else:  # a long image: no such crop fits, take the middle
        width = height = min(image.width, image.height)
    left = int(chance.integers(0, image.width - width + 1))
    top = int(chance.integers(0, image.height - height + 1))
    crop = picture.resized_crop(
        image, top, left, height, width, list(size), picture.InterpolationMode.BICUBIC
    )
    return picture.pil_to_tensor(crop)

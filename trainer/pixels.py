"""Images of a set to the uint8 pixels that a backbone takes, by its own crop or by a random one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as picture

from medley.backbone import Backbone
from trainer.datasets import ImageSet

__all__ = ["pixels_of"]

CROP_SCALE = (0.9, 1.0)  # RandomResizedCrop as in MoE-Adapters, arXiv:2403.11549; no flip
CROP_RATIO = (3 / 4, 4 / 3)


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

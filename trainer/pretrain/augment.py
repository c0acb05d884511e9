"""Icons to training images: a background, colours, a small turn, blur, noise.

Never mirrored: left and right, and letters, are part of what icons mean.

Dimensions: B batch, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_WHITE, _BLACK = 0.5, 0.1  # share of backgrounds; the others have any colour
_BLACK_INK = 0.35  # share of single-colour icons drawn in black
_LEAST_CONTRAST = 0.7  # summed over the three channels
_TURN, _SHIFT = 0.25, 0.15  # radians; share of half the image
_GREY = 0.15
_COARSE_PX = (28, 40, 64)  # half of the images went through one of these sizes, as many inputs have


class Chance:
    """Uniform and normal numbers from one seeded generator."""

    def __init__(self, *seed: int) -> None:
        self._generator = torch.Generator()
        self._generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Numbers in [low, high)."""
        return low + (high - low) * torch.rand(*shape, generator=self._generator)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self._generator)


def augment(pictures: Sequence[NDArray[Any]], chance: Chance) -> Tensor:
    """Make training images of rendered icons.

    Args:
        pictures: B of (S, S, 4) RGBA or (S, S) alpha, uint8.
        chance: where every choice comes from.

    Returns:
        (B, 3, S, S) float32 between 0 and 1.
    """
    ground_B3 = _grounds(len(pictures), chance)
    ink_B3 = _inks(ground_B3, chance)
    layers_B4SS = torch.stack([_layer(*args) for args in zip(pictures, ink_B3, strict=True)])
    layers_B4SS = _move(layers_B4SS, chance)
    images_B3SS = layers_B4SS[:, :3] + ground_B3[:, :, None, None] * (1 - layers_B4SS[:, 3:])
    images_B3SS = _coarsen(images_B3SS, chance)
    return _light(images_B3SS, chance)


def on_white(pictures: Sequence[NDArray[Any]]) -> Tensor:
    """RGBA pictures on white, (B, 3, S, S) float32 between 0 and 1: what examinations see."""
    layers_B4SS = torch.stack([_layer(picture, torch.zeros(3)) for picture in pictures])
    return layers_B4SS[:, :3] + (1 - layers_B4SS[:, 3:])


def _layer(picture: NDArray[Any], ink_3: Tensor) -> Tensor:
    """(4, S, S): colour times opacity, and opacity."""
    values = torch.from_numpy(np.array(picture)).float() / 255
    if values.ndim == 2:
        return torch.cat([ink_3[:, None, None] * values, values[None]])
    colour, opacity = values[..., :3].permute(2, 0, 1), values[..., 3]
    return torch.cat([colour * opacity, opacity[None]])


def _grounds(batch: int, chance: Chance) -> Tensor:
    kind_B1 = chance.uniform(0, 1, batch, 1)
    ground_B3 = chance.uniform(0, 1, batch, 3)
    ground_B3 = torch.where(kind_B1 < _WHITE + _BLACK, torch.zeros(1), ground_B3)
    return torch.where(kind_B1 < _WHITE, torch.ones(1), ground_B3)


def _inks(ground_B3: Tensor, chance: Chance) -> Tensor:
    batch = len(ground_B3)
    ink_B3 = chance.uniform(0, 1, batch, 3)
    ink_B3 = torch.where(chance.uniform(0, 1, batch, 1) < _BLACK_INK, torch.zeros(1), ink_B3)
    contrast_B1 = (ink_B3 - ground_B3).abs().sum(1, keepdim=True)
    return torch.where(contrast_B1 < _LEAST_CONTRAST, 1 - ground_B3.round(), ink_B3)


def _move(layers_B4SS: Tensor, chance: Chance) -> Tensor:
    batch = len(layers_B4SS)
    turn_B = chance.uniform(-_TURN, _TURN, batch)
    zoom_B = 1 / chance.uniform(0.65, 1.15, batch)
    stretch_B = chance.uniform(0.875, 1.125, batch)
    affine_B23 = torch.zeros(batch, 2, 3)
    affine_B23[:, 0, 0] = zoom_B * stretch_B * turn_B.cos()
    affine_B23[:, 0, 1] = -zoom_B * turn_B.sin()
    affine_B23[:, 1, 0] = zoom_B * turn_B.sin()
    affine_B23[:, 1, 1] = zoom_B / stretch_B * turn_B.cos()
    affine_B23[:, :, 2] = chance.uniform(-_SHIFT, _SHIFT, batch, 2)
    grid = F.affine_grid(affine_B23, list(layers_B4SS.shape), align_corners=False)
    return F.grid_sample(layers_B4SS, grid, align_corners=False)


def _coarsen(images_B3SS: Tensor, chance: Chance) -> Tensor:
    side = images_B3SS.shape[-1]
    kind_B = chance.uniform(0, 2 * len(_COARSE_PX), len(images_B3SS)).long()
    for kind, px in enumerate(_COARSE_PX):
        chosen = kind_B == kind
        if px < side and chosen.any():
            small = F.interpolate(images_B3SS[chosen], size=px, mode="bilinear", antialias=True)
            images_B3SS[chosen] = F.interpolate(small, size=side, mode="bicubic").clamp(0, 1)
    return images_B3SS


def _light(images_B3SS: Tensor, chance: Chance) -> Tensor:
    batch = len(images_B3SS)
    grey_B111 = chance.uniform(0, 1, batch, 1, 1, 1) < _GREY
    grey = images_B3SS.mean(1, keepdim=True).expand_as(images_B3SS)
    images_B3SS = torch.where(grey_B111, grey, images_B3SS)
    contrast_B111 = chance.uniform(0.7, 1.3, batch, 1, 1, 1)
    brightness_B111 = chance.uniform(-0.1, 0.1, batch, 1, 1, 1)
    noise_B111 = chance.uniform(0, 0.03, batch, 1, 1, 1)
    images_B3SS = (images_B3SS - 0.5) * contrast_B111 + 0.5 + brightness_B111
    images_B3SS = images_B3SS + noise_B111 * chance.normal(*images_B3SS.shape)
    return images_B3SS.clamp(0, 1)

import numpy as np
import torch

from trainer.pretrain.augment import Chance, augment, on_white

CHANCE = np.random.default_rng(0)
PICTURES = [
    CHANCE.integers(0, 256, (64, 64, 4), np.uint8),
    CHANCE.integers(0, 256, (64, 64), np.uint8),
] * 4


def test_images_are_between_black_and_white() -> None:
    images = augment(PICTURES, Chance(0))
    assert images.shape == (8, 3, 64, 64)
    assert images.min() >= 0
    assert images.max() <= 1


def test_the_same_chance_makes_the_same_images_and_another_does_not() -> None:
    assert torch.equal(augment(PICTURES, Chance(1, 2)), augment(PICTURES, Chance(1, 2)))
    assert not torch.equal(augment(PICTURES, Chance(1, 2)), augment(PICTURES, Chance(1, 3)))


def test_nearly_all_single_colour_icons_stand_out_from_their_ground() -> None:
    box = np.zeros((64, 64), np.uint8)
    box[16:48, 16:48] = 255
    images = augment([box] * 64, Chance(5))
    middle, edge = images[:, :, 30:34, 30:34].mean((2, 3)), images[:, :, :4, :4].mean((2, 3))
    visible = (middle - edge).abs().amax(1) > 0.15  # turning grey hides one now and then
    assert visible.float().mean() > 0.9


def test_transparency_shows_white() -> None:
    images = on_white([np.zeros((4, 4, 4), np.uint8)])
    assert torch.equal(images, torch.ones(1, 3, 4, 4))

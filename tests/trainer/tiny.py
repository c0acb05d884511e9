"""A tiny data set that the tiny backbone learns in a few steps: one colour a class, with noise."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from trainer.datasets import ImageSet, PixelPicture

NoLargeFiles = Callable[..., AbstractContextManager[None]]

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 60, 220),
    "yellow": (220, 210, 40),
    "white": (235, 235, 235),
    "black": (20, 20, 20),
}


def pictures(classes: Sequence[str], per_class: int, *, seed: int = 0, noise: int = 40) -> ImageSet:
    """Noisy patches of 36 x 32 pixels. Prompts fit the tiny context of 12 tokens."""
    chance = np.random.default_rng(seed)
    items = []
    for label, name in enumerate(classes):
        for _ in range(per_class):
            jitter = chance.integers(-noise, noise + 1, (32, 36, 3))
            pixels = np.clip(np.array(COLOURS[name]) + jitter, 0, 255).astype(np.uint8)
            items.append((PixelPicture(pixels), label))
    return ImageSet("colours", tuple(classes), ("a {}",), items)


def folder_of(images: ImageSet, folder: Path) -> Path:
    """Write a set as a folder of class folders."""
    for index, (picture, label) in enumerate(images.items):
        file = folder / images.class_names[label] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture.read())
    return folder


def broken_image(path: Path) -> Path:
    """Write a file that calls itself an image and is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not an image")
    return path

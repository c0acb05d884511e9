"""Task `counting`: how many objects, one to six? The same emoji pasted into cells of a 3 x 3 grid.

Abstract: no object tells the answer, and the objects of the test are not those of training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.datasets import ImageSet, PixelPicture
from trainer.suite.drawing import SIDE, Pixels, pick_colour
from trainer.suite.icons import IconSet

__all__ = ["CLASSES", "build"]

CLASSES = (
    "one object",
    "two objects",
    "three objects",
    "four objects",
    "five objects",
    "six objects",
)
TEMPLATES = ("a picture of {}", "a picture with {}")
NUM_TRAIN = 3000
NUM_TEST = 1200
TRAIN_OBJECTS = 500
CELL = SIDE // 3
SEED = 3

THINGS = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places")

# Pictures that show several things at once, and the twenty-four clocks.
_NOT_ONE_THING = re.compile(
    r"beers|buildings|cards|cherries|chopsticks|clinking|clock|crossed|footprints|gloves|houses|"
    r"leaves|links|paw-prints|sparkle|socks|thirty"
)


def build(twemoji: Path) -> tuple[ImageSet, ImageSet]:
    """Training and test pictures with disjoint objects."""
    generator = np.random.default_rng(SEED)
    icons = IconSet(twemoji)
    names = [name for name in icons.names_in(*THINGS) if not _NOT_ONE_THING.search(name)]
    order = [names[index] for index in generator.permutation(len(names))]
    train = _pictures(icons, order[:TRAIN_OBJECTS], NUM_TRAIN, generator)
    test = _pictures(icons, order[TRAIN_OBJECTS:], NUM_TEST, generator)
    return ImageSet("counting", CLASSES, TEMPLATES, train), ImageSet(
        "counting", CLASSES, TEMPLATES, test
    )


def _pictures(
    icons: IconSet, names: Sequence[str], count: int, generator: np.random.Generator
) -> list[tuple[PixelPicture, int]]:
    drawings = [drawing for name in names if (drawing := icons.draw(name)) is not None]
    items = []
    for _ in range(count):
        drawing = drawings[generator.integers(len(drawings))]
        number = int(generator.integers(1, len(CLASSES) + 1))
        items.append((PixelPicture(_scattered(drawing, number, generator)), number - 1))
    return items


def _scattered(drawing: Image.Image, number: int, generator: np.random.Generator) -> Pixels:
    """`number` copies of the drawing, each shifted and scaled a little within a cell of its own."""
    canvas = Image.new("RGB", (SIDE, SIDE), pick_colour(generator, 200, 256))
    for cell in generator.permutation(9)[:number]:
        side = int(generator.integers(15, CELL))
        copy = drawing.resize((side, side), Image.Resampling.BICUBIC)
        left, top = (
            int(corner * CELL + generator.integers(0, CELL + 1 - side))
            for corner in (cell % 3, cell // 3)
        )
        canvas.paste(copy, (left, top), copy)
    return np.asarray(canvas)

"""Task `textile`: is a woven fabric sound, and if not, what is its defect? Simulated pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from medley.images import decode
from trainer.datasets import ImageSet, PixelPicture
from trainer.suite.drawing import SIDE

__all__ = ["CLASSES", "build"]

CLASSES = {
    "nominal": "plain woven fabric",
    "local": "fabric with a local defect",
    "global": "fabric with a global defect",
}
TEST_EVERY = 4


def build(conformal_clip_data: Path) -> tuple[ImageSet, ImageSet]:
    """Every fourth picture of each class is for testing."""
    folder = conformal_clip_data / "conformal_clip_data/data/textile_images/simulated"
    items = [
        (number % TEST_EVERY == TEST_EVERY - 1, (picture, label))
        for label, name in enumerate(CLASSES)
        for number, picture in enumerate(_pictures(folder / name))
    ]
    train, test = (
        ImageSet(
            "textile",
            tuple(CLASSES.values()),
            ("a photo of {}", "a picture of {}"),
            [item for is_test, item in items if is_test == wanted],
        )
        for wanted in (False, True)
    )
    return train, test


def _pictures(folder: Path) -> Iterator[PixelPicture]:
    for file in sorted(folder.glob("*.jpg")):
        image = decode(file.read_bytes()).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        yield PixelPicture(np.asarray(image))

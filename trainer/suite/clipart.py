"""Task `clipart`: what kind of thing does a clip art show? Classes are the library's own folders.

The Open Clip Art Library is uneven: gigantic files, broken files, copies in several folders. What
cannot be decoded within limits and what lies in two classes is left out; drawings of one series are
never on both sides of the split.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from medley.errors import ImageError
from medley.images import ImageLimits, decode
from trainer.datasets import ImageSet, PixelPicture
from trainer.suite.drawing import SIDE

__all__ = ["CLASSES", "build"]

CLASSES = {
    "animals": "an animal",
    "food": "food",
    "transportation": "a vehicle",
    "people": "a person",
    "plants": "a plant",
    "buildings": "a building",
    "recreation/music": "a musical instrument",
    "recreation/sports": "sports",
    "tools": "a tool",
    "office": "office supplies",
    "computer/hardware": "computer hardware",
    "recreation/toys": "a toy",
    "signs_and_symbols/weather": "the weather",
    "electronics": "electronics",
}
NOT_OF_THE_CLASS = frozenset(
    {"aiga-symbols", "roadsigns", "smilies", "clothing", "bodypart", "furniture", "weapons"}
)
TEMPLATES = ("a clip art of {}", "a picture of {}")
TEST_EVERY = 3
LIMITS = ImageLimits(max_pixels=16_000_000)
SEED = 0


def build(openclipart: Path) -> tuple[ImageSet, ImageSet]:
    """Every third series of each class is for testing."""
    root = openclipart / "usr/share/openclipart/png"
    files = {folder: _files(root / folder) for folder in CLASSES}
    twice = _in_two_classes(files)
    generator = np.random.default_rng(SEED)
    sides: tuple[list[tuple[PixelPicture, int]], ...] = ([], [])
    for label, folder in enumerate(CLASSES):
        series = _series([file for file in files[folder] if file not in twice])
        for place, index in enumerate(generator.permutation(len(series))):
            is_test = place % TEST_EVERY == TEST_EVERY - 1
            sides[is_test].extend((picture, label) for picture in _pictures(series[index]))
    train, test = (
        ImageSet("clipart", tuple(CLASSES.values()), TEMPLATES, items) for items in sides
    )
    return train, test


def _files(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.png"))
    return [file for file in found if NOT_OF_THE_CLASS.isdisjoint(file.relative_to(folder).parts)]


def _in_two_classes(files: Mapping[str, Sequence[Path]]) -> set[Path]:
    owners: dict[str, set[str]] = defaultdict(set)
    digests = {}
    for folder, members in files.items():
        for file in members:
            digests[file] = hashlib.sha256(file.read_bytes()).hexdigest()
            owners[digests[file]].add(folder)
    return {file for file, digest in digests.items() if len(owners[digest]) > 1}


def _series(files: Sequence[Path]) -> list[list[Path]]:
    """Files whose names differ only in a number at the end or in being black and white."""
    grouped: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        grouped[re.sub(r"(_bw)?[\d_.]*r?$", "", file.stem)].append(file)
    return [grouped[stem] for stem in sorted(grouped)]


def _pictures(files: Sequence[Path]) -> list[PixelPicture]:
    pictures = []
    for file in files:
        try:
            image = decode(file.read_bytes(), LIMITS)
        except ImageError:
            continue
        image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (SIDE, SIDE), "white")
        canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
        pictures.append(PixelPicture(np.asarray(canvas)))
    return pictures

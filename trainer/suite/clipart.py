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
from trainer.suite.drawing import SIDE, Pixels

__all__ = ["CLASSES", "build"]

CLASSES = {
    "an animal": ("animals",),
    "food": ("food",),
    "a vehicle": ("transportation/vehicles", "transportation/boating"),
    "a person": ("people",),
    "a plant": ("plants",),
    "a building": ("buildings",),
    "a musical instrument": ("recreation/music",),
    "sports": ("recreation/sports",),
    "a tool": ("tools",),
    "office supplies": ("office",),
    "computer hardware": ("computer/hardware",),
    "a toy": ("recreation/toys",),
    "the weather": ("signs_and_symbols/weather",),
    "electronics": ("electronics",),
}
NOT_OF_THE_CLASS = frozenset({"smilies", "clothing", "bodypart", "furniture", "weapons"})
TEMPLATES = ("a clip art of {}", "a picture of {}")
TEST_SHARE = 3  # one picture in three
LIMITS = ImageLimits(max_pixels=16_000_000)
SEED = 0

_INK = 20  # how much darker than white, of 255, a pixel must be to count as drawn
_MIN_DRAWN_SIDE = 16


def build(openclipart: Path) -> tuple[ImageSet, ImageSet]:
    """A third of each class is for testing, whole series at a time."""
    root = openclipart / "usr/share/openclipart/png"
    files = {name: _files(root, folders) for name, folders in CLASSES.items()}
    twice = _in_two_classes(files)
    generator = np.random.default_rng(SEED)
    train: list[tuple[PixelPicture, int]] = []
    test: list[tuple[PixelPicture, int]] = []
    for label, name in enumerate(CLASSES):
        series = _series([file for file in files[name] if file not in twice])
        seats = sum(len(drawings) for drawings in series) // TEST_SHARE
        for index in generator.permutation(len(series)):
            fits = len(series[index]) <= seats
            seats -= len(series[index]) if fits else 0
            (test if fits else train).extend((drawing, label) for drawing in series[index])
    names = tuple(CLASSES)
    return ImageSet("clipart", names, TEMPLATES, train), ImageSet("clipart", names, TEMPLATES, test)


def _files(root: Path, folders: Sequence[str]) -> list[Path]:
    found = sorted(file for folder in folders for file in (root / folder).rglob("*.png"))
    return [file for file in found if NOT_OF_THE_CLASS.isdisjoint(file.relative_to(root).parts)]


def _in_two_classes(files: Mapping[str, Sequence[Path]]) -> set[Path]:
    owners: dict[str, set[str]] = defaultdict(set)
    digests = {}
    for name, members in files.items():
        for file in members:
            digests[file] = hashlib.sha256(file.read_bytes()).hexdigest()
            owners[digests[file]].add(name)
    return {file for file, digest in digests.items() if len(owners[digest]) > 1}


def _series(files: Sequence[Path]) -> list[list[PixelPicture]]:
    """Drawings grouped by file name without the number, or "black and white", at its end.

    What looks like a drawing that was there before is left out, whatever its name.
    """
    grouped: dict[str, list[PixelPicture]] = defaultdict(list)
    seen = set()
    for file in files:
        pixels_HWC = _drawn(file)
        if pixels_HWC is None or (look := _look(pixels_HWC)) in seen:
            continue
        seen.add(look)
        grouped[re.sub(r"(_bw)?[\d_.]*r?$", "", file.stem)].append(PixelPicture(pixels_HWC))
    return [grouped[stem] for stem in sorted(grouped)]


def _drawn(file: Path) -> Pixels | None:
    """The drawing without its empty margin, on a white square; None if there is nothing to see."""
    try:
        image = decode(file.read_bytes(), LIMITS)
    except ImageError:
        return None
    box = image.convert("L").point([255] * (255 - _INK) + [0] * (1 + _INK)).getbbox()
    if box is None or max(box[2] - box[0], box[3] - box[1]) < _MIN_DRAWN_SIDE:
        return None
    image = image.crop(box)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.asarray(canvas)


def _look(pixels_HWC: Pixels) -> bytes:
    """The picture so coarse that two copies of different size come out equal."""
    small = Image.fromarray(pixels_HWC).resize((8, 8), Image.Resampling.BOX)
    return (np.asarray(small) >> 4).tobytes()

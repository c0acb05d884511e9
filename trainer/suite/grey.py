"""Tasks `fashion`, `digits` and `animals`: 28 x 28 grey pictures, enlarged.

Not one of them is drawn by us: two are photographs or handwriting, the third silhouettes.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.datasets import ImageSet, PixelPicture
from trainer.suite.drawing import Pixels, from_grey
from trainer.suite.pickles import load_array

__all__ = [
    "ANIMALS",
    "DIGITS",
    "FASHION",
    "build_animals",
    "build_digits",
    "build_fashion",
    "read_fashion",
]

NUM_TRAIN = 4000
NUM_TEST = 1500
SEED = 0

FASHION = (
    "t-shirt",
    "trousers",
    "pullover sweater",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
FASHION_TEMPLATES = ("a photo of a {}", "a picture of a {}")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANIMALS = (
    "bear",
    "bird",
    "cat",
    "cow",
    "dog",
    "elephant",
    "giraffe",
    "horse",
    "sheep",
    "zebra",
)

Labels = NDArray[np.int64]


def build_fashion(fashion_mnist: Path) -> tuple[ImageSet, ImageSet]:
    """Fashion-MNIST, a sample of the official split."""
    generator = np.random.default_rng(SEED)
    train, test = (
        _sampled(*read_fashion(fashion_mnist, part), count, generator)
        for part, count in (("train", NUM_TRAIN), ("t10k", NUM_TEST))
    )
    return (
        _image_set("fashion", FASHION, FASHION_TEMPLATES, *train),
        _image_set("fashion", FASHION, FASHION_TEMPLATES, *test),
    )


def read_fashion(fashion_mnist: Path, part: str) -> tuple[Pixels, Labels]:
    """Images uint8 (N, 28, 28) and labels (N,) of ``train`` or ``t10k``."""
    folder = fashion_mnist / "usr/share/datasets/fashion-mnist"
    images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    grey_NHW = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return grey_NHW, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)


def build_digits(mnist: Path) -> tuple[ImageSet, ImageSet]:
    """Ten thousand handwritten digits, split at random."""
    files = [mnist / "src" / "digits" / f"{digit}.json" for digit in range(10)]
    unit = [np.array(json.loads(file.read_text())["data"]).reshape(-1, 28, 28) for file in files]
    grey_NHW = np.concatenate([(digit * 255).round().astype(np.uint8) for digit in unit])
    labels_N = np.repeat(np.arange(10), [len(digit) for digit in unit])
    return _split_at_random("digits", DIGITS, ("a handwritten number {}",), grey_NHW, labels_N)


def build_animals(animal_shape_mnist: Path) -> tuple[ImageSet, ImageSet]:
    """Ten thousand animal silhouettes, split at random; some are in it twice and used once."""
    folder = animal_shape_mnist / "animal_shape_mnist" / "data" / "Animal Shape"
    grey_NHW = load_array(gzip.decompress((folder / "animal_data_version_3.gz").read_bytes()))
    labels = load_array(gzip.decompress((folder / "animal_label_version_3.gz").read_bytes()))
    templates = ("a silhouette of a {}", "a picture of a {}")
    _, first = np.unique(grey_NHW, axis=0, return_index=True)
    first.sort()
    grey_NHW, labels_N = grey_NHW[first].astype(np.uint8), labels.astype(np.int64).ravel()[first]
    return _split_at_random("animals", ANIMALS, templates, grey_NHW, labels_N)


def _split_at_random(
    name: str,
    class_names: tuple[str, ...],
    templates: tuple[str, ...],
    grey_NHW: Pixels,
    labels_N: Labels,
) -> tuple[ImageSet, ImageSet]:
    order = np.random.default_rng(SEED).permutation(len(grey_NHW))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN : NUM_TRAIN + NUM_TEST]
    return (
        _image_set(name, class_names, templates, grey_NHW[train], labels_N[train]),
        _image_set(name, class_names, templates, grey_NHW[test], labels_N[test]),
    )


def _sampled(
    grey_NHW: Pixels, labels_N: Labels, count: int, generator: np.random.Generator
) -> tuple[Pixels, Labels]:
    chosen = generator.permutation(len(grey_NHW))[:count]
    return grey_NHW[chosen], labels_N[chosen]


def _image_set(
    name: str,
    class_names: tuple[str, ...],
    templates: tuple[str, ...],
    grey_NHW: Pixels,
    labels_N: Labels,
) -> ImageSet:
    items = [
        (PixelPicture(from_grey(grey_HW)), int(label))
        for grey_HW, label in zip(grey_NHW, labels_N, strict=True)
    ]
    return ImageSet(name, class_names, templates, items)

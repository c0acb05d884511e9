"""How each MTIL data set lies on disk: from its folder and a part's name to labelled pictures.

The layouts are those that torchvision makes. Pictures stay files and are not opened here; whether
the files are there is a question for `trainer.mtil.check`. Counts are nobody's business here.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from medley.errors import DataError
from trainer.datasets import FilePicture, Picture, PixelPicture, Split
from trainer.mtil.arrays import read_cifar, read_idx

__all__ = ["LAYOUTS", "SEED", "SPLIT_BY_US", "Item", "in_test"]

SEED = 42
TRAIN_SHARE = 0.8

Item = tuple[Picture, int]
Labels = Mapping[str, int]
Layout = Callable[[Path, Split, Labels], list[Item]]


def aircraft(home: Path, split: Split, labels: Labels) -> list[Item]:
    """``images_variant_<split>.txt``: image number, a space, the variant."""
    listed = home / f"images_variant_{split}.txt"
    return [
        (FilePicture(home / "images" / f"{image}.jpg"), _label(labels, variant, listed))
        for image, variant in _rows(listed, 2, " ")
    ]


def caltech101(home: Path, split: Split, labels: Labels) -> list[Item]:
    """``<class>/image_<number>.jpg``; ``BACKGROUND_Google`` is no class and not looked into."""
    return _parted(_in_class_folders(home, "image_", labels), split)


def cifar100(home: Path, split: Split, labels: Labels) -> list[Item]:
    """Two pickles, of which only arrays and plain values are taken."""
    pixels_NHWC, labels_N = read_cifar(home / split, len(labels))
    return [(PixelPicture(p), int(label)) for p, label in zip(pixels_NHWC, labels_N, strict=True)]


def dtd(home: Path, split: Split, labels: Labels) -> list[Item]:
    """``labels/<split>1.txt``: ``<class>/<file>``, below ``images``."""
    listed = home / "labels" / f"{split}1.txt"
    return [
        (FilePicture(home / "images" / key / file), _label(labels, key, listed))
        for key, file in _rows(listed, 2, "/")
    ]


def eurosat(home: Path, split: Split, labels: Labels) -> list[Item]:
    """``<class>/<class>_<number>.jpg``."""
    return _parted(_in_class_folders(home, "", labels), split)


def flowers(home: Path, split: Split, labels: Labels) -> list[Item]:
    """``setid.mat`` numbers the images of each part, ``imagelabels.mat`` has all labels from 1."""
    numbers = _matlab(home / "setid.mat", {"train": "trnid", "test": "tstid"}[split])
    classes = _matlab(home / "imagelabels.mat", "labels")
    if numbers.size and not 1 <= numbers.min() <= numbers.max() <= len(classes):
        raise DataError(f"{home / 'setid.mat'}: image number outside 1..{len(classes)}")
    return [
        (
            FilePicture(home / "jpg" / f"image_{number:05d}.jpg"),
            _label(labels, str(classes[number - 1]), home / "imagelabels.mat"),
        )
        for number in numbers.tolist()
    ]


def food(home: Path, split: Split, labels: Labels) -> list[Item]:
    """``meta/<split>.json``: class to ``<class>/<number>``, below ``images``."""
    listed = home / "meta" / f"{split}.json"
    try:
        table = json.loads(_text(listed))
        pairs = [(key, str(image)) for key, images in table.items() for image in images]
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{listed}: not a table of images by class: {error}") from error
    return [
        (FilePicture(home / "images" / f"{image}.jpg"), _label(labels, key, listed))
        for key, image in pairs
    ]


def mnist(home: Path, split: Split, labels: Labels) -> list[Item]:
    """IDX files, packed or not. Grey becomes RGB without a copy."""
    stem = {"train": "train", "test": "t10k"}[split]
    file = home / f"{stem}-labels-idx1-ubyte"
    grey_NHW, digits_N = read_idx(home / f"{stem}-images-idx3-ubyte", 3), read_idx(file, 1)
    if len(grey_NHW) != len(digits_N):
        raise DataError(f"{file}: {len(digits_N)} labels for {len(grey_NHW)} images")
    return [
        (
            PixelPicture(np.broadcast_to(grey_HW[..., None], (*grey_HW.shape, 3))),
            _label(labels, str(digit), file),
        )
        for grey_HW, digit in zip(grey_NHW, digits_N, strict=True)
    ]


def pets(home: Path, split: Split, labels: Labels) -> list[Item]:
    """``annotations/<part>.txt``: ``<class>_<number>`` and three numbers that are not needed."""
    listed = home / "annotations" / {"train": "trainval.txt", "test": "test.txt"}[split]
    return [
        (
            FilePicture(home / "images" / f"{image}.jpg"),
            _label(labels, image.rpartition("_")[0], listed),
        )
        for image, *_ in _rows(listed, 4, " ")
    ]


def cars(home: Path, split: Split, labels: Labels) -> list[Item]:
    """Annotations give file and class number from 1; ``cars_meta.mat`` names the numbers."""
    meta = home / "devkit" / "cars_meta.mat"
    keys = [str(key) for key in _matlab(meta, "class_names")]
    if keys != list(labels):
        wrong = sorted(set(keys) ^ set(labels)) or ["the same in another order"]
        raise DataError(f"{meta}: not the {len(labels)} classes expected: {', '.join(wrong[:5])}")
    annotations = _cars_annotations(home, split)
    rows = _matlab(annotations, "annotations")
    try:
        pairs = [(str(row["fname"]), int(row["class"])) for row in rows]
    except (ValueError, TypeError, IndexError) as error:
        raise DataError(f"{annotations}: no file and class in it: {error}") from error
    if strange := [number for _, number in pairs if not 1 <= number <= len(keys)]:
        raise DataError(f"{annotations}: class number {strange[0]} of only {len(keys)}")
    folder = home / f"cars_{split}"
    return [(FilePicture(folder / file), number - 1) for file, number in pairs]


def sun397(home: Path, split: Split, labels: Labels) -> list[Item]:
    """``<letter>/<class>/sun_<word>.jpg``, some classes one folder deeper."""
    return _parted(_in_class_folders(home, "sun_", labels), split)


LAYOUTS: dict[str, Layout] = {
    "aircraft": aircraft,
    "caltech101": caltech101,
    "cifar100": cifar100,
    "dtd": dtd,
    "eurosat": eurosat,
    "flowers": flowers,
    "food": food,
    "mnist": mnist,
    "pets": pets,
    "cars": cars,
    "sun397": sun397,
}
SPLIT_BY_US = frozenset({"caltech101", "eurosat", "sun397"})


def in_test(count: int) -> set[int]:
    """Which of `count` images are test images where no official split exists.

    As the reference code has it: ``torch.utils.data.random_split`` of 80 % (rounded down) and the
    rest, with a generator seeded 42.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED))
    return set(order[int(TRAIN_SHARE * count) :].tolist())


def _parted(items: list[Item], split: Split) -> list[Item]:
    test = in_test(len(items))
    return [item for index, item in enumerate(items) if (index in test) == (split == "test")]


def _in_class_folders(home: Path, prefix: str, labels: Labels) -> list[Item]:
    """All images, classes in the order of their labels and files by name; a folder may lack."""
    return [
        (FilePicture(file), label)
        for key, label in labels.items()
        if (home / key).is_dir()
        for file in sorted((home / key).glob(f"{prefix}*.jpg"))
        if file.name[0] != "."
    ]


def _cars_annotations(home: Path, split: Split) -> Path:
    """The labels of the test part came later: they lie beside the devkit, or in it."""
    if split == "train":
        return home / "devkit" / "cars_train_annos.mat"
    beside = home / "cars_test_annos_withlabels.mat"
    inside = home / "devkit" / beside.name
    return inside if inside.is_file() and not beside.is_file() else beside


def _label(labels: Labels, key: str, file: Path) -> int:
    if key not in labels:
        raise DataError(f"{file}: unknown class {key!r}")
    return labels[key]


def _rows(file: Path, columns: int, separator: str) -> Iterator[list[str]]:
    for number, line in enumerate(_text(file).splitlines(), start=1):
        row = line.strip().split(separator, columns - 1)
        if len(row) != columns:
            raise DataError(f"{file}: line {number}: {line[:60]!r} has not {columns} columns")
        yield row


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _matlab(file: Path, name: str) -> Any:
    """One variable of a .mat file, as a vector."""
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    try:
        return np.atleast_1d(loadmat(file, squeeze_me=True)[name])
    except KeyError as error:
        raise DataError(f"{file}: no variable {name!r} in it") from error
    except (
        MatReadError,
        OSError,
        ValueError,
        TypeError,
        IndexError,
        EOFError,
        NotImplementedError,
        zlib.error,
    ) as error:
        raise DataError(f"{file}: not a MATLAB file: {error}") from error

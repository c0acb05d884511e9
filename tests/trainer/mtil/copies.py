"""Tiny copies of the eleven data sets, laid out as the real ones, with a few images of each part.

Every picture is 12 x 8 pixels and as red as its label, so that a test can see whose it is.
"""

import gzip
import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

from trainer.mtil.words import class_entries

__all__ = ["COPIES", "idx", "pickled_by_python_2", "save_jpeg"]


def save_jpeg(path: Path, label: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), (10 * label, 0, 0)).save(path, quality=95)


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def pickled_by_python_2(value: object) -> bytes:
    """CIFAR's files are of that age: all text and bytes are what was called `str` then."""

    def save_str(pickler: Any, value: str | bytes) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        pickler.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)

    buffer = io.BytesIO()
    pickler: Any = pickle._Pickler(buffer, protocol=2)
    pickler.dispatch = {**pickler.dispatch, str: save_str, bytes: save_str}
    pickler.dump(value)
    return buffer.getvalue()


def aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b/data"
    for split, first in (("train", 1), ("test", 5)):
        lines = []
        for number, variant, label in ((first, "707-320", 0), (first + 1, "BAE 146-200", 37)):
            save_jpeg(data / f"images/{number:07d}.jpg", label % 20)
            lines.append(f"{number:07d} {variant}\n")
        (data / f"images_variant_{split}.txt").write_text("".join(lines))


def caltech101(root: Path) -> None:
    home = root / "caltech101/101_ObjectCategories"
    for key, label in (("Faces", 0), ("accordion", 4)):
        for number in range(1, 6):
            save_jpeg(home / key / f"image_{number:04d}.jpg", label)
    save_jpeg(home / "BACKGROUND_Google/image_0001.jpg", 9)


def cifar100(root: Path) -> None:
    home = root / "cifar-100-python"
    home.mkdir(parents=True)
    for split, count in (("train", 4), ("test", 2)):
        pixels = np.zeros((count, 3, 32, 32), np.uint8)
        labels = [label % 3 for label in range(count)]
        pixels[:, 0] = np.array(labels)[:, None, None] * 10
        table = {"data": pixels.reshape(count, -1), "fine_labels": labels, "batch_label": split}
        (home / split).write_bytes(pickled_by_python_2(table))


def dtd(root: Path) -> None:
    home = root / "dtd/dtd"
    (home / "labels").mkdir(parents=True)
    for split, number in (("train", 1), ("test", 2)):
        keys = (("banded", 0), ("polka-dotted", 30))
        for key, label in keys:
            save_jpeg(home / f"images/{key}/{key}_{number:04d}.jpg", label % 20)
        lines = [f"{key}/{key}_{number:04d}.jpg\n" for key, _ in keys]
        (home / f"labels/{split}1.txt").write_text("".join(lines))


def eurosat(root: Path) -> None:
    for key, label in (("AnnualCrop", 0), ("SeaLake", 9)):
        for number in range(1, 6):
            save_jpeg(root / f"eurosat/2750/{key}/{key}_{number}.jpg", label)


def flowers(root: Path) -> None:
    home = root / "flowers-102"
    for number, label in enumerate((76, 0, 1, 0), start=1):
        save_jpeg(home / f"jpg/image_{number:05d}.jpg", label % 20)
    savemat(home / "imagelabels.mat", {"labels": np.array([[77, 1, 2, 1]], np.uint8)})
    parts = {"trnid": [[3, 2]], "valid": [[1]], "tstid": [[4]]}
    savemat(home / "setid.mat", {k: np.array(v, np.uint16) for k, v in parts.items()})


def food(root: Path) -> None:
    home = root / "food-101"
    (home / "meta").mkdir(parents=True)
    for split, number in (("train", 11), ("test", 12)):
        table = {}
        for key, label in (("waffles", 100), ("apple_pie", 0)):
            save_jpeg(home / f"images/{key}/{number}.jpg", label % 20)
            table[key] = [f"{key}/{number}"]
        (home / f"meta/{split}.json").write_text(json.dumps(table))


def mnist(root: Path) -> None:
    home = root / "MNIST/raw"
    home.mkdir(parents=True)
    for stem, digits in (("train", [5, 0, 4]), ("t10k", [7])):
        grey = np.array(digits)[:, None, None] * np.full((1, 28, 28), 10)
        labels = np.array(digits)
        (home / f"{stem}-labels-idx1-ubyte").write_bytes(idx(labels))
        (home / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(grey)))


def pets(root: Path) -> None:
    home = root / "oxford-iiit-pet"
    (home / "annotations").mkdir(parents=True)
    for part, number in (("trainval", 100), ("test", 7)):
        lines = []
        for key, label in (("Abyssinian", 0), ("american_pit_bull_terrier", 2)):
            save_jpeg(home / f"images/{key}_{number}.jpg", label)
            lines.append(f"{key}_{number} {label + 1} 1 1\n")
        (home / f"annotations/{part}.txt").write_text("".join(lines))


def cars(root: Path) -> None:
    home = root / "stanford_cars"
    (home / "devkit").mkdir(parents=True)
    names = np.array([entry.key for entry in class_entries("cars")], dtype=object)
    savemat(home / "devkit/cars_meta.mat", {"class_names": names})
    annotations = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    for split, file in annotations.items():
        rows = np.zeros((1, 2), dtype=[("class", object), ("fname", object)])
        for index, label in enumerate((15, 0)):
            save_jpeg(home / f"cars_{split}/{index:05d}.jpg", label)
            rows[0, index] = (np.uint8(label + 1), f"{index:05d}.jpg")
        savemat(home / file, {"annotations": rows})


def sun397(root: Path) -> None:
    for key, label in (("a/abbey", 0), ("a/apartment_building/outdoor", 8)):
        for word in "abcde":
            save_jpeg(root / f"SUN397/{key}/sun_{word}.jpg", label)


COPIES: dict[str, Callable[[Path], None]] = {
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

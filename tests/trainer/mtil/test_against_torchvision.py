"""Where torchvision reads a copy too, it finds the same files, labels and seeded parts.

Left out: CIFAR-100 and Flowers, of which torchvision takes only the very bytes its makers gave out.
"""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset, random_split
from torchvision import datasets

from tests.trainer.mtil.copies import COPIES
from trainer.datasets import FilePicture, Split
from trainer.mtil.reading import read

Pairs = set[tuple[str, int]]


def caltech101(root: Path) -> list[tuple[str, int]]:
    found = datasets.Caltech101(root)
    home = root / "caltech101/101_ObjectCategories"
    labels = {"Faces": 0, "accordion": 4}
    return [
        (str(home / found.categories[y] / f"image_{n:04d}.jpg"), labels[found.categories[y]])
        for n, y in zip(found.index, found.y, strict=True)
    ]


def eurosat(root: Path) -> list[tuple[str, int]]:
    found = datasets.EuroSAT(root)
    return [(path, {"AnnualCrop": 0, "SeaLake": 9}[found.classes[y]]) for path, y in found.samples]


def files(found: Any, labels: dict[str, int]) -> Pairs:
    paths, numbers = found._image_files, found._labels
    return {(str(p), labels[found.classes[y]]) for p, y in zip(paths, numbers, strict=True)}


def aircraft(root: Path, split: Split) -> Pairs:
    names = [f"variant {number}" for number in range(100)]
    names[0], names[37] = "707-320", "BAE 146-200"
    (root / "fgvc-aircraft-2013b/data/variants.txt").write_text("\n".join(names))
    found = datasets.FGVCAircraft(str(root), split=split)
    return files(found, {name: label for label, name in enumerate(names)})


def dtd(root: Path, split: Split) -> Pairs:
    return files(datasets.DTD(root, split=split), {"banded": 0, "polka-dotted": 30})


def food(root: Path, split: Split) -> Pairs:
    return files(datasets.Food101(root, split=split), {"apple_pie": 0, "waffles": 100})


def pets(root: Path, split: Split) -> Pairs:
    found = datasets.OxfordIIITPet(root, split={"train": "trainval", "test": "test"}[split])
    return {(str(path), label) for path, label in zip(found._images, found._labels, strict=True)}


def cars(root: Path, split: Split) -> Pairs:
    return {(path, int(y)) for path, y in datasets.StanfordCars(root, split=split)._samples}


OFFICIAL: dict[str, Callable[[Path, Split], Pairs]] = {
    "aircraft": aircraft,
    "dtd": dtd,
    "food": food,
    "pets": pets,
    "cars": cars,
}


def ours(task: str, split: Split, root: Path) -> Pairs:
    items = read(task, split, root).items
    return {(str(p.path), label) for p, label in items if isinstance(p, FilePicture)}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("task", OFFICIAL)
def test_official_parts_are_the_same(task: str, split: Split, tmp_path: Path) -> None:
    COPIES[task](tmp_path)
    expected = OFFICIAL[task](tmp_path, split)
    assert len(expected) == 2
    assert ours(task, split, tmp_path) == expected


@pytest.mark.parametrize("task", ["caltech101", "eurosat"])
def test_seeded_parts_are_the_same(task: str, tmp_path: Path) -> None:
    COPIES[task](tmp_path)
    images = {"caltech101": caltech101, "eurosat": eurosat}[task](tmp_path)
    numbers = TensorDataset(torch.arange(10))
    parts = random_split(numbers, [8, 2], generator=torch.Generator().manual_seed(42))
    assert ours(task, "train", tmp_path) == {images[index] for index in parts[0].indices}
    assert ours(task, "test", tmp_path) == {images[index] for index in parts[1].indices}


def test_mnist_is_the_same(tmp_path: Path) -> None:
    COPIES["mnist"](tmp_path)
    for stem in ("train", "t10k"):
        raw = tmp_path / "MNIST/raw" / f"{stem}-images-idx3-ubyte"
        raw.write_bytes(gzip.decompress(raw.with_name(f"{raw.name}.gz").read_bytes()))
    found = datasets.MNIST(tmp_path, train=True)
    images = read("mnist", "train", tmp_path)
    assert images.labels.tolist() == found.targets.tolist()
    assert [images.image(i).convert("L").getpixel((0, 0)) for i in range(3)] == [
        int(grey[0, 0]) for grey in found.data
    ]


def test_sun397_has_the_same_files_in_an_order_of_its_own(tmp_path: Path) -> None:
    COPIES["sun397"](tmp_path)
    names = ("/a/abbey", "/a/apartment_building/outdoor")
    (tmp_path / "SUN397/ClassName.txt").write_text("\n".join(names))
    expected = files(datasets.SUN397(tmp_path), {name[3:]: 8 * i for i, name in enumerate(names)})
    assert ours("sun397", "train", tmp_path) | ours("sun397", "test", tmp_path) == expected

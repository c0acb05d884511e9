"""Each data set is read from a tiny copy of its own layout, and refused when that is damaged."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch.utils.data import TensorDataset, random_split

from medley.errors import DataError, ImageError
from tests.trainer.mtil.copies import COPIES, idx
from trainer.datasets import Split, open_dataset
from trainer.mtil import TASKS, load_task
from trainer.mtil.layouts import in_test
from trainer.mtil.reading import read
from trainer.mtil.words import TEMPLATES

# What the copies hold, in the order of the data set's own lists.
EXPECTED: dict[str, dict[Split, list[str]]] = {
    "aircraft": {"train": ["707-320", "BAE 146-200"], "test": ["707-320", "BAE 146-200"]},
    "cifar100": {
        "train": ["apple", "aquarium fish", "baby", "apple"],
        "test": ["apple", "aquarium fish"],
    },
    "dtd": {"train": ["banded", "polka-dotted"], "test": ["banded", "polka-dotted"]},
    "flowers": {
        "train": ["hard-leaved pocket orchid", "pink primrose"],
        "test": ["pink primrose"],
    },
    "food": {"train": ["waffles", "apple pie"], "test": ["waffles", "apple pie"]},
    "mnist": {"train": ["5 - five", "0 - zero", "4 - four"], "test": ["7 - seven"]},
    "pets": {
        "train": ["Abyssinian", "American Pit Bull Terrier"],
        "test": ["Abyssinian", "American Pit Bull Terrier"],
    },
    "cars": {
        "train": ["Audi V8 Sedan 1994", "AM General Hummer SUV 2000"],
        "test": ["Audi V8 Sedan 1994", "AM General Hummer SUV 2000"],
    },
}
SEEDED = {
    "caltech101": {"off-center face", "accordion"},
    "eurosat": {"annual crop land", "lake or sea"},
    "sun397": {"abbey", "apartment building/outdoor"},
}


def names(task: str, split: Split, root: Path) -> list[str]:
    images = read(task, split, root)
    return [images.class_names[label] for label in images.labels]


def test_there_is_a_copy_of_every_task() -> None:
    assert tuple(COPIES) == TASKS
    assert EXPECTED.keys() | SEEDED.keys() == set(TASKS)


@pytest.mark.parametrize("task", EXPECTED)
def test_official_parts_are_read_in_their_own_order(task: str, tmp_path: Path) -> None:
    COPIES[task](tmp_path)
    for split, expected in EXPECTED[task].items():
        assert names(task, split, tmp_path) == expected


@pytest.mark.parametrize("task", TASKS)
def test_every_picture_is_that_of_its_label(task: str, tmp_path: Path) -> None:
    COPIES[task](tmp_path)
    images = read(task, "train", tmp_path)
    assert images.templates == TEMPLATES[task]
    for index, label in enumerate(images.labels):
        red = images.image(index).convert("RGB").getpixel((1, 1))[0]  # type: ignore[index]
        assert red == pytest.approx(10 * (label % 20), abs=6)


@pytest.mark.parametrize("task", SEEDED)
def test_a_seeded_split_takes_each_image_once(task: str, tmp_path: Path) -> None:
    COPIES[task](tmp_path)
    train, test = read(task, "train", tmp_path), read(task, "test", tmp_path)
    assert (len(train), len(test)) == (8, 2)
    files = {picture.read() for picture, _ in train.items} | {p.read() for p, _ in test.items}
    assert len({str(picture) for picture, _ in (*train.items, *test.items)}) == 10
    assert len(files) == 2  # one shade of red a class: the background class is in neither part
    assert {train.class_names[i] for i in np.flatnonzero(train.counts + test.counts)} == SEEDED[
        task
    ]


def test_the_seeded_split_is_the_one_of_the_reference_code() -> None:
    numbers = TensorDataset(torch.arange(1003))
    parts = random_split(
        numbers,
        [802, 201],
        generator=torch.Generator().manual_seed(42),
    )
    assert in_test(1003) == set(parts[1].indices)
    assert in_test(10) == {3, 7}  # a torch that shuffles otherwise would be a silent change


def test_labels_of_the_cars_test_part_may_lie_in_the_devkit(tmp_path: Path) -> None:
    COPIES["cars"](tmp_path)
    home = tmp_path / "stanford_cars"
    file = home / "cars_test_annos_withlabels.mat"
    shutil.move(file, home / "devkit" / file.name)
    assert names("cars", "test", tmp_path) == EXPECTED["cars"]["test"]


def test_mnist_is_read_packed_or_not(tmp_path: Path) -> None:
    COPIES["mnist"](tmp_path)
    raw = tmp_path / "MNIST/raw"
    before = read("mnist", "test", tmp_path)
    (raw / "t10k-images-idx3-ubyte").write_bytes(idx(np.full((1, 28, 28), 70)))
    (raw / "t10k-images-idx3-ubyte.gz").unlink()
    assert read("mnist", "test", tmp_path).digest == before.digest


class Caller:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


DAMAGE = {
    "aircraft: a class nobody knows": (
        *("aircraft", "fgvc-aircraft-2013b/data/images_variant_train.txt", b"1 Zeppelin\n"),
        "unknown class 'Zeppelin'",
    ),
    "aircraft: a line too short": (
        *("aircraft", "fgvc-aircraft-2013b/data/images_variant_train.txt", b"1\n"),
        "line 1: '1' has not 2 columns",
    ),
    "dtd: not text": ("dtd", "dtd/dtd/labels/train1.txt", b"\xff\xfe\xff", "cannot be read"),
    "food: not JSON": ("food", "food-101/meta/train.json", b"{", "not a table of images"),
    "food: JSON of another shape": (
        *("food", "food-101/meta/train.json", b"[1]"),
        "not a table of images",
    ),
    "flowers: not a .mat file": ("flowers", "flowers-102/setid.mat", b"nothing", "not a MATLAB"),
    "flowers: an empty .mat file": ("flowers", "flowers-102/setid.mat", b"", "not a MATLAB"),
    "pets: another format": (
        *("pets", "oxford-iiit-pet/annotations/trainval.txt", b"Abyssinian_1 1\n"),
        "has not 4 columns",
    ),
    "mnist: cut off": (
        *("mnist", "MNIST/raw/train-labels-idx1-ubyte", idx(np.arange(3))[:-1]),
        "3 bytes announced, 2 there",
    ),
    "mnist: something else": (
        *("mnist", "MNIST/raw/train-labels-idx1-ubyte", b"GIF89a.."),
        "not an IDX file",
    ),
    "mnist: a broken archive": (
        *("mnist", "MNIST/raw/train-images-idx3-ubyte.gz", b"\x1f\x8b\x08"),
        "cannot be unpacked",
    ),
    "mnist: too few labels": (
        *("mnist", "MNIST/raw/train-labels-idx1-ubyte", idx(np.arange(2))),
        "2 labels for 3 images",
    ),
    "mnist: no digit": (
        *("mnist", "MNIST/raw/train-labels-idx1-ubyte", idx(np.array([1, 2, 10]))),
        "unknown class '10'",
    ),
    "cifar: a pickle that calls": (
        *("cifar100", "cifar-100-python/train", pickle.dumps({"data": Caller()})),
        "system is not allowed",
    ),
    "cifar: half a pickle": (
        *("cifar100", "cifar-100-python/train", pickle.dumps({"data": [1] * 99})[:40]),
        "not a pickled array",
    ),
    "cifar: CIFAR-10": (
        *("cifar100", "cifar-100-python/train", pickle.dumps({"data": [], "labels": []})),
        "not a part of CIFAR-100",
    ),
    "cifar: no table": ("cifar100", "cifar-100-python/train", pickle.dumps([]), "not a pickled"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_named_in_one_line(case: str, tmp_path: Path) -> None:
    task, file, data, message = DAMAGE[case]
    COPIES[task](tmp_path)
    (tmp_path / file).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        read(task, "train", tmp_path)
    assert str(tmp_path / file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "pixels", "message"),
    [
        ([0, 100], np.zeros((2, 3072), np.uint8), "a label outside 0..99"),
        ([0], np.zeros((2, 3072), np.uint8), "2 images but labels"),
        ([0, 1], np.zeros((2, 3072), np.int32), "2 images but labels"),
        ([0], np.zeros((1, 3000), np.uint8), "not a part of CIFAR-100"),
    ],
)
def test_cifar_arrays_that_do_not_fit_are_refused(
    labels: list[int], pixels: np.ndarray, message: str, tmp_path: Path
) -> None:
    COPIES["cifar100"](tmp_path)
    table = pickle.dumps({"data": pixels, "fine_labels": labels}, protocol=4)
    (tmp_path / "cifar-100-python/train").write_bytes(table)
    with pytest.raises(DataError, match=message):
        read("cifar100", "train", tmp_path)


def test_cars_of_other_names_are_refused(tmp_path: Path) -> None:
    COPIES["cars"](tmp_path)
    meta = tmp_path / "stanford_cars/devkit/cars_meta.mat"
    savemat(meta, {"class_names": np.array(["Tesla"], object)})
    with pytest.raises(DataError, match="not the 196 classes expected: "):
        read("cars", "train", tmp_path)
    savemat(meta, {"names": np.array(["Tesla"], object)})
    with pytest.raises(DataError, match="no variable 'class_names'"):
        read("cars", "train", tmp_path)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        (np.array([(197, "1.jpg")], dtype=[("class", "u1"), ("fname", "O")]), "197 of only 196"),
        (np.array([(0, "1.jpg")], dtype=[("class", "u1"), ("fname", "O")]), "0 of only 196"),
        (np.array([3.5]), "no file and class in it"),
    ],
)
def test_cars_annotations_that_make_no_sense_are_refused(
    annotations: np.ndarray, message: str, tmp_path: Path
) -> None:
    COPIES["cars"](tmp_path)
    file = tmp_path / "stanford_cars/devkit/cars_train_annos.mat"
    savemat(file, {"annotations": annotations})
    with pytest.raises(DataError, match=message) as caught:
        read("cars", "train", tmp_path)
    assert str(file) in str(caught.value)


def test_flowers_that_are_not_numbered_are_refused(tmp_path: Path) -> None:
    COPIES["flowers"](tmp_path)
    savemat(tmp_path / "flowers-102/setid.mat", {"trnid": np.array([[9]])})
    with pytest.raises(DataError, match=r"image number outside 1..4"):
        read("flowers", "train", tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_a_folder_that_is_not_there_is_named(task: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder") as caught:
        load_task(task, "train", root=tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("aircraft", "fgvc-aircraft-2013b/data/images_variant_train.txt"),
        ("cifar100", "cifar-100-python/train"),
        ("flowers", "flowers-102/imagelabels.mat"),
        ("mnist", "MNIST/raw/train-images-idx3-ubyte.gz"),
        ("cars", "stanford_cars/devkit/cars_train_annos.mat"),
    ],
)
def test_a_list_that_is_not_there_is_named(task: str, file: str, tmp_path: Path) -> None:
    COPIES[task](tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match="no such file") as caught:
        read(task, "train", tmp_path)
    assert str(tmp_path / file.removesuffix(".gz")) in str(caught.value)


def test_a_truncated_image_fails_when_it_is_opened(tmp_path: Path) -> None:
    COPIES["pets"](tmp_path)
    file = tmp_path / "oxford-iiit-pet/images/Abyssinian_100.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    images = read("pets", "train", tmp_path)
    with pytest.raises(ImageError):
        images.image(0)


def test_a_task_that_mtil_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="MTIL has no task 'imagenet'; there are aircraft"):
        load_task("imagenet", "train", root=tmp_path)


def test_without_a_root_one_line_says_what_to_do() -> None:
    with pytest.raises(DataError, match="cannot be fetched for you: give their folder with --root"):
        load_task("dtd", "train", root=None)
    with pytest.raises(DataError, match="give their folder with --root"):
        open_dataset("mtil:dtd", "train")


def test_a_part_of_other_size_is_not_learnt_from(tmp_path: Path) -> None:
    COPIES["dtd"](tmp_path)
    with pytest.raises(DataError, match="dtd train: 1,880 images expected, 2 found") as caught:
        open_dataset(f"mtil:dtd:{tmp_path}", "train")
    assert "medley data check" in str(caught.value)
    assert "\n" not in str(caught.value)

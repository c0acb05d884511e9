"""Labelled images: what a task is learnt from and measured on.

Reads folders, CSV tables and the small suite into one `ImageSet`, lazily, in a fixed order. It
knows no model: resizing and normalising belong to the backbone.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medley.errors import DataError, ImageError
from medley.images import decode
from medley.prompts import DEFAULT_TEMPLATES
from trainer.sources import DEFAULT_CACHE

__all__ = [
    "FilePicture",
    "ImageSet",
    "Picture",
    "PixelPicture",
    "Split",
    "align",
    "few_shot",
    "normalised",
    "open_dataset",
    "read_csv",
    "read_folder",
    "require_trainable",
    "split",
    "unreadable",
]

Split = Literal["train", "test"]
Labels = NDArray[np.int64]

SUITE_PREFIX = "suite:"
MTIL_PREFIX = "mtil:"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"})
MIN_IMAGES_PER_CLASS = 2
SHOWN_PROBLEMS = 5

_log = logging.getLogger(__name__)


class Picture(Protocol):
    """One image that is opened only when asked for."""

    def read(self) -> bytes:
        """The encoded image, as it would be sent to a server."""

    def image(self) -> Image.Image:
        """The decoded image, RGB."""

    def content(self) -> bytes:
        """What identifies the picture; goes into the digest of its set."""


@dataclass(frozen=True)
class FilePicture:
    """An image file."""

    path: Path

    def read(self) -> bytes:
        """The file; ``DataError`` if it cannot be read."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}") from error

    def image(self) -> Image.Image:
        """The decoded file; ``ImageError`` if it is not a sound image."""
        return decode(self.read())

    def content(self) -> bytes:
        """The file."""
        return self.read()


@dataclass(frozen=True, eq=False)
class PixelPicture:
    """An image held in memory: uint8 (H, W, 3)."""

    pixels: NDArray[np.uint8]

    def read(self) -> bytes:
        """The pixels as PNG."""
        buffer = io.BytesIO()
        self.image().save(buffer, format="PNG")
        return buffer.getvalue()

    def image(self) -> Image.Image:
        """The pixels, undecoded because they need no decoding."""
        return Image.fromarray(self.pixels)

    def content(self) -> bytes:
        """The raw pixels: unlike PNG bytes they do not depend on a compressor's version."""
        return self.pixels.tobytes()


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one task.

    Attributes:
        name: for people and reports.
        class_names: what the text tower reads; label ``i`` is ``class_names[i]``.
        templates: prompts with one ``{}`` for the class name.
        items: pictures with their labels, in a fixed order.

    Raises:
        DataError: a label without a class, class names that differ only in case or punctuation,
            or a template without exactly one ``{}``.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    items: Sequence[tuple[Picture, int]]

    def __post_init__(self) -> None:
        _refuse_duplicates(self.name, self.class_names)
        _check_templates(self.name, self.templates)
        for _, label in self.items:
            if not 0 <= label < len(self.class_names):
                raise DataError(
                    f"{self.name}: label {label} of only {len(self.class_names)} classes"
                )

    def __len__(self) -> int:
        return len(self.items)

    def image(self, index: int) -> Image.Image:
        """The decoded image; ``ImageError`` or ``DataError`` if it cannot be had."""
        return self.items[index][0].image()

    def bytes_of(self, index: int) -> bytes:
        """The encoded image, as it would be sent to a server."""
        return self.items[index][0].read()

    @cached_property
    def labels(self) -> Labels:
        """Labels of all items, int64 (N,), read-only."""
        labels_N = np.array([label for _, label in self.items], dtype=np.int64)
        labels_N.flags.writeable = False
        return labels_N

    @cached_property
    def counts(self) -> Labels:
        """Images per class, int64 (C,)."""
        return np.bincount(self.labels, minlength=len(self.class_names)).astype(np.int64)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over class names, labels and contents, in order, but not paths and `name`."""
        total = hashlib.sha256(json.dumps(self.class_names).encode())
        for picture, label in self.items:
            total.update(label.to_bytes(8, "little"))
            total.update(hashlib.sha256(picture.content()).digest())
        return total.hexdigest()

    def subset(self, indices: Iterable[int]) -> ImageSet:
        """The items at these indices, in the order given, with the same classes."""
        return replace(self, items=tuple(self.items[int(index)] for index in indices))


def open_dataset(
    spec: str | Path,
    split: Split,
    *,
    cache: Path = DEFAULT_CACHE,
    skip_unreadable: bool = False,
) -> ImageSet:
    """Open a data set by what a person would write on a command line.

    Args:
        spec: ``suite:<task>``, ``mtil:<task>:<folder of all MTIL data sets>``, a CSV file, or a
            folder of class folders. A folder with ``train`` in it is read by split; any other
            folder, and a CSV file, is taken whole.
        split: the part wanted. What is meant for training must also pass `require_trainable`.
        cache: where the suite is kept once built.
        skip_unreadable: leave unreadable images out, with a warning, instead of refusing the set.

    Raises:
        DataError: the set cannot be used; the message is one line.
    """
    opened = _open(str(spec), split, cache, skip_unreadable)
    if split == "train":
        require_trainable(opened)
    return opened


def read_folder(
    path: Path, *, classes: Sequence[str] | None = None, skip_unreadable: bool = False
) -> ImageSet:
    """Read ``path/<class>/<image>``.

    ``classes.json``, in the folder or beside it, may give display names and prompts:
    ``{"names": {"<class folder>": "<class name>"}, "templates": ["a photo of a {}"]}``.

    Args:
        path: the folder.
        classes: class folders that define the labels, in order; by default those found, sorted.
        skip_unreadable: leave unreadable images out, with a warning.

    Raises:
        DataError: no such folder, no images in it or in one of its classes, a class that is not
            among `classes`, unreadable images, or a bad ``classes.json``.
    """
    found = _class_folders(path)
    folders = list(classes) if classes is not None else found
    if strangers := sorted(set(found) - set(folders)):
        raise DataError(f"{path}: classes that the training images lack: {', '.join(strangers)}")
    names, templates = _read_classes_json(path, folders)
    items = [
        (FilePicture(file), label)
        for label, folder in enumerate(folders)
        if folder in found
        for file in _image_files(path / folder)
    ]
    return _readable(ImageSet(path.name, names, templates, items), skip_unreadable)


def read_csv(path: Path, *, skip_unreadable: bool = False) -> ImageSet:
    """Read a table with the columns ``image`` (path, relative to the table) and ``label`` (name).

    Raises:
        DataError: no such file, not a CSV text, no such column, an empty value, unreadable images.
    """
    rows = _csv_rows(path)
    names = tuple(sorted({label for _, label in rows}))
    items = [(FilePicture(path.parent / image), names.index(label)) for image, label in rows]
    return _readable(ImageSet(path.stem, names, DEFAULT_TEMPLATES, items), skip_unreadable)


def require_trainable(image_set: ImageSet) -> None:
    """Refuse what cannot be learnt: of each class DDAS needs an image to fit and one to calibrate.

    Raises:
        DataError: fewer than two classes, or a class with fewer than two images.
    """
    if len(image_set.class_names) < 2:
        raise DataError(
            f"{image_set.name}: only one class, {image_set.class_names[0]!r}; 2 or more are needed"
        )
    poor = [
        f"{name!r} ({count})"
        for name, count in zip(image_set.class_names, image_set.counts, strict=True)
        if count < MIN_IMAGES_PER_CLASS
    ]
    if poor:
        raise DataError(
            f"{image_set.name}: at least {MIN_IMAGES_PER_CLASS} images a class are needed to "
            f"calibrate; too few in {_shortened(poor)}"
        )


def align(image_set: ImageSet, class_names: Sequence[str]) -> ImageSet:
    """Relabel a set to another list of classes, matching names without case and punctuation.

    Raises:
        DataError: the set has a class that is not in the list.
    """
    index = {normalised(name): label for label, name in enumerate(class_names)}
    strangers = [name for name in image_set.class_names if normalised(name) not in index]
    if strangers:
        raise DataError(f"{image_set.name}: unknown classes: {_shortened(strangers)}")
    new = [index[normalised(name)] for name in image_set.class_names]
    items = tuple((picture, new[label]) for picture, label in image_set.items)
    return replace(image_set, class_names=tuple(class_names), items=items)


def normalised(class_name: str) -> str:
    """A class name without case and punctuation: names equal in this form are one class."""
    return " ".join(re.split(r"[\W_]+", class_name.casefold())).strip()


def split(image_set: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split every class alike: ``(rest, part)`` with `fraction` of each class in `part`.

    Whatever the fraction, a class of two or more images has at least one on either side; a single
    image stays in `rest`. Both parts keep the order of the set.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, not {fraction}")
    taken: set[int] = set()
    for members in _shuffled_classes(image_set, seed):
        wanted = max(1, round(fraction * len(members)))
        taken.update(members[: min(wanted, len(members) - 1)])
    rest = (index for index in range(len(image_set)) if index not in taken)
    return image_set.subset(rest), image_set.subset(sorted(taken))


def few_shot(image_set: ImageSet, shots: int, seed: int) -> ImageSet:
    """`shots` images of each class, in the order of the set.

    Raises:
        DataError: a class has fewer.
    """
    chosen: list[int] = []
    for label, members in enumerate(_shuffled_classes(image_set, seed)):
        if len(members) < shots:
            raise DataError(
                f"{image_set.name}: {shots} shots asked, but class "
                f"{image_set.class_names[label]!r} has {len(members)} images"
            )
        chosen += members[:shots]
    return image_set.subset(sorted(chosen))


def unreadable(picture: Picture) -> str | None:
    """Why a picture cannot be decoded, or nothing."""
    try:
        picture.image()
    except ImageError as error:
        return f"{picture.path}: {error}" if isinstance(picture, FilePicture) else str(error)
    except DataError as error:
        return str(error)
    return None


def _open(spec: str, split: Split, cache: Path, skip_unreadable: bool) -> ImageSet:
    if spec.startswith(SUITE_PREFIX):
        from trainer.suite import (
            load_task,
        )  # the suite is made of image sets: it imports this module

        return load_task(spec.removeprefix(SUITE_PREFIX), split, cache=cache)
    if spec.startswith(MTIL_PREFIX):
        from trainer.mtil import load_task as load_mtil_task

        task, _, root = spec.removeprefix(MTIL_PREFIX).partition(":")
        return load_mtil_task(task, split, root=Path(root) if root else None)
    path = Path(spec)
    if path.suffix.lower() == ".csv":
        return read_csv(path, skip_unreadable=skip_unreadable)
    if not (path / "train").is_dir():
        return read_folder(path, skip_unreadable=skip_unreadable)
    classes = _class_folders(
        path / "train"
    )  # the labels of both parts, whatever the test part lacks
    part = read_folder(path / split, classes=classes, skip_unreadable=skip_unreadable)
    return replace(part, name=path.name)


def _class_folders(path: Path) -> list[str]:
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    folders = sorted(
        child.name for child in path.iterdir() if child.is_dir() and child.name[0] != "."
    )
    if not folders:
        raise DataError(f"{path}: no class folders in it; expected {path.name}/<class>/<image>")
    return folders


def _image_files(folder: Path) -> list[Path]:
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != "."
    )
    if not files:
        raise DataError(f"{folder}: no images in it; {', '.join(sorted(IMAGE_SUFFIXES))} are read")
    return files


def _read_classes_json(
    path: Path, folders: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Class names and templates; a folder without a name lends its own, with spaces."""
    file = next(
        (f for f in (path / "classes.json", path.parent / "classes.json") if f.is_file()), None
    )
    names: dict[str, str] = {}
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    if file is not None:
        names, templates = _parse_classes_json(file)
    return tuple(names.get(folder, folder.replace("_", " ")) for folder in folders), templates


def _parse_classes_json(file: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        names, templates = given.get("names", {}), given.get("templates", list(DEFAULT_TEMPLATES))
        sound = (
            given.keys() <= {"names", "templates"}
            and all(isinstance(name, str) and name.strip() for name in names.values())
            and isinstance(templates, list)
            and all(isinstance(template, str) for template in templates)
        )
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    if not sound:
        raise DataError(f'{file}: expected {{"names": {{folder: name}}, "templates": [text]}}')
    return names, tuple(templates)


def _csv_rows(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            columns = reader.fieldnames or []
            if missing := [name for name in ("image", "label") if name not in columns]:
                raise DataError(f"{path}: no column {' and no column '.join(missing)}")
            rows = [(row["image"].strip(), row["label"].strip()) for row in reader]
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV table: {error}") from error
    if not rows:
        raise DataError(f"{path}: no images in it")
    if incomplete := [f"row {n}" for n, row in enumerate(rows, start=1) if not all(row)]:
        raise DataError(f"{path}: image or label is empty in {_shortened(incomplete)}")
    return rows


def _readable(image_set: ImageSet, skip_unreadable: bool) -> ImageSet:
    """Decode everything once: a bad file is met before an hour of training, not after."""
    with ThreadPoolExecutor() as pool:  # Pillow decodes without holding the interpreter lock
        problems = list(pool.map(unreadable, (picture for picture, _ in image_set.items)))
    bad = [problem for problem in problems if problem is not None]
    if not bad:
        return image_set
    text = f"{image_set.name}: {len(bad)} of {len(problems)} images unreadable: {_shortened(bad)}"
    if not skip_unreadable or len(bad) == len(problems):
        raise DataError(text)
    _log.warning("%s; left out", text)
    return image_set.subset(index for index, problem in enumerate(problems) if problem is None)


def _refuse_duplicates(name: str, class_names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for class_name in class_names:
        other = seen.setdefault(normalised(class_name), class_name)
        if other is not class_name:
            raise DataError(f"{name}: classes {other!r} and {class_name!r} are the same name")


def _check_templates(name: str, templates: Sequence[str]) -> None:
    if not templates:
        raise DataError(f"{name}: no prompt template")
    for template in templates:
        rest = template.replace("{}", "", 1)
        if rest == template or "{" in rest or "}" in rest:
            raise DataError(f"{name}: template {template!r} must contain {{}} exactly once")


def _shuffled_classes(image_set: ImageSet, seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [
        generator.permutation(np.flatnonzero(image_set.labels == label)).tolist()
        for label in range(len(image_set.class_names))
    ]


def _shortened(problems: Sequence[str]) -> str:
    more = len(problems) - SHOWN_PROBLEMS
    return "; ".join(problems[:SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")

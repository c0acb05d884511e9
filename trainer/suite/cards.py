"""What each task of the small suite must hold, and whether what was built is that.

`pins.json` has the counts and the digest of each part, as drawn with the versions in
`constraints.txt`. Another version of Pillow, FreeType or resvg may draw other pixels; accuracies
are then not comparable, and nothing but these digests would tell.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from medley.errors import DataError
from trainer.cards import Card
from trainer.datasets import ImageSet, Split
from trainer.sources import DEFAULT_CACHE
from trainer.suite.recipes import SOURCES, TASKS, cached_file, licences, load_task

__all__ = ["CARDS", "PINS", "Pin", "problems"]

SPLITS: tuple[Split, ...] = ("train", "test")
_SPLIT_RULES = {
    "clipart": "train and test are other series of clip art",
    "animals": "random, exact copies once",
    "fashion": "sample of the official parts",
    "flags": "test is of other vendors",
    "chess": "test is of other piece sets",
    "letters": "test is of other font families",
    "digits": "random",
    "counting": "test counts other objects",
    "textile": "every fourth is test",
}


class Pin(TypedDict):
    """One part of a task."""

    counts: list[int]
    digest: str


def _read_pins() -> dict[str, dict[Split, Pin]]:
    return json.loads((Path(__file__).parent / "pins.json").read_text(encoding="utf-8"))


def _card(task: str) -> Card:
    return Card(
        task=task,
        classes=len(PINS[task]["train"]["counts"]),
        images={split: sum(PINS[task][split]["counts"]) for split in SPLITS},
        licence=", ".join(sorted(set(licences(task).values()))),
        source=", ".join(SOURCES[task]),
        split=_SPLIT_RULES[task],
    )


PINS = _read_pins()
CARDS = {task: _card(task) for task in TASKS}


def problems(task: str, cache: Path = DEFAULT_CACHE) -> list[str]:
    """Everything by which a built task differs from the pinned one, a line each. Builds nothing.

    Raises:
        DataError: there is no such task.
    """
    file = cached_file(task, cache)
    if not file.is_file():
        return [f"{task}: not built yet ({file}); medley data fetch {task}"]
    found: list[str] = []
    for split in SPLITS:
        try:
            found += _differences(load_task(task, split, cache=cache), split)
        except DataError as error:
            return [*found, f"{task} {split}: {error}"]
    return found


def _differences(images: ImageSet, split: Split) -> Iterator[str]:
    task, pin = images.name, PINS[images.name][split]
    if images.counts.tolist() == pin["counts"]:
        if images.digest != pin["digest"]:
            yield (
                f"{task} {split}: the pictures are not the pinned ones (digest "
                f"{images.digest[:12]}, expected {pin['digest'][:12]}): a library draws "
                f"differently, accuracies cannot be compared"
            )
        return
    yield f"{task} {split}: {sum(pin['counts']):,} images expected, {len(images):,} found"
    for name, expected, count in zip(
        images.class_names, pin["counts"], images.counts.tolist(), strict=False
    ):
        if count != expected:
            yield f"{task} {split}: class {name!r}: {expected} images expected, {count} found"

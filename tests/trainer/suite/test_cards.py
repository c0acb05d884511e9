"""What the small suite must hold: its cards, and what is said of a task that is another."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medley.errors import DataError
from trainer.suite import CARDS, TASKS, cached_file, load_task, problems
from trainer.suite.cards import PINS

CLASSES = ("fine", "torn", "stained")


def write_textile(cache: Path, counts: dict[str, list[int]]) -> Path:
    """A cached task of one-pixel pictures."""
    words = {"name": "textile", "classes": CLASSES, "templates": ["a {}"]}
    arrays: dict[str, Any] = {"words": np.frombuffer(json.dumps(words).encode(), np.uint8)}
    for split, count in counts.items():
        labels = np.repeat(np.arange(len(CLASSES)), count)
        arrays[f"{split}_labels"] = labels
        arrays[f"{split}_pixels"] = np.zeros((len(labels), 1, 1, 3), np.uint8)
    file = cached_file("textile", cache)
    file.parent.mkdir(parents=True)
    np.savez(file, allow_pickle=False, **arrays)
    return file


def pinned_counts() -> dict[str, list[int]]:
    pins = PINS["textile"]
    return {"train": list(pins["train"]["counts"]), "test": list(pins["test"]["counts"])}


def test_every_task_has_a_card_with_its_terms() -> None:
    assert tuple(CARDS) == TASKS == tuple(PINS)
    assert all(card.licence and card.source and card.split for card in CARDS.values())
    assert CARDS["flags"].classes == 100
    assert CARDS["textile"].images == {"train": 1500, "test": 500}


def test_a_task_that_is_not_built_is_said_to_be_so_and_not_built(tmp_path: Path) -> None:
    (line,) = problems("textile", tmp_path)
    assert line.startswith("textile: not built yet (")
    assert line.endswith("medley data fetch textile")
    assert list(tmp_path.iterdir()) == []


def test_other_pixels_of_the_same_number_are_noticed(tmp_path: Path) -> None:
    write_textile(tmp_path, pinned_counts())
    train, test = problems("textile", tmp_path)
    expected = PINS["textile"]["train"]["digest"][:12]
    assert train.startswith("textile train: the pictures are not the pinned ones (digest ")
    assert f"expected {expected}" in train
    assert test.startswith("textile test: the pictures")


def test_other_counts_are_told_by_class(tmp_path: Path) -> None:
    counts = pinned_counts()
    expected = counts["test"][1]
    counts["test"][1] -= 3
    write_textile(tmp_path, counts)
    found = problems("textile", tmp_path)
    assert found[1:] == [
        "textile test: 500 images expected, 497 found",
        f"textile test: class {CLASSES[1]!r}: {expected} images expected, {expected - 3} found",
    ]


@pytest.mark.parametrize("data", [b"", b"nothing", b"PK\x03\x04 and no more"])
def test_a_damaged_cache_is_named_in_one_line(data: bytes, tmp_path: Path) -> None:
    file = write_textile(tmp_path, pinned_counts())
    file.write_bytes(data)
    with pytest.raises(DataError, match="damaged; delete it and it is built again") as caught:
        load_task("textile", "train", cache=tmp_path)
    assert "\n" not in str(caught.value)
    (line,) = problems("textile", tmp_path)
    assert str(file) in line


def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the suite has no task 'mars'"):
        problems("mars", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_task_as_it_is_built_here_is_the_pinned_one(task: str) -> None:
    load_task(task, "test")
    assert problems(task) == []

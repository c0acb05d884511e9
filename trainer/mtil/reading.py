"""One part of one MTIL data set as an `ImageSet`."""

from __future__ import annotations

from pathlib import Path

from medley.errors import DataError
from trainer.datasets import ImageSet, Split
from trainer.mtil.cards import FOLDERS, TASKS
from trainer.mtil.layouts import LAYOUTS
from trainer.mtil.words import TEMPLATES, class_entries

__all__ = ["home_of", "read"]


def home_of(task: str, root: Path) -> Path:
    """The folder of a data set below the suite's root.

    Raises:
        DataError: MTIL has no such task.
    """
    if task not in FOLDERS:
        raise DataError(f"MTIL has no task {task!r}; there are {', '.join(TASKS)}")
    return root.expanduser() / FOLDERS[task]


def read(task: str, split: Split, root: Path) -> ImageSet:
    """What is there of one part, complete or not, without opening a picture.

    Raises:
        DataError: no such task or folder, or a list in it cannot be used.
    """
    home = home_of(task, root)
    if not home.is_dir():
        raise DataError(f"{home}: no such folder")
    entries = class_entries(task)
    labels = {entry.key: label for label, entry in enumerate(entries)}
    items = LAYOUTS[task](home, split, labels)
    return ImageSet(task, tuple(entry.name for entry in entries), TEMPLATES[task], items)

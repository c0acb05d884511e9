"""What a checkpoint does not say of its tasks: their names, classes and templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from medley.errors import DataError
from medley.manifest import ClassName, Template
from trainer.mtil.words import TEMPLATES, class_entries
from trainer.suites import open_suite

__all__ = ["TaskText", "mtil_tasks", "read_tasks"]


def _all_different(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("names must be unique")
    return names


class TaskText(BaseModel):
    """One task: its name, its classes in the order of their labels, its templates."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
    class_names: Annotated[
        tuple[ClassName, ...], Field(min_length=1), AfterValidator(_all_different)
    ]
    templates: Annotated[tuple[Template, ...], Field(min_length=1)]


_TASKS = TypeAdapter(Annotated[tuple[TaskText, ...], Field(min_length=1)])


def read_tasks(path: Path) -> tuple[TaskText, ...]:
    """Read a JSON list of {"task", "class_names", "templates"}, in the order of learning.

    Raises:
        DataError: it cannot be read, is not such a list, or names a task twice.
    """
    try:
        tasks = _TASKS.validate_python(json.loads(path.read_text(encoding="utf-8")))
        _all_different(tuple(task.task for task in tasks))
    except OSError as error:
        raise DataError(f"cannot read {path.name}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "whole"
        raise DataError(f"{path.name}: {place}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name}: {error}") from error
    return tasks


def mtil_tasks(order: str = "I") -> tuple[TaskText, ...]:
    """The tasks of MTIL with the class names and templates of the reference; it needs no images.

    Raises:
        DataError: MTIL has no such order and no such tasks.
    """
    return tuple(
        TaskText(
            task=task,
            class_names=tuple(entry.name for entry in class_entries(task)),
            templates=TEMPLATES[task],
        )
        for task in open_suite("mtil").order(order)
    )

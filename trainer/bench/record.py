"""What one run of a benchmark measured, as one JSON file a seed, written whole and read strictly.

Only numbers and names: metrics are computed from them (`metrics.py`), people read `report.py`.

Shares are 0..1. A matrix has a row for each task of the order, after which it was measured, and a
column for each data set, in the same order. Legend: T tasks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, JsonValue, TypeAdapter, ValidationError

from medley.errors import DataError
from trainer.checkpoint import write_whole

__all__ = ["Cost", "Matrix", "Record", "Routing", "Row", "Scores", "load", "save"]

FORMAT = "medley-benchmark"
VERSION = 1

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class _Part:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class Row(_Part):
    """One method with one router under one protocol; without a sequence, its row is repeated."""

    method: str  # zero-shot, linear-probe, finetune, lora, moe_adapter, condu-lora, ...
    router: str  # none, told, ddas, labels, ddas+aggregate, paper-1, prototype, ...
    protocol: str  # told, agnostic, union
    accuracy_TT: Matrix


@dataclass(frozen=True, kw_only=True)
class Routing(_Part):
    """Of one router, all tasks learnt, every image on its own."""

    router: str
    counts: tuple[tuple[int, ...], ...]  # rows: task of the image; columns: tasks, then zero-shot
    auroc: float  # known against unknown, each task left out once; mean
    false_reject: tuple[float, ...]  # by task
    alpha: float | None  # promised of that
    false_accept: tuple[float, ...]  # by task, its own bundle absent


@dataclass(frozen=True, kw_only=True)
class Scores(_Part):
    """Of one task's selector, an error for each image: its own, other tasks', nobody's."""

    task: str
    threshold: float
    own: tuple[float, ...]
    others: tuple[float, ...]
    unseen: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Cost(_Part):
    """Of learning one task by one method; `active` is per image, on top of the backbone.

    Bytes are those of files: the task's bundle, and what all tasks of the method share; a method
    that makes none has 0.
    """

    method: str
    task: str
    trained_parameters: int
    stored_parameters: int
    active_parameters: int
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    fuse_cpu_seconds: float = 0.0  # of making it one with the tasks before it
    bundle_bytes: int = 0
    shared_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Record(_Part):
    """Everything that one seed gave.

    Raises:
        DataError: two parts of one name, a matrix of another size than the order, a share outside
            0..1 or a task that is not of the order.
    """

    suite: str
    order: tuple[str, ...]
    backbone: str
    seed: int
    shots: int | None
    rows: tuple[Row, ...]
    routings: tuple[Routing, ...]
    scores: tuple[Scores, ...]
    costs: tuple[Cost, ...]
    settings: dict[str, JsonValue]
    machine: str
    images: dict[str, tuple[int, int]]  # by task: train, test
    command: str = ""

    def __post_init__(self) -> None:
        tasks = len(self.order)
        _require(tasks > 0, "the order has no task")
        _unique("task", self.order)
        _unique("row", [(row.method, row.router, row.protocol) for row in self.rows])
        _unique("routing", [routing.router for routing in self.routings])
        _unique("scores", [scores.task for scores in self.scores])
        _unique("cost", [(cost.method, cost.task) for cost in self.costs])
        for row in self.rows:
            name = f"{row.method}, {row.router}, {row.protocol}"
            _size(name, row.accuracy_TT, rows=tasks, columns=tasks)
            _shares(name, [share for line in row.accuracy_TT for share in line])
        for routing in self.routings:
            _size(f"routing of {routing.router}", routing.counts, rows=tasks, columns=tasks + 1)
            _size(
                f"rejects and accepts of {routing.router}",
                (routing.false_reject, routing.false_accept),
                rows=2,
                columns=tasks,
            )
            shares = (routing.auroc, *routing.false_reject, *routing.false_accept)
            _shares(f"routing of {routing.router}", shares)
        named = {*(s.task for s in self.scores), *(c.task for c in self.costs), *self.images}
        strangers = sorted(named - set(self.order))
        _require(not strangers, f"{', '.join(strangers)} not in the order {','.join(self.order)}")


_RECORD = TypeAdapter(Record)


def save(record: Record, path: Path) -> None:
    """Write a record whole.

    Args:
        record: its settings hold only what JSON knows: lists, not tuples, and texts as keys.
        path: in a folder that exists.

    Raises:
        DataError: it cannot be written; an older file stays.
    """
    content = asdict(record)
    whole = {"format": FORMAT, "version": VERSION, "digest": _digest(content), "record": content}
    write_whole(path, json.dumps(whole, allow_nan=False).encode())


def load(path: Path) -> Record:
    """Read what `save` wrote.

    Raises:
        DataError: there is none, or it is damaged, of another version, or no record at all; one
            line that names the file.
    """
    try:
        whole = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # JSON or UTF-8
        raise DataError(f"{path} is damaged: not JSON") from error
    content = _opened(whole, path)
    try:
        return _RECORD.validate_json(json.dumps(content), strict=True)
    except (ValidationError, DataError) as error:
        raise DataError(f"{path} is not a benchmark record: {_first(error)}") from error


def _opened(whole: Any, path: Path) -> Any:
    """Take the content out of its envelope."""
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise DataError(f"{path} is not a benchmark record")
    if whole.get("version") != VERSION:
        raise DataError(
            f"{path} is a benchmark record of version {whole.get('version')!r}, "
            f"this reads version {VERSION}"
        )
    if whole.get("digest") != _digest(whole.get("record")):
        raise DataError(f"{path} is damaged: it has changed since it was written")
    return whole["record"]


def _digest(content: Any) -> str:
    """Of the values, whatever the white space: NaN, which JSON does not know, stays what it is."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _first(error: ValidationError | DataError) -> str:
    if isinstance(error, DataError):
        return str(error)
    problem = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise DataError(message)


def _unique(what: str, names: Iterable[Hashable]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    _require(not repeated, f"{what} {repeated[0] if repeated else ''} is there twice")


def _size(what: str, matrix: Sequence[Sequence[float]], *, rows: int, columns: int) -> None:
    fits = len(matrix) == rows and all(len(line) == columns for line in matrix)
    _require(fits, f"{what}: {len(matrix)} rows, must be {rows} of {columns} each")


def _shares(what: str, values: Iterable[float]) -> None:
    for value in values:
        _require(math.isfinite(value) and 0 <= value <= 1, f"{what}: {value} is not a share")

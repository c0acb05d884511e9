"""What was timed under which conditions, as JSON lines; all that a report is made of.

A line is complete by itself: conditions, machine, versions, every single time. Columns of one row,
which is to say of equal conditions, were timed in turns: their i-th times belong to round i.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from medley.errors import DataError

__all__ = ["FILE", "Conditions", "Journal", "Measurement", "Run", "read_lines"]

FILE = "measurements.jsonl"

Conditions = Mapping[str, str | int]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What all lines of one command share."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    command: str
    machine: str
    device: str
    versions: str
    started: str  # ISO 8601, UTC


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One column of one row."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    run: Run
    bench: str  # which one: kernels, swap, serve, ...
    conditions: Conditions
    column: str
    times_s: tuple[float, ...] = ()  # of one call, by round
    values: Mapping[str, float] = field(default_factory=dict)
    series: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    failure: str | None = None


class Journal:
    """A file of lines, appended as soon as they are known: a stopped run keeps what it has.

    Raises:
        DataError: with code `output`: the folder cannot be written.
    """

    def __init__(self, folder: Path, run: Run) -> None:
        self.folder, self.run = folder, run
        self._path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path.write_text("")
        except OSError as error:
            raise DataError(f"{folder} cannot be written: {error}", code="output") from error

    def add(
        self,
        bench: str,
        conditions: Conditions,
        column: str,
        *,
        times_s: Sequence[float] = (),
        values: Mapping[str, float] | None = None,
        series: Mapping[str, tuple[float, ...]] | None = None,
        failure: str | None = None,
    ) -> None:
        """Append a line; the arguments are those of `Measurement`."""
        line = Measurement(
            run=self.run,
            bench=bench,
            conditions=dict(conditions),
            column=column,
            times_s=tuple(round(time_s, 9) for time_s in times_s),  # nanoseconds
            values=dict(values or {}),
            series=dict(series or {}),
            failure=failure,
        )
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(line), allow_nan=False) + "\n")


def read_lines(folder: Path) -> list[Measurement]:
    """Read what a journal wrote.

    Raises:
        DataError: with code `measurements`: no such file, or a line that is not one of ours.
    """
    path, adapter = folder / FILE, TypeAdapter(Measurement)
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}", code="measurements") from error
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(adapter.validate_json(line))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]["msg"]
            raise DataError(f"{path}, line {number}: {problem}", code="measurements") from error
    return found

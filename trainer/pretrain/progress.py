"""Progress for people: a bar with rate and time left, or a line now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

_LINE_EVERY_S = 30.0


@dataclass
class Task:
    """One stage under way; `advance` says how far, `note` what to show beside it."""

    name: str
    total: int
    console: Console
    done: int = 0
    note: str = ""
    _bars: Bars | None = None
    _started_s: float = field(default_factory=time.monotonic)
    _started_at: int = 0
    _line_s: float = 0.0

    def advance(self, count: int, *, note: str = "") -> None:
        """So much more is done."""
        self.done += count
        self.note = note or self.note
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], completed=self.done, note=self._beside())
        elif time.monotonic() - self._line_s > _LINE_EVERY_S or self.done >= self.total:
            self._line_s = time.monotonic()
            self.console.print(
                f"{time.strftime('%H:%M:%S')} {self.name} {self.done}/{self.total} {self._beside()}"
            )

    def skip(self, count: int) -> None:
        """So much was done before: it does not count for the rate."""
        self.done = self._started_at = count

    def _beside(self) -> str:
        seconds = max(time.monotonic() - self._started_s, 1e-3)
        return f"{(self.done - self._started_at) / seconds:.1f}/s {self.note}"


class Progress:
    """Shows tasks on a console, one at a time."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(soft_wrap=True, highlight=False)

    def table(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Show rows that share their columns."""
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*(str(value) for value in row.values()))
        self._console.print(table)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        """A task of ``total`` units; shown until the block ends."""
        if not self._console.is_terminal:
            yield Task(name, total, self._console)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bars(*columns, console=self._console) as bars:
            bars.add_task(name, total=total, note="")
            yield Task(name, total, self._console, _bars=bars)

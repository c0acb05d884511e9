"""What should be served: tasks, their versions, which one is live, and a generation number.

Holds names and digests, never bytes (see `service/store.py`) and nothing about what is on the
device (see `service/tasks.py`). `Registry` is the seam for several replicas; `LocalRegistry` is one
SQLite file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Protocol

from service.errors import ConflictError, NotFoundError, UnavailableError

__all__ = ["Desired", "LocalRegistry", "Registry", "VersionRecord", "now"]


@dataclass(frozen=True)
class VersionRecord:
    """One immutable version of a task."""

    task: str
    version: str
    digest: str
    created_at: str


@dataclass(frozen=True)
class Desired:
    """Everything the registry says, read in one transaction; `live` maps a task to its version."""

    generation: int = 0
    versions: tuple[VersionRecord, ...] = ()
    live: dict[str, str] = field(default_factory=dict)

    @cached_property
    def records(self) -> dict[tuple[str, str], VersionRecord]:
        """Records by task and version."""
        return {(record.task, record.version): record for record in self.versions}

    @cached_property
    def tasks(self) -> dict[str, list[VersionRecord]]:
        """Records by task, oldest first."""
        found: dict[str, list[VersionRecord]] = {}
        for record in self.versions:
            found.setdefault(record.task, []).append(record)
        return found


class Registry(Protocol):
    """Each change is one atomic step, raises the generation by one and returns what follows it."""

    def read(self) -> Desired:
        """What is desired now."""

    def register(self, record: VersionRecord, *, activate: bool) -> Desired:
        """Add a version, and make it live if asked; ConflictError if that version is there."""

    def activate(self, task: str, version: str) -> Desired:
        """Make a known version live; NotFoundError if it is not known."""

    def rollback(self, task: str) -> Desired:
        """Make the version live that was live before; ConflictError if there is none."""

    def delete_version(self, task: str, version: str) -> Desired:
        """Remove a version; ConflictError while it is live."""

    def delete_task(self, task: str) -> Desired:
        """Remove a task with all its versions; NotFoundError if it is not known."""

    def close(self) -> None:
        """Release what it holds."""


_BUSY_S = 1.0  # nobody else writes here; a backup may hold the file for a moment
# `activations` is a stack per task: activating puts a version on top, rolling back takes it off.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS generation (value INTEGER NOT NULL);
INSERT INTO generation SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM generation);
CREATE TABLE IF NOT EXISTS versions (
    task TEXT NOT NULL, version TEXT NOT NULL, digest TEXT NOT NULL, created_at TEXT NOT NULL,
    PRIMARY KEY (task, version)
);
CREATE TABLE IF NOT EXISTS activations (
    task TEXT NOT NULL, version TEXT NOT NULL, generation INTEGER NOT NULL,
    PRIMARY KEY (task, version),
    FOREIGN KEY (task, version) REFERENCES versions ON DELETE CASCADE
);
"""


class LocalRegistry:
    """SQLite, flushed at every commit: a killed process leaves before or after, never between.

    One thread at a time may use it (`service/tasks.py` has one lock for all changes). `on_step` is
    called inside a change, before it is committed, so that tests can die there.
    """

    def __init__(self, path: Path, *, on_step: Callable[[str], None] = lambda step: None) -> None:
        self._on_step = on_step
        with _registry_errors():
            self._db = sqlite3.connect(
                path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def read(self) -> Desired:
        """What is desired now, in one transaction."""
        with self._transaction("DEFERRED"):
            return self._desired()

    def register(self, record: VersionRecord, *, activate: bool) -> Desired:
        """Add a version; see `Registry`."""
        with self._change() as generation:
            if self._knows(record.task, record.version):
                raise ConflictError(
                    f"version {record.version} of {record.task} exists", code="version_exists"
                )
            self._db.execute(
                "INSERT INTO versions VALUES (?, ?, ?, ?)",
                (record.task, record.version, record.digest, record.created_at),
            )
            self._on_step("registry-half")
            if activate:
                self._push(record.task, record.version, generation)
            return self._desired()

    def activate(self, task: str, version: str) -> Desired:
        """Make a version live; see `Registry`."""
        with self._change() as generation:
            self._need(task, version)
            self._push(task, version, generation)
            return self._desired()

    def rollback(self, task: str) -> Desired:
        """Take the top off the task's stack; see `Registry`."""
        with self._change():
            self._need(task)
            stack = self._stack(task)
            if len(stack) < 2:
                raise ConflictError(
                    f"{task} has no version that was live before", code="no_earlier_version"
                )
            self._db.execute(
                "DELETE FROM activations WHERE task = ? AND version = ?", (task, stack[0])
            )
            return self._desired()

    def delete_version(self, task: str, version: str) -> Desired:
        """Remove a version that is not live; see `Registry`."""
        with self._change():
            self._need(task, version)
            if self._stack(task)[:1] == [version]:
                raise ConflictError(
                    f"version {version} of {task} is live; make another live, or delete the task",
                    code="version_live",
                )
            self._db.execute("DELETE FROM versions WHERE task = ? AND version = ?", (task, version))
            return self._desired()

    def delete_task(self, task: str) -> Desired:
        """Remove a task; see `Registry`."""
        with self._change():
            self._need(task)
            self._db.execute("DELETE FROM versions WHERE task = ?", (task,))
            return self._desired()

    @contextmanager
    def _change(self) -> Iterator[int]:
        """One transaction that raises the generation; rolled back as a whole by any exception."""
        with self._transaction("IMMEDIATE"):
            (generation,) = self._db.execute(
                "UPDATE generation SET value = value + 1 RETURNING value"
            ).fetchone()
            yield int(generation)
            self._on_step("registry-uncommitted")

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        with _registry_errors():
            self._db.execute(f"BEGIN {kind}")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    def _desired(self) -> Desired:
        (generation,) = self._db.execute("SELECT value FROM generation").fetchone()
        versions = self._db.execute(
            "SELECT task, version, digest, created_at FROM versions"
            " ORDER BY task, created_at, version"
        )
        # SQLite fills the other columns of a max() query from the row that has the maximum.
        live = self._db.execute(
            "SELECT task, version, MAX(generation) FROM activations GROUP BY task"
        )
        return Desired(
            generation=generation,
            versions=tuple(VersionRecord(*row) for row in versions),
            live={task: version for task, version, _ in live},
        )

    def _push(self, task: str, version: str, generation: int) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO activations VALUES (?, ?, ?)", (task, version, generation)
        )

    def _stack(self, task: str) -> list[str]:
        rows = self._db.execute(
            "SELECT version FROM activations WHERE task = ? ORDER BY generation DESC", (task,)
        )
        return [version for (version,) in rows]

    def _knows(self, task: str, version: str | None = None) -> bool:
        row = self._db.execute(
            "SELECT 1 FROM versions WHERE task = ? AND version = COALESCE(?, version)",
            (task, version),
        ).fetchone()
        return row is not None

    def _need(self, task: str, version: str | None = None) -> None:
        if not self._knows(task):
            raise NotFoundError(f"no task {task}", code="unknown_task")
        if version is not None and not self._knows(task, version):
            raise NotFoundError(f"no version {version} of {task}", code="unknown_version")


def now() -> str:
    """The time for a record: UTC, ISO 8601, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _registry_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise UnavailableError(
            "the registry cannot be read or written", code="registry_unavailable"
        ) from error

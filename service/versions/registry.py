"""What should be served: tasks, versions, aliases, pins, rollouts, and a generation number.

Holds names and digests, never bytes (see `store.py`) and nothing about what is on the
device (see `residency.py`). `Registry` is the seam for several replicas; `LocalRegistry` is
one SQLite file. Nothing here goes by the clock: what came first has the smaller generation.
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

from service.errors import (
    ConflictError,
    NotFoundError,
    PreconditionError,
    StorageError,
    UnavailableError,
)

__all__ = ["LIVE", "Desired", "IfMatch", "LocalRegistry", "Registry", "VersionRecord", "now"]

LIVE = "live"  # the alias that decides what a task answers with; the only one that rolls back


@dataclass(frozen=True)
class VersionRecord:
    """One immutable version of a task; `created_at` informs people and orders nothing."""

    task: str
    version: str
    digest: str
    created_at: str
    size_bytes: int | None = None  # None where a registry of 0.1 did not keep it


@dataclass(frozen=True)
class Desired:
    """Everything the registry says, read in one transaction."""

    generation: int = 0
    versions: tuple[VersionRecord, ...] = ()
    aliases: dict[str, dict[str, str]] = field(default_factory=dict)  # task, alias: version
    previous: dict[str, str] = field(default_factory=dict)  # task: what a rollback makes live
    pinned: frozenset[tuple[str, str]] = frozenset()  # task, version
    rollouts: dict[str, str] = field(default_factory=dict)  # task: text of `rollouts.py`
    changed: dict[str, int] = field(default_factory=dict)  # task: generation of its last change

    @cached_property
    def live(self) -> dict[str, str]:
        """The live version of each task that has one."""
        return {task: names[LIVE] for task, names in self.aliases.items() if LIVE in names}

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


@dataclass(frozen=True)
class IfMatch:
    """A condition of a change: the task's last change is one of `tags`; `any`: the task exists."""

    tags: frozenset[int] = frozenset()
    any: bool = False

    def check(self, task: str, changed: int | None) -> None:
        """Raise PreconditionError if it does not hold for a task that was last changed then."""
        if changed is None or not (self.any or changed in self.tags):
            raise PreconditionError(f"{task} has changed since, or is not there")


class Registry(Protocol):
    """Each change is one atomic step and returns what is desired after it.

    A change raises the generation by one, unless what it asks for is so already. All of them raise
    NotFoundError for a task or version that is not known (`register` knows none), and
    PreconditionError where `if_match` does not hold.
    """

    def read(self) -> Desired:
        """What is desired now."""

    def register(
        self, record: VersionRecord, *, activate: bool, if_match: IfMatch | None = None
    ) -> Desired:
        """Add a version, and make it live if asked.

        Raises:
            ConflictError: that version is there, or an alias is called so.
        """

    def set_alias(
        self, task: str, alias: str, version: str, *, if_match: IfMatch | None = None
    ) -> Desired:
        """Let an alias name a version; `live` makes it live.

        Raises:
            ConflictError: a version is called like the alias.
        """

    def delete_alias(self, task: str, alias: str, *, if_match: IfMatch | None = None) -> Desired:
        """Forget an alias; without `live`, and what was live before, a task answers by name only.

        Raises:
            NotFoundError: no such alias.
        """

    def rollback(self, task: str, *, if_match: IfMatch | None = None) -> Desired:
        """Make the version live that was live before; ConflictError if there is none."""

    def set_pinned(
        self, task: str, version: str, pinned: bool, *, if_match: IfMatch | None = None
    ) -> Desired:
        """Say whether a version has to stay on the device."""

    def set_rollout(
        self, task: str, text: str | None, *, if_match: IfMatch | None = None
    ) -> Desired:
        """Keep a task's rollout; what the text means is for `rollouts.py`."""

    def delete_version(
        self, task: str, version: str, *, if_match: IfMatch | None = None
    ) -> Desired:
        """Remove a version; ConflictError while an alias names it."""

    def delete_task(self, task: str, *, if_match: IfMatch | None = None) -> Desired:
        """Remove a task with all that belongs to it."""

    def close(self) -> None:
        """Release what it holds."""


_BUSY_S = 1.0  # nobody else writes here; a backup may hold the file for a moment
# `activations` is a stack per task: activating puts a version on top, rolling back takes it off.
_FORMAT_1 = """
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
_FORMAT_2 = """
ALTER TABLE versions ADD COLUMN size_bytes INTEGER;
ALTER TABLE versions ADD COLUMN generation INTEGER NOT NULL DEFAULT 0;
CREATE TABLE tasks (task TEXT PRIMARY KEY, changed INTEGER NOT NULL, rollout TEXT);
INSERT INTO tasks SELECT DISTINCT task, (SELECT value FROM generation), NULL FROM versions;
CREATE TABLE aliases (
    task TEXT NOT NULL, alias TEXT NOT NULL, version TEXT NOT NULL,
    PRIMARY KEY (task, alias),
    FOREIGN KEY (task, version) REFERENCES versions ON DELETE CASCADE
);
CREATE TABLE pins (
    task TEXT NOT NULL, version TEXT NOT NULL,
    PRIMARY KEY (task, version),
    FOREIGN KEY (task, version) REFERENCES versions ON DELETE CASCADE
);
"""
_FORMATS = (_FORMAT_1, _FORMAT_2)  # each makes its format of the one before


class LocalRegistry:
    """SQLite, flushed at every commit: a killed process leaves before or after, never between.

    One thread at a time may use it (`tasks.py` has one lock for all changes). `on_step` is
    called inside a change, before it is committed, so that tests can die there. See `Registry` for
    what the methods do.
    """

    def __init__(self, path: Path, *, on_step: Callable[[str], None] = lambda step: None) -> None:
        self.up = True  # whether it could be used when it last was
        self._on_step = on_step
        with _registry_errors():
            self._db = sqlite3.connect(
                path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
        try:
            with _registry_errors():
                self._open()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def read(self) -> Desired:
        """What is desired now, in one transaction."""
        with self._transaction("DEFERRED"):
            return self._desired()

    def register(
        self, record: VersionRecord, *, activate: bool, if_match: IfMatch | None = None
    ) -> Desired:
        """Add a version."""
        task, version = record.task, record.version
        with self._change():
            self._match(task, if_match)
            if self._knows(task, version):
                raise ConflictError(f"version {version} of {task} exists", code="version_exists")
            if version == LIVE or self._alias(task, version) is not None:
                raise ConflictError(f"{task} has an alias {version}", code="alias_conflict")
            generation = self._advance(task)
            self._db.execute(
                "INSERT INTO versions (task, version, digest, created_at, size_bytes, generation)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (task, version, record.digest, record.created_at, record.size_bytes, generation),
            )
            self._on_step("registry-half")
            if activate:
                self._push(task, version, generation)
            return self._desired()

    def set_alias(
        self, task: str, alias: str, version: str, *, if_match: IfMatch | None = None
    ) -> Desired:
        """Let an alias name a version."""
        with self._change():
            self._need(task, version)
            self._match(task, if_match)
            if self._knows(task, alias):
                raise ConflictError(f"{task} has a version {alias}", code="alias_conflict")
            if self._alias(task, alias) == version:
                return self._desired()
            generation = self._advance(task)
            if alias == LIVE:
                self._push(task, version, generation)
            else:
                self._db.execute(
                    "INSERT OR REPLACE INTO aliases VALUES (?, ?, ?)", (task, alias, version)
                )
            return self._desired()

    def delete_alias(self, task: str, alias: str, *, if_match: IfMatch | None = None) -> Desired:
        """Forget an alias."""
        with self._change():
            self._need(task)
            self._match(task, if_match)
            if self._alias(task, alias) is None:
                raise NotFoundError(f"{task} has no alias {alias}", code="unknown_alias")
            self._advance(task)
            if alias == LIVE:
                self._db.execute("DELETE FROM activations WHERE task = ?", (task,))
            else:
                self._db.execute("DELETE FROM aliases WHERE task = ? AND alias = ?", (task, alias))
            return self._desired()

    def rollback(self, task: str, *, if_match: IfMatch | None = None) -> Desired:
        """Take the top off the task's stack."""
        with self._change():
            self._need(task)
            self._match(task, if_match)
            stack = self._stack(task)
            if len(stack) < 2:
                raise ConflictError(
                    f"{task} has no version that was live before", code="no_earlier_version"
                )
            self._advance(task)
            self._db.execute(
                "DELETE FROM activations WHERE task = ? AND version = ?", (task, stack[0])
            )
            return self._desired()

    def set_pinned(
        self, task: str, version: str, pinned: bool, *, if_match: IfMatch | None = None
    ) -> Desired:
        """Say whether a version has to stay on the device."""
        with self._change():
            self._need(task, version)
            self._match(task, if_match)
            if pinned == self._has(
                "SELECT 1 FROM pins WHERE task = ? AND version = ?", task, version
            ):
                return self._desired()
            self._advance(task)
            change = "INSERT INTO pins VALUES (?, ?)"
            if not pinned:
                change = "DELETE FROM pins WHERE task = ? AND version = ?"
            self._db.execute(change, (task, version))
            return self._desired()

    def set_rollout(
        self, task: str, text: str | None, *, if_match: IfMatch | None = None
    ) -> Desired:
        """Keep a task's rollout."""
        with self._change():
            self._need(task)
            self._match(task, if_match)
            self._advance(task)
            self._db.execute("UPDATE tasks SET rollout = ? WHERE task = ?", (text, task))
            return self._desired()

    def delete_version(
        self, task: str, version: str, *, if_match: IfMatch | None = None
    ) -> Desired:
        """Remove a version that no alias names."""
        with self._change():
            self._need(task, version)
            self._match(task, if_match)
            self._check_free(task, version)
            self._advance(task)
            self._db.execute("DELETE FROM versions WHERE task = ? AND version = ?", (task, version))
            if not self._knows(task):
                self._db.execute("DELETE FROM tasks WHERE task = ?", (task,))
            return self._desired()

    def delete_task(self, task: str, *, if_match: IfMatch | None = None) -> Desired:
        """Remove a task; aliases, pins and activations go with its versions."""
        with self._change():
            self._need(task)
            self._match(task, if_match)
            self._advance(task)
            self._db.execute("DELETE FROM versions WHERE task = ?", (task,))
            self._db.execute("DELETE FROM tasks WHERE task = ?", (task,))
            return self._desired()

    def _open(self) -> None:
        """Bring the file to the present format, one transaction for each step."""
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA foreign_keys=ON")
        (found,) = self._db.execute("PRAGMA user_version").fetchone()
        if found > len(_FORMATS):
            raise UnavailableError(
                f"the registry was written by a newer Medley: its format is {found},"
                f" this one knows up to {len(_FORMATS)}",
                code="registry_unavailable",
            )
        for number, statements in enumerate(_FORMATS[found:], found + 1):
            self._db.executescript(
                f"BEGIN IMMEDIATE; {statements} PRAGMA user_version = {number}; COMMIT;"
            )

    @contextmanager
    def _change(self) -> Iterator[None]:
        """One transaction; rolled back as a whole by any exception."""
        with self._transaction("IMMEDIATE"):
            yield
            self._on_step("registry-uncommitted")

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        try:
            with _registry_errors():
                self._db.execute(f"BEGIN {kind}")
                try:
                    yield
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:  # a full disk may have ended it already
                        self._db.execute("ROLLBACK")
                    raise
        except (StorageError, UnavailableError):
            self.up = False
            raise
        self.up = True

    def _advance(self, task: str) -> int:
        """Raise the generation; it is that of the task's last change now."""
        (generation,) = self._db.execute(
            "UPDATE generation SET value = value + 1 RETURNING value"
        ).fetchone()
        self._db.execute(
            "INSERT INTO tasks VALUES (?, ?, NULL)"
            " ON CONFLICT (task) DO UPDATE SET changed = excluded.changed",
            (task, generation),
        )
        return int(generation)

    def _desired(self) -> Desired:
        (generation,) = self._db.execute("SELECT value FROM generation").fetchone()
        versions = self._db.execute(
            "SELECT task, version, digest, created_at, size_bytes FROM versions"
            " ORDER BY task, generation, rowid"
        )
        aliases: dict[str, dict[str, str]] = {}
        for task, alias, version in self._db.execute("SELECT * FROM aliases ORDER BY task, alias"):
            aliases.setdefault(task, {})[alias] = version
        previous: dict[str, str] = {}
        for task, version in self._db.execute(
            "SELECT task, version FROM activations ORDER BY task, generation"
        ):
            names = aliases.setdefault(task, {})
            if LIVE in names:
                previous[task] = names[LIVE]
            names[LIVE] = version
        tasks = self._db.execute("SELECT task, changed, rollout FROM tasks").fetchall()
        return Desired(
            generation=generation,
            versions=tuple(VersionRecord(*row) for row in versions),
            aliases=aliases,
            previous=previous,
            pinned=frozenset(self._db.execute("SELECT task, version FROM pins")),
            rollouts={task: text for task, _, text in tasks if text is not None},
            changed={task: changed for task, changed, _ in tasks},
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

    def _alias(self, task: str, alias: str) -> str | None:
        if alias == LIVE:
            return next(iter(self._stack(task)), None)
        row = self._db.execute(
            "SELECT version FROM aliases WHERE task = ? AND alias = ?", (task, alias)
        ).fetchone()
        return None if row is None else str(row[0])

    def _has(self, query: str, *values: str | None) -> bool:
        return self._db.execute(query, values).fetchone() is not None

    def _knows(self, task: str, version: str | None = None) -> bool:
        return self._has(
            "SELECT 1 FROM versions WHERE task = ? AND version = COALESCE(?, version)",
            task,
            version,
        )

    def _need(self, task: str, version: str | None = None) -> None:
        if not self._knows(task):
            raise NotFoundError(f"no task {task}", code="unknown_task")
        if version is not None and not self._knows(task, version):
            raise NotFoundError(f"no version {version} of {task}", code="unknown_version")

    def _match(self, task: str, if_match: IfMatch | None) -> None:
        if if_match is not None:
            row = self._db.execute("SELECT changed FROM tasks WHERE task = ?", (task,)).fetchone()
            if_match.check(task, None if row is None else int(row[0]))

    def _check_free(self, task: str, version: str) -> None:
        if self._stack(task)[:1] == [version]:
            raise ConflictError(
                f"version {version} of {task} is live; make another live, or delete the task",
                code="version_live",
            )
        rows = self._db.execute(
            "SELECT alias FROM aliases WHERE task = ? AND version = ?", (task, version)
        )
        names = ", ".join(alias for (alias,) in rows)
        if names:
            raise ConflictError(
                f"version {version} of {task} is what {names} names", code="version_in_use"
            )


def now() -> str:
    """The time for a record: UTC, ISO 8601, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _registry_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise StorageError("the disk of the registry is full") from error
        raise UnavailableError(
            "the registry cannot be read or written", code="registry_unavailable"
        ) from error

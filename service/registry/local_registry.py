"""A registry of one server: one SQLite file that holds one document."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import StorageError, UnavailableError
from service.registry.changes import Change
from service.registry.desired import Desired, VersionRecord
from service.registry.document import State, TaskState
from service.registry.registry import Registry

__all__ = ["LocalRegistry"]

_BUSY_S = 1.0  # nobody else writes here; a backup may hold the file for a moment
_FORMAT = 3  # a document; 2 kept tables, and 0.1 fewer of them without saying a number
_FORMAT_2 = """
ALTER TABLE versions ADD COLUMN size_bytes INTEGER;
ALTER TABLE versions ADD COLUMN generation INTEGER NOT NULL DEFAULT 0;
CREATE TABLE tasks (task TEXT PRIMARY KEY, changed INTEGER NOT NULL, rollout TEXT);
INSERT INTO tasks SELECT DISTINCT task, (SELECT value FROM generation), NULL FROM versions;
CREATE TABLE aliases (task TEXT NOT NULL, alias TEXT NOT NULL, version TEXT NOT NULL);
CREATE TABLE pins (task TEXT NOT NULL, version TEXT NOT NULL);
"""
_TABLES_OF_2 = ("pins", "aliases", "activations", "tasks", "versions", "generation")


class LocalRegistry(Registry):
    """SQLite, flushed at every commit: a killed process leaves before or after, never between.

    `on_step` is called inside a change, before it is committed, so that tests can die there.
    """

    def __init__(self, path: Path, *, on_step: Callable[[str], None] = lambda step: None) -> None:
        self._on_step = on_step
        self._turns = threading.Lock()  # one connection, one transaction
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

    def read(self, known: Desired | None = None) -> Desired:
        """What is desired now."""
        with self._transaction("DEFERRED"):
            state = self._state()
        return known if known is not None and known.id == state.id else state.desired()

    def change(self, change: Change) -> Desired:
        """Make one change in one transaction; rolled back as a whole by any exception."""
        with self._transaction("IMMEDIATE"):
            before = self._state()
            after = change.apply(before)
            if after is not before:
                self._db.execute("UPDATE state SET document = ?", (after.to_json(),))
                self._on_step("registry-uncommitted")
        return after.desired()

    def listen(self, on_hint: Callable[[], None]) -> Callable[[], None]:
        """Nobody else changes it: there is never a hint."""
        return lambda: None

    def _state(self) -> State:
        (document,) = self._db.execute("SELECT document FROM state").fetchone()
        return State.from_json(document)

    def _open(self) -> None:
        """Bring the file to the present format, in one transaction."""
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        (found,) = self._db.execute("PRAGMA user_version").fetchone()
        if found > _FORMAT:
            raise UnavailableError(
                f"the registry was written by a newer Medley: its format is {found},"
                f" this one knows up to {_FORMAT}",
                code="registry_unavailable",
            )
        if found < _FORMAT:
            with self._transaction("IMMEDIATE"):
                self._convert(found)

    def _convert(self, found: int) -> None:
        tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master")}
        state = State()
        if "versions" in tables:
            for statement in _FORMAT_2.split(";") if found < 2 else ():
                self._db.execute(statement)
            state = _read_tables(self._db)
            for table in _TABLES_OF_2:
                self._db.execute(f"DROP TABLE {table}")
        self._db.execute("CREATE TABLE state (document TEXT NOT NULL)")
        self._db.execute("INSERT INTO state VALUES (?)", (state.to_json(),))
        self._db.execute(f"PRAGMA user_version = {_FORMAT}")

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        try:
            with self._turns, _registry_errors():
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


def _read_tables(db: sqlite3.Connection) -> State:
    """The state of a file of format 2; what came first has the smaller generation."""
    (generation,) = db.execute("SELECT value FROM generation").fetchone()
    tasks = {
        task: TaskState(
            versions=tuple(
                VersionRecord(task, *row)
                for row in db.execute(
                    "SELECT version, digest, created_at, size_bytes FROM versions"
                    " WHERE task = ? ORDER BY generation, rowid",
                    (task,),
                )
            ),
            activations=_column(db, "activations WHERE task = ? ORDER BY generation", task),
            aliases=dict(db.execute("SELECT alias, version FROM aliases WHERE task = ?", (task,))),
            pinned=_column(db, "pins WHERE task = ?", task),
            rollout=rollout,
            changed=changed,
        )
        for task, changed, rollout in db.execute("SELECT task, changed, rollout FROM tasks")
    }
    return State(generation=generation, tasks=tasks)


def _column(db: sqlite3.Connection, where: str, task: str) -> tuple[str, ...]:
    return tuple(version for (version,) in db.execute(f"SELECT version FROM {where}", (task,)))


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

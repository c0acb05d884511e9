"""Work that may outlast the request that began it: what runs, and what became of it.

Each operation is a task of the event loop; nobody has to wait for it. Kept in memory: a server that
starts anew knows none. Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, Protocol, TypeVar

from medley.errors import MedleyError
from service.errors import EngineError, NotFoundError, QueueFullError, UnavailableError, problem
from service.registry.desired import now

__all__ = ["Operation", "Operations", "Started"]

log = logging.getLogger(__name__)
KEPT = 1000


class Result(Protocol):
    """What an operation ends with."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What people should look at although it succeeded."""

    @property
    def replicas(self) -> dict[str, Any] | None:
        """How many replicas have it, if somebody wanted to know."""


R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Operation:
    """What can be said of one operation now; times inform people and order nothing."""

    id: str
    kind: Literal["register"]
    task: str
    version: str
    created_at: str
    state: Literal["running", "succeeded", "failed"] = "running"
    finished_at: str | None = None
    error: dict[str, Any] | None = None  # a problem
    warnings: tuple[str, ...] = ()
    replicas: dict[str, Any] | None = None  # a `Reached` of `quorum.py`
    replica: str = ""  # who runs it, where others are told of it


@dataclass(frozen=True)
class Started(Generic[R]):
    """An operation that runs, for who began it."""

    id: str
    _running: asyncio.Task[R]

    async def result(self, wait_s: float) -> R | None:
        """What came of it, or None if it takes longer; whoever waits may give up at any time.

        Raises:
            Exception: what the operation failed with.
        """
        done, _ = await asyncio.wait({self._running}, timeout=wait_s)
        return self._running.result() if done else None


class Operations:
    """The running operations, and the last `kept` of all."""

    def __init__(self, *, kept: int = KEPT) -> None:
        self._kept = kept
        self._known: dict[str, Operation] = {}  # oldest first
        self._running: dict[str, asyncio.Task[Any]] = {}
        self.after_end: list[Callable[[str], None]] = []  # called with the id of each that ended

    def start(
        self, kind: Literal["register"], task: str, version: str, work: Coroutine[Any, Any, R]
    ) -> Started[R]:
        """Begin `work`; it is remembered under an id of its own.

        Raises:
            QueueFullError: as many run as are remembered.
        """
        if len(self._running) >= self._kept:
            work.close()
            raise QueueFullError(f"{len(self._running)} operations run", retry_after_s=10)
        begun = Operation(uuid.uuid4().hex, kind, task, version, now())
        running = asyncio.create_task(work, name=f"{kind} {task}@{version}")
        self._known[begun.id] = begun
        self._running[begun.id] = running
        running.add_done_callback(lambda done: self._finish(begun.id, done))
        self._forget()
        return Started(begun.id, running)

    def get(self, operation: str) -> Operation:
        """The operation with this id; NotFoundError if it is not known here."""
        found = self._known.get(operation)
        if found is None:
            raise NotFoundError("no such operation here", code="unknown_operation")
        return found

    def all(self) -> Iterable[Operation]:
        """What is remembered, latest first."""
        return reversed(self._known.values())

    async def close(self) -> None:
        """Cancel what runs, and wait until it has stopped at a place where it may."""
        while self._running:
            for running in self._running.values():
                running.cancel()
            await asyncio.wait(self._running.values())

    def _finish(self, operation: str, done: asyncio.Task[Any]) -> None:
        del self._running[operation]
        self._known[operation] = _ended(self._known[operation], done)
        for action in self.after_end:
            action(operation)
        self._forget()

    def _forget(self) -> None:
        """Drop the oldest that have ended, until few enough are left."""
        for old in [id for id in self._known if id not in self._running]:
            if len(self._known) <= self._kept:
                return
            del self._known[old]


def _ended(operation: Operation, done: asyncio.Task[Any]) -> Operation:
    ended = replace(operation, finished_at=now())
    if done.cancelled():
        error: BaseException | None = UnavailableError("the server shut down", code="draining")
    else:
        error = done.exception()
    if error is None:
        result: Result = done.result()
        return replace(ended, state="succeeded", warnings=result.warnings, replicas=result.replicas)
    if isinstance(error, MedleyError):
        log.warning("%s %s@%s failed: %s", ended.kind, ended.task, ended.version, error)
        return replace(ended, state="failed", error=problem(error))
    log.error("operation %s failed", ended.id, exc_info=error)
    return replace(ended, state="failed", error=problem(EngineError("unexpected")))

"""What this server answers from: an immutable snapshot, replaced as a whole, and leases on it.

A request takes a lease on the snapshot of the moment and keeps it to the end, so a swap never
changes a request in flight (docs/adr/0004). A path leaves the device when no snapshot that has it
is leased any more, never sooner. Used by the event loop's thread only; knows nothing of the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from service.errors import NotFoundError, UnavailableError
from service.registry.desired import Desired, VersionRecord

__all__ = ["Key", "LabelSet", "Leaving", "Live", "Resident", "Snapshot", "Tier"]

Key = tuple[str, str]  # task, version
Tier = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class LabelSet:
    """Class names and their text features; `kind` says where the names come from."""

    kind: Literal["task", "request", "union"]
    names: tuple[str, ...]
    features_CE: Tensor  # unit length, float32, on the host

    @cached_property
    def row_of(self) -> dict[str, int]:
        """The row of each name, folded: upper and lower case do not matter when names are met."""
        return {name.casefold(): row for row, name in enumerate(self.names)}


@dataclass(frozen=True)
class Resident:
    """A version that is on the device and passed its self-test."""

    record: VersionRecord
    path: int
    templates: tuple[str, ...]
    own: LabelSet  # its classes, as its bundle has them
    zero_shot: LabelSet  # its classes, encoded by the untouched text tower
    threshold: float
    size_bytes: int = 0  # of its experts and its selector, shared ones included

    @property
    def key(self) -> Key:
        """Task and version."""
        return self.record.task, self.record.version


@dataclass(frozen=True)
class Snapshot:
    """Everything that one request may need to know; never changed."""

    desired: Desired = field(default_factory=Desired)
    residents: dict[Key, Resident] = field(default_factory=dict)
    failed: dict[Key, str] = field(default_factory=dict)  # why a version cannot be resident
    hosted: frozenset[str] = frozenset()  # digests that are ready in memory, resident or not

    @cached_property
    def live(self) -> dict[str, Resident]:
        """The live version of each task that has one which works, in order of name."""
        found = ((t, self.residents.get((t, v))) for t, v in sorted(self.desired.live.items()))
        return {task: resident for task, resident in found if resident is not None}

    @cached_property
    def by_path(self) -> dict[int, Resident]:
        """Whose path it is."""
        return {resident.path: resident for resident in self.residents.values()}

    @cached_property
    def eligible(self) -> frozenset[int]:
        """Paths that DDAS may choose: those of live versions."""
        return frozenset(resident.path for resident in self.live.values())

    @cached_property
    def union(self) -> LabelSet | None:
        """All live tasks' classes as zero-shot sees them; a name that several tasks have once."""
        features = [resident.zero_shot.features_CE for resident in self.live.values()]
        return self.union_of(features) if features else None

    def union_of(self, features: Sequence[Tensor]) -> LabelSet:
        """The same names in the same order, from other features of each live task's classes."""
        parts = [
            features_CE if len(rows) == len(features_CE) else features_CE[rows]
            for features_CE, rows in zip(features, self._union_rows, strict=True)
        ]  # nearly always the whole, which is many times as quick
        return LabelSet("union", self._union_names, torch.cat(parts))

    @cached_property
    def _union_rows(self) -> tuple[list[int], ...]:
        """Of each live task, the rows of the classes that no task before it has."""
        seen: set[str] = set()
        found = []
        for classes in (resident.own for resident in self.live.values()):
            found.append([row for name, row in classes.row_of.items() if name not in seen])
            seen |= classes.row_of.keys()
        return tuple(found)

    @cached_property
    def _union_names(self) -> tuple[str, ...]:
        classes = (resident.own for resident in self.live.values())
        both = zip(classes, self._union_rows, strict=True)
        return tuple(own.names[row] for own, rows in both for row in rows)

    def key(self, task: str, name: str | None = None) -> Key:
        """The version of a task that a name means: a version, an alias, or None for the live one.

        Raises:
            NotFoundError: no such task or version, or none is live.
        """
        if task not in self.desired.tasks:
            raise NotFoundError(f"no task {task}", code="unknown_task")
        version = self.desired.live.get(task) if name is None else name
        if version is None:
            raise NotFoundError(f"no version of {task} is live", code="no_live_version")
        key = (task, self.desired.aliases.get(task, {}).get(version, version))
        if key not in self.desired.records:
            raise NotFoundError(f"{task} has no version or alias {name}", code="unknown_version")
        return key

    def key_of(self, model: str) -> Key | None:
        """The version that `task`, `task@version` or `task@alias` means; None: `auto` or `base`.

        Raises:
            NotFoundError: as for `key`.
        """
        if model in ("auto", "base"):
            return None
        task, at, name = model.partition("@")
        return self.key(task, name if at else None)

    def find(self, task: str, name: str | None = None) -> Resident:
        """The version that `key` says, which must be on the device: see `Residency.lease`.

        Raises:
            NotFoundError: as for `key`.
            UnavailableError: it is not on the device, or cannot be.
        """
        key = self.key(task, name)
        if key in self.residents:
            return self.residents[key]
        at = "@".join(key)
        if key in self.failed:
            raise UnavailableError(f"{at} could not be loaded", code="version_failed")
        raise UnavailableError(f"{at} is not on the device now", code="version_unloaded")

    def tier(self, key: Key) -> Tier:
        """Where a registered version is: ready to answer, ready in memory, or a file only."""
        if key in self.residents:
            return "device"
        return "host" if self.desired.records[key].digest in self.hosted else "disk"


@dataclass(frozen=True)
class Leaving:
    """A path that no new request is given; it is freed after the last lease on `serial`."""

    path: int
    serial: int  # of the last snapshot that had it


class Live:
    """The current snapshot and who still uses older ones; `unload` hears of paths to be freed."""

    def __init__(self, unload: Callable[[int], object]) -> None:
        self.snapshot = Snapshot()
        self.leaving: tuple[Leaving, ...] = ()
        self.after_flip: list[Callable[[], None]] = []  # called with each new snapshot in place
        self._unload = unload
        self._serial = 0
        self._tokens = count()
        self._leases: dict[int, tuple[int, str]] = {}  # token: serial of the snapshot, holder

    @contextmanager
    def lease(self, holder: str = "") -> Iterator[Snapshot]:
        """Use the snapshot of now; the only place where a lease begins and ends.

        Args:
            holder: who takes it, for the log: the request's id.
        """
        token = next(self._tokens)
        self._leases[token] = (self._serial, holder)
        try:
            yield self.snapshot
        finally:
            del self._leases[token]
            self._release()

    def publish(self, snapshot: Snapshot) -> tuple[Leaving, ...]:
        """Flip: new requests see `snapshot`; paths it lacks leave after their last use.

        Returns:
            those of them that somebody still uses.
        """
        gone = self.snapshot.by_path.keys() - snapshot.by_path.keys()
        leaving = tuple(Leaving(path, self._serial) for path in sorted(gone))
        self.leaving += leaving
        self.snapshot = snapshot
        self._serial += 1
        self._release()
        for action in self.after_flip:
            action()
        return tuple(one for one in leaving if one in self.leaving)

    async def reached(self, generation: int) -> None:
        """Wait until what is served is of this generation, or of a later one."""
        flipped = asyncio.Event()
        self.after_flip.append(flipped.set)
        try:
            while self.snapshot.desired.generation < generation:
                await flipped.wait()
                flipped.clear()
        finally:
            self.after_flip.remove(flipped.set)

    def holders(self, leaving: Leaving) -> list[str]:
        """Who keeps a path from being freed, the longest first."""
        return [holder for serial, holder in self._leases.values() if serial <= leaving.serial]

    def _release(self) -> None:
        if not self.leaving:
            return
        oldest = min((serial for serial, _ in self._leases.values()), default=self._serial)
        free = [one for one in self.leaving if one.serial < oldest]
        self.leaving = tuple(one for one in self.leaving if one.serial >= oldest)
        for one in free:
            self._unload(one.path)

"""What this server answers from: an immutable snapshot, replaced as a whole, and leases on it.

A request takes a lease on the snapshot of the moment and keeps it to the end, so a swap never
changes a request in flight (docs/adr/0004). A path leaves the device when no snapshot that has it
is leased any more. Used by the event loop's thread only; knows nothing of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from service.errors import NotFoundError, UnavailableError
from service.registry import Desired, VersionRecord

__all__ = ["Key", "LabelSet", "Live", "Resident", "Snapshot"]

Key = tuple[str, str]  # task, version


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


@dataclass(frozen=True)
class Snapshot:
    """Everything that one request may need to know; never changed."""

    desired: Desired = field(default_factory=Desired)
    residents: dict[Key, Resident] = field(default_factory=dict)
    failed: dict[Key, str] = field(default_factory=dict)  # why a version is not resident

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
        rows: dict[str, tuple[str, Tensor]] = {}
        for classes in (resident.zero_shot for resident in self.live.values()):
            for name, feature_E in zip(classes.names, classes.features_CE, strict=True):
                rows.setdefault(name.casefold(), (name, feature_E))
        if not rows:
            return None
        names, features = zip(*rows.values(), strict=True)
        return LabelSet("union", names, torch.stack(features))

    def find(self, task: str, version: str | None = None) -> Resident:
        """The version of a task that is meant; the live one if none is named.

        Raises:
            NotFoundError: no such task or version, or none is live.
            UnavailableError: it is registered but could not be loaded here.
        """
        if task not in self.desired.tasks:
            raise NotFoundError(f"no task {task}", code="unknown_task")
        version = self.desired.live.get(task) if version is None else version
        if version is None:
            raise NotFoundError(f"no version of {task} is live", code="no_live_version")
        if (task, version) not in self.desired.records:
            raise NotFoundError(f"no version {version} of {task}", code="unknown_version")
        resident = self.residents.get((task, version))
        if resident is None:
            raise UnavailableError(f"{task}@{version} could not be loaded", code="version_failed")
        return resident


class Live:
    """The current snapshot and who still uses older ones."""

    def __init__(self, unload: Callable[[int], object]) -> None:
        self.snapshot = Snapshot()
        self._unload = unload
        self._serial = 0
        self._leases: Counter[int] = Counter()  # by serial of the snapshot
        self._leaving: list[tuple[int, int]] = []  # serial of the last snapshot with it, path

    @contextmanager
    def lease(self) -> Iterator[Snapshot]:
        """Use the snapshot of now; the only place where a lease begins and ends."""
        serial, snapshot = self._serial, self.snapshot
        self._leases[serial] += 1
        try:
            yield snapshot
        finally:
            self._leases[serial] -= 1
            self._release()

    def publish(self, snapshot: Snapshot) -> None:
        """Flip: new requests see `snapshot`; paths it lacks leave after their last use."""
        gone = self.snapshot.by_path.keys() - snapshot.by_path.keys()
        self._leaving += [(self._serial, path) for path in sorted(gone)]
        self.snapshot = snapshot
        self._serial += 1
        self._release()

    def _release(self) -> None:
        self._leases = +self._leases  # drops the serials that nobody holds
        oldest = min(self._leases, default=self._serial)
        free = [path for last, path in self._leaving if last < oldest]
        self._leaving = [(last, path) for last, path in self._leaving if last >= oldest]
        for path in free:
            self._unload(path)

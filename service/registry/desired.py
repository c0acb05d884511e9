"""What should be served: tasks, versions, aliases, pins, rollouts, and a generation number.

Names and digests, never bytes (see `store.py`) and nothing about what is on the device (see
`residency.py`). How it is written down is in `document.py`, who keeps it in `registry.py`. Nothing
here goes by the clock: what came first has the smaller generation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property

from service.errors import PreconditionError

__all__ = ["LIVE", "Desired", "IfMatch", "VersionRecord", "now"]

LIVE = "live"  # the alias that decides what a task answers with; the only one that rolls back


@dataclass(frozen=True)
class VersionRecord:
    """One immutable version of a task; `created_at` informs people and orders nothing.

    A version whose method needs one names its unified model, a file that several versions share.
    """

    task: str
    version: str
    digest: str
    created_at: str
    size_bytes: int | None = None  # None where a registry of 0.1 did not keep it
    method: str = "moe_adapter"  # the only one of registries that did not name it
    unified: str = ""  # digest

    @property
    def files(self) -> tuple[str, ...]:
        """Digests of all that it is loaded from."""
        return (self.digest, self.unified) if self.unified else (self.digest,)


@dataclass(frozen=True)
class Desired:
    """Everything a registry says at one generation."""

    generation: int = 0
    id: str = ""  # of the change that made it: no two states have the same
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
    def files(self) -> frozenset[str]:
        """Digests of all that any version is loaded from: bundles, and their unified models."""
        return frozenset(digest for record in self.versions for digest in record.files)

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


def now() -> str:
    """The time for a record: UTC, ISO 8601, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")

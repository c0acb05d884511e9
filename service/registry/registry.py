"""Who keeps the desired state: the seam between one server and several.

`LocalRegistry` is a file of one server, `RedisRegistry` is shared by replicas. What a change
means is the same for both (`changes.py`); they differ in how one is made to be the only one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from service.registry import changes
from service.registry.changes import Change
from service.registry.desired import Desired, IfMatch, VersionRecord

__all__ = ["Registry"]


class Registry(ABC):
    """Each change is one atomic step and returns what is desired after it.

    A change raises the generation by one, unless what it asks for is so already. All of them raise
    NotFoundError for a task or version that is not known (`register` knows none), PreconditionError
    where `if_match` does not hold, and UnavailableError or StorageError where the registry cannot
    be used: then the change has not been acknowledged, and may have been made all the same.
    """

    up: bool = True  # whether it could be used when it last was

    @abstractmethod
    def read(self, known: Desired | None = None) -> Desired:
        """What is desired now; `known` itself if that is still so.

        Raises:
            UnavailableError, StorageError: it cannot be read.
        """

    @abstractmethod
    def change(self, change: Change) -> Desired:
        """Make one change; the methods below are its ways of being called."""

    @abstractmethod
    def listen(self, on_hint: Callable[[], None]) -> Callable[[], None]:
        """Have `on_hint` called, from another thread, when there may be news.

        Hints may be lost, and come for nothing. Returns what ends them.
        """

    @abstractmethod
    def close(self) -> None:
        """Release what it holds."""

    def register(
        self, record: VersionRecord, *, activate: bool, if_match: IfMatch | None = None
    ) -> Desired:
        """Add a version, and make it live if asked.

        Raises:
            ConflictError: that version is there, or an alias is called so.
        """
        edit = changes.register(record, activate=activate)
        return self.change(Change(record.task, edit, if_match, begins=True))

    def set_alias(
        self, task: str, alias: str, version: str, *, if_match: IfMatch | None = None
    ) -> Desired:
        """Let an alias name a version; `live` makes it live.

        Raises:
            ConflictError: a version is called like the alias.
        """
        return self.change(Change(task, changes.set_alias(alias, version), if_match))

    def delete_alias(self, task: str, alias: str, *, if_match: IfMatch | None = None) -> Desired:
        """Forget an alias; without `live`, and what was live before, a task answers by name only.

        Raises:
            NotFoundError: no such alias.
        """
        return self.change(Change(task, changes.delete_alias(alias), if_match))

    def rollback(self, task: str, *, if_match: IfMatch | None = None) -> Desired:
        """Make the version live that was live before; ConflictError if there is none."""
        return self.change(Change(task, changes.rollback, if_match))

    def set_pinned(
        self, task: str, version: str, pinned: bool, *, if_match: IfMatch | None = None
    ) -> Desired:
        """Say whether a version has to stay on the device."""
        return self.change(Change(task, changes.set_pinned(version, pinned), if_match))

    def set_rollout(
        self, task: str, text: str | None, *, if_match: IfMatch | None = None
    ) -> Desired:
        """Keep a task's rollout; what the text means is for `rollouts.py`."""
        return self.change(Change(task, changes.set_rollout(text), if_match))

    def delete_version(
        self, task: str, version: str, *, if_match: IfMatch | None = None
    ) -> Desired:
        """Remove a version; ConflictError while an alias names it."""
        return self.change(Change(task, changes.delete_version(version), if_match))

    def delete_task(self, task: str, *, if_match: IfMatch | None = None) -> Desired:
        """Remove a task with all that belongs to it."""
        return self.change(Change(task, changes.delete_task, if_match))

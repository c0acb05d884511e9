"""What a change does to the desired state: pure functions, the same for every registry.

An edit takes a task and gives the task after it: the very same object where what is asked for is
so already, None where the task is no more. `Change` does the rest: is the task there, does the
condition hold, and the generation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from service.errors import ConflictError, NotFoundError
from service.registry.desired import LIVE, IfMatch, VersionRecord
from service.registry.document import State, TaskState

__all__ = [
    "Change",
    "Edit",
    "delete_alias",
    "delete_task",
    "delete_version",
    "register",
    "rollback",
    "set_alias",
    "set_pinned",
    "set_rollout",
]

Edit = Callable[[str, TaskState], TaskState | None]  # takes the task's name, for what it says


@dataclass(frozen=True)
class Change:
    """One change of one task, to be tried on whatever the state is by then."""

    task: str
    edit: Edit
    if_match: IfMatch | None = None
    begins: bool = False  # the task need not be there

    def apply(self, state: State) -> State:
        """The state after it; `state` itself if nothing has to change.

        Raises:
            NotFoundError, ConflictError, PreconditionError: it cannot be made in this state.
        """
        before = state.tasks.get(self.task)
        if before is None and not self.begins:
            raise NotFoundError(f"no task {self.task}", code="unknown_task")
        if self.if_match is not None:
            self.if_match.check(self.task, before.changed if before else None)
        before = before or TaskState()
        after = self.edit(self.task, before)
        if after is before:
            return state
        others = {name: task for name, task in state.tasks.items() if name != self.task}
        if after is None:
            return state.after(others)
        return state.after(others | {self.task: replace(after, changed=state.generation + 1)})


def register(record: VersionRecord, *, activate: bool) -> Edit:
    """Add a version, and make it live if asked."""

    def edit(name: str, task: TaskState) -> TaskState:
        version = record.version
        if task.has(version):
            raise ConflictError(f"version {version} of {name} exists", code="version_exists")
        if version == LIVE or version in task.aliases:
            raise ConflictError(f"{name} has an alias {version}", code="alias_conflict")
        added = replace(task, versions=(*task.versions, record))
        return _activated(added, version) if activate else added

    return edit


def set_alias(alias: str, version: str) -> Edit:
    """Let an alias name a version."""

    def edit(name: str, task: TaskState) -> TaskState:
        _need(name, task, version)
        if task.has(alias):
            raise ConflictError(f"{name} has a version {alias}", code="alias_conflict")
        if task.names.get(alias) == version:
            return task
        if alias == LIVE:
            return _activated(task, version)
        return replace(task, aliases={**task.aliases, alias: version})

    return edit


def delete_alias(alias: str) -> Edit:
    """Forget an alias; with `live` goes what was live before."""

    def edit(name: str, task: TaskState) -> TaskState:
        if alias not in task.names:
            raise NotFoundError(f"{name} has no alias {alias}", code="unknown_alias")
        if alias == LIVE:
            return replace(task, activations=())
        return replace(task, aliases={a: v for a, v in task.aliases.items() if a != alias})

    return edit


def rollback(name: str, task: TaskState) -> TaskState:
    """Take the top off the stack of activations."""
    if len(task.activations) < 2:
        raise ConflictError(
            f"{name} has no version that was live before", code="no_earlier_version"
        )
    return replace(task, activations=task.activations[:-1])


def set_pinned(version: str, pinned: bool) -> Edit:
    """Say whether a version has to stay on the device."""

    def edit(name: str, task: TaskState) -> TaskState:
        _need(name, task, version)
        if pinned == (version in task.pinned):
            return task
        others = _without(task.pinned, version)
        return replace(task, pinned=(*others, version) if pinned else others)

    return edit


def set_rollout(text: str | None) -> Edit:
    """Keep a rollout; the same text again is a change too, which begins it anew."""

    def edit(name: str, task: TaskState) -> TaskState:
        return replace(task, rollout=text)

    return edit


def delete_version(version: str) -> Edit:
    """Remove a version that no alias names; the task goes with its last one."""

    def edit(name: str, task: TaskState) -> TaskState | None:
        _need(name, task, version)
        _check_free(name, task, version)
        versions = tuple(record for record in task.versions if record.version != version)
        if not versions:
            return None
        return replace(
            task,
            versions=versions,
            activations=_without(task.activations, version),
            pinned=_without(task.pinned, version),
        )

    return edit


def delete_task(name: str, task: TaskState) -> None:
    """Remove a task with all that belongs to it."""


def _activated(task: TaskState, version: str) -> TaskState:
    return replace(task, activations=(*_without(task.activations, version), version))


def _without(versions: tuple[str, ...], version: str) -> tuple[str, ...]:
    return tuple(other for other in versions if other != version)


def _need(name: str, task: TaskState, version: str) -> None:
    if not task.has(version):
        raise NotFoundError(f"no version {version} of {name}", code="unknown_version")


def _check_free(name: str, task: TaskState, version: str) -> None:
    if task.live == version:
        raise ConflictError(
            f"version {version} of {name} is live; make another live, or delete the task",
            code="version_live",
        )
    names = ", ".join(sorted(alias for alias, named in task.aliases.items() if named == version))
    if names:
        raise ConflictError(
            f"version {version} of {name} is what {names} names", code="version_in_use"
        )

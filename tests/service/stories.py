"""Changes of a registry as three words each, and a plain model of what they should do."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from service.registry.changes import Change
from service.registry.desired import Desired, IfMatch, VersionRecord
from service.registry.document import State
from service.registry.registry import Registry

__all__ = ["CHANGES", "STORIES", "Memory", "Model", "Told", "apply", "record"]

TASKS, VERSIONS = ("a", "b"), ("1", "2", "3")
CHANGES = (
    *("register", "wait", "activate", "alias", "no-alias", "deactivate", "rollback"),
    *("pin", "unpin", "rollout", "delete_version", "delete_task"),
)
Told = tuple[str, str, str]  # what, of which task, which version
STORIES = st.lists(
    st.tuples(st.sampled_from(CHANGES), st.sampled_from(TASKS), st.sampled_from(VERSIONS)),
    max_size=20,
)


def record(task: str, version: str) -> VersionRecord:
    """A version's record, without a bundle anywhere."""
    return VersionRecord(task, version, f"sha256:{task}{version}", "2026-11-22T00:00:00+00:00", 7)


def apply(registry: Registry, change: Told, if_match: IfMatch | None = None) -> Desired:
    """Have a registry make a change that is told in three words."""
    name, task, version = change
    match name:
        case "register" | "wait":
            new, activate = record(task, version), name == "register"
            return registry.register(new, activate=activate, if_match=if_match)
        case "activate" | "alias":
            alias = "live" if name == "activate" else "canary"
            return registry.set_alias(task, alias, version, if_match=if_match)
        case "deactivate" | "no-alias":
            alias = "live" if name == "deactivate" else "canary"
            return registry.delete_alias(task, alias, if_match=if_match)
        case "pin" | "unpin":
            return registry.set_pinned(task, version, name == "pin", if_match=if_match)
        case "rollout":
            return registry.set_rollout(task, version, if_match=if_match)
        case "rollback":
            return registry.rollback(task, if_match=if_match)
        case "delete_version":
            return registry.delete_version(task, version, if_match=if_match)
        case _:
            return registry.delete_task(task, if_match=if_match)


class Memory(Registry):
    """A registry that is nothing but the pure functions, and goes with the process."""

    def __init__(self) -> None:
        self.state = State()

    def read(self, known: Desired | None = None) -> Desired:
        """What is desired now."""
        return self.state.desired()

    def change(self, change: Change) -> Desired:
        """Make it."""
        self.state = change.apply(self.state)
        return self.state.desired()

    def listen(self, on_hint: Callable[[], None]) -> Callable[[], None]:
        """Never hints."""
        return lambda: None

    def close(self) -> None:
        """Nothing to release."""


class Model:
    """What the registry should hold, by task; `stacks` are activations, the last one is live."""

    def __init__(self) -> None:
        self.versions: dict[str, list[str]] = {}
        self.stacks: dict[str, list[str]] = {}
        self.canaries: dict[str, str] = {}
        self.rollouts: dict[str, str] = {}
        self.changed: dict[str, int] = {}
        self.pinned: set[tuple[str, str]] = set()
        self.generation = 0

    def allows(self, name: str, task: str, version: str) -> bool:
        known = version in self.versions.get(task, ())
        stack = self.stacks.get(task, [])
        if name in ("register", "wait"):
            return not known
        if name in ("activate", "alias", "pin", "unpin"):
            return known
        if name == "delete_version":
            return known and stack[-1:] != [version] and self.canaries.get(task) != version
        return {
            "no-alias": task in self.canaries,
            "deactivate": bool(stack),
            "rollback": len(stack) > 1,
            "rollout": task in self.versions,
            "delete_task": task in self.versions,
        }[name]

    def is_so_already(self, name: str, task: str, version: str) -> bool:
        return {
            "activate": self.stacks.get(task, [])[-1:] == [version],
            "alias": self.canaries.get(task) == version,
            "pin": (task, version) in self.pinned,
            "unpin": (task, version) not in self.pinned,
        }.get(name, False)

    def apply(self, name: str, task: str, version: str) -> None:
        if self.is_so_already(name, task, version):
            return
        stack = self.stacks.setdefault(task, [])
        if name in ("register", "wait"):
            self.versions.setdefault(task, []).append(version)
        if name == "delete_version":
            self.versions[task].remove(version)
            self.pinned.discard((task, version))
        if name in ("register", "activate", "delete_version") and version in stack:
            stack.remove(version)
        if name in ("register", "activate"):
            stack.append(version)
        match name:
            case "rollback":
                stack.pop()
            case "deactivate":
                stack.clear()
            case "alias":
                self.canaries[task] = version
            case "no-alias":
                del self.canaries[task]
            case "pin":
                self.pinned.add((task, version))
            case "unpin":
                self.pinned.discard((task, version))
            case "rollout":
                self.rollouts[task] = version
        self.generation += 1
        self.changed[task] = self.generation
        if name == "delete_task" or not self.versions.get(task):
            for table in (self.versions, self.stacks, self.canaries, self.rollouts, self.changed):
                table.pop(task, None)
            self.pinned = {key for key in self.pinned if key[0] != task}

    def aliases(self) -> dict[str, dict[str, str]]:
        live = {task: {"live": stack[-1]} for task, stack in self.stacks.items() if stack}
        return {
            task: live.get(task, {})
            | ({"canary": self.canaries[task]} if task in self.canaries else {})
            for task in live.keys() | self.canaries.keys()
        }

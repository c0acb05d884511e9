"""The registry against a plain model of it, and what survives."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medley.errors import MedleyError
from service.errors import ConflictError, NotFoundError, UnavailableError
from service.registry import LocalRegistry, VersionRecord

TASKS, VERSIONS = ("a", "b"), ("1", "2", "3")
changes = st.tuples(
    st.sampled_from(["register", "wait", "activate", "rollback", "delete_version", "delete_task"]),
    st.sampled_from(TASKS),
    st.sampled_from(VERSIONS),
)


def record(task: str, version: str) -> VersionRecord:
    return VersionRecord(task, version, f"sha256:{task}{version}", "2026-11-22T00:00:00+00:00")


def apply(registry: LocalRegistry, change: tuple[str, str, str]) -> None:
    name, task, version = change
    if name in ("register", "wait"):
        registry.register(record(task, version), activate=name == "register")
    elif name == "rollback":
        registry.rollback(task)
    elif name == "delete_task":
        registry.delete_task(task)
    else:
        getattr(registry, name)(task, version)


class Model:
    """What the registry should hold: versions by task, and a stack of activations by task."""

    def __init__(self) -> None:
        self.versions: dict[str, set[str]] = {}
        self.stacks: dict[str, list[str]] = {}
        self.generation = 0

    def allows(self, name: str, task: str, version: str) -> bool:
        known = version in self.versions.get(task, ())
        stack = self.stacks.get(task, [])
        return {
            "register": not known,
            "wait": not known,
            "activate": known,
            "rollback": len(stack) > 1,
            "delete_version": known and stack[-1:] != [version],
            "delete_task": task in self.versions,
        }[name]

    def apply(self, name: str, task: str, version: str) -> None:
        stack = self.stacks.setdefault(task, [])
        if name in ("register", "wait"):
            self.versions.setdefault(task, set()).add(version)
        if name == "delete_version":
            self.versions[task].discard(version)
        if name in ("register", "activate", "delete_version") and version in stack:
            stack.remove(version)
        if name in ("register", "activate"):
            stack.append(version)
        if name == "rollback":
            stack.pop()
        if name == "delete_task" or not self.versions.get(task):
            self.versions.pop(task, None)
            self.stacks.pop(task, None)
        self.generation += 1


@settings(max_examples=60, deadline=None)
@given(story=st.lists(changes, max_size=15))
def test_any_story_leaves_what_a_plain_model_says_and_a_reopened_file_agrees(
    story: list[tuple[str, str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("registry") / "registry.sqlite"
    registry, model = LocalRegistry(path), Model()
    for change in story:
        if model.allows(*change):
            apply(registry, change)
            model.apply(*change)
        else:
            with pytest.raises(MedleyError):
                apply(registry, change)
    here = registry.read()
    registry.close()
    again = LocalRegistry(path)

    assert here == again.read()
    assert here.generation == model.generation
    assert {(r.task, r.version) for r in here.versions} == {
        (task, version) for task, versions in model.versions.items() for version in versions
    }
    assert here.live == {task: stack[-1] for task, stack in model.stacks.items() if stack}
    again.close()


def test_a_refused_change_says_why_and_leaves_the_generation(tmp_path: Path) -> None:
    registry = LocalRegistry(tmp_path / "registry.sqlite")
    before = registry.register(record("a", "1"), activate=True)

    with pytest.raises(ConflictError, match="exists"):
        registry.register(record("a", "1"), activate=True)
    with pytest.raises(ConflictError, match="live before"):
        registry.rollback("a")
    with pytest.raises(ConflictError, match="is live"):
        registry.delete_version("a", "1")
    with pytest.raises(NotFoundError, match="no task b"):
        registry.delete_task("b")
    with pytest.raises(NotFoundError, match="no version 2"):
        registry.activate("a", "2")

    assert registry.read() == before
    registry.close()


def test_a_failure_inside_a_change_undoes_it_whole(tmp_path: Path) -> None:
    def fail(step: str) -> None:
        raise RuntimeError(step)

    registry = LocalRegistry(tmp_path / "registry.sqlite", on_step=fail)
    before = registry.read()

    with pytest.raises(RuntimeError):
        registry.register(record("a", "1"), activate=True)

    assert registry.read() == before
    registry.close()


def test_a_file_that_is_no_registry_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    path.write_bytes(b"not a database" * 1000)

    with pytest.raises(UnavailableError):
        LocalRegistry(path)

"""The registry against a plain model of it, what survives, and what is refused."""

import resource
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medley.errors import MedleyError
from service.errors import (
    ConflictError,
    NotFoundError,
    PreconditionError,
    StorageError,
    UnavailableError,
)
from service.versions.desired import Desired, IfMatch, VersionRecord
from service.versions.local_registry import LocalRegistry

TASKS, VERSIONS = ("a", "b"), ("1", "2", "3")
CHANGES = (
    *("register", "wait", "activate", "alias", "no-alias", "deactivate", "rollback"),
    *("pin", "unpin", "rollout", "delete_version", "delete_task"),
)
changes = st.tuples(st.sampled_from(CHANGES), st.sampled_from(TASKS), st.sampled_from(VERSIONS))


def record(task: str, version: str) -> VersionRecord:
    return VersionRecord(task, version, f"sha256:{task}{version}", "2026-11-22T00:00:00+00:00", 7)


def apply(
    registry: LocalRegistry, change: tuple[str, str, str], if_match: IfMatch | None = None
) -> Desired:
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


@settings(max_examples=60, deadline=None)
@given(story=st.lists(changes, max_size=20))
def test_any_story_leaves_what_a_plain_model_says_and_a_reopened_file_agrees(
    story: list[tuple[str, str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("registry") / "registry.sqlite"
    registry, model = LocalRegistry(path), Model()
    for change in story:
        if model.allows(*change):
            told = apply(registry, change)
            model.apply(*change)
            assert told == registry.read()
        else:
            with pytest.raises(MedleyError):
                apply(registry, change)
    here = registry.read()
    registry.close()
    again = LocalRegistry(path)

    assert here == again.read()
    assert here.generation == model.generation
    assert {task: [r.version for r in of] for task, of in here.tasks.items()} == model.versions
    assert here.aliases == model.aliases()
    assert here.previous == {t: stack[-2] for t, stack in model.stacks.items() if len(stack) > 1}
    assert here.pinned == frozenset(model.pinned)
    assert here.rollouts == model.rollouts
    assert here.changed == model.changed
    again.close()


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in ("register", "wait")])
def test_a_change_goes_only_by_the_tag_it_was_told(tmp_path: Path, name: str) -> None:
    registry = LocalRegistry(tmp_path / "registry.sqlite")
    for change in (("register", "a", "1"), ("register", "a", "2"), ("alias", "a", "1")):
        apply(registry, change)
    if name == "unpin":
        apply(registry, ("pin", "a", "2"))
    if name == "delete_version":
        apply(registry, ("wait", "a", "3"))
    before = registry.read()
    apply(registry, ("register", "b", "1"))  # another task's change is none of a's
    change = (name, "a", "3" if name == "delete_version" else "2")

    with pytest.raises(PreconditionError):
        apply(registry, change, IfMatch(frozenset({before.generation - 1, 99})))
    after = apply(registry, change, IfMatch(frozenset({before.generation, 99})))

    assert after.generation == registry.read().generation
    with pytest.raises(NotFoundError):
        apply(registry, (name, "nobody", "1"), IfMatch(any=True))
    registry.close()


def test_a_registration_can_ask_for_a_task_that_is_there_and_unchanged(tmp_path: Path) -> None:
    registry = LocalRegistry(tmp_path / "registry.sqlite")
    for nobody in (IfMatch(any=True), IfMatch(frozenset({0}))):
        with pytest.raises(PreconditionError):
            registry.register(record("a", "1"), activate=True, if_match=nobody)
    registry.register(record("a", "1"), activate=True)
    registry.register(record("a", "2"), activate=True, if_match=IfMatch(any=True))

    with pytest.raises(PreconditionError):
        registry.register(record("a", "3"), activate=True, if_match=IfMatch(frozenset({1})))
    after = registry.register(record("a", "3"), activate=True, if_match=IfMatch(frozenset({2})))

    assert after.live == {"a": "3"}
    registry.close()


def test_an_alias_and_a_version_are_never_called_the_same(tmp_path: Path) -> None:
    registry = LocalRegistry(tmp_path / "registry.sqlite")
    registry.register(record("a", "1"), activate=True)
    registry.register(record("a", "2"), activate=True)
    before = registry.set_alias("a", "best", "1")

    with pytest.raises(ConflictError, match="has a version 2"):
        registry.set_alias("a", "2", "1")
    for taken in ("best", "live"):
        with pytest.raises(ConflictError, match=f"has an alias {taken}"):
            registry.register(record("a", taken), activate=True)

    assert registry.read() == before
    registry.close()


def test_a_refused_change_says_why_and_leaves_the_generation(tmp_path: Path) -> None:
    registry = LocalRegistry(tmp_path / "registry.sqlite")
    registry.register(record("a", "1"), activate=True)
    registry.register(record("a", "2"), activate=False)
    before = registry.set_alias("a", "canary", "2")

    with pytest.raises(ConflictError, match="exists"):
        registry.register(record("a", "1"), activate=True)
    with pytest.raises(ConflictError, match="live before"):
        registry.rollback("a")
    with pytest.raises(ConflictError, match="is live"):
        registry.delete_version("a", "1")
    with pytest.raises(ConflictError, match="canary"):
        registry.delete_version("a", "2")
    with pytest.raises(NotFoundError, match="no task b"):
        registry.delete_task("b")
    with pytest.raises(NotFoundError, match="no version 3"):
        registry.set_alias("a", "live", "3")
    with pytest.raises(NotFoundError, match="no alias best"):
        registry.delete_alias("a", "best")

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


def test_a_disk_that_takes_no_change_leaves_what_was_and_later_takes_it(tmp_path: Path) -> None:
    """A limit on the size of files fails writes as a full disk does."""
    registry = LocalRegistry(tmp_path / "registry.sqlite")
    before = registry.register(record("a", "1"), activate=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        with pytest.raises((UnavailableError, StorageError)) as caught:
            registry.register(record("a", "2"), activate=True)
        assert not registry.up
        assert registry.read() == before
        assert registry.up
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert str(tmp_path) not in str(caught.value)
    assert registry.register(record("a", "2"), activate=True).live == {"a": "2"}
    registry.close()


def test_versions_are_in_the_order_in_which_they_came_whatever_the_clock_says(
    tmp_path: Path,
) -> None:
    registry = LocalRegistry(tmp_path / "registry.sqlite")
    for version, time in (("9", "2026"), ("1", "1970"), ("5", "2001")):
        registry.register(VersionRecord("a", version, f"sha256:{version}", time), activate=True)

    after = registry.rollback("a")

    assert [r.version for r in after.tasks["a"]] == ["9", "1", "5"]
    assert after.live == {"a": "1"}
    registry.close()


def test_a_file_that_is_no_registry_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    path.write_bytes(b"not a database" * 1000)

    with pytest.raises(UnavailableError):
        LocalRegistry(path)


FORMAT_OF_0_1 = """
CREATE TABLE generation (value INTEGER NOT NULL);
INSERT INTO generation VALUES (3);
CREATE TABLE versions (
    task TEXT NOT NULL, version TEXT NOT NULL, digest TEXT NOT NULL, created_at TEXT NOT NULL,
    PRIMARY KEY (task, version)
);
INSERT INTO versions VALUES ('a', '2', 'sha256:2', '2026'), ('a', '1', 'sha256:1', '2025');
CREATE TABLE activations (
    task TEXT NOT NULL, version TEXT NOT NULL, generation INTEGER NOT NULL,
    PRIMARY KEY (task, version),
    FOREIGN KEY (task, version) REFERENCES versions ON DELETE CASCADE
);
INSERT INTO activations VALUES ('a', '2', 1), ('a', '1', 3);
"""


def test_a_registry_of_0_1_is_read_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    with closing(sqlite3.connect(path)) as old:
        old.executescript(FORMAT_OF_0_1)

    registry = LocalRegistry(path)
    before = registry.read()
    after = registry.register(record("a", "3"), activate=False, if_match=IfMatch(frozenset({3})))
    registry.close()

    assert (before.generation, before.live, before.previous) == (3, {"a": "1"}, {"a": "2"})
    assert before.changed == {"a": 3}
    assert before.records["a", "1"] == VersionRecord("a", "1", "sha256:1", "2025", None)
    assert [r.version for r in after.tasks["a"]] == ["2", "1", "3"]


def test_a_registry_of_a_newer_medley_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    LocalRegistry(path).close()
    with closing(sqlite3.connect(path)) as newer:
        newer.execute("PRAGMA user_version = 99")

    with pytest.raises(UnavailableError, match="newer Medley: its format is 99") as caught:
        LocalRegistry(path)
    assert "\n" not in str(caught.value)

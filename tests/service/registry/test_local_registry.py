"""The registry of one server: what survives, and which files are read or refused."""

import resource
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from service.errors import StorageError, UnavailableError
from service.registry.desired import Desired, IfMatch, VersionRecord
from service.registry.local_registry import LocalRegistry
from tests.service.stories import record


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


FORMAT_2 = """
CREATE TABLE generation (value INTEGER NOT NULL);
INSERT INTO generation VALUES (9);
CREATE TABLE versions (
    task TEXT NOT NULL, version TEXT NOT NULL, digest TEXT NOT NULL, created_at TEXT NOT NULL,
    size_bytes INTEGER, generation INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (task, version)
);
INSERT INTO versions VALUES
    ('b', '1', 'sha256:b1', '2026', 7, 5), ('a', '2', 'sha256:2', '2026', 8, 4),
    ('a', '1', 'sha256:1', '2025', NULL, 3);
CREATE TABLE activations (
    task TEXT NOT NULL, version TEXT NOT NULL, generation INTEGER NOT NULL,
    PRIMARY KEY (task, version),
    FOREIGN KEY (task, version) REFERENCES versions ON DELETE CASCADE
);
INSERT INTO activations VALUES ('a', '1', 8), ('a', '2', 4);
CREATE TABLE tasks (task TEXT PRIMARY KEY, changed INTEGER NOT NULL, rollout TEXT);
INSERT INTO tasks VALUES ('a', 9, 'a rollout'), ('b', 5, NULL);
CREATE TABLE aliases (
    task TEXT NOT NULL, alias TEXT NOT NULL, version TEXT NOT NULL, PRIMARY KEY (task, alias),
    FOREIGN KEY (task, version) REFERENCES versions ON DELETE CASCADE
);
INSERT INTO aliases VALUES ('a', 'best', '2');
CREATE TABLE pins (
    task TEXT NOT NULL, version TEXT NOT NULL, PRIMARY KEY (task, version),
    FOREIGN KEY (task, version) REFERENCES versions ON DELETE CASCADE
);
INSERT INTO pins VALUES ('a', '1');
PRAGMA user_version = 2;
"""


def test_a_registry_of_tables_becomes_a_document_with_all_that_it_held(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    with closing(sqlite3.connect(path)) as old:
        old.executescript(FORMAT_2)

    for _ in range(2):  # converted, and as it was left
        with closing(LocalRegistry(path)) as registry:
            assert registry.read() == Desired(
                generation=9,
                versions=(
                    VersionRecord("a", "1", "sha256:1", "2025", None),
                    VersionRecord("a", "2", "sha256:2", "2026", 8),
                    VersionRecord("b", "1", "sha256:b1", "2026", 7),
                ),
                aliases={"a": {"live": "1", "best": "2"}},
                previous={"a": "2"},
                pinned=frozenset({("a", "1")}),
                rollouts={"a": "a rollout"},
                changed={"a": 9, "b": 5},
            )


def test_a_registry_of_a_newer_medley_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    LocalRegistry(path).close()
    with closing(sqlite3.connect(path)) as newer:
        newer.execute("PRAGMA user_version = 99")

    with pytest.raises(UnavailableError, match="newer Medley: its format is 99") as caught:
        LocalRegistry(path)
    assert "\n" not in str(caught.value)

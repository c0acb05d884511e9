"""Copies of the state in the store: which are kept, and which is found again."""

import logging
from pathlib import Path

import pytest

from service.bundles.blobs import Blobs
from service.errors import RegistryError, StorageError
from service.registry.backup import KEPT, Backup
from service.registry.document import State


@pytest.fixture
def backup(tmp_path: Path) -> Backup:
    """The copies of a new store."""
    return Backup(Blobs(str(tmp_path), timeout_s=5))


def states(count: int) -> list[State]:
    """One that comes after the other."""
    made = [State(ids=("0",))]
    while len(made) < count:
        made.append(made[-1].after({}))
    return made


def test_the_newest_copy_is_found_and_nothing_where_there_is_none(
    backup: Backup, tmp_path: Path
) -> None:
    assert backup.newest() is None
    for state in states(12):
        assert backup.keep(state)
        assert backup.newest() == state
        assert backup.generation == state.generation
    assert Backup(Blobs(str(tmp_path), timeout_s=5)).newest() == state


def test_old_copies_go_and_foreign_files_stay(backup: Backup, tmp_path: Path) -> None:
    backup.keep(State(ids=("0",)))
    foreign = tmp_path / "registry" / "99999999999999999999-notes.txt"
    foreign.write_text("mine")

    for state in states(KEPT + 7):
        backup.keep(state)

    copies = sorted(path.name for path in (tmp_path / "registry").glob("*.json"))
    assert len(copies) == KEPT
    assert copies[0].startswith(f"{7:020}-")
    assert backup.newest() == state
    assert foreign.read_text() == "mine"


def test_the_same_state_is_kept_twice_and_a_rival_is_not(backup: Backup) -> None:
    first, second, third = states(3)
    rival = first.after({})
    for state in (first, second, second):
        assert backup.keep(state)

    assert not backup.keep(rival)  # as old as the second, and another
    assert not backup.keep(first)
    assert backup.keep(third)
    assert backup.newest() == third


def test_a_damaged_copy_is_passed_over_and_said(
    backup: Backup, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = states(2)
    for state in (older, newer):
        backup.keep(state)
    damaged = tmp_path / "registry" / f"{newer.generation:020}-{newer.id}.json"
    damaged.write_text(damaged.read_text()[:50])

    with caplog.at_level(logging.ERROR):
        assert backup.newest() == older
    assert damaged.name in caplog.text


def test_a_copy_of_a_newer_medley_is_refused(backup: Backup, tmp_path: Path) -> None:
    backup.keep(State(ids=("0",)))
    (tmp_path / "registry" / f"{7:020}-ab.json").write_text('{"format": 99}')

    with pytest.raises(RegistryError, match="newer Medley"):
        backup.newest()


def test_a_store_that_is_away_is_an_error_of_ours(backup: Backup, tmp_path: Path) -> None:
    tmp_path.rename(tmp_path.with_name("away"))
    for call in (backup.newest, lambda: backup.keep(State(ids=("0",)))):
        with pytest.raises(StorageError) as caught:
            call()
        assert caught.value.code == "store_unavailable"
    tmp_path.with_name("away").rename(tmp_path)

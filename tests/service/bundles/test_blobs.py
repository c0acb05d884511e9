"""The shared place of immutable files: whole or not at all, in time or not at all."""

import errno
import json
import os
import secrets
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.bundles.blobs import AT_ONCE, ID_FILE, Blobs
from service.errors import NotFoundError, StorageError

BIG = secrets.token_bytes(3_000_000)


@pytest.fixture(params=["folder", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {
        "folder": f"{tmp_path}/store",
        "file": f"file://{tmp_path}/store",
        "memory": f"memory://{secrets.token_hex(8)}/store",
    }[request.param]


def open_folder(tmp_path: Path, *, timeout_s: float = 5) -> Blobs:
    return Blobs(f"{tmp_path}/store", timeout_s=timeout_s)


def test_what_is_put_is_there_for_everybody(url: str, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(BIG)
    one, other = Blobs(url, timeout_s=5), Blobs(url, timeout_s=5)
    one.put("bundles/a", tmp_path / "big")
    one.put("registry/2", b"two")
    one.put("registry/1", b"one")
    other.get("bundles/a", tmp_path / "copy")

    assert (tmp_path / "copy").read_bytes() == BIG
    assert other.read("registry/2") == b"two"
    assert other.size("bundles/a") == len(BIG)
    assert other.names("registry/") == ["registry/1", "registry/2"]
    assert other.names("registry/2") == ["registry/2"]
    assert other.names("bundles/") == ["bundles/a"]
    assert other.has("bundles/a")
    assert one.id == other.id
    assert one.up


def test_what_is_put_again_is_replaced_and_what_is_deleted_is_gone(url: str) -> None:
    blobs = Blobs(url, timeout_s=5)
    blobs.put("registry/1", b"one")
    blobs.put("registry/1", b"two")
    assert blobs.read("registry/1") == b"two"

    blobs.delete("registry/1")
    blobs.delete("registry/1")

    assert not blobs.has("registry/1")
    assert blobs.names("registry/") == []
    assert blobs.names("never/") == []
    with pytest.raises(NotFoundError):
        blobs.read("registry/1")
    assert blobs.up, "a file that is not there is an answer"


def test_all_who_come_first_at_once_agree_whose_store_it_is(url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(lambda _: Blobs(url, timeout_s=20).id, range(8)))

    assert len(ids) == 1


def test_an_id_is_made_where_the_file_system_has_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)

    assert open_folder(tmp_path).id == open_folder(tmp_path).id


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"format": 2, "id": "x"}, "format 2"),
        ({"id": "x"}, "none of ours"),
        ([], "none of ours"),
        ("", "none of ours"),
    ],
)
def test_what_is_no_store_of_ours_is_refused(tmp_path: Path, found: object, said: str) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ID_FILE).write_text(json.dumps(found) if found else "")

    with pytest.raises(StorageError, match=said) as caught:
        open_folder(tmp_path)

    assert caught.value.code == "store_refused"


@pytest.mark.parametrize("url", ["nonsense://b", "simplecache::/srv/x", "abc://", "s3:/b"])
def test_what_is_neither_a_url_nor_a_path_is_refused(url: str) -> None:
    with pytest.raises(StorageError, match="no bundle store") as caught:
        Blobs(url, timeout_s=5)

    assert caught.value.code == "store_refused"


def test_a_place_taken_by_a_file_is_no_store_and_its_path_is_not_told(tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes(b"")

    with pytest.raises(StorageError) as caught:
        open_folder(tmp_path)

    assert caught.value.code == "store_unavailable"
    assert str(tmp_path) not in str(caught.value)


def test_a_store_that_has_gone_is_not_one_that_is_empty(tmp_path: Path) -> None:
    """Nor is it begun anew where it was: what is put there would be lost to all others."""
    blobs = open_folder(tmp_path)
    blobs.put("bundles/a", b"a")
    (tmp_path / "store").rename(tmp_path / "away")

    for mounted in (False, True):
        if mounted:  # the empty folder under a mount that has fallen away
            (tmp_path / "store").mkdir()
        for call in (
            lambda: blobs.read("bundles/a"),
            lambda: blobs.has("bundles/a"),
            lambda: blobs.names("bundles/"),
            lambda: blobs.delete("bundles/a"),
            lambda: blobs.put("bundles/b", b"b"),
        ):
            with pytest.raises(StorageError) as caught:
                call()
            assert caught.value.code == "store_unavailable"
            assert not blobs.up
        assert not list((tmp_path / "store").glob("*")), mounted
    (tmp_path / "store").rmdir()
    (tmp_path / "away").rename(tmp_path / "store")

    assert blobs.read("bundles/a") == b"a"
    assert blobs.up


def test_another_store_in_the_same_place_is_not_taken_for_the_first(tmp_path: Path) -> None:
    blobs = open_folder(tmp_path)
    shutil.rmtree(tmp_path / "store")
    open_folder(tmp_path)

    with pytest.raises(StorageError, match="another one"):
        blobs.put("bundles/a", b"a")


def test_a_file_that_hangs_is_given_up_and_too_many_are_not_waited_for(tmp_path: Path) -> None:
    """A pipe that nobody writes to hangs as a dead network mount does."""
    blobs = open_folder(tmp_path, timeout_s=0.1)
    blobs.put("bundles/a", b"a")
    os.mkfifo(tmp_path / "store" / "bundles" / "b")
    before = threading.active_count()

    for _ in range(AT_ONCE):
        with pytest.raises(StorageError, match=r"0\.1 s"):
            blobs.read("bundles/b")
    with pytest.raises(StorageError, match="too many"):
        blobs.read("bundles/a")
    assert threading.active_count() - before == AT_ONCE

    hanging = [one for one in threading.enumerate() if one.name == "bundle-store"]
    (tmp_path / "store" / "bundles" / "b").open("wb").close()
    for thread in hanging:
        thread.join(10)
    assert blobs.read("bundles/a") == b"a"


def test_what_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    """The file's size is known, its bytes cannot be read: as if the disk failed half way."""
    blobs = open_folder(tmp_path)
    (tmp_path / "folder").mkdir()

    with pytest.raises(StorageError):
        blobs.put("bundles/a", tmp_path / "folder")

    assert blobs.names("bundles/") == []
    assert list((tmp_path / "store" / "incoming").iterdir()) == []

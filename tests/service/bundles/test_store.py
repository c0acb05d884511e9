"""The store of bundle bytes."""

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from service.bundles.store import BundleStore
from service.errors import PayloadError, StorageError, UnavailableError

DIGEST = "sha256:" + "a" * 64


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BundleStore]:
    store = BundleStore(tmp_path)
    yield store
    store.close()


def files(store: BundleStore) -> list[str]:
    return sorted(path.name for path in store.folder.rglob("*") if path.is_file())


def test_kept_bytes_are_there_and_nothing_else(store: BundleStore) -> None:
    with store.upload(100) as upload:
        upload.write(b"abc")
        upload.write(b"def")
        upload.finish()
        store.keep(upload, DIGEST)

    assert store.path(DIGEST).read_bytes() == b"abcdef"
    assert files(store) == ["a" * 64 + ".safetensors", "lock"]


def test_an_upload_that_is_not_kept_leaves_nothing(store: BundleStore) -> None:
    with suppress(RuntimeError), store.upload(100) as upload:
        upload.write(b"abc")
        raise RuntimeError

    assert files(store) == ["lock"]


def test_more_bytes_than_allowed_are_refused(store: BundleStore) -> None:
    with store.upload(4) as upload:
        upload.write(b"abcd")
        with pytest.raises(PayloadError):
            upload.write(b"e")


def test_cleaning_removes_half_uploads_and_what_nobody_wants(store: BundleStore) -> None:
    for digest in (DIGEST, "sha256:" + "b" * 64):
        with store.upload(100) as upload:
            upload.write(b"x")
            store.keep(upload, digest)
    (store.folder / "incoming" / "half.part").write_bytes(b"x")

    assert store.clean({DIGEST}) == 2
    assert files(store) == ["a" * 64 + ".safetensors", "lock"]
    assert store.clean(set()) == 0, "a lost registry must not take the bundles with it"


def test_a_folder_belongs_to_one_server_at_a_time(store: BundleStore) -> None:
    with pytest.raises(UnavailableError, match="another server"):
        BundleStore(store.folder)

    store.close()
    BundleStore(store.folder).close()


def test_a_full_disk_is_an_error_without_a_path_in_it(store: BundleStore) -> None:
    """A limit on the size of files fails writes as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with store.upload(10**9) as upload:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(StorageError) as caught:
                upload.write(b"x" * 2_000_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert caught.value.code == "storage_full"
    assert str(store.folder) not in str(caught.value)


def test_bytes_that_the_disk_takes_only_in_part_leave_nothing(store: BundleStore) -> None:
    """They are still in a buffer, and do not fit when it is emptied at the end either."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with store.upload(10**9) as upload:
            upload.write(b"x" * 100)
            with pytest.raises(StorageError):
                upload.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert files(store) == ["lock"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_store_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)

    with pytest.raises(StorageError):
        BundleStore(tmp_path / "store")


def test_a_store_whose_place_is_taken_by_a_file_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes(b"")

    with pytest.raises(StorageError):
        BundleStore(tmp_path / "store")

"""A store that replicas share, and the folder of each as a cache of it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from medley.errors import BundleError
from medley.sealed import check_seal, pack
from service.bundles.blobs import Blobs
from service.bundles.shared_store import SharedStore
from service.bundles.store import BundleStore
from service.errors import StorageError, UnavailableError

Open = Callable[..., BundleStore]


def sealed(number: int = 0) -> tuple[str, bytes]:
    """Digest and bytes of something sealed; a store does not look further."""
    data = pack(f'{{"number":{number}}}', {})
    return "sha256:" + data.split(b'seal\\":\\"')[1][:64].decode(), data


def keep(store: BundleStore, digest: str, data: bytes) -> None:
    with store.upload(10**6) as upload:
        upload.write(data)
        upload.finish()
        store.keep(upload, digest)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Open a replica's store by the replica's name; all of them share one place."""
    stores: list[BundleStore] = []

    def open_store(name: str, **options: Callable[[str], None]) -> BundleStore:
        blobs = Blobs(str(tmp_path / "shared"), timeout_s=5)
        stores.append(BundleStore(tmp_path / name, SharedStore(blobs, **options)))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def shared_file(tmp_path: Path, digest: str) -> Path:
    return tmp_path / "shared" / "bundles" / f"{digest.removeprefix('sha256:')}.safetensors"


def test_what_one_replica_keeps_another_fetches(opened: Open) -> None:
    (digest, data), one, other = sealed(), opened("one"), opened("other")
    keep(one, digest, data)

    assert not other.path(digest).exists()
    assert other.fetch(digest).read_bytes() == data
    assert one.fetch(digest).read_bytes() == data
    assert list((other.folder / "incoming").iterdir()) == []


def test_what_is_in_the_cache_needs_no_shared_store(opened: Open, tmp_path: Path) -> None:
    (digest, data), store = sealed(), opened("one")
    keep(store, digest, data)
    (tmp_path / "shared").rename(tmp_path / "away")

    assert store.fetch(digest).read_bytes() == data


def test_a_lost_bundle_is_told_from_a_store_that_is_away(opened: Open, tmp_path: Path) -> None:
    store, (digest, _) = opened("one"), sealed()
    with pytest.raises(BundleError, match=digest) as lost:
        store.fetch(digest)
    assert lost.value.code == "bundle_lost"

    (tmp_path / "shared").rename(tmp_path / "away")
    with pytest.raises(StorageError) as away:
        store.fetch(digest)
    assert away.value.code == "store_unavailable"


@pytest.mark.parametrize("at", [0, 60, -1])
def test_a_damaged_bundle_never_enters_the_cache_and_is_mended_by_the_next_registration(
    opened: Open, tmp_path: Path, at: int
) -> None:
    (digest, data), one, other = sealed(), opened("one"), opened("other")
    keep(one, digest, data)
    damaged = bytearray(data)
    damaged[at] ^= 1
    shared_file(tmp_path, digest).write_bytes(damaged)

    with pytest.raises(BundleError):
        other.fetch(digest)
    assert not other.path(digest).exists()

    keep(one, digest, data)
    assert other.fetch(digest).read_bytes() == data


@pytest.mark.parametrize("found", [sealed(1)[1], b"", b"x" * 200, sealed()[1][:100]])
def test_something_else_under_a_bundles_name_never_enters_the_cache(
    opened: Open, tmp_path: Path, found: bytes
) -> None:
    digest, data = sealed()
    one, other = opened("one"), opened("other")
    keep(one, digest, data)
    shared_file(tmp_path, digest).write_bytes(found)

    with pytest.raises(BundleError):
        other.fetch(digest)
    assert not other.path(digest).exists()


@pytest.mark.parametrize("found", [b"", b"x" * 200, sealed(1)[1]])
def test_a_damaged_copy_in_the_cache_is_fetched_again(opened: Open, found: bytes) -> None:
    (digest, data), store = sealed(), opened("one")
    keep(store, digest, data)
    store.path(digest).write_bytes(found)

    assert store.fetch(digest).read_bytes() == data


def test_what_the_shared_store_does_not_take_is_not_kept_here_either(
    opened: Open, tmp_path: Path
) -> None:
    (digest, data), store = sealed(), opened("one")
    (tmp_path / "shared").rename(tmp_path / "away")

    with pytest.raises(StorageError):
        keep(store, digest, data)

    assert not store.path(digest).exists()
    assert list((store.folder / "incoming").iterdir()) == []


def test_nothing_is_put_before_it_was_announced(opened: Open, tmp_path: Path) -> None:
    digest, data = sealed()

    def refuse(announced: str) -> None:
        assert announced == digest
        raise UnavailableError("the registry is away", code="registry_unavailable")

    store = opened("one", announce=refuse)
    with pytest.raises(UnavailableError):
        keep(store, digest, data)

    assert not shared_file(tmp_path, digest).exists()


def test_forgetting_and_cleaning_touch_the_cache_only(opened: Open, tmp_path: Path) -> None:
    store, bundles = opened("one"), [sealed(number) for number in range(3)]
    for digest, data in bundles:
        keep(store, digest, data)
    (wanted, _), (removed, _), (cleaned, _) = bundles

    store.remove(removed)
    assert store.clean({wanted}) == 1

    assert store.path(wanted).exists()
    for digest in (removed, cleaned):
        assert not store.path(digest).exists()
        assert shared_file(tmp_path, digest).exists()


def test_what_was_lost_before_the_registry_named_it_is_put_again(
    opened: Open, tmp_path: Path
) -> None:
    (digest, data), one, other = sealed(), opened("one"), opened("other")
    keep(one, digest, data)
    shared_file(tmp_path, digest).unlink()

    one.confirm(digest)
    one.confirm(digest)

    assert other.fetch(digest).read_bytes() == data


def test_foreign_files_are_neither_read_nor_listed(opened: Open, tmp_path: Path) -> None:
    (digest, data), store = sealed(), opened("one")
    keep(store, digest, data)
    for name in ("README", "A" * 64 + ".safetensors", "a" * 64, "a" * 64 + ".safetensors.bak"):
        (tmp_path / "shared" / "bundles" / name).write_bytes(b"foreign")

    assert store.shared is not None
    assert store.shared.digests() == {digest}


@pytest.mark.parametrize(
    "digest", ["", "sha256:../../secret", "md5:" + "a" * 64, "sha256:" + "A" * 64]
)
def test_what_is_no_digest_names_no_file(opened: Open, digest: str) -> None:
    store = opened("one")
    assert store.shared is not None

    with pytest.raises(BundleError):
        store.shared.has(digest)


def test_a_seal_is_checked_over_a_file_as_over_its_bytes(tmp_path: Path) -> None:
    digest, data = sealed()
    path = tmp_path / "bundle"
    path.write_bytes(data)
    assert f"sha256:{check_seal(path)}" == digest

    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(BundleError):
            check_seal(path)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(BundleError):
            check_seal(path)
    with pytest.raises(BundleError):
        check_seal(tmp_path / "missing")

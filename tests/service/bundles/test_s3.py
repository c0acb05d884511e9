"""The shared store in S3, spoken for real: the same promises as a folder's."""

import os
import secrets
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from medley.errors import BundleError
from medley.sealed import pack
from service.bundles.blobs import Blobs
from service.bundles.shared_store import SharedStore
from service.bundles.store import BundleStore
from service.errors import NotFoundError, StorageError
from tests.s3_server import S3Server

BIG = secrets.token_bytes(7_000_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as started:
        assert httpx.put(f"{started.url}/bucket").status_code == 200
        yield started


@pytest.fixture
def url(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store of its own, as an operator names it: keys and end point are in the environment."""
    given = {"ENDPOINT_URL": server.url, "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y"}
    for name, value in (given | {"DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    return f"s3://bucket/{secrets.token_hex(8)}/store"


def test_files_are_put_listed_read_and_deleted(url: str, tmp_path: Path) -> None:
    one, other = Blobs(url, timeout_s=20), Blobs(f"{url}/", timeout_s=20)
    (tmp_path / "big").write_bytes(BIG)
    one.put("bundles/a", tmp_path / "big")
    one.put("registry/1", b"one")
    other.get("bundles/a", tmp_path / "copy")

    assert one.id == other.id
    assert (tmp_path / "copy").read_bytes() == BIG
    assert (other.read("registry/1"), other.size("bundles/a")) == (b"one", len(BIG))
    assert other.names("registry/") == ["registry/1"]
    assert other.names("never/") == []
    other.put("registry/1", b"two")
    assert one.read("registry/1") == b"two"
    one.delete("registry/1")
    one.delete("registry/1")
    assert not other.has("registry/1")
    assert other.names("registry/") == []
    with pytest.raises(NotFoundError):
        other.read("registry/1")


def test_all_who_come_first_at_once_agree_whose_store_it_is(url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: Blobs(url, timeout_s=30).id, range(4)))) == 1


def test_a_bundle_goes_through_it_and_a_damaged_one_does_not(url: str, tmp_path: Path) -> None:
    data = pack('{"number":1}', {})
    digest = "sha256:" + data.split(b'seal\\":\\"')[1][:64].decode()
    shared = SharedStore(Blobs(url, timeout_s=20))
    one, other = (BundleStore(tmp_path / name, shared) for name in ("one", "other"))
    with one.upload(10**6) as upload:
        upload.write(data)
        upload.finish()
        one.keep(upload, digest)

    assert shared.digests() == {digest}
    assert other.fetch(digest).read_bytes() == data
    other.remove(digest)
    shared.blobs.put(f"bundles/{digest[7:]}.safetensors", data[:-1])
    with pytest.raises(BundleError):
        other.fetch(digest)
    shared.remove(digest)
    with pytest.raises(BundleError, match="lost") as caught:
        other.fetch(digest)
    assert caught.value.code == "bundle_lost"
    one.close()
    other.close()


def test_a_bucket_that_is_not_there_is_no_store_yet(url: str) -> None:
    with pytest.raises(StorageError) as caught:
        Blobs("s3://no-such-bucket/store", timeout_s=20)

    assert caught.value.code == "store_unavailable"


def test_a_server_that_does_not_answer_is_given_up_and_found_again(
    server: S3Server, url: str
) -> None:
    blobs = Blobs(url, timeout_s=2)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(StorageError, match="2 s"):
            blobs.names("bundles/")
        assert not blobs.up
    finally:
        os.kill(server.pid, signal.SIGCONT)

    patient = Blobs(url, timeout_s=20)
    assert patient.names("bundles/") == []
    assert patient.id == blobs.id

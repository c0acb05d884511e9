"""Bundles by address: which are fetched, which are refused, and what a bad source does."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
from pydantic import ValidationError

from medley.backbone import Backbone
from service.bundles.sources import Sources, check_prefix
from service.errors import RequestError
from service.settings import Settings
from tests.service.conftest import MakeBundle, OpenApp
from tests.service.fused import made_fusion


def fetch(http: httpx.Client, source: object, version: str = "1") -> httpx.Response:
    return http.put(f"/v1/tasks/pets/versions/{version}", json={"source": source})


def test_a_bundle_in_a_folder_is_registered_by_its_address(
    open_app: OpenApp, make: MakeBundle, tmp_path: Path
) -> None:
    bundle, data = make()
    shelf = tmp_path / "shelf"
    (shelf / "pets").mkdir(parents=True)
    (shelf / "pets" / "1.safetensors").write_bytes(data)
    source = f"file://{shelf}/pets/1.safetensors"

    with open_app(bundle_sources=f"{shelf},file://{shelf}") as http:
        created = fetch(http, source)
        assert created.status_code == 201, created.text
        assert created.json()["versions"][0]["digest"] == bundle.digest
        assert created.json()["versions"][0]["size_bytes"] == len(data)
        assert fetch(http, f"{shelf}/pets/1.safetensors").status_code == 200
        assert list((tmp_path / "store" / "incoming").iterdir()) == []


def test_a_trigger_bundle_in_a_folder_brings_its_unified_model_from_beside_it(
    open_app: OpenApp, backbone: Backbone, tmp_path: Path
) -> None:
    fusion = made_fusion(tmp_path / "shelf", backbone, ("birds", "cars"))
    birds, cars = (f"{fusion.file(task)}" for task in fusion.bundles)
    aside = fusion.path.rename(tmp_path / "aside")

    with open_app(bundle_sources=f"{fusion.folder}") as http:
        alone = http.put("/v1/tasks/birds/versions/1", json={"source": birds})
        assert (alone.status_code, alone.json()["code"]) == (422, "unified_missing")

        aside.rename(fusion.path)
        created = http.put("/v1/tasks/birds/versions/1", json={"source": birds})
        assert created.status_code == 201, created.text
        assert created.json()["versions"][0]["unified"] == fusion.digest

        fusion.path.write_bytes(b"not looked at again")
        assert http.put("/v1/tasks/cars/versions/1", json={"source": cars}).status_code == 201


def test_a_server_without_sources_fetches_nothing(open_app: OpenApp, tmp_path: Path) -> None:
    with open_app() as http:
        response = fetch(http, f"file://{tmp_path}/x")

    assert (response.status_code, response.json()["code"]) == (403, "sources_disabled")


@pytest.mark.parametrize(
    "source",
    [
        "{shelf}/../secret",
        "{shelf}/a/../../secret",
        "{shelf}/./x",
        "{shelf}//x",
        "{shelf}/",
        "{shelf}",
        "{shelf}-other/x",
        "{shelf}/%2e%2e/secret",
        "{shelf}/x?y",
        "{shelf}/x#y",
        "{shelf}/x::file:///etc/passwd",
        "{shelf}/x\\..\\y",
        "{shelf}/x\0y",
        "{shelf}/*",
        "{shelf}/link",
        "{shelf}/folder-link/secret",
        "simplecache::{shelf}/x",
        "/etc/passwd",
        "https://example.org/x",
        "x",
    ],
)
def test_no_address_leads_out_of_the_sources(tmp_path: Path, source: str) -> None:
    shelf = tmp_path / "shelf"
    for folder in (shelf, tmp_path / "shelf-other"):
        folder.mkdir()
        (folder / "x").write_bytes(b"x")
    (tmp_path / "secret").write_bytes(b"secret")
    (shelf / "link").symlink_to(tmp_path / "secret")
    (shelf / "folder-link").symlink_to(tmp_path)
    sources = Sources((check_prefix(f"file://{shelf}"),), timeout_s=1)
    sources.check(f"file://{shelf}/x")

    with pytest.raises(RequestError) as caught:
        sources.check(source.format(shelf=f"file://{shelf}"))

    assert caught.value.code == "source_refused"
    assert str(tmp_path) not in str(caught.value)


def test_a_source_that_is_refused_is_told_over_http(open_app: OpenApp, tmp_path: Path) -> None:
    with open_app(bundle_sources=f"file://{tmp_path}/shelf") as http:
        response = fetch(http, f"file://{tmp_path}/secret")

    assert (response.status_code, response.json()["code"]) == (422, "source_refused")


def test_what_is_not_a_readable_file_is_told_without_a_path(
    open_app: OpenApp, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")  # would be waited for
    (tmp_path / "large").write_bytes(bytes(2000))
    (tmp_path / "rubbish").write_bytes(b"rubbish")
    with open_app(bundle_sources=f"file://{tmp_path}", max_bundle_bytes=1000) as http:
        for name, status, code in (
            ("missing", 422, "source_failed"),
            ("store", 422, "source_failed"),
            ("pipe", 422, "source_failed"),
            ("large", 413, "too_large"),
            ("rubbish", 422, "not_safetensors"),
        ):
            response = fetch(http, f"file://{tmp_path}/{name}")
            assert (response.status_code, response.json()["code"]) == (status, code), name
            assert str(tmp_path) not in response.text
        assert list((tmp_path / "store" / "incoming").iterdir()) == []


@pytest.mark.parametrize("body", [{}, {"source": 1}, {"source": ""}, {"source": "x", "y": 1}, []])
def test_a_request_names_one_source_and_nothing_else(http: httpx.Client, body: object) -> None:
    assert http.put("/v1/tasks/pets/versions/1", json=body).status_code == 422
    assert fetch(http, "x" * 100_000).json()["code"] == "too_large"


@pytest.mark.parametrize(
    "sources", ["bundles", "nonsense://x", "file://relative", "simplecache::/srv/bundles"]
)
def test_a_source_that_cannot_be_one_stops_the_server_before_it_starts(sources: str) -> None:
    with pytest.raises(ValidationError, match="bundle source"):
        Settings.model_validate({"bundle_sources": sources})


class Shelf(BaseHTTPRequestHandler):
    """`/shelf/bundle` is there, `/shelf/moved` leads to it, `/shelf/slow` never comes."""

    data: ClassVar[bytes] = b""
    stop: ClassVar[threading.Event] = threading.Event()

    def do_GET(self) -> None:
        if self.path == "/shelf/moved":
            self.send_response(302)
            self.send_header("Location", "/secret")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path == "/shelf/slow":
            self.stop.wait()
        found = self.path in ("/shelf/bundle", "/secret")
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(self.data) if found else 0))
        self.end_headers()
        if found and self.command == "GET":
            self.wfile.write(self.data)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def shelf(data: bytes) -> Iterator[str]:
    class OneShelf(Shelf):
        pass

    OneShelf.data, OneShelf.stop = data, threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), OneShelf) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/shelf"
        finally:
            OneShelf.stop.set()
            server.shutdown()
            thread.join()


def test_a_bundle_by_http_is_fetched_and_no_redirect_is_followed(
    open_app: OpenApp, make: MakeBundle
) -> None:
    with shelf(make()[1]) as url, open_app(bundle_sources=url) as http:
        moved = fetch(http, f"{url}/moved")
        assert moved.status_code == 422, moved.text
        assert http.get("/v1/tasks").json()["tasks"] == []
        assert fetch(http, f"{url}/none").json()["code"] == "source_failed"
        assert fetch(http, f"{url}/bundle").status_code == 201


def test_a_source_that_does_not_answer_is_given_up(open_app: OpenApp, make: MakeBundle) -> None:
    with shelf(b"") as url, open_app(bundle_sources=url, upload_timeout_s=0.2) as http:
        response = fetch(http, f"{url}/slow")
        assert response.json()["code"] == "source_failed"
        assert "0.2 s" in response.json()["detail"]
        (operation,) = http.get("/v1/operations").json()["operations"]
        assert (operation["state"], operation["error"]["code"]) == ("failed", "source_failed")

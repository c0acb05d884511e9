"""The beginning and the end of a server process: what is true when, and what a signal does."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from medley.errors import MedleyError
from service.app import create_app
from service.server import serve
from service.settings import Settings
from tests.service.conftest import ROOT, MakeBundle, OpenApp, ServerProcess, StartServer
from tests.service.load import loading
from tests.service.raw import Raw, post
from tests.service.routes.test_classify import classify
from tests.service.versions.test_tasks import put

PETS = [("pets", "/v1/classify?model=pets"), ("auto", "/v1/classify")]


@contextmanager
def begun_server(store: Path, *settings: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process of which nothing is known yet, and the URL that it will have."""
    port = free_port()
    command = [sys.executable, "-m", "tests.service.tiny_server", str(store), f"port={port}"]
    with subprocess.Popen(
        [*command, *settings], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def patient(url: str) -> httpx.Client:
    """A client that waits until somebody listens."""
    return httpx.Client(base_url=url, timeout=30, transport=httpx.HTTPTransport(retries=12))


@pytest.fixture
def stalled_store(open_app: OpenApp, make: MakeBundle, tmp_path: Path) -> tuple[Path, Path]:
    """A store whose disk does not give the only bundle before somebody writes it to a pipe."""
    store = tmp_path / "store"
    with open_app(store=store) as http:
        put(http, make()[1]).raise_for_status()
    (bundle,) = (store / "bundles").iterdir()
    bundle.unlink()
    os.mkfifo(bundle)
    return store, bundle


def test_a_server_that_starts_is_alive_and_neither_started_nor_ready(
    stalled_store: tuple[Path, Path], make: MakeBundle, image: bytes
) -> None:
    store, bundle = stalled_store
    with begun_server(store) as (process, url), patient(url) as http:
        assert http.get("/livez").status_code == 200
        while http.get("/startupz").json()["detail"] != "the server is starting: restoring tasks":
            pass
        for path in ("/startupz", "/readyz", "/v1/tasks", "/v1/tasks/pets"):
            refused = http.get(path)
            assert (refused.status_code, refused.json()["code"]) == (503, "starting")
            assert refused.headers["retry-after"] == "1"
        assert classify(http, image).json()["code"] == "starting"
        assert put(http, make()[1]).json()["code"] == "starting"
        assert http.get("/metrics").status_code == 200
        assert http.get("/nowhere").status_code == 404

        bundle.write_bytes(make()[1])

        assert process.stdout is not None
        assert process.stdout.readline().strip() == url  # it says so when it is ready
        assert http.get("/startupz").json() == {"started": True}
        assert http.get("/readyz").json()["ready"] is True
        assert classify(http, image, model="pets").status_code == 200


def test_a_server_that_starts_can_be_told_to_leave(
    stalled_store: tuple[Path, Path], make: MakeBundle
) -> None:
    store, bundle = stalled_store
    with begun_server(store) as (process, url), patient(url) as http:
        assert http.get("/livez").status_code == 200
        process.terminate()
        bundle.write_bytes(make()[1])
        assert process.wait(30) == 0


@pytest.mark.slow
def test_a_start_that_hangs_is_cut_off_in_time(stalled_store: tuple[Path, Path]) -> None:
    with begun_server(stalled_store[0], "drain_s=0") as (process, url), patient(url) as http:
        assert http.get("/livez").status_code == 200
        process.terminate()
        assert process.wait(30) == 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"backbone": "no-such-model"}, "no backbone is called 'no-such-model'"),
        ({"store": __file__}, "the store cannot be written"),
        ({"alexnet_weights": __file__}, "something else than tensors"),
    ],
)
def test_a_start_that_fails_ends_the_server(
    fields: dict[str, str], says: str, tmp_path: Path
) -> None:
    settings = Settings.model_validate({"port": 0, "store": tmp_path / "store"} | fields)
    app = create_app(settings, in_background=True)

    with pytest.raises(MedleyError, match=says):
        serve(app, settings, on_ready=pytest.fail)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "2")
    settings = Settings(port=0, store=tmp_path)
    app = create_app(settings, in_background=True)

    with pytest.raises(MedleyError, match="one process serves one device"):
        serve(app, settings, on_ready=pytest.fail)


def test_a_second_server_on_a_store_ends_with_one_line_and_the_first_does_not_notice(
    server: ServerProcess, http: httpx.Client
) -> None:
    program = "from service.commands import commands; commands()"
    command = [sys.executable, "-c", program, "serve", "--port", "0", "--store", str(server.store)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("medley: ")
    assert "another server uses this store folder" in last
    assert http.get("/readyz").status_code == 200


def test_an_engine_without_success_for_long_is_not_worth_living(open_app: OpenApp) -> None:
    with open_app(heartbeat_s=1000) as http:
        app: FastAPI = http.app  # type: ignore[attr-defined]
        engine = app.state.service.engine
        engine._last_success_s -= 3001
        assert http.get("/readyz").json()["code"] == "not_ready"
        assert http.get("/livez").status_code == 200
        engine._last_success_s -= 30_000
        assert http.get("/livez").json()["code"] == "engine_dead"


def test_a_draining_server_is_not_ready_and_answers_until_balancers_have_noticed(
    start_server: StartServer, make: MakeBundle, image: bytes, tmp_path: Path
) -> None:
    """At the end somebody is in the middle of an upload, and is cut off when the time is up."""
    ask, data = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n", make(version="2")[1]
    with ExitStack() as stack:
        server = stack.enter_context(start_server(tmp_path, "drain_delay_s=60", "drain_s=1"))
        kept, endless = (stack.enter_context(Raw(server.url)) for _ in range(2))
        assert kept.ask(ask % b"/readyz").status == 200
        with server.client() as http:
            put(http, make()[1]).raise_for_status()
            server.process.terminate()
            while http.get("/readyz").status_code == 200:
                pass
            refused = http.get("/readyz")
            assert (refused.status_code, refused.json()["code"]) == (503, "draining")
            assert http.get("/livez").status_code == 200
            assert classify(http, image, model="pets").status_code == 200
        last = kept.ask(ask % b"/livez")
        assert last.headers["connection"] == "close"
        assert kept.is_closed()

        head = b"PUT /v1/tasks/pets/versions/2 HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
        kind = b"Content-Type: application/octet-stream\r\n"
        endless.send(head + kind + b"Content-Length: %d\r\n\r\n" % len(data))
        assert endless.socket.recv(100).startswith(b"HTTP/1.1 100")
        endless.send(data[:100])
        server.process.terminate()  # a second signal ends the delay
        assert server.process.wait(30) == 0
    assert not list((tmp_path / "incoming").iterdir())
    assert len(list((tmp_path / "bundles").iterdir())) == 1


def test_a_rolling_restart_under_load_fails_no_request(
    start_server: StartServer, make: MakeBundle, image: bytes, tmp_path: Path
) -> None:
    """SIGTERM under load, then the next server on the same port; clients only reconnect."""
    port = f"port={free_port()}"
    requests = [(name, post(path, image, content_type="image/png")) for name, path in PETS]
    with ExitStack() as stack:  # the second server outlives the load
        first = stack.enter_context(start_server(tmp_path, port))
        with first.client() as http:
            put(http, make()[1]).raise_for_status()
        with loading(first.url, requests, clients=4) as tally:
            first.process.terminate()
            assert first.process.wait(30) == 0
            stack.enter_context(start_server(tmp_path, port))

    assert set(tally.statuses) == {200}
    assert len(tally.answers) == len(requests), "an answer differs"
    assert tally.torn == 0
    assert tally.again["ConnectionRefusedError"] > 0, "no client met the gap"

"""What is there after a process has died, and after it has been asked to stop."""

import itertools
import json
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import httpx
import pytest

from service.bundles.store import BundleStore
from tests.service.conftest import ROOT, MakeBundle, OpenApp, ServerProcess, StartServer
from tests.service.load import loading
from tests.service.raw import post
from tests.service.routes.test_classify import classify
from tests.service.test_start_and_stop import free_port
from tests.service.versions.test_tasks import put

BEFORE = ["received", "verified", "stored", "admitted", "registry-uncommitted"]
AFTER = ["committed", "published"]


@pytest.fixture(scope="module")
def stores(
    tmp_path_factory: pytest.TempPathFactory, make: MakeBundle
) -> tuple[Path, dict[str, int]]:
    """A store left behind by a killed registration of version 2, for every step of it."""
    folder = tmp_path_factory.mktemp("killed")
    bundles = [folder / "1.safetensors", folder / "2.safetensors"]
    for path, data in zip(bundles, (make()[1], make(version="2", seed=3)[1]), strict=True):
        path.write_bytes(data)
    command = [sys.executable, "-m", "tests.service.killed", str(folder), *map(str, bundles)]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, check=True)
    return folder, json.loads(done.stdout)


def test_every_step_of_a_registration_is_killed_at(stores: tuple[Path, dict[str, int]]) -> None:
    assert stores[1] == dict.fromkeys(BEFORE + AFTER, signal.SIGKILL)


@pytest.mark.parametrize("step", BEFORE + AFTER)
def test_a_killed_registration_is_before_or_after_never_between(
    stores: tuple[Path, dict[str, int]],
    step: str,
    open_app: OpenApp,
    make: MakeBundle,
    image: bytes,
) -> None:
    store, after = stores[0] / step, step in AFTER
    with open_app(store=store) as http:
        task = http.get("/v1/tasks/pets").json()
        assert task["live"] == ("2" if after else "1")
        assert task["generation"] == (2 if after else 1)
        assert {v["version"]: v["state"] for v in task["versions"]} == (
            {"1": "ready", "2": "live"} if after else {"1": "live"}
        )
        (result,) = classify(http, image, labels=None).json()["results"]
        assert result["path"]["version"] == task["live"]
        kept = {path.name for path in (store / "bundles").iterdir()}
        assert len(kept) == len(task["versions"])
        assert not list((store / "incoming").iterdir())

        again = put(http, make(version="2", seed=3)[1], version="2")
        assert again.status_code == (200 if after else 201)
        assert again.json()["live"] == "2"


def test_a_killed_server_comes_back_and_a_stopped_one_answers_what_it_holds(
    start_server: StartServer, make: MakeBundle, image: bytes, tmp_path: Path
) -> None:
    data = make(version="2", seed=3)[1]
    with start_server(tmp_path) as first, first.client() as http:
        put(http, make()[1])
        before = classify(http, image, labels=None).json()["results"]

        def half_then_kill() -> Iterator[bytes]:
            yield data[: len(data) // 2]
            first.process.kill()
            first.process.wait()
            yield data[len(data) // 2 :]

        with pytest.raises(httpx.TransportError):
            http.put("/v1/tasks/pets/versions/2", content=half_then_kill())

    with start_server(tmp_path) as second, second.client() as http:
        assert classify(http, image, labels=None).json()["results"] == before
        assert [v["version"] for v in http.get("/v1/tasks/pets").json()["versions"]] == ["1"]

        def half_then_terminate() -> Iterator[bytes]:
            yield image[:100]
            second.process.terminate()
            yield image[100:]

        held = http.post(
            "/v1/classify", content=half_then_terminate(), headers={"content-type": "image/png"}
        )
        assert held.json()["results"] == before
        assert second.process.wait(30) == 0
    assert not (tmp_path / "registry.sqlite-wal").exists()  # closed, not abandoned


@pytest.mark.parametrize("damage", ["missing", "truncated", "swapped"])
def test_a_version_whose_bundle_is_damaged_is_reported_and_the_others_serve(
    open_app: OpenApp, make: MakeBundle, image: bytes, tmp_path: Path, damage: str
) -> None:
    pets, tools = make(), make(task="tools", seed=1)
    with open_app() as http:
        put(http, pets[1])
        put(http, tools[1], "tools")
    store = BundleStore(tmp_path / "store")
    path = store.path(pets[0].digest)
    store.close()
    path.unlink()
    if damage != "missing":
        path.write_bytes(pets[1][:500] if damage == "truncated" else tools[1])

    with open_app() as http:
        (version,) = http.get("/v1/tasks/pets").json()["versions"]
        assert version["state"] == "failed"
        assert version["reason"]
        assert str(tmp_path) not in version["reason"]
        assert http.get("/readyz").json()["failed_versions"] == ["pets@1"]
        refused = classify(http, image, model="pets")
        assert (refused.status_code, refused.json()["code"]) == (503, "version_failed")
        (result,) = classify(http, image, labels=None).json()["results"]
        assert result["path"]["task"] == "tools"

        assert put(http, pets[1]).status_code == 200
        assert classify(http, image, model="pets").status_code == 200
        assert http.get("/readyz").json()["failed_versions"] == []


def test_a_second_server_on_the_same_store_does_not_start(open_app: OpenApp) -> None:
    with open_app(), pytest.raises(Exception, match="another server"), open_app():
        pass


def test_an_upload_whose_client_goes_away_leaves_nothing(
    server: ServerProcess, http: httpx.Client, make: MakeBundle
) -> None:
    data, url = make(task="gone")[1], httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 80)) as raw:
        raw.sendall(
            b"PUT /v1/tasks/gone/versions/1 HTTP/1.1\r\nHost: x\r\n"
            b"Content-Length: %d\r\n\r\n" % len(data)
        )
        raw.sendall(data[: len(data) // 2])
    ended = 'operation="PUT /v1/tasks/{task}/versions/{version}",status="499"} 1.0'
    assert any(ended in http.get("/metrics").text for _ in range(1000))

    assert list((server.store / "incoming").iterdir()) == []
    assert put(http, data, "gone").status_code == 201


def test_a_full_disk_refuses_the_bundle_and_nothing_else(
    open_app: OpenApp, make: MakeBundle, image: bytes, tmp_path: Path
) -> None:
    """A limit on the size of files fails writes as a full disk does."""
    first, data = make()[1], make(task="tools", seed=1)[1]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_app() as http:
        put(http, first)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            refused = put(http, data, "tools")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        assert (refused.status_code, refused.json()["code"]) == (507, "storage_full")
        assert [task["task"] for task in http.get("/v1/tasks").json()["tasks"]] == ["pets"]
        assert list((tmp_path / "store" / "incoming").iterdir()) == []
        assert classify(http, image, labels=None).status_code == 200
        assert put(http, data, "tools").status_code == 201


def test_a_registry_that_cannot_be_written_refuses_changes_and_answers_go_on(
    open_app: OpenApp, make: MakeBundle, image: bytes, tmp_path: Path
) -> None:
    with open_app() as http:
        put(http, make()[1])
        before = classify(http, image, labels=None).json()
        with closing(sqlite3.connect(tmp_path / "store" / "registry.sqlite")) as other:
            other.execute("PRAGMA journal_mode=WAL")
            other.execute("BEGIN IMMEDIATE")
            refused = put(http, make(task="tools", seed=1)[1], "tools")
            assert (refused.status_code, refused.json()["code"]) == (503, "registry_unavailable")
            assert http.delete("/v1/tasks/pets").status_code == 503
            assert classify(http, image, labels=None).json() == before
            other.rollback()
        assert len(list((tmp_path / "store" / "bundles").iterdir())) == 1
        assert put(http, make(task="tools", seed=1)[1], "tools").status_code == 201


Registered = dict[str, tuple[str, frozenset[str]]]  # live version and all versions of each task
ONE, TWO = frozenset("1"), frozenset("12")
CHANGES: list[tuple[str, str, tuple[str, str] | None, Registered]] = [
    ("PUT", "pets/versions/2", ("pets", "2"), {"pets": ("2", TWO)}),
    ("POST", "pets:rollback", None, {"pets": ("1", TWO)}),
    ("PUT", "guest/versions/1", ("guest", "1"), {"pets": ("1", TWO), "guest": ("1", ONE)}),
    ("DELETE", "pets/versions/2", None, {"pets": ("1", ONE), "guest": ("1", ONE)}),
    ("DELETE", "guest", None, {"pets": ("1", ONE)}),
]


def test_a_server_killed_under_load_and_change_comes_back_before_or_after_the_change(
    start_server: StartServer, make: MakeBundle, image: bytes, tmp_path: Path
) -> None:
    """Three lives on one store; in the first two, changes never stop until it is killed."""
    port = f"port={free_port()}"
    request = post("/v1/classify?model=pets@1", image, content_type="image/png")
    bundles = {
        ("pets", "2"): make(version="2", seed=3)[1],
        ("guest", "1"): make(task="guest", seed=4)[1],
    }
    with ExitStack() as stack:
        server = stack.enter_context(start_server(tmp_path, port))
        with server.client() as http:
            put(http, make()[1]).raise_for_status()
        done = 0
        with loading(server.url, [("pets@1", request)], clients=3) as tally:
            for wanted in (4, 8):
                done += changes_until_killed(server, bundles, done, wanted)
                server = stack.enter_context(start_server(tmp_path, port))
                done += check_what_is_left(server, done, image)

    assert set(tally.statuses) == {200}
    answers = {json.dumps(json.loads(body)["results"]) for _, _, body in tally.answers}
    assert len(answers) == 1
    assert tally.again.total() > 0


def check_what_is_left(server: ServerProcess, done: int, image: bytes) -> bool:
    """Returns whether the change after the `done` that were acknowledged is there too."""
    with server.client() as http:
        found = registered(http)
        before, after = (CHANGES[number % len(CHANGES)][3] for number in (done - 1, done))
        assert found in (before, after)
        assert not list((server.store / "incoming").iterdir())
        files = list((server.store / "bundles").iterdir())
        assert len(files) == sum(len(versions) for _, versions in found.values())
        for task, (live, _) in found.items():
            (result,) = classify(http, image, model=task, labels=None).json()["results"]
            assert result["path"]["version"] == live
    return found == after


def changes_until_killed(
    server: ServerProcess, bundles: dict[tuple[str, str], bytes], first: int, wanted: int
) -> int:
    """Change without a pause; after `wanted` changes are acknowledged, kill. Returns how many."""
    acknowledged, enough = [], threading.Event()

    def change() -> None:
        with server.client() as http, suppress(httpx.TransportError):
            for number in itertools.count(first):
                method, path, bundle, _ = CHANGES[number % len(CHANGES)]
                content = bundles[bundle] if bundle else None
                http.request(method, f"/v1/tasks/{path}", content=content).raise_for_status()
                acknowledged.append(number)
                if len(acknowledged) == wanted:
                    enough.set()

    with ThreadPoolExecutor(1) as pool:
        changing = pool.submit(change)
        assert enough.wait(60)
        server.process.kill()
        changing.result()
    server.process.wait()
    return len(acknowledged)


def registered(http: httpx.Client) -> Registered:
    tasks = http.get("/v1/tasks").json()["tasks"]
    assert {v["state"] for task in tasks for v in task["versions"]} <= {"live", "ready"}
    return {t["task"]: (t["live"], frozenset(v["version"] for v in t["versions"])) for t in tasks}

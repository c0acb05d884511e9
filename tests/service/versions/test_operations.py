"""Operations: what runs on, what is remembered, and how they stop."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from medley.backbone import Backbone
from service.app import create_app
from service.errors import ConflictError, NotFoundError, QueueFullError
from service.registry.desired import IfMatch
from service.settings import Settings
from service.versions.operations import Operations, Started
from service.versions.tasks import Registered, Tasks, Wanted
from tests.service.conftest import MakeBundle, OpenApp, ServerProcess
from tests.service.raw import Raw


@dataclass(frozen=True)
class Done:
    warnings: tuple[str, ...] = ()
    replicas: None = None


async def at_once(*warnings: str) -> Done:
    return Done(warnings)


async def for_ever() -> Done:
    await asyncio.Event().wait()
    return Done()


async def refused() -> Done:
    raise ConflictError("no", code="version_exists")


async def broken() -> Done:
    raise ZeroDivisionError("secret")


def test_an_operation_tells_what_became_of_it() -> None:
    async def story() -> None:
        operations, go_on = Operations(), asyncio.Event()

        async def waits() -> Done:
            await go_on.wait()
            return Done(("look",))

        started = operations.start("register", "a", "1", waits())
        assert await started.result(0) is None
        running = operations.get(started.id)
        assert (running.state, running.finished_at, running.error) == ("running", None, None)
        go_on.set()
        assert await started.result(10) == Done(("look",))
        ended = operations.get(started.id)
        assert (ended.state, ended.warnings) == ("succeeded", ("look",))
        assert ended.finished_at is not None
        assert list(operations.all()) == [ended]

    asyncio.run(story())


def test_a_failure_is_told_to_who_waits_and_remembered_without_secrets() -> None:
    async def story() -> None:
        operations = Operations()
        for work, code in ((refused(), "version_exists"), (broken(), "internal")):
            started = operations.start("register", "a", "1", work)
            with pytest.raises((ConflictError, ZeroDivisionError)):
                await started.result(10)
            ended = operations.get(started.id)
            assert (ended.state, ended.error and ended.error["code"]) == ("failed", code)
            assert "secret" not in str(ended)

    asyncio.run(story())


def test_the_last_are_remembered_and_those_that_run() -> None:
    async def story() -> None:
        operations = Operations(kept=3)
        forever = operations.start("register", "a", "0", for_ever())
        ids = []
        for _ in range(5):
            started = operations.start("register", "a", "1", at_once())
            await started.result(10)
            ids.append(started.id)

        assert [one.id for one in operations.all()] == [ids[4], ids[3], forever.id]
        with pytest.raises(NotFoundError):
            operations.get(ids[0])
        await operations.close()

    asyncio.run(story())


def test_no_more_run_than_are_remembered() -> None:
    async def story() -> None:
        operations = Operations(kept=1)
        operations.start("register", "a", "1", for_ever())
        with pytest.raises(QueueFullError):
            operations.start("register", "a", "2", at_once())
        await operations.close()
        await operations.start("register", "a", "2", at_once()).result(10)

    asyncio.run(story())


def test_at_the_end_they_are_cancelled_and_waited_for() -> None:
    async def story() -> None:
        operations, cleaned = Operations(), asyncio.Event()

        async def tidy() -> Done:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                cleaned.set()
            return Done()

        started = operations.start("register", "a", "1", tidy())
        assert await started.result(0) is None
        await operations.close()

        assert cleaned.is_set()
        error = operations.get(started.id).error
        assert error is not None
        assert error["code"] == "draining"

    asyncio.run(story())


def finished(http: httpx.Client, location: str) -> dict[str, Any]:
    """The operation, when it has ended."""
    answers: Iterator[dict[str, Any]] = (http.get(location).json() for _ in range(10_000))
    return next(one for one in answers if one["state"] != "running")


def test_a_registration_can_be_left_alone_and_asked_for_later(
    open_app: OpenApp, make: MakeBundle
) -> None:
    with open_app() as http:
        accepted = http.put("/v1/tasks/pets/versions/1?wait=0", content=make()[1])
        assert accepted.status_code == 202
        location = accepted.headers["location"]
        assert location == f"/v1/operations/{accepted.json()['id']}"
        done = finished(http, location)
        assert (done["kind"], done["task"], done["version"]) == ("register", "pets", "1")
        assert (done["state"], done["error"], done["warnings"]) == ("succeeded", None, [])
        assert http.get("/v1/tasks/pets").json()["live"] == "1"

        again = http.put("/v1/tasks/pets/versions/1?wait=0", content=make(seed=4)[1])
        refused = finished(http, again.headers["location"])
        assert refused["state"] == "failed"
        assert refused["error"]["code"] == "version_exists"
        known = http.get("/v1/operations").json()["operations"]
        assert [one["id"] for one in known] == [refused["id"], done["id"]]
        unknown = http.get("/v1/operations/none")
        assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_operation")


@pytest.mark.parametrize("wait", ["-1", "601", "nan", "inf", "long"])
def test_a_wait_that_makes_no_sense_is_refused(http: httpx.Client, wait: str) -> None:
    response = http.put(f"/v1/tasks/pets/versions/1?wait={wait}", content=b"")

    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


def test_a_registration_survives_its_client_once_the_bytes_are_in(
    server: ServerProcess, make: MakeBundle
) -> None:
    data = make(task="left")[1]
    with Raw(server.url) as raw:
        raw.send(
            b"PUT /v1/tasks/left/versions/1 HTTP/1.1\r\nHost: x\r\n"
            b"Content-Length: %d\r\n\r\n" % len(data)
        )
        raw.send(data)

    with server.client() as http:
        found = (http.get("/v1/operations").json()["operations"] for _ in range(10_000))
        operation = next(o for ops in found for o in ops if o["task"] == "left")
        assert finished(http, f"/v1/operations/{operation['id']}")["state"] == "succeeded"
        assert http.get("/v1/tasks/left").json()["live"] == "1"


def test_a_server_that_stops_during_registrations_leaves_each_whole_or_not_at_all(
    open_app: OpenApp, make: MakeBundle
) -> None:
    names = [f"stop-{n}" for n in range(4)]
    with open_app() as http:
        for name in names:
            url = f"/v1/tasks/{name}/versions/1?wait=0"
            assert http.put(url, content=make(task=name)[1]).status_code == 202

    with open_app() as http:
        kept = {task["task"]: task for task in http.get("/v1/tasks").json()["tasks"]}
        assert kept.keys() <= set(names)
        assert {task["versions"][0]["state"] for task in kept.values()} <= {"live"}
        for name in names:
            response = http.put(f"/v1/tasks/{name}/versions/1", content=make(task=name)[1])
            assert response.status_code == (200 if name in kept else 201)


class Gate:
    """Holds a registration inside its registry transaction, which runs in a worker thread."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, step: str) -> None:
        if step == "registry-uncommitted":
            self.reached.set()
            self.go_on.wait()


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


@asynccontextmanager
async def held_registration(
    store: Path, data: bytes, backbone: Backbone
) -> AsyncIterator[tuple[Tasks, Started[Registered], Gate]]:
    gate = Gate()
    app = create_app(Settings(store=store, buckets=(4,)), backbone=backbone, on_step=gate)
    async with app.router.lifespan_context(app):
        tasks: Tasks = app.state.service.tasks
        try:
            started = await tasks.receive(Wanted("pets", "1"), chunks(data))
            await asyncio.to_thread(gate.reached.wait)
            yield tasks, started, gate
        finally:
            gate.go_on.set()


def test_a_change_that_has_begun_is_made_whole_before_the_engine_stops(
    tmp_path: Path, make: MakeBundle, backbone: Backbone, open_app: OpenApp
) -> None:
    async def story() -> None:
        async with held_registration(tmp_path / "store", make()[1], backbone) as held:
            tasks, started, gate = held
            waits = await tasks.receive(Wanted("tools", "1"), chunks(make(task="tools")[1]))
            closing = asyncio.create_task(tasks.close())
            with pytest.raises(asyncio.CancelledError):
                await waits.result(10)
            assert not closing.done()
            gate.go_on.set()
            await closing
            assert tasks.live.snapshot.live.keys() == {"pets"}
            assert tasks.operations.get(started.id).state == "failed", "nobody was told"

    asyncio.run(story())
    assert list((tmp_path / "store" / "incoming").iterdir()) == []
    with open_app() as http:
        assert [task["task"] for task in http.get("/v1/tasks").json()["tasks"]] == ["pets"]


def test_who_deletes_what_is_being_registered_comes_after_it(
    tmp_path: Path, make: MakeBundle, backbone: Backbone
) -> None:
    async def story() -> None:
        async with held_registration(tmp_path / "store", make()[1], backbone) as held:
            tasks, started, gate = held
            deleting = asyncio.create_task(tasks.delete_task("pets"))
            rivals = [
                asyncio.create_task(tasks.set_alias("pets", name, "1", if_match=IfMatch(any=True)))
                for name in ("live", "best")
            ]
            await asyncio.sleep(0)
            assert not deleting.done()
            gate.go_on.set()
            registered = await started.result(30)
            assert registered is not None
            assert registered.snapshot.live.keys() == {"pets"}
            assert (await deleting).desired.tasks == {}
            for rival in rivals:
                with pytest.raises(NotFoundError):
                    await rival
            assert list((tmp_path / "store" / "bundles").iterdir()) == []

    asyncio.run(story())


def test_who_gives_up_waiting_for_a_change_does_not_undo_it(
    tmp_path: Path, make: MakeBundle, backbone: Backbone
) -> None:
    async def story() -> None:
        async with held_registration(tmp_path / "store", make()[1], backbone) as held:
            tasks, started, gate = held
            impatient = asyncio.create_task(tasks.set_pinned("pets", "1", True))
            await asyncio.sleep(0)
            impatient.cancel()
            gate.go_on.set()
            assert await started.result(30) is not None
            with pytest.raises(asyncio.CancelledError):
                await impatient
            assert (await tasks.set_alias("pets", "best", "1")).desired.pinned == frozenset()

    asyncio.run(story())

"""Between a request and its answer: deadlines, clients that hang up, what is held at once."""

import asyncio
import base64
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from medley.backbone import Backbone
from service.app import create_app
from service.settings import Settings
from service.state import Service
from service.versions.live import Leaving

LABELS = ["cat", "car"]
TIMEOUT_HEADER = "x-request-timeout-ms"


class Client:
    """One request at the border to the app: it says when its body comes and when it hangs up."""

    def __init__(
        self, app: FastAPI, *parts: bytes, ends: bool = True, headers: dict[str, str] | None = None
    ) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.gone = asyncio.Event()
        self._app = app
        self._parts = list(parts)
        self._ends = ends
        given = {"content-type": "application/json"} | (headers or {})
        self._headers = [(name.encode(), value.encode()) for name, value in given.items()]

    def start(self) -> asyncio.Task[None]:
        """Send the request."""
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/classify",
            "raw_path": b"/v1/classify",
            "query_string": b"",
            "headers": self._headers,
            "client": ("127.0.0.1", 1),
            "root_path": "",
            "server": ("127.0.0.1", 80),
        }
        return asyncio.ensure_future(self._app(scope, self._receive, self._send))

    async def answer(self) -> int:
        """Send the request and wait for its status."""
        await self.start()
        return self.status

    @property
    def code(self) -> str:
        """The code of the problem that came back."""
        return str(json.loads(self.body)["code"])

    async def _receive(self) -> Message:
        if self._parts:
            part = self._parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": self._more()}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    def _more(self) -> bool:
        return bool(self._parts) or not self._ends

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            self.body += message.get("body", b"")


@asynccontextmanager
async def running(tmp_path: Path, backbone: Backbone, **fields: Any) -> AsyncIterator[FastAPI]:
    settings = Settings.model_validate({"store": tmp_path / "store", "buckets": (4,)} | fields)
    app = create_app(settings, backbone=backbone)
    async with app.router.lifespan_context(app):
        yield app


@asynccontextmanager
async def held(app: FastAPI) -> AsyncIterator[None]:
    """Nothing is computed until the block ends."""
    entered, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        let_go.wait()

    service_of(app).engine.run(hold)
    await asyncio.to_thread(entered.wait)
    try:
        yield
    finally:
        let_go.set()


def service_of(app: FastAPI) -> Service:
    service = app.state.service
    assert isinstance(service, Service)
    return service


def asked(*images: bytes) -> bytes:
    given = [{"bytes_b64": base64.b64encode(image).decode()} for image in images]
    return json.dumps({"images": given, "labels": LABELS, "model": "base"}).encode()


def value(app: FastAPI, name: str, **labels: str) -> float:
    return service_of(app).metrics.registry.get_sample_value(name, labels) or 0.0


def images(app: FastAPI, outcome: str) -> float:
    task = "zero_shot" if outcome == "ok" else "none"
    return value(app, "medley_images_total", task=task, route="explicit", outcome=outcome)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what other threads do; there is no event to wait for."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  (another thread moves it)
            await asyncio.sleep(0.001)


def test_a_deadline_ends_the_wait_and_gives_the_place_in_the_queue_back(
    tmp_path: Path, backbone: Backbone, image: bytes
) -> None:
    async def run() -> None:
        async with running(tmp_path, backbone) as app:
            async with held(app):
                client = Client(app, asked(image, image), headers={TIMEOUT_HEADER: "100"})
                assert (await client.answer(), client.code) == (504, "deadline_passed")
                assert value(app, "medley_queue_depth") == 0
                assert images(app, "deadline") == 2
            assert await Client(app, asked(image)).answer() == 200

    asyncio.run(run())


def test_no_client_waits_longer_than_the_server_allows(
    tmp_path: Path, backbone: Backbone, image: bytes
) -> None:
    async def run() -> None:
        async with running(tmp_path, backbone, request_timeout_s=0.1) as app, held(app):
            for headers in (None, {TIMEOUT_HEADER: "999999999999"}):
                client = Client(app, asked(image), headers=headers)
                assert (await client.answer(), client.code) == (504, "deadline_passed")

    asyncio.run(run())


def test_a_client_that_hangs_up_leaves_the_queue(
    tmp_path: Path, backbone: Backbone, image: bytes
) -> None:
    async def run() -> None:
        async with running(tmp_path, backbone) as app:
            async with held(app):
                client = Client(app, asked(image, image))
                request = client.start()
                await until(lambda: value(app, "medley_queue_depth") == 2)
                client.gone.set()
                await request
                assert value(app, "medley_queue_depth") == 0
                assert images(app, "cancelled") == 2
            assert await Client(app, asked(image)).answer() == 200
            assert images(app, "ok") == 1

    asyncio.run(run())


def test_images_in_work_are_bounded_and_refused_before_they_are_decoded(
    tmp_path: Path, backbone: Backbone, image: bytes
) -> None:
    async def run() -> None:
        limits = {"max_inflight_images": 2, "max_images": 2}
        async with running(tmp_path, backbone, **limits) as app:
            async with held(app):
                first = Client(app, asked(image, image))
                request = first.start()
                await until(lambda: value(app, "medley_queue_depth") == 2)
                second = Client(app, asked(image))
                assert (await second.answer(), second.code) == (429, "busy")
                assert second.headers["retry-after"] == "1"
                assert images(app, "rejected") == 1
            await request
            assert first.status == 200
            assert await Client(app, asked(image, image)).answer() == 200

    asyncio.run(run())


def test_the_bytes_of_all_bodies_together_are_bounded(
    tmp_path: Path, backbone: Backbone, image: bytes
) -> None:
    async def run() -> None:
        body = asked(image)
        limits = {"max_inflight_bytes": len(body) + 10, "max_request_bytes": len(body) + 10}
        async with running(tmp_path, backbone, **limits) as app:
            slow = Client(app, body[:100], ends=False)
            request = slow.start()
            await asyncio.sleep(0)  # its first part is taken in
            refused = Client(app, body)
            assert (await refused.answer(), refused.code) == (429, "busy")
            assert refused.headers["retry-after"] == "1"
            slow.gone.set()
            await request
            assert await Client(app, body).answer() == 200
            assert await Client(app, body).answer() == 200

    asyncio.run(run())


def test_a_body_that_does_not_arrive_is_not_waited_for(
    tmp_path: Path, backbone: Backbone, image: bytes
) -> None:
    async def run() -> None:
        async with running(tmp_path, backbone, body_timeout_s=0.05) as app:
            begun = {
                "application/json": asked(image)[:50],
                "image/png": image[:50],
                "multipart/form-data; boundary=x": b"--x\r\n",
            }
            for kind, part in begun.items():
                slow = Client(app, part, ends=False, headers={"content-type": kind})
                assert (await slow.answer(), slow.code) == (408, "request_timeout")
                assert slow.headers["connection"] == "close"
            hasty = Client(app, b"{", ends=False, headers={TIMEOUT_HEADER: "10"})
            assert (await hasty.answer(), hasty.code) == (504, "deadline_passed")

    asyncio.run(run())


def test_whenever_clients_leave_nothing_of_them_is_left(
    tmp_path: Path, backbone: Backbone, image: bytes
) -> None:
    """Some hang up, some have little time, some wait: every place and lease comes back."""
    random = Random(0)

    async def run() -> None:
        async with running(tmp_path, backbone) as app:
            leaving: list[asyncio.Task[None]] = []
            staying: list[asyncio.Task[None]] = []
            async with held(app):
                for number in range(90):
                    headers = (
                        {TIMEOUT_HEADER: str(random.randint(1, 60))} if number % 3 == 1 else {}
                    )
                    client = Client(app, asked(*[image] * random.randint(1, 3)), headers=headers)
                    (leaving if number % 3 else staying).append(client.start())
                    if number % 3 == 2:
                        asyncio.get_running_loop().call_later(random.random() / 20, client.gone.set)
                await asyncio.gather(*leaving)
            await asyncio.gather(*staying)

            assert min(images(app, outcome) for outcome in ("ok", "cancelled", "deadline")) > 0
            assert images(app, "error") == 0
            for name in ("inflight_bytes", "inflight_images", "decode_backlog_images"):
                assert value(app, f"medley_{name}") == 0
            assert value(app, "medley_queue_depth") == 0
            assert service_of(app).tasks.live.holders(Leaving(path=0, serial=1_000)) == []

    asyncio.run(run())


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "", "1e3", "9" * 13, "\u0663"])
def test_a_deadline_that_is_no_positive_number_is_refused(
    http: httpx.Client, image: bytes, value: str
) -> None:
    headers = {b"content-type": b"image/png", TIMEOUT_HEADER.encode(): value.encode()}

    response = http.post("/v1/classify", content=image, params={"labels": LABELS}, headers=headers)

    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


def test_an_answer_says_where_its_time_went(http: httpx.Client, image: bytes) -> None:
    response = http.post(
        "/v1/classify",
        content=image,
        params={"labels": LABELS},
        headers={"content-type": "image/png", TIMEOUT_HEADER: "10000"},
    )

    parts = [part.strip().split(";dur=") for part in response.headers["server-timing"].split(",")]
    times_ms = {name: float(value) for name, value in parts}
    assert list(times_ms) == ["decode", "queue", "forward", "head", "total"]
    assert times_ms["total"] >= times_ms["decode"] + times_ms["forward"]

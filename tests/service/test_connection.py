"""What a connection may take before there is a request: bytes, headers, time, a place."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from service.connection import Connection, ConnectionLimits, Connections
from service.lifecycle import Lifecycle
from service.signals.metrics import Metrics
from tests.service.conftest import ServerProcess, StartServer
from tests.service.raw import Raw

GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
LIMITS: dict[str, Any] = {
    "header_timeout_s": 1,
    "keep_alive_s": 2.5,
    "max_header_bytes": 2048,
    "max_headers": 20,
    "max_connections": 8,
}


@pytest.fixture(scope="module")
def strict(
    start_server: StartServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server with small limits."""
    with start_server(
        tmp_path_factory.mktemp("strict"), *(f"{k}={v}" for k, v in LIMITS.items())
    ) as started:
        yield started


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(21)) + b"\r\n",
        b"GET /livez HTTP/1.1\r\nX: " + 3000 * b"y" + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n" + b"".join(b"X-%d: %0600d\r\n" % (n, n) for n in range(6)),
        b"GET /livez?" + 3000 * b"y" + b" HTTP/1.1\r\n\r\n",
    ],
    ids=["too many", "one too long", "too long together", "request line"],
)
def test_headers_over_a_limit_are_refused(strict: ServerProcess, head: bytes) -> None:
    with Raw(strict.url) as raw:
        answer = raw.ask(head)
        assert (answer.status, answer.json()["code"]) == (431, "headers_too_large")
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["x-request-id"] == answer.json()["request_id"]
        assert raw.is_closed()


def test_a_header_that_never_ends_is_cut_off(strict: ServerProcess) -> None:
    with Raw(strict.url) as raw:
        raw.send(b"GET /livez HTTP/1.1\r\nX: ")
        with pytest.raises(ConnectionError):
            send_without_end(raw)


def test_trailers_count_as_headers(strict: ServerProcess) -> None:
    chunked = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    trailers = b"".join(b"X-%d: y\r\n" % n for n in range(21))
    with Raw(strict.url) as raw:
        answer = raw.ask(chunked + b"Content-Type: image/png\r\n\r\n0\r\n" + trailers)
        assert answer.json()["code"] == "headers_too_large"


def test_headers_that_do_not_come_are_not_waited_for(strict: ServerProcess) -> None:
    begun = (b"G", b"GET /livez HTTP/1.1\r\nHost: x\r\n", b"PUT / H")
    with ExitStack() as stack:
        waiting = [stack.enter_context(Raw(strict.url)) for _ in begun]
        for raw, start in zip(waiting, begun, strict=True):
            raw.send(start)
        for raw in waiting:
            answer = raw.answer()
            assert (answer.status, answer.json()["code"]) == (408, "request_timeout")
            assert raw.is_closed()


def test_headers_that_trickle_in_get_no_more_time(strict: ServerProcess) -> None:
    """Each byte waits until it is sure that the server has nothing to say yet."""
    with Raw(strict.url) as raw:
        raw.send(b"GET /livez HTTP/1.1\r\nX: ")
        raw.socket.settimeout(0.1)
        heard = b""
        for _ in range(100):
            try:
                heard = raw.socket.recv(100)
                break
            except TimeoutError:
                raw.send(b"y")

    assert heard.startswith(b"HTTP/1.1 408 ")


def test_a_connection_with_nothing_to_ask_is_closed(strict: ServerProcess) -> None:
    with Raw(strict.url) as new, Raw(strict.url) as used:
        assert used.ask(GET).status == 200
        assert new.is_closed()
        assert used.is_closed()


def test_a_new_connection_takes_the_place_of_the_one_that_is_idle_for_longest(
    strict: ServerProcess,
) -> None:
    with ExitStack() as stack:
        held = [stack.enter_context(Raw(strict.url)) for _ in range(8)]
        for raw in held:
            assert raw.ask(GET).status == 200
        held[0].send(b"GET /livez HTT")
        assert held[1].ask(GET).status == 200
        others = [stack.enter_context(Raw(strict.url)) for _ in range(7)]
        assert [raw.ask(GET).status for raw in others] == 7 * [200]
        assert all(raw.is_closed() for raw in held[2:])
        assert held[1].ask(GET).status == 200


def test_nobody_who_is_answered_loses_the_place(strict: ServerProcess) -> None:
    body = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    with ExitStack() as stack:
        held = [stack.enter_context(Raw(strict.url)) for _ in range(8)]
        for raw in held:
            raw.send(body + b"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n")
            assert raw.socket.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"  # it is being read
        answer = stack.enter_context(Raw(strict.url)).answer()
        assert (answer.status, answer.json()["code"]) == (503, "too_many_connections")
        assert answer.headers["retry-after"] == "1"
        for raw in held:
            assert raw.ask(b"1234567890").status == 422  # no task is live


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"hello\r\n\r\n",
        b"GET /livez HTTP/9.9\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nX: \x00\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST /v1/classify HTTP/1.1\r\nContent-Length: -3\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: x\r\nTransfer-Encoding: chunked\r\n\r\nz",
    ],
)
def test_what_is_not_http_or_could_mean_two_things_is_refused(
    strict: ServerProcess, request_: bytes
) -> None:
    with Raw(strict.url) as raw:
        answer = raw.ask(request_)
        assert (answer.status, answer.json()["code"]) == (400, "malformed_http")
        assert raw.is_closed()


def test_requests_that_are_sent_ahead_are_answered_in_order(strict: ServerProcess) -> None:
    with Raw(strict.url) as raw:
        raw.send(GET + b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n" + GET)
        assert [raw.answer().status for _ in range(3)] == [200, 404, 200]


def test_a_content_length_that_lies_harms_its_own_connection_only(strict: ServerProcess) -> None:
    """What comes after the bytes that it told of is no request; what does not come ends it."""
    head = b"POST /v1/classify?labels=a HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    with Raw(strict.url) as raw:
        raw.send(head + b"Content-Length: 3\r\n\r\nabc and more")
        assert raw.is_closed()
    with Raw(strict.url) as raw:
        raw.send(head + b"Content-Length: 1000\r\n\r\nabc")
        raw.end()
        assert raw.is_closed()


def test_another_protocol_is_answered_in_this_one(strict: ServerProcess) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    with Raw(strict.url) as raw:
        assert raw.ask(GET.replace(b"\r\n\r\n", b"\r\n" + upgrade + b"\r\n")).status == 200


def test_a_body_that_nobody_waits_for_any_more_is_not_read_for_ever(strict: ServerProcess) -> None:
    """Refused by its length alone; a client that sends it all the same is cut off."""
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    with Raw(strict.url) as raw:
        answer = raw.ask(head + b"Content-Length: 1000000000\r\n\r\n")
        assert (answer.status, answer.json()["code"]) == (413, "too_large")
        with pytest.raises(ConnectionError):
            send_without_end(raw)


def test_a_client_that_takes_no_answer_is_not_written_to_for_ever() -> None:
    ended = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": []}
        await send(start)
        while not await gone(receive):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        ended.set()

    async def gone(receive: Receive) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(0):
                while (await receive())["type"] != "http.disconnect":
                    pass
                return True
        return False

    async def served() -> None:
        limits = ConnectionLimits(**LIMITS, stall_timeout_s=0.1)
        shared = Connections(limits, Lifecycle(), Metrics())
        http: Any = partial(Connection, shared=shared)
        config = uvicorn.Config(endless, http=http, lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as bound:
            serving = asyncio.create_task(server.serve(sockets=[bound]))
            _, writer = await asyncio.open_connection(*bound.getsockname())
            writer.write(GET)
            async with asyncio.timeout(30):
                await ended.wait()
            writer.transport.abort()
            server.should_exit = True
            await serving

    asyncio.run(served())


def test_refused_connections_are_counted(strict: ServerProcess) -> None:
    with Raw(strict.url) as raw:
        raw.ask(b"hello\r\n\r\n")
    with strict.client() as http:
        metrics = http.get("/metrics").text

    assert 'medley_connections_refused_total{code="malformed_http"}' in metrics


def send_without_end(raw: Raw) -> None:
    while True:
        raw.send(1024 * b"y")

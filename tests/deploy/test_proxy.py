"""The proxy's configuration, by a real HAProxy before servers that do as they are told."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from tests.deploy.haproxy import SETTINGS, haproxy, haproxy_before

LIMIT_S = 15.0


@dataclass
class Replica:
    """A server whose readiness and manners a test sets; knows what it was asked."""

    name: str
    ready: bool = True
    dies: bool = False  # closes the connection instead of an answer
    status: int = 200
    asked: list[str] = field(default_factory=list)
    port: int = 0

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer as a replica does: probes by readiness, the rest with its name."""
        probe = request.path == "/readyz"
        if not probe:
            self.asked.append(request.command)
        if self.dies and not probe:
            request.close_connection = True
            return
        request.send_response((200 if self.ready else 503) if probe else self.status)
        request.send_header("Content-Length", str(len(self.name)))
        request.end_headers()
        request.wfile.write(self.name.encode())


@contextmanager
def listening(replica: Replica) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer in one piece: the proxy's check hears no more than its status

        def do_GET(self) -> None:
            replica.answer(self)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            replica.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64
        block_on_close = False  # of connections that the proxy keeps

    with Server(("127.0.0.1", 0), Handler) as server:
        replica.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield
        server.shutdown()
        thread.join()


@dataclass(frozen=True)
class Proxied:
    """A proxy and what is behind it."""

    client: httpx.Client
    first: Replica
    second: Replica

    def wait_for(self, true: Callable[[], bool]) -> None:
        """Until the proxy has noticed something."""
        end_s = time.monotonic() + LIMIT_S
        while not true():
            assert time.monotonic() < end_s
            time.sleep(0.01)

    def answers(self, count: int = 20) -> set[str]:
        """Who answers requests, none of which may fail."""
        return {self.client.get("/v1/tasks").raise_for_status().text for _ in range(count)}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    replicas = Replica("replica-1"), Replica("replica-2")
    with ExitStack() as stack:
        for replica in replicas:
            stack.enter_context(listening(replica))
        ports = {replica.name: replica.port for replica in replicas}
        folder = tmp_path_factory.mktemp("proxy")
        url = stack.enter_context(haproxy_before(ports, folder, look_every="50ms"))
        client = stack.enter_context(httpx.Client(base_url=url))
        yield Proxied(client, *replicas)


@pytest.fixture
def proxied(running: Proxied) -> Proxied:
    """Both replicas well, and asked nothing yet."""
    for replica in (running.first, running.second):
        replica.ready, replica.dies, replica.status = True, False, 200
    running.wait_for(lambda: _reaches_both(running))
    for replica in (running.first, running.second):
        replica.asked.clear()
    return running


def _reaches_both(proxied: Proxied) -> bool:
    try:
        return len(proxied.answers()) == 2
    except httpx.HTTPError:
        return False


def test_haproxy_accepts_the_file_as_it_is() -> None:
    command = [haproxy(), "-c", "-f", str(SETTINGS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_a_replica_that_is_not_ready_is_asked_nothing_and_no_request_fails(
    proxied: Proxied,
) -> None:
    proxied.first.ready = False
    proxied.wait_for(lambda: proxied.answers(6) == {"replica-2"})
    asked = len(proxied.first.asked)

    assert proxied.answers() == {"replica-2"}
    assert len(proxied.first.asked) == asked

    proxied.first.ready = True
    proxied.wait_for(lambda: proxied.answers(6) == {"replica-1", "replica-2"})


def test_a_get_is_asked_again_elsewhere_if_its_replica_dies_or_is_behind(proxied: Proxied) -> None:
    proxied.first.dies = True
    assert proxied.answers() == {"replica-2"}

    proxied.first.dies, proxied.first.status = False, 503
    assert proxied.answers() == {"replica-2"}


def test_a_change_is_sent_once(proxied: Proxied) -> None:
    proxied.first.dies = proxied.second.dies = True
    url = proxied.client.base_url.join("/v1/tasks/pets:rollback")
    answer = httpx.post(url, content=b"{}")  # on a connection of its own: a kept one is only closed

    assert answer.status_code == 502
    assert proxied.first.asked + proxied.second.asked == ["POST"]


def test_without_a_ready_replica_clients_are_told_to_come_again(proxied: Proxied) -> None:
    proxied.first.ready = proxied.second.ready = False
    proxied.wait_for(lambda: proxied.client.get("/v1/tasks").status_code == 503)
    answer = proxied.client.get("/v1/tasks")

    assert answer.json()["code"] == "no_replica"
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["Retry-After"] == "1"


def test_metrics_are_not_those_of_a_replica_by_chance(proxied: Proxied) -> None:
    assert proxied.client.get("/metrics").status_code == 404
    assert not proxied.first.asked + proxied.second.asked

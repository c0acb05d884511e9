"""The process of visitors against a small HTTP server of this process."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from service.bench.load import Load, LoadError, Order, Ready, visiting


class Echo(BaseHTTPRequestHandler):
    """Answers 200, or the status that the path names; remembers what came."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str, bytes]]
    clients: set[int]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.path, self.headers["Content-Type"], body))
        self.clients.add(self.client_address[1])
        self.send_response(int(self.path.removeprefix("/")))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def echo() -> Iterator[tuple[str, type[Echo]]]:
    handler = type("Fresh", (Echo,), {"seen": [], "clients": set()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    with visiting() as started:
        yield started


@pytest.fixture
def body(tmp_path: Path) -> Path:
    path = tmp_path / "body"
    path.write_bytes(b"\x00\xffpicture")
    return path


def ready(body: Path, status: int = 200) -> Ready:
    return Ready(path=f"/{status}", content_type="image/jpeg", body_file=str(body))


def test_every_arrival_is_one_request_with_its_body_and_content_type(
    load: Load, echo: tuple[str, type[Echo]], body: Path
) -> None:
    url, handler = echo
    order = Order(
        url=url,
        requests=[ready(body), ready(body, 503)],
        picks=[0, 1, 0],
        due_s=[0.0, 0.01, 0.02],
        visitors=2,
    )
    visits = load.visit(order)
    assert sorted(visits.status) == [200, 200, 503]
    assert sorted(visits.due_s) == [0.0, 0.01, 0.02]
    assert {seen[1:] for seen in handler.seen} == {("image/jpeg", b"\x00\xffpicture")}
    assert sorted(path for path, _, _ in handler.seen) == ["/200", "/200", "/503"]


def test_an_arrival_is_never_sent_before_it_is_due(
    load: Load, echo: tuple[str, type[Echo]], body: Path
) -> None:
    due_s = [0.0, 0.1, 0.2]
    order = Order(url=echo[0], requests=[ready(body)], picks=[0] * 3, due_s=due_s, visitors=3)
    visits = load.visit(order)
    assert all(sent >= due for sent, due in zip(visits.sent_s, visits.due_s, strict=True))


def test_an_arrival_that_finds_no_free_visitor_keeps_the_time_at_which_it_was_due(
    load: Load, echo: tuple[str, type[Echo]], body: Path
) -> None:
    order = Order(url=echo[0], requests=[ready(body)], picks=[0] * 5, due_s=[0.0] * 5, visitors=1)
    visits = load.visit(order)
    assert list(visits.due_s) == [0.0] * 5
    for sent_s, before_s in zip(visits.sent_s[1:], visits.done_s[:-1], strict=True):
        assert sent_s >= before_s  # one visitor, one request at a time


def test_few_arrivals_need_one_connection_however_many_visitors_there_are(
    load: Load, echo: tuple[str, type[Echo]], body: Path
) -> None:
    due_s = [0.1 * number for number in range(5)]
    order = Order(url=echo[0], requests=[ready(body)], picks=[0] * 5, due_s=due_s, visitors=8)
    load.visit(order)
    assert len(echo[1].clients) < 5


def test_a_closed_loop_ends_when_it_is_told_to(
    load: Load, echo: tuple[str, type[Echo]], body: Path
) -> None:
    count = 50_000
    order = Order(
        url=echo[0],
        requests=[ready(body)],
        picks=[0] * count,
        due_s=[0.0] * count,
        visitors=2,
        stop_s=0.3,
    )
    visits = load.visit(order)
    assert 0 < len(visits.status) < count
    assert set(visits.status) == {200}


def test_a_server_that_is_not_there_is_a_failed_visit_and_not_the_end(
    load: Load, body: Path
) -> None:
    order = Order(
        url="http://127.0.0.1:9", requests=[ready(body)], picks=[0], due_s=[0.0], visitors=1
    )
    assert list(load.visit(order).status) == [0]


def test_visitors_who_die_are_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    order = Order(
        url="http://127.0.0.1:9",
        requests=[ready(tmp_path / "absent")],
        picks=[0],
        due_s=[0.0],
        visitors=1,
    )
    with visiting() as mortal, pytest.raises(LoadError, match="ended"):
        mortal.visit(order)
    assert "absent" in capfd.readouterr().err

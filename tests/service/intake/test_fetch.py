"""Images by URL: what is fetched, what is refused, and to which address a connection goes."""

import asyncio
import base64
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from pydantic import ValidationError

from service.errors import BusyError, FetchError
from service.intake.fetch import Fetching, Network, Resolve, is_public
from service.intake.room import Room
from service.settings import Settings
from tests.service.conftest import OpenApp

PICTURE = b"\x89PNG and so on"
LOOPBACK = (ip_network("127.0.0.0/8"),)


class Pictures(ThreadingHTTPServer):
    """A server of one picture, which remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, str]] = []  # headers
        self.content = PICTURE
        self.let_go = threading.Event()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Pictures

    def do_GET(self) -> None:
        self.server.asked.append({name.lower(): value for name, value in self.headers.items()})
        url = urlsplit(self.path)
        getattr(self, url.path.strip("/"))(parse_qs(url.query))

    def picture(self, query: dict[str, list[str]]) -> None:
        self._answer(200, self.server.content)

    def missing(self, query: dict[str, list[str]]) -> None:
        self._answer(404, PICTURE)

    def elsewhere(self, query: dict[str, list[str]]) -> None:
        self._answer(302, b"", Location=query["to"][0])

    def around(self, query: dict[str, list[str]]) -> None:
        """So many redirects, then the picture."""
        left = int(query["n"][0])
        self._answer(307, b"", Location=f"/around?n={left - 1}" if left > 1 else "/picture")

    def endless(self, query: dict[str, list[str]]) -> None:
        """More and more, without saying how much."""
        self.send_response(200)
        self.end_headers()
        try:
            while not self.server.let_go.is_set():
                self.wfile.write(bytes(10_000))
        except OSError:  # the client has had enough
            self.close_connection = True

    def slow(self, query: dict[str, list[str]]) -> None:
        self.server.let_go.wait()

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def pictures() -> Iterator[Pictures]:
    with Pictures() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.let_go.set()
        server.shutdown()
        thread.join()


def fetch(
    url: str,
    *,
    networks: tuple[Network, ...] = LOOPBACK,
    resolve: Resolve | None = None,
    timeout_s: float = 10.0,
    room: Room | None = None,
) -> bytes:
    async def run() -> bytes:
        fetching = Fetching(
            room or Room(1_000_000, "bytes"),
            max_bytes=100_000,
            timeout_s=timeout_s,
            networks=networks,
            resolve=resolve,
        )
        try:
            async with fetching.image(url) as data:
                return data
        finally:
            await fetching.close()

    return asyncio.run(run())


def refusal(url: str, **options: Any) -> FetchError:
    with pytest.raises(FetchError) as caught:
        fetch(url, **options)
    return caught.value


def to(*answers: list[str]) -> Resolve:
    """A resolver that gives these answers, one after the other, and the last for ever."""
    left = list(answers)

    async def resolve(host: str, port: int) -> list[str]:
        return left.pop(0) if len(left) > 1 else left[0]

    return resolve


def test_a_picture_is_fetched_from_an_allowed_network(pictures: Pictures) -> None:
    assert fetch(pictures.url("/picture")) == PICTURE


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/a.png",
        "file:///etc/passwd",
        "gopher://example.org/",
        "data:image/png;base64,AAAA",
        "/a.png",
        "a.png",
        "http://",
        "http:///a.png",
        "//example.org/a.png",
        "http://user@example.org/",
        "http://user:password@example.org/",
        "",
    ],
)
def test_what_is_no_plain_http_url_is_refused_before_any_name_is_looked_up(url: str) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        raise AssertionError(host)

    assert refusal(url, resolve=resolve).code == "url_refused"


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://exa mple.org\x00/", "http://a:99999999/", "http://[fe80::1%25]/"]
)
def test_a_url_that_cannot_be_read_is_an_image_s_error(url: str) -> None:
    assert refusal(url).code in ("fetch_failed", "url_refused")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "[::1]", "[::ffff:127.0.0.1]", "0"],
)
def test_this_machine_is_refused_in_every_spelling(pictures: Pictures, host: str) -> None:
    assert refusal(pictures.url("/picture", host), networks=()).code in (
        *("url_refused", "fetch_failed"),  # a resolver may not know an odd spelling
    )
    assert pictures.asked == []


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1"),
        *("192.0.0.8", "192.0.2.1", "192.168.1.1", "198.18.0.1", "224.0.0.1", "240.0.0.1"),
        *("255.255.255.255", "233.252.0.1"),
        *("::", "::1", "::ffff:10.0.0.1", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1"),
        *("2002:7f00:1::", "2001:db8::1", "2001::1", "fc00::1", "fd12::1", "fe80::1", "fec0::1"),
        *("ff02::1", "ff0e::1"),
    ],
)
def test_an_address_that_is_not_public_is_not_connected_to(address: str) -> None:
    assert not is_public(ip_address(address))
    for found in ([address], ["93.184.215.14", address], [address, "93.184.215.14"]):
        error = refusal("http://pictures.example/", resolve=to(found), networks=())
        assert error.code == "url_refused"


@pytest.mark.parametrize("address", ["93.184.215.14", "::ffff:8.8.8.8", "2606:4700::1111"])
def test_an_ordinary_address_is_public(address: str) -> None:
    assert is_public(ip_address(address))


def test_the_address_that_was_checked_is_connected_to(pictures: Pictures) -> None:
    """A name that changes after the check gains nothing: it is asked for once."""
    resolve = to(["127.0.0.1"], ["10.0.0.1"])

    assert fetch(pictures.url("/picture", "pictures.example"), resolve=resolve) == PICTURE
    (headers,) = pictures.asked
    assert headers["host"] == f"pictures.example:{pictures.server_port}"
    assert headers.keys().isdisjoint({"authorization", "cookie", "proxy-authorization"})


def test_of_several_addresses_one_that_answers_is_taken(pictures: Pictures) -> None:
    resolve = to(["127.0.0.2", "127.0.0.1"])  # nobody listens on the first

    assert fetch(pictures.url("/picture", "pictures.example"), resolve=resolve) == PICTURE


def test_a_name_without_an_address_cannot_be_fetched() -> None:
    async def resolve(host: str, port: int) -> list[str]:
        raise OSError("unknown")

    assert refusal("http://pictures.example/", resolve=resolve).code == "fetch_failed"
    assert refusal("http://pictures.example/", resolve=to([])).code == "url_refused"


def test_a_redirect_is_checked_like_the_first_url(pictures: Pictures) -> None:
    resolve = to(["127.0.0.1"], ["10.0.0.1"])
    for target in ("http://inside.example/", "file:///etc/passwd", "http://a:b@c.example/"):
        away = pictures.url(f"/elsewhere?to={target}", "pictures.example")
        assert refusal(away, resolve=resolve).code == "url_refused"


def test_three_redirects_are_followed_and_not_four(pictures: Pictures) -> None:
    assert fetch(pictures.url("/around?n=3")) == PICTURE
    assert refusal(pictures.url("/around?n=4")).code == "fetch_failed"


def test_another_status_than_200_is_no_picture(pictures: Pictures) -> None:
    assert refusal(pictures.url("/missing")).code == "fetch_failed"


def test_a_picture_without_end_is_cut_off(pictures: Pictures) -> None:
    room = Room(1_000_000, "bytes")

    assert refusal(pictures.url("/endless"), room=room).code == "too_large"
    assert room.used == 0


def test_what_is_fetched_counts_among_the_bytes_that_are_held(pictures: Pictures) -> None:
    with pytest.raises(BusyError):
        fetch(pictures.url("/endless"), room=Room(50_000, "bytes"))


def test_a_server_that_does_not_answer_is_left(pictures: Pictures) -> None:
    assert refusal(pictures.url("/slow"), timeout_s=0.05).code == "fetch_failed"


def test_no_proxy_is_taken_from_the_environment(
    pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    assert fetch(pictures.url("/picture")) == PICTURE


def test_tls_asks_for_the_name_and_trusts_nobody_by_itself() -> None:
    with tls_server() as (port, names):
        url = f"https://pictures.example:{port}/picture"

        assert refusal(url, resolve=to(["127.0.0.1"])).code == "fetch_failed"
    assert names == ["pictures.example"]


@contextmanager
def tls_server() -> Iterator[tuple[int, list[str | None]]]:
    """Takes one handshake, which fails as it has no certificate, and keeps the name asked for."""
    names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = lambda _, name, __: names.append(name)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            context.wrap_socket(connection, server_side=True)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], names
        thread.join()


def test_urls_are_off_by_default(open_app: OpenApp, pictures: Pictures) -> None:
    body = {"image": {"url": pictures.url("/picture")}, "labels": ["a", "b"]}
    with open_app() as http:
        response = http.post("/v1/classify", json=body)

    assert (response.status_code, response.json()["code"]) == (422, "url_refused")
    assert pictures.asked == []


def test_where_urls_are_allowed_a_fetched_image_is_answered_like_its_bytes(
    open_app: OpenApp, pictures: Pictures, image: bytes
) -> None:
    pictures.content = image
    sources = [
        {"url": pictures.url("/picture")},
        {"bytes_b64": base64.b64encode(image).decode()},
        {"url": pictures.url("/missing")},
        {"url": pictures.url("/picture", "[::1]")},
    ]
    with open_app(image_urls=True, image_url_networks="127.0.0.0/8,10.0.0.0/8") as http:
        response = http.post("/v1/classify", json={"images": sources, "labels": ["a", "b"]})
        metrics = http.get("/metrics").text

    assert response.status_code == 200
    assert 'medley_stage_duration_seconds_count{stage="fetch"} 1.0' in metrics
    fetched, given, missing, elsewhere = response.json()["results"]
    assert fetched == given
    assert missing["error"]["code"] == "fetch_failed"
    assert elsewhere["error"]["code"] == "url_refused"


@pytest.mark.parametrize("networks", ["10.0.0.0/8,x", "10.0.0.1/8", "localhost"])
def test_a_network_that_is_none_is_a_wrong_setting(networks: str) -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate({"image_url_networks": networks})

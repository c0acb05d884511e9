"""One server as the doctor asks it: by a client that behaves, and by sockets that do not."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from httpx_retries import Retry, RetryTransport
from pydantic import BaseModel, SecretStr, ValidationError

from service.address import authorization, server_url
from service.wire.openai_schemas import ErrorAnswer
from service.wire.schemas import ClassifyResponse, Prediction, Problem

__all__ = ["Reply", "Site"]

TIMEOUT_S, PATIENCE_S = 30.0, 5.0
LABELS = ("a cat", "a car", "a house")
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Reply:
    """An answer, or with status 0 why there is none."""

    status: int
    headers: Mapping[str, str] = field(default_factory=httpx.Headers)
    body: bytes = b""
    error: str = ""

    def read(self, model: type[Model]) -> Model | None:
        """The body, if it is what it should be."""
        try:
            return model.model_validate_json(self.body)
        except ValidationError:
            return None

    @property
    def problem(self) -> Problem | None:
        """The problem that it is, as RFC 9457 and docs/api.md have it."""
        kind = self.headers.get("content-type", "").partition(";")[0]
        found = self.read(Problem) if kind == "application/problem+json" else None
        return found if found is not None and found.status == self.status else None

    @property
    def prediction(self) -> Prediction | None:
        """The only result of a classification that succeeded."""
        answer = self.read(ClassifyResponse) if self.status == 200 else None
        results = answer.results if answer is not None else []
        return results[0] if len(results) == 1 and isinstance(results[0], Prediction) else None

    @property
    def is_refusal(self) -> bool:
        """Whether the server says in due form that it is the client who is wrong."""
        return 400 <= self.status < 500 and self.problem is not None

    @property
    def said(self) -> str:
        """In a few words."""
        if not self.status:
            return self.error or "no answer"
        if self.problem is not None:
            return f"{self.status} {self.problem.code}"
        openai = self.read(ErrorAnswer) if self.status >= 400 else None
        return f"{self.status} {openai.error.code}" if openai else str(self.status)


class Site:
    """One server.

    Args:
        url: where it is.
        key: the admin key, or a read key; None if there is none or it should not be used.
        patience_s: how long to wait for an answer to what is no proper request.

    Raises:
        ValueError: url or key cannot be one.
    """

    def __init__(
        self, url: str, key: SecretStr | None = None, *, patience_s: float = PATIENCE_S
    ) -> None:
        self._url = server_url(url)
        self._key = authorization(key)
        self.name = f"{self._url.host}:{self._port}"
        self.has_key = key is not None
        self.patience_s = patience_s
        # A busy server is asked again when it says so: nothing else is repeated.
        retry = Retry(
            total=3, allowed_methods=["GET", "POST"], status_forcelist=[429], retry_on_exceptions=[]
        )
        transport = RetryTransport(httpx.HTTPTransport(), retry=retry)
        self._http = httpx.Client(base_url=self._url, transport=transport, timeout=TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    @property
    def is_here(self) -> bool:
        """Whether it is on a loopback address, where changes may go without a key."""
        try:
            return ipaddress.ip_address(self._url.host).is_loopback
        except ValueError:
            return self._url.host == "localhost"

    def ask(
        self,
        method: str,
        path: str,
        *,
        bearer: str | None = None,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Reply:
        """Send one request with the key; with `bearer` instead, of which "" is none at all.

        Args:
            method: of HTTP.
            path: from the server's top.
            bearer: instead of the key.
            headers: more of them.
            options: `params`, `content`, `json` and so on, as httpx has them.
        """
        key = self._key if bearer is None else authorization(SecretStr(bearer) if bearer else None)
        sent = {**(headers or {}), **key}
        try:
            response = self._http.request(method, path, headers=sent, **options)
        except httpx.HTTPError as error:
            return Reply(0, error=f"no answer ({type(error).__name__})")
        return Reply(response.status_code, response.headers, response.content)

    def classify(self, image: bytes, *, headers: Mapping[str, str] | None = None) -> Reply:
        """Ask about one image what any server can answer."""
        return self.ask(
            "POST",
            "/v1/classify",
            params=OPTIONS,
            content=image,
            headers={"Content-Type": "application/octet-stream", **(headers or {})},
        )

    def connect(self, *, timeout_s: float) -> socket.socket:
        """A connection without HTTP.

        Raises:
            OSError: it did not come about.
        """
        plain = socket.create_connection((self._url.host, self._port), timeout_s)
        if self._url.scheme == "http":
            return plain
        context = ssl.create_default_context()
        return context.wrap_socket(plain, server_hostname=self._url.host)

    def raw(self, data: bytes, *, timeout_s: float | None = None, end: bool = False) -> Reply:
        """Send bytes and read one answer; a server that closes has answered too.

        Args:
            data: anything.
            timeout_s: of silence, instead of the doctor's patience.
            end: whether to end our half of the connection then.
        """
        timeout_s = self.patience_s if timeout_s is None else timeout_s
        try:
            with self.connect(timeout_s=timeout_s) as connection:
                _push(connection, data, end=end)
                return read_reply(connection)
        except TimeoutError:
            return Reply(0, error=f"nothing within {timeout_s:g} s")
        except OSError as error:
            return Reply(0, error=f"closed ({type(error).__name__})")

    def head(self, method: str, path: str, *lines: str) -> bytes:
        """Request line and headers of a request that is written by hand, with the key."""
        start = f"{method} {self._url.path.rstrip('/')}{path} HTTP/1.1"
        key = [f"{name}: {value}" for name, value in self._key.items()]
        return "\r\n".join([start, f"Host: {self.name}", *key, *lines, "", ""]).encode()

    @property
    def _port(self) -> int:
        return self._url.port or (443 if self._url.scheme == "https" else 80)


OPTIONS: dict[str, Any] = {"model": "base", "labels": list(LABELS), "top_k": len(LABELS)}


def read_reply(connection: socket.socket) -> Reply:
    """Read one answer from a connection.

    Raises:
        OSError: it ends before.
    """
    response = http.client.HTTPResponse(connection)
    try:
        response.begin()
        body = response.read()
    except (http.client.HTTPException, ValueError) as error:  # of sizes that are none
        return Reply(0, error=f"closed ({type(error).__name__})")
    return Reply(response.status, httpx.Headers(response.getheaders()), body)


def _push(connection: socket.socket, data: bytes, *, end: bool) -> None:
    """A server may answer and close before it has read everything: then its answer counts."""
    try:
        connection.sendall(data)
        if end:
            connection.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, ConnectionResetError):
        pass

"""HTTP/1.1 over a socket: free to misbehave, and too cheap to slow down the server it loads."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

__all__ = ["Answer", "Raw", "post"]


@dataclass(frozen=True)
class Answer:
    """Status, headers with names in lower case, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Raw:
    """One connection; `ConnectionError` where the server has closed it."""

    def __init__(self, url: str, *, timeout_s: float = 30.0) -> None:
        where = httpx.URL(url)
        self.socket = socket.create_connection((where.host, where.port or 80), timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def ask(self, request: bytes) -> Answer:
        self.send(request)
        return self.answer()

    def answer(self) -> Answer:
        """Read one answer."""
        status_line = self._file.readline()
        if not status_line:
            raise ConnectionResetError("closed before an answer")
        headers = {}
        while (line := self._file.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        size = int(headers.get("content-length", 0))
        body = self._file.read(size)
        if line == b"" or len(body) < size:
            raise ConnectionResetError("closed within an answer")
        return Answer(int(status_line.split()[1]), headers, body)

    def end(self) -> None:
        """Send nothing more."""
        self.socket.shutdown(socket.SHUT_WR)

    def rest(self) -> bytes:
        """Wait for the server to close; what it has said until then."""
        return self._file.read()

    def is_closed(self) -> bool:
        """Wait for the server to close; whether it did so without another byte."""
        try:
            return self.rest() == b""
        except ConnectionResetError:
            return True


def post(path: str, body: bytes, *, content_type: str) -> bytes:
    """A whole POST request."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

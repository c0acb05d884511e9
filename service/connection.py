"""One client's connection: uvicorn's HTTP/1.1 protocol, and the limits that it lacks.

uvicorn waits for a request's headers for ever, takes headers of any size, and holds any number of
idle connections. What a request may cost once its headers are there is not decided here but where
its body is read (`intake/`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NamedTuple

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import problem_fields
from service.lifecycle import Lifecycle
from service.signals.metrics import Metrics

__all__ = ["Connection", "ConnectionLimits", "Connections"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """What one connection, and all of them, may take.

    Up to one piece as it came from the network (256 kB) is read before the limits are looked at.
    """

    header_timeout_s: float
    keep_alive_s: float
    max_header_bytes: int  # the request line counts
    max_headers: int
    max_connections: int
    stall_timeout_s: float = 30.0  # for a client to take the bytes of an answer


class Refusal(NamedTuple):
    """Why a connection is closed, as its client hears it."""

    status: HTTPStatus
    code: str
    detail: str


MALFORMED = Refusal(HTTPStatus.BAD_REQUEST, "malformed_http", "this is not HTTP/1.1")
TOO_LARGE = Refusal(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "headers_too_large", "the headers are too large"
)
TOO_SLOW = Refusal(
    HTTPStatus.REQUEST_TIMEOUT, "request_timeout", "the headers did not arrive in time"
)
TOO_MANY = Refusal(
    HTTPStatus.SERVICE_UNAVAILABLE, "too_many_connections", "no connection is free or idle"
)


@dataclass
class Connections:
    """What all connections of a server share."""

    limits: ConnectionLimits
    lifecycle: Lifecycle
    metrics: Metrics
    idle: dict[Connection, None] = field(default_factory=dict)  # without a request, oldest first

    def make_room(self) -> bool:
        """Close the connection that has been idle for longest; return whether there was one."""
        oldest = next(iter(self.idle), None)
        if oldest is None:
            return False
        oldest.abandon()
        return True


class Connection(HttpToolsProtocol):
    """An HTTP/1.1 connection.

    It is idle until a request's headers are complete and after an answer, so a client that never
    completes its headers makes room for others like one that has nothing to ask.
    """

    def __init__(self, *args: Any, shared: Connections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shared = shared
        self._limits = shared.limits
        self._idle_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._in_head = False  # a request has begun, its headers are not complete
        self._in_body = False
        self._head_bytes = 0  # of complete headers
        self._pieces_bytes = 0  # of network pieces that have not completed the headers
        self._refusal = MALFORMED  # what a parser's error means

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection if there is room, or room can be made."""
        super().connection_made(transport)
        full = len(self.connections) > self._limits.max_connections
        if full and not self._shared.make_room():
            self._refuse(TOO_MANY)
        else:
            self._await_head(self._limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._be_busy()
        self._end_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse one piece; headers that do not end are cut off."""
        if self._in_head:
            self._pieces_bytes += len(data)
        super().data_received(data)
        endless = self._in_head and self._pieces_bytes > self._limits.max_header_bytes
        if endless and not self.transport.is_closing():
            self._refuse(TOO_LARGE)

    def on_message_begin(self) -> None:
        """Begin to count, and to wait."""
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = self._pieces_bytes = 0
        if self in self._shared.idle:
            self._await_head(self._limits.header_timeout_s)

    def on_url(self, url: bytes) -> None:
        """Take a part of the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the request; its answer is the connection's last while the server drains."""
        self._in_head, self._in_body = False, True
        self._be_busy()
        super().on_headers_complete()
        if self._shared.lifecycle.draining:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """Note that nothing of this request is still to come."""
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the client to take the last bytes.

        A body that still comes in, of a request that was answered early, gets no more time than
        headers do.
        """
        super().on_response_complete()
        if self.transport.is_closing():
            self._begin_stall()
        elif self.cycle.response_complete:  # no other request has been sent ahead
            short = self._in_body
            limits = self._limits
            self._await_head(limits.header_timeout_s if short else limits.keep_alive_s)

    def pause_writing(self) -> None:
        """Give a client that does not read some time."""
        super().pause_writing()
        self._begin_stall()

    def resume_writing(self) -> None:
        """Go on writing."""
        super().resume_writing()
        self._end_stall()

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser, or a limit within it, has refused."""
        self._refuse(self._refusal)

    def abandon(self) -> None:
        """Close at once; nobody waits for an answer here."""
        self._be_busy()
        self.transport.abort()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: a request for another protocol is answered in this one, as HTTP has it."""

    def _count(self, size_bytes: int) -> None:
        """Raises: within the parser, which turns it into `send_400_response`."""
        self._head_bytes += size_bytes
        limits = self._limits
        too_large = self._head_bytes > limits.max_header_bytes
        if too_large or len(self.headers) >= limits.max_headers:
            self._refusal = TOO_LARGE
            raise ValueError(TOO_LARGE.detail)

    def _await_head(self, timeout_s: float) -> None:
        self._be_busy()
        self._shared.idle[self] = None
        self._idle_timer = self.loop.call_later(timeout_s, self._waited)

    def _be_busy(self) -> None:
        self._shared.idle.pop(self, None)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _waited(self) -> None:
        if self._in_head:
            self._refuse(TOO_SLOW)
        else:
            self.abandon()

    def _begin_stall(self) -> None:
        self._end_stall()
        self._stall_timer = self.loop.call_later(self._limits.stall_timeout_s, self.transport.abort)

    def _end_stall(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _refuse(self, refusal: Refusal) -> None:
        """Answer and close; only close where the answer would be taken for another request's."""
        log.info("a connection is closed: %s", refusal.detail)
        self._shared.metrics.connections_refused.labels(refusal.code).inc()
        self._be_busy()
        begun = self.cycle is not None  # it is, before the first request
        pending = begun and not self.cycle.response_complete
        if pending and (self.pipeline or self._in_head or self.cycle.response_started):
            self.transport.abort()
            return
        self.transport.write(_answer(refusal))
        self.transport.close()
        self._begin_stall()


def _answer(refusal: Refusal) -> bytes:
    request_id = uuid.uuid4().hex
    fields = problem_fields(refusal.status, refusal.code, refusal.detail)
    body = json.dumps(fields | {"request_id": request_id}).encode()
    lines = [
        f"HTTP/1.1 {refusal.status.value} {refusal.status.phrase}",
        "Content-Type: application/problem+json",
        f"Content-Length: {len(body)}",
        f"X-Request-Id: {request_id}",
        "Connection: close",
        *(["Retry-After: 1"] if refusal is TOO_MANY else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body

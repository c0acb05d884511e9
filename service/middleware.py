"""What every request gets, whatever its route: ids, headers, a count, a log line, a last net."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.problems import internal_error
from service.signals.metrics import Metrics
from service.signals.notes import CURRENT, Notes
from service.signals.tracing import RequestSpan, Tracing, Untraced, read_traceparent
from service.wire.headers import GENERATION_HEADER, REPLICA_HEADER

__all__ = ["GONE", "RequestContext"]

log = logging.getLogger(__name__)
GONE = 499  # nginx's number for a client that went away before it was answered
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_PROBES = frozenset(
    {"/livez", "/readyz", "/startupz", "/metrics", "/v2/health/live", "/v2/health/ready"}
)


class RequestContext:
    """ASGI middleware around the whole app.

    Every request is counted once, also one whose client goes away or that the end of the server
    cuts off.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        generation: Callable[[], int],
        tracing: Tracing | None = None,
        replica: str = "",
    ) -> None:
        """Go around an app.

        Args:
            app: the app.
            metrics: where requests are counted.
            generation: says which one of the registry is served now.
            tracing: where spans go; nowhere by default.
            replica: this server's name in `X-Replica`; no such header if it is empty.
        """
        self._app = app
        self._metrics = metrics
        self._generation = generation
        self._tracing = tracing or Untraced()
        self._replica = replica

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s = time.monotonic()
        headers = Headers(scope=scope)
        parent = read_traceparent(headers.getlist("traceparent"))
        span = self._tracing.begin(parent, headers.get("tracestate", ""))
        notes = Notes(
            _request_id(headers.get("x-request-id")), span.trace.trace_id, span.trace.span_id
        )
        scope["request_id"] = notes.request_id
        exchange = _Exchange(receive, send, lambda: self._headers(notes, span))
        token = CURRENT.set(notes)
        try:
            with self._metrics.inflight.track_inprogress():
                await self._answered(scope, exchange)
        finally:  # also when the task is cancelled, which is no Exception
            self._ended(scope, exchange.final_status, notes, span, time.monotonic() - start_s)
            CURRENT.reset(token)

    async def _answered(self, scope: Scope, exchange: _Exchange) -> None:
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception:  # outermost net: the client gets an id, the log gets the rest
            log.exception("request %s failed", scope["request_id"])
            if exchange.status:
                exchange.status = HTTPStatus.INTERNAL_SERVER_ERROR  # it broke off
            else:
                response = internal_error(Request(scope))
                await response(scope, exchange.receive, exchange.send)

    def _headers(self, notes: Notes, span: RequestSpan) -> dict[str, str]:
        generation = self._generation() if notes.generation is None else notes.generation
        headers = {
            "X-Request-Id": notes.request_id,
            GENERATION_HEADER: str(generation),
            "traceparent": span.trace.header,
        }
        return headers | ({REPLICA_HEADER: self._replica} if self._replica else {})

    def _ended(
        self, scope: Scope, status: int, notes: Notes, span: RequestSpan, duration_s: float
    ) -> None:
        operation = _operation(scope)
        self._metrics.requests.labels(operation, str(status)).inc()
        self._metrics.request_duration_s.labels(operation).observe(duration_s)
        for code, count in notes.problems.items():
            self._metrics.problems.labels(code).inc(count)
        span.end(operation, _attributes(scope, status, notes), notes.stages)
        _log(operation, status, notes, duration_s)


class _Exchange:
    """One request as seen from outside the app: its status, and whether the client stayed."""

    def __init__(self, receive: Receive, send: Send, headers: Callable[[], dict[str, str]]) -> None:
        self._receive = receive
        self._send = send
        self._headers = headers
        self._gone = False
        self.status = 0

    @property
    def final_status(self) -> int:
        """The status that was sent, else why none was."""
        if self.status:
            return self.status
        return GONE if self._gone else HTTPStatus.SERVICE_UNAVAILABLE

    async def receive(self) -> Message:
        """Hand on what comes from the client."""
        message = await self._receive()
        self._gone |= message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        """Hand on what goes to the client, with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.status = GONE if self._gone else message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in self._headers().items():
                headers.setdefault(name, value)
        await self._send(message)


def _log(operation: str, status: int, notes: Notes, duration_s: float) -> None:
    """One line per request; a probe that succeeds is for debugging only."""
    probe = operation.rpartition(" ")[2] in _PROBES
    level = logging.DEBUG if probe else logging.INFO
    level = logging.WARNING if status >= HTTPStatus.INTERNAL_SERVER_ERROR else level
    facts = {
        "operation": operation,
        "status": int(status),
        "duration_ms": round(1000 * duration_s, 3),
        "stages_ms": notes.stages_ms(),
        "images": notes.answered.total(),
        "answered": dict(notes.answered),
        "problems": dict(notes.problems),
    }
    facts = {name: value for name, value in facts.items() if value}
    said = ", ".join(f"{name} {count}" for name, count in (notes.answered + notes.problems).items())
    words = (operation, status, 1000 * duration_s, f": {said}" if said else "")
    log.log(level, "%s %d in %.1f ms%s", *words, extra=facts)


def _attributes(scope: Scope, status: int, notes: Notes) -> dict[str, str | int]:
    """Of a request's span, by OpenTelemetry's conventions for HTTP where there is one."""
    route = scope.get("route")
    return {
        "http.request.method": scope["method"],
        "http.route": route.path if route is not None else "",
        "http.response.status_code": int(status),
        "medley.request_id": notes.request_id,
        "medley.images": notes.answered.total(),
    }


def _request_id(given: str | None) -> str:
    """The client's own id if it is harmless in a log and a header, else a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _operation(scope: Scope) -> str:
    """The route's pattern, never the path: paths are an open set."""
    route = scope.get("route")
    if route is not None:
        return f"{scope['method']} {route.path}"
    operation: str = scope.get("operation", "none")  # what the gate refused
    return operation

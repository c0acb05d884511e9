"""What every request gets, whatever its route: an id, the generation, its metrics, a last net."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics import Metrics
from service.problems import internal_error

__all__ = ["RequestContext"]

log = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestContext:
    """ASGI middleware around the whole app; `generation` says which one is served now."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, generation: Callable[[], int]) -> None:
        self._app = app
        self._metrics = metrics
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["request_id"] = _request_id(Headers(scope=scope).get("x-request-id"))
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = scope["request_id"]
                headers.setdefault("X-Registry-Generation", str(self._generation()))
            await send(message)

        with self._metrics.inflight.track_inprogress(), self._metrics.request_duration_s.time():
            try:
                await self._app(scope, receive, send_with_headers)
            except Exception:  # outermost net: the client gets an id, the log gets the rest
                log.exception("request %s failed", scope["request_id"])
                if not status:
                    response = internal_error(Request(scope))
                    await response(scope, receive, send_with_headers)
        self._metrics.requests.labels(_operation(scope), str(status)).inc()


def _request_id(given: str | None) -> str:
    """The client's own id if it is harmless in a log and a header, else a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _operation(scope: Scope) -> str:
    """The route's pattern, never the path: paths are an open set."""
    route = scope.get("route")
    return f"{scope['method']} {route.path}" if route is not None else "none"

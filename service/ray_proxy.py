"""What Ray's HTTP proxy gets from us: its own failures said as Medley says them.

A replica that dies takes its requests with it, and Ray's proxy answers those with a bare 500, which
no client should repeat. Here it becomes 503 with `Retry-After`, as it would be from a balancer.
"""

from __future__ import annotations

import json
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import problem_fields
from service.wire.headers import GENERATION_HEADER

__all__ = ["LostReplicas", "middlewares"]

STATUS = HTTPStatus.SERVICE_UNAVAILABLE
PROBLEM = problem_fields(STATUS, "replica_lost", "the replica that had this request is gone")


def middlewares() -> list[Middleware]:
    """For `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=service.ray_proxy:middlewares`."""
    return [Middleware(LostReplicas)]


class LostReplicas:
    """ASGI middleware: an error that no replica has written becomes a problem that may be retried.

    Every answer of a replica names the registry's generation, errors too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on one request and its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        replaced = False

        async def send_on(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and _is_rays_own(message):
                replaced = True
                for ours in _problem():
                    await send(ours)
            elif not replaced:
                await send(message)

        await self._app(scope, receive, send_on)


def _is_rays_own(start: Message) -> bool:
    failed: bool = start["status"] >= HTTPStatus.INTERNAL_SERVER_ERROR
    return failed and GENERATION_HEADER not in Headers(raw=start["headers"])


def _problem() -> tuple[Message, Message]:
    body = json.dumps(PROBLEM).encode()
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", b"1"),
    ]
    return (
        {"type": "http.response.start", "status": int(STATUS), "headers": headers},
        {"type": "http.response.body", "body": body},
    )

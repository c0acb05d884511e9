"""What Ray's HTTP proxy gets from us: its own failures said as Medley says them.

A replica that dies takes its requests with it, and Ray's proxy says nothing to those: its server
makes that a bare 500, which no client should repeat. Here it is 503 with `Retry-After`.
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
    """ASGI middleware: no answer, or an error that no replica has written, is a problem of ours.

    Every answer of a replica names the registry's generation, errors too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on one request and its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        await self._app(scope, receive, answer.send)
        if not answer.begun:
            await answer.fail()


class _Answer:
    """One answer on its way to the client."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._replaced = False
        self.begun = False

    async def send(self, message: Message) -> None:
        """Hand on what a replica says, and our problem for an error of Ray's own."""
        if message["type"] == "http.response.start" and _is_rays_own(message):
            self._replaced = True
            await self.fail()
        elif not self._replaced:
            self.begun = True
            await self._send(message)

    async def fail(self) -> None:
        """Say that the replica is gone."""
        self.begun = True
        body = json.dumps(PROBLEM).encode()
        headers = [
            (b"content-type", b"application/problem+json"),
            (b"content-length", str(len(body)).encode()),
            (b"retry-after", b"1"),
        ]
        await self._send({"type": "http.response.start", "status": int(STATUS), "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _is_rays_own(start: Message) -> bool:
    failed: bool = start["status"] >= HTTPStatus.INTERNAL_SERVER_ERROR
    return failed and GENERATION_HEADER not in Headers(raw=start["headers"])

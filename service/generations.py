"""`X-Min-Generation`: a request that knows of a change is not answered from before it.

Replicas follow the registry one after the other; whoever has just registered a task and asks
another replica for it waits here until that one has followed, or is told to come again. The
generation that an answer was made from is in its `X-Registry-Generation` (`middleware.py`).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from medley.errors import MedleyError
from service.access import Level
from service.errors import RequestError, UnavailableError
from service.problems import answer
from service.wire.headers import MIN_GENERATION_HEADER

__all__ = ["MinGeneration"]

_NUMBER = re.compile(r"[0-9]{1,15}", re.ASCII)


class MinGeneration:
    """ASGI middleware, inside of the gate: nobody without a key waits, and no probe.

    Args:
        app: what is behind it.
        reached: waits until a generation is served here; False if it is not in time.
    """

    def __init__(self, app: ASGIApp, *, reached: Callable[[int], Awaitable[bool]]) -> None:
        self._app = app
        self._reached = reached

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass once its generation is served."""
        if scope["type"] == "http" and scope["level"] is not Level.OPEN:
            try:
                await self._wait(Headers(scope=scope).get(MIN_GENERATION_HEADER))
            except MedleyError as error:
                await answer(Request(scope), error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _wait(self, header: str | None) -> None:
        if header is None:
            return
        if not _NUMBER.fullmatch(header):
            where = {"where": f"header.{MIN_GENERATION_HEADER}", "what": "a whole number"}
            raise RequestError(f"{MIN_GENERATION_HEADER} is no generation", errors=[where])
        if not await self._reached(int(header)):
            raise UnavailableError(
                f"this server has not reached generation {header}", code="behind"
            )

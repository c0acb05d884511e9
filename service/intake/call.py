"""One request as the layers under the routes know it: its id, and until when its answer is of use.

Not the HTTP request: only `call_of` and `until_gone` see that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from service.errors import DeadlineError, RequestError
from service.settings import Settings
from service.wire.headers import TIMEOUT_HEADER

__all__ = ["Call", "call_of", "until_gone"]

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """Who asks and for how long; times are those of `time.monotonic`."""

    request_id: str
    started_s: float
    deadline_s: float

    @property
    def left_s(self) -> float:
        """Time until the deadline; negative when it has passed."""
        return self.deadline_s - time.monotonic()

    def server_timing(self, stages_s: Mapping[str, float]) -> str:
        """The header `Server-Timing`: the stages, and `total` since the request was understood."""
        times_s = {**stages_s, "total": time.monotonic() - self.started_s}
        return ", ".join(f"{name};dur={1000 * s:.2f}" for name, s in times_s.items())

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Cancel what is inside at the deadline.

        Raises:
            DeadlineError: it was cancelled so.
        """
        try:
            async with asyncio.timeout(self.left_s) as timeout:
                yield
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise DeadlineError("the request's time is over") from error


def call_of(request: Request, settings: Settings) -> Call:
    """What `request` is to the layers below; its time begins now.

    The header `X-Request-Timeout-Ms` gives it less time than the settings do, never more.

    Raises:
        RequestError: the header is no positive number.
    """
    now_s = time.monotonic()
    timeout_s = min(_asked_s(request), settings.request_timeout_s)
    return Call(request.scope["request_id"], now_s, now_s + timeout_s)


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do `work`, and cancel it when the client hangs up. The body must have been read.

    Raises:
        ClientDisconnect: the client is gone; `work` has ended.
    """
    worker = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({worker, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientDisconnect
        return worker.result()
    finally:
        worker.cancel()
        gone.cancel()
        await asyncio.wait({worker, gone})  # both have let go of what they hold


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _asked_s(request: Request) -> float:
    """What the client allows; infinite if it does not say."""
    value = request.headers.get(TIMEOUT_HEADER)
    if value is None:
        return float("inf")
    if not (value.isascii() and value.isdigit() and len(value) <= 12 and int(value)):
        raise RequestError(f"{TIMEOUT_HEADER} must be a positive number of milliseconds")
    return int(value) / 1000

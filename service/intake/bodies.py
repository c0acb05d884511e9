"""Request bodies, bounded: each in bytes and in time, and all that are held at once in bytes.

Only what has arrived is counted, so that nobody takes room by promising a large body.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request
from starlette.types import Message, Receive

from service.errors import DeadlineError, PayloadError, RequestTimeoutError
from service.intake.call import Call
from service.intake.room import Room, Take

__all__ = ["Bodies"]


class Bodies:
    """How much of requests' bodies this server takes in."""

    def __init__(self, room: Room, *, max_bytes: int, timeout_s: float) -> None:
        self._room = room
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    @contextmanager
    def open(self, request: Request, call: Call) -> Iterator[Request]:
        """The request, to read its body from; its bytes count as held until the end.

        Reading raises:
            PayloadError: the body is too large.
            BusyError: all requests together hold too much.
            RequestTimeoutError: it does not arrive in time.
            DeadlineError: the request's own time ends first.
        """
        self._check_declared(request)
        with self._room.share() as take:
            yield Request(request.scope, self._receive(request, call, take))

    def _check_declared(self, request: Request) -> None:
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            raise self._too_large()

    def _receive(self, request: Request, call: Call, take: Take) -> Receive:
        end_s = time.monotonic() + self._timeout_s
        seen = 0

        async def receive() -> Message:
            nonlocal seen
            try:
                async with asyncio.timeout(min(end_s, call.deadline_s) - time.monotonic()):
                    message = await request.receive()
            except TimeoutError as error:
                if call.deadline_s < end_s:
                    raise DeadlineError("the body did not arrive in the request's time") from error
                raise RequestTimeoutError(
                    f"the body did not arrive within {self._timeout_s:g} s"
                ) from error
            size = len(message.get("body", b""))
            seen += size
            if seen > self._max_bytes:
                raise self._too_large()
            take(size)
            return message

        return receive

    def _too_large(self) -> PayloadError:
        return PayloadError(f"the request is larger than {self._max_bytes} bytes")

"""Bodies that are too large to hold: in chunks as they arrive, bounded in size and in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import Request

from service.errors import PayloadError, RequestTimeoutError

__all__ = ["BYTES", "JSON", "body_of", "kind_of"]

JSON, BYTES = "application/json", "application/octet-stream"


def kind_of(request: Request) -> str:
    """The content type, without what may follow it; empty if none is named."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def body_of(request: Request, *, max_bytes: int, timeout_s: float) -> AsyncIterator[bytes]:
    """The request's body as it arrives; a length that is declared too large ends it unread.

    Raises:
        PayloadError: it is larger.
        RequestTimeoutError: it takes longer to arrive.
    """
    too_large = PayloadError(f"the body is larger than {max_bytes} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    end_s = asyncio.get_running_loop().time() + timeout_s
    stream, seen = request.stream(), 0
    while True:
        try:
            async with asyncio.timeout_at(end_s):
                chunk = await anext(stream, None)
        except TimeoutError as error:
            raise RequestTimeoutError(f"the body did not arrive within {timeout_s:g} s") from error
        if chunk is None:
            return
        seen += len(chunk)
        if seen > max_bytes:
            raise too_large
        yield chunk

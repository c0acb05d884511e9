"""Small JSON bodies of routes that classify nothing, read within the bounds of all bodies.

No route lets the framework read its body: that would read to the end, however long it is.
"""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel

from service.intake.call import call_of
from service.intake.forms import checked
from service.state import Service

__all__ = ["read_json"]

Model = TypeVar("Model", bound=BaseModel)


async def read_json(
    kind: type[Model], request: Request, service: Service, *, empty: bytes = b""
) -> Model:
    """Read a request's JSON body; an empty one as if it were `empty`.

    Raises:
        SyntaxProblemError, RequestError: it is not what `kind` says.
        PayloadError, BusyError, RequestTimeoutError, DeadlineError: see `Bodies.open`.
    """
    call = call_of(request, service.settings)
    with service.bodies.open(request, call) as bounded:
        return checked(kind, await bounded.body() or empty)

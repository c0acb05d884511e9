"""Tags of what is desired, as HTTP has them: a generation in quotes (RFC 9110, 8.8.3 and 13.1)."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Header

from service.errors import RequestError
from service.registry.desired import IfMatch

__all__ = ["IfMatchHeader", "etag", "if_match", "is_same", "only_new"]

IfMatchHeader = Annotated[
    str | None, Header(description="The task's ETag, or *; the change is refused if it is not so")
]
_TAG = re.compile(r'(W/)?"([^"]*)"')


def etag(generation: int) -> str:
    """The tag of what was last changed by `generation`."""
    return f'"{generation}"'


def if_match(header: str | None) -> IfMatch | None:
    """The condition of an If-Match header; a tag that is none of ours matches nothing."""
    if header is None:
        return None
    strong = [text for weak, text in _TAG.findall(header) if not weak]
    numbers = frozenset(int(text) for text in strong if re.fullmatch("[0-9]{1,18}", text))
    return IfMatch(numbers, any=header.strip() == "*")


def is_same(header: str | None, generation: int) -> bool:
    """Whether by this If-None-Match header the client has what is there already."""
    if header is None:
        return False
    return header.strip() == "*" or str(generation) in [text for _, text in _TAG.findall(header)]


def only_new(header: str | None) -> bool:
    """Whether this If-None-Match header of a change asks for what is not there yet.

    Raises:
        RequestError: it asks for something else, which no change needs.
    """
    if header is not None and header.strip() != "*":
        raise RequestError("for a change, If-None-Match can only be *")
    return header is not None

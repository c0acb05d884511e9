"""The W3C trace that a request belongs to: taken over from the client, told to it and to the log.

That much needs no library. Spans go to a collector with the extra `otel` only (`otel.py`).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from service.errors import ServiceError
from service.signals.notes import Stage

__all__ = ["RequestSpan", "Trace", "Tracing", "Untraced", "make_tracing", "read_traceparent"]

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1


@dataclass(frozen=True)
class Trace:
    """One place in a trace: the trace's id and the id of a span in it, lower-case hex."""

    trace_id: str
    span_id: str
    sampled: bool

    @property
    def header(self) -> str:
        """The value of `traceparent`."""
        return f"00-{self.trace_id}-{self.span_id}-{_SAMPLED if self.sampled else 0:02x}"


class RequestSpan(Protocol):
    """One request's part in a trace."""

    @property
    def trace(self) -> Trace:
        """Where in which trace it is."""

    def end(self, name: str, attributes: Mapping[str, str | int], stages: Sequence[Stage]) -> None:
        """The request is over; `stages` are what it was made of."""


class Tracing(Protocol):
    """Where spans go."""

    def begin(self, given: Trace | None, state: str) -> RequestSpan:
        """A request begins; `given` and `state` are its `traceparent` and `tracestate`."""

    def close(self) -> None:
        """Send what is still here."""


class Untraced:
    """Spans go nowhere, ids go on."""

    def begin(self, given: Trace | None, state: str) -> RequestSpan:
        """Go on in the given trace, else in a new one."""
        trace_id = given.trace_id if given else secrets.token_hex(16)
        return _Ids(Trace(trace_id, secrets.token_hex(8), bool(given and given.sampled)))

    def close(self) -> None:
        """Nothing is here."""


def make_tracing(kind: Literal["off", "otlp"]) -> Tracing:
    """Tracing as the settings have it.

    Raises:
        ServiceError: it needs the extra `otel`, which is not installed.
    """
    if kind == "off":
        return Untraced()
    try:
        from service.signals.otel import Otel
    except ImportError as error:
        raise ServiceError("MEDLEY_TRACING=otlp needs medley-clip[otel] installed") from error
    return Otel()


def read_traceparent(values: Sequence[str]) -> Trace | None:
    """Read the `traceparent` headers of a request; None unless there is exactly one valid one.

    Source: W3C Trace Context, https://www.w3.org/TR/trace-context/#traceparent-header.
    """
    found = _TRACEPARENT.fullmatch(values[0].strip()) if len(values) == 1 else None
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    zero = not int(trace_id, 16) or not int(span_id, 16)
    if zero or version == "ff" or (version == "00" and more):
        return None
    return Trace(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


@dataclass(frozen=True)
class _Ids:
    trace: Trace

    def end(self, name: str, attributes: Mapping[str, str | int], stages: Sequence[Stage]) -> None:
        """Nobody listens."""

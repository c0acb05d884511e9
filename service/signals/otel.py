"""Spans to an OpenTelemetry collector, by the SDK. Imported only where tracing is turned on.

One span per request, and under it one for each stage of it. What is sent where is set up by the
`OTEL_*` variables that the SDK reads: endpoint, service name, sampler.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
    set_span_in_context,
)

from service.signals.notes import Stage
from service.signals.tracing import RequestSpan, Trace

__all__ = ["Otel"]

CLOSE_S = 3.0  # a collector that is not there must not hold up the end of the server


class Otel:
    """Spans go where `processor` takes them; to the collector of the environment by default."""

    def __init__(self, processor: SpanProcessor | None = None) -> None:
        self._provider = TracerProvider(shutdown_on_exit=False)
        self._provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("medley")

    def begin(self, given: Trace | None, state: str) -> RequestSpan:
        """Go on in the given trace, else in a new one; the sampler decides what is recorded."""
        parent = set_span_in_context(NonRecordingSpan(_context(given, state))) if given else None
        span = self._tracer.start_span("request", parent, kind=SpanKind.SERVER)
        return _RequestSpan(self._tracer, span)

    def close(self) -> None:
        """Send what is still here, if that goes quickly."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)


@dataclass(frozen=True)
class _RequestSpan:
    tracer: Tracer
    span: Span

    @property
    def trace(self) -> Trace:
        here = self.span.get_span_context()
        return Trace(f"{here.trace_id:032x}", f"{here.span_id:016x}", here.trace_flags.sampled)

    def end(self, name: str, attributes: Mapping[str, str | int], stages: Sequence[Stage]) -> None:
        under = set_span_in_context(self.span)
        for stage in stages:
            part = self.tracer.start_span(stage.name, under, start_time=stage.began_ns)
            part.end(stage.began_ns + round(stage.duration_s * 1e9))
        self.span.update_name(name)
        self.span.set_attributes(dict(attributes))
        if int(attributes["http.response.status_code"]) >= 500:
            self.span.set_status(StatusCode.ERROR)
        self.span.end()


def _context(given: Trace, state: str) -> SpanContext:
    return SpanContext(
        int(given.trace_id, 16),
        int(given.span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED if given.sampled else TraceFlags.DEFAULT),
        trace_state=TraceState.from_header([state]),
    )

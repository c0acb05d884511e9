"""A trace is taken over and passed on; spans nest and reach a collector, if that is installed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from medley.backbone import Backbone
from service.app import create_app
from service.settings import Settings
from service.signals.notes import Notes
from service.signals.tracing import Trace, Untraced, make_tracing, read_traceparent
from tests.service.conftest import MakeBundle, OpenApp, StartServer

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GIVEN = f"00-{TRACE}-{SPAN}-01"
PNG = {"Content-Type": "image/png"}


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([GIVEN], Trace(TRACE, SPAN, sampled=True)),
        ([f"00-{TRACE}-{SPAN}-00"], Trace(TRACE, SPAN, sampled=False)),
        ([f"00-{TRACE}-{SPAN}-ff"], Trace(TRACE, SPAN, sampled=True)),
        ([f" {GIVEN} "], Trace(TRACE, SPAN, sampled=True)),
        ([f"01-{TRACE}-{SPAN}-01-of-a-later-version"], Trace(TRACE, SPAN, sampled=True)),
        ([f"{GIVEN}-more"], None),
        ([f"ff-{TRACE}-{SPAN}-01"], None),
        ([f"00-{'0' * 32}-{SPAN}-01"], None),
        ([f"00-{TRACE}-{'0' * 16}-01"], None),
        ([GIVEN.upper()], None),
        ([GIVEN[:-1]], None),
        ([GIVEN, GIVEN], None),
        (["\r\nx: y"], None),
        ([""], None),
        ([], None),
    ],
)
def test_a_traceparent_is_read_as_the_w3c_has_it(values: list[str], found: Trace | None) -> None:
    assert read_traceparent(values) == found


def test_a_trace_goes_on_without_any_library(open_app: OpenApp) -> None:
    with open_app() as http:
        followed = http.get("/readyz", headers={"traceparent": GIVEN}).headers["traceparent"]
        again = http.get("/readyz", headers={"traceparent": GIVEN}).headers["traceparent"]
        forged = http.get("/readyz", headers={"traceparent": "00-zz"}).headers["traceparent"]

    ours = read_traceparent([followed])
    assert ours is not None
    assert (ours.trace_id, ours.sampled) == (TRACE, True)
    assert len({SPAN, ours.span_id, again.split("-")[2]}) == 3, "each request is a span of its own"
    assert read_traceparent([forged]) is not None
    assert "zz" not in forged


def test_spans_of_nobody_cost_nothing_and_say_nothing() -> None:
    tracing = Untraced()
    span = tracing.begin(None, "")
    span.end("GET /", {"http.response.status_code": 200}, [])
    tracing.close()

    assert read_traceparent([span.trace.header]) == span.trace


def test_a_stage_is_noted_also_if_it_fails() -> None:
    notes = Notes()
    with pytest.raises(ZeroDivisionError), notes.stage("decode"):
        raise ZeroDivisionError
    notes.ended("forward", 0.25)
    notes.ended("forward", 0.5)

    assert [stage.name for stage in notes.stages] == ["decode", "forward", "forward"]
    assert notes.stages_ms()["forward"] == 750


def test_without_the_extra_nothing_of_it_is_imported() -> None:
    """The SDK and its exporters; the bare API comes with FastAPI itself."""
    code = """
import sys
tried = []
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")):
            tried.append(name)
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import redis.cluster, redis.sentinel  # looks for it on its own account
tried.clear()
from service import app
from service import commands
from service import server
from service.settings import Settings
app.create_app(Settings())
assert not tried and "service.signals.otel" not in sys.modules, tried
try:
    app.create_app(Settings(tracing="otlp"))
except Exception as error:
    assert tried
    sys.stdout.write(str(error))
"""
    root = Path(__file__).parents[3]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)

    assert ran.stdout == "MEDLEY_TRACING=otlp needs medley-clip[otel] installed", ran.stderr


class TestWithTheExtra:
    """Spans by the SDK."""

    def test_spans_nest_under_the_clients_span(
        self, backbone: Backbone, make: MakeBundle, image: bytes, tmp_path: Path
    ) -> None:
        memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor

        from service.signals.otel import Otel

        exporter = memory.InMemorySpanExporter()
        tracing = Otel(SimpleSpanProcessor(exporter))
        settings = Settings(store=tmp_path / "store", buckets=(4,))
        app = create_app(settings, backbone=backbone, tracing=tracing)
        with TestClient(app) as http:
            http.put("/v1/tasks/pets/versions/1", content=make(task="pets")[1])
            exporter.clear()
            headers = {**PNG, "traceparent": GIVEN, "tracestate": "vendor=1", "X-Request-Id": "r1"}
            answer = http.post("/v1/classify", content=image, headers=headers)
            spans = {span.name: span for span in exporter.get_finished_spans()}

        assert answer.status_code == 200
        assert spans.keys() == {"POST /v1/classify", "decode", "queue", "forward", "head"}
        request = spans.pop("POST /v1/classify")
        assert f"{request.parent.span_id:016x}" == SPAN
        assert f"{request.context.trace_id:032x}" == TRACE
        assert request.context.trace_state.get("vendor") == "1"
        assert answer.headers["traceparent"] == f"00-{TRACE}-{request.context.span_id:016x}-01"
        assert request.attributes["http.response.status_code"] == 200
        assert request.attributes["medley.request_id"] == "r1"
        assert request.attributes["medley.images"] == 1
        for part in spans.values():
            assert part.parent.span_id == request.context.span_id
            assert part.context.trace_id == request.context.trace_id
            assert part.start_time <= part.end_time <= request.end_time
        order = sorted(spans.values(), key=lambda span: int(span.end_time or 0))
        assert [span.name for span in order] == ["decode", "queue", "forward", "head"]

    def test_a_trace_that_its_client_does_not_record_is_not_recorded(self) -> None:
        memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor

        from service.signals.otel import Otel

        exporter = memory.InMemorySpanExporter()
        tracing = Otel(SimpleSpanProcessor(exporter))
        span = tracing.begin(Trace(TRACE, SPAN, sampled=False), "")
        span.end("GET /", {"http.response.status_code": 500}, [])

        assert (span.trace.trace_id, span.trace.sampled) == (TRACE, False)
        assert not exporter.get_finished_spans()

    def test_a_server_sends_its_spans_to_the_collector_that_the_environment_names(
        self, start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A process of its own, stopped by SIGTERM: what is still here goes out at the end."""
        wire = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
        with collector() as (url, bodies):
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
            monkeypatch.setenv("OTEL_SERVICE_NAME", "medley-test")
            with start_server(tmp_path, "tracing=otlp") as server, server.client() as http:
                http.get("/v1/tasks", headers={"traceparent": GIVEN}).raise_for_status()
        requests = [wire.ExportTraceServiceRequest.FromString(body) for body in bodies]
        resources = [resource for request in requests for resource in request.resource_spans]
        spans = [s for r in resources for scope in r.scope_spans for s in scope.spans]
        (ours,) = [span for span in spans if span.trace_id.hex() == TRACE]

        for resource in resources:
            named = {a.key: a.value.string_value for a in resource.resource.attributes}
            assert named["service.name"] == "medley-test"
        assert (ours.name, ours.parent_span_id.hex()) == ("GET /v1/tasks", SPAN)

    def test_a_collector_that_is_not_there_holds_nobody_up(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
        from service.signals import otel

        monkeypatch.setattr(otel, "CLOSE_S", 0.05)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
        tracing = make_tracing("otlp")
        tracing.begin(None, "").end("GET /", {"http.response.status_code": 200}, [])
        tracing.close()


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """A server that keeps what is posted to it."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", bodies
        finally:
            server.shutdown()
            thread.join()

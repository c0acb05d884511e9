"""What a server logs: one object per line, told by request, with nothing of what was sent."""

from __future__ import annotations

import base64
import io
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from service import problems
from service.middleware import RequestContext
from service.signals import logs
from service.signals.metrics import Metrics
from service.signals.notes import CURRENT, Notes
from tests.service.conftest import MakeBundle, StartServer

PNG = {"Content-Type": "image/png"}


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What is logged; the process logs as before afterwards."""
    root = logging.getLogger()
    hooks = sys.excepthook, threading.excepthook
    before = root.handlers[:], root.level, {n: logging.getLogger(n).level for n in logs.OURS}
    stream = io.StringIO()
    yield stream
    root.handlers[:], root.level = before[0], before[1]
    for name, level in before[2].items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(capture=False)
    sys.excepthook, threading.excepthook = hooks


def lines_of(text: str) -> list[dict[str, Any]]:
    """Every line, each of which is an object."""
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(isinstance(line, dict) for line in lines)
    return lines


def failing_app() -> FastAPI:
    app = FastAPI()
    problems.install(app)
    app.add_middleware(RequestContext, metrics=Metrics(), generation=lambda: 1)

    @app.get("/fails")
    def fails() -> None:
        raise ZeroDivisionError("our bug")

    @app.get("/livez")
    def livez() -> None:
        pass

    return app


def test_a_server_logs_one_object_per_request_and_nothing_that_was_sent(
    start_server: StartServer,
    make: MakeBundle,
    image: bytes,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ("log_format=json", "log_level=info", "admin_key=s3cret-key")
    with start_server(tmp_path, *words) as server, server.client() as http:
        key = {"Authorization": "Bearer s3cret-key"}
        _, data = make(task="pets")
        http.put("/v1/tasks/pets/versions/1", content=data, headers=key)
        http.put("/v1/tasks/pets/versions/2", content=data, headers={"Authorization": "Bearer no"})
        asked = {"labels": ["hush-hush", "dog"], "model": "pets"}
        classified = http.post(
            "/v1/classify", params=asked, content=image, headers={**PNG, "X-Request-Id": "mine"}
        )
        broken = {"images": [{"bytes_b64": b64(image)}, {"bytes_b64": b64(b"no image")}]}
        http.post("/v1/classify", json=broken)
        http.get("/nowhere/hush-hush")
        http.get("/readyz")
    text = capfd.readouterr().err
    lines = lines_of(text)
    told = {line["request_id"]: line for line in lines if "operation" in line}

    assert classified.status_code == 200
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, lines))
    mine = told["mine"]
    assert (mine["operation"], mine["status"]) == ("POST /v1/classify", 200)
    assert mine["images"] == 1
    assert mine["answered"] == {"pets": 1}
    assert mine["stages_ms"].keys() == {"decode", "queue", "forward", "head"}
    assert 0 < sum(mine["stages_ms"].values()) <= mine["duration_ms"] + 1
    assert mine["trace_id"] == classified.headers["traceparent"].split("-")[1]
    statuses = [(line["operation"], line["status"]) for line in told.values()]
    assert {("PUT /v1/tasks/{task}/versions/{version}", code) for code in (201, 401)} < {*statuses}
    assert sorted(status for _, status in statuses) == [200, 200, 201, 401, 404], "no probe"
    assert {"not_an_image": 1} in [line.get("problems") for line in told.values()]
    for secret in ("hush-hush", "s3cret-key", "dog", b64(image)[:40], "bytes_b64", str(tmp_path)):
        assert secret not in text


def test_a_bug_is_one_line_with_its_trace_and_the_id_that_the_client_got(
    log: io.StringIO,
) -> None:
    logs.configure("json", stream=log)
    answer = TestClient(failing_app()).get("/fails")
    failure, request = lines_of(log.getvalue())

    assert "ZeroDivisionError: our bug" in failure["exc_info"]
    assert (failure["level"], request["level"]) == ("ERROR", "WARNING")
    assert failure["request_id"] == request["request_id"] == answer.headers["x-request-id"]
    assert request["problems"] == {"internal": 1}


def test_a_probe_that_succeeds_is_logged_for_debugging_only(log: io.StringIO) -> None:
    logs.configure("json", stream=log)
    client = TestClient(failing_app())
    client.get("/livez")
    assert log.getvalue() == ""

    logs.configure("json", level="debug", stream=log)
    client.get("/livez")
    assert lines_of(log.getvalue())[-1]["operation"] == "GET /livez"


def test_text_for_people_names_the_request_and_stays_one_line(log: io.StringIO) -> None:
    logs.configure("text", stream=log)
    answer = TestClient(failing_app()).get("/nowhere", headers={"X-Request-Id": "mine"})
    (line,) = log.getvalue().splitlines()

    assert answer.status_code == 404
    assert "INFO [mine] none 404 in " in line


def test_what_libraries_tell_of_the_addresses_they_ask_for_is_not_logged(
    log: io.StringIO,
) -> None:
    logs.configure("json", level="debug", stream=log)
    logging.getLogger("httpx").info("HTTP Request: GET http://10.0.0.1/secret")
    logging.getLogger("asyncio").warning("a task took long")

    assert [line["message"] for line in lines_of(log.getvalue())] == ["a task took long"]


def test_warnings_and_strange_texts_are_json_too(log: io.StringIO) -> None:
    logs.configure("json", stream=log)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn('a "quoted"\nwarning \u2028 of two lines', stacklevel=1)
    logging.getLogger("service").warning("a task called %s", '"}\n{"level": "forged"}')
    first, second = lines_of(log.getvalue())

    assert "of two lines" in first["message"]
    assert second["level"] == "WARNING"


def test_what_nobody_caught_is_one_line_too(log: io.StringIO) -> None:
    logs.configure("json", stream=log)
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    (line,) = lines_of(log.getvalue())

    assert line["level"] == "CRITICAL"
    assert "ZeroDivisionError" in line["exc_info"]


def test_lines_outside_a_request_have_no_id_and_inside_all_have(log: io.StringIO) -> None:
    logs.configure("json", stream=log)
    ours = logging.getLogger("service.versions.tasks")
    ours.info("outside")
    token = CURRENT.set(Notes("r1", "t1", "s1"))
    ours.info("inside")
    CURRENT.reset(token)
    outside, inside = lines_of(log.getvalue())

    assert "request_id" not in outside
    assert (inside["request_id"], inside["trace_id"], inside["span_id"]) == ("r1", "t1", "s1")


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_every_answer_has_its_headers_also_one_that_no_route_gave() -> None:
    app = failing_app()
    headers = TestClient(app).get("/nowhere").headers

    assert {"x-request-id", "traceparent", "x-registry-generation"} <= headers.keys()
    assert "x-replica" not in headers


def test_a_replica_says_its_name() -> None:
    app = FastAPI()
    app.add_middleware(RequestContext, metrics=Metrics(), generation=lambda: 1, replica="pod-7")

    assert TestClient(app).get("/").headers["x-replica"] == "pod-7"

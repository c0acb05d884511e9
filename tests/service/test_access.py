"""Who may do what: every route has a rule, and what has none is closed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.routing import iter_route_contexts
from pydantic import SecretStr
from starlette.testclient import TestClient

from medley.backbone import Backbone
from service.access import RULES, Gate, Level, Rules
from service.app import create_app
from service.middleware import RequestContext
from service.problems import install
from service.settings import Settings
from service.signals.metrics import Metrics
from tests.service.conftest import OpenApp

ADMIN, READER = {"authorization": "Bearer admin"}, {"authorization": "Bearer reader"}


def rules() -> list[tuple[str, str, Level]]:
    return [(m, path, level) for path, methods in RULES.items() for m, level in methods.items()]


def filled(path: str) -> str:
    """A pattern's path with a name in each gap."""
    return path.replace("{", "").replace("}", "")


def test_every_route_of_the_app_has_a_rule_and_every_rule_a_route(
    tmp_path: Path, backbone: Backbone
) -> None:
    app = create_app(Settings(store=tmp_path), backbone=backbone)
    routes = {
        (method, route.path)
        for route in iter_route_contexts(app.routes)
        for method in (route.methods or {"WEBSOCKET"}) - {"HEAD"}
    }

    assert routes == {(method, path) for method, path, _ in rules()}


def hello() -> str:
    return "hello"


def small_app(
    settings: Settings, *, add: Callable[[FastAPI], object], rules: Rules = RULES
) -> FastAPI:
    """An app of the routes that `add` adds, behind the gate."""
    app = FastAPI(openapi_url=None)
    install(app)
    add(app)
    app.add_middleware(Gate, settings=settings, openapi=app.openapi, rules=rules)
    app.add_middleware(RequestContext, metrics=Metrics(), generation=lambda: 0)
    return app


def test_an_app_with_a_documented_route_that_has_no_rule_does_not_start() -> None:
    app = small_app(Settings(), add=lambda app: app.get("/v1/forgotten")(hello))

    with pytest.raises(AssertionError, match="GET /v1/forgotten"), TestClient(app):
        pass


def test_a_hidden_route_that_has_no_rule_is_closed() -> None:
    def add(app: FastAPI) -> None:
        app.get("/v1/hidden", include_in_schema=False)(hello)
        app.post("/livez", include_in_schema=False)(hello)

    client = TestClient(small_app(Settings(), add=add))

    assert client.get("/v1/hidden").status_code == 404
    assert client.post("/livez").status_code == 405


def test_a_websocket_is_closed() -> None:
    def add(app: FastAPI) -> None:
        @app.websocket("/livez")
        async def opened(socket: WebSocket) -> None:
            await socket.accept()

    client = TestClient(small_app(Settings(), add=add))
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/livez"):
        pass


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> Any:
    """A client of a server with both keys; it sends none by itself."""
    settings = Settings(
        store=tmp_path_factory.mktemp("locked"),
        buckets=(4,),
        admin_key=SecretStr("admin"),
        read_key=SecretStr("reader"),
    )
    with TestClient(create_app(settings, backbone=backbone)) as client:
        yield client


@pytest.mark.parametrize(("method", "path", "level"), rules())
def test_a_route_answers_those_who_may_and_nobody_else(
    locked: httpx.Client, method: str, path: str, level: Level
) -> None:
    wrong = [{}, {"authorization": "Bearer "}, {"authorization": "Basic admin"}]
    codes = {
        who: locked.request(method, filled(path), headers=headers).status_code
        for who, headers in [("admin", ADMIN), ("reader", READER), *enumerate(wrong)]
    }
    refused = {who for who, status in codes.items() if status == 401}

    assert (
        refused
        == {
            Level.OPEN: set(),
            Level.READ: {0, 1, 2},
            Level.CHANGE: {"reader", 0, 1, 2},
        }[level]
    )


def test_without_a_read_key_reading_is_open_and_changing_is_not(open_app: OpenApp) -> None:
    with open_app(admin_key="admin") as http:
        assert http.get("/v1/tasks").status_code == 200
        assert http.delete("/v1/tasks/pets").json()["code"] == "unauthorized"
        assert http.delete("/v1/tasks/pets", headers=ADMIN).json()["code"] == "unknown_task"


def test_without_a_key_changes_are_off_on_an_open_address(open_app: OpenApp) -> None:
    with open_app(host="0.0.0.0") as http:
        for method, path, level in rules():
            if level is Level.CHANGE:
                response = http.request(method, filled(path), headers=ADMIN)
                assert (response.status_code, response.json()["code"]) == (403, "changes_disabled")


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        (None, "127.0.0.1:8000", 404),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", 404),
        ("http://localhost:8000", "localhost:8000", 404),
        ("http://[::1]:8000", "[::1]:8000", 404),
        ("http://localhost:3000", "localhost:8000", 403),
        ("https://evil.example", "127.0.0.1:8000", 403),
        ("http://evil.example:8000", "evil.example:8000", 403),
        ("null", "127.0.0.1:8000", 403),
        ("http://[", "127.0.0.1:8000", 403),
    ],
)
def test_without_a_key_a_page_of_another_site_changes_nothing(
    open_app: OpenApp, origin: str | None, host: str, status: int
) -> None:
    """A browser on the server's own machine sends whatever some page wants, also by POST."""
    headers = {"host": host} | ({"origin": origin} if origin else {})
    with open_app() as http:
        assert http.delete("/v1/tasks/pets", headers=headers).status_code == status


@pytest.mark.parametrize(("method", "path", "level"), rules())
def test_an_unknown_query_parameter_is_refused_by_name(
    http: httpx.Client, method: str, path: str, level: Level
) -> None:
    response = http.request(method, filled(path), params={"surprise": "seCret", "a": ""})

    assert response.status_code == 422
    assert "surprise" in response.text
    assert "seCret" not in response.text


def test_the_key_is_asked_for_before_anything_else(locked: httpx.Client) -> None:
    headers = {"content-length": "99999999999"}

    assert locked.put("/v1/tasks/a/versions/1?x=1", headers=headers).status_code == 401


def test_an_unknown_path_is_a_404_and_a_wrong_method_a_405(http: httpx.Client) -> None:
    missing, wrong = http.get("/v1/nothing"), http.patch("/v1/tasks/pets")

    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "DELETE, GET"
    assert http.get("/v1/tasks/").status_code == 404


def test_where_two_patterns_fit_a_path_the_stricter_level_holds() -> None:
    def add(app: FastAPI) -> None:
        app.get("/v1/{name}")(hello)
        app.get("/v1/secret", operation_id="secret")(hello)

    settings = Settings(admin_key=SecretStr("admin"))
    rules = {"/v1/{name}": {"GET": Level.READ}, "/v1/secret": {"GET": Level.CHANGE}}
    client = TestClient(small_app(settings, add=add, rules=rules))

    assert client.get("/v1/other").status_code == 200
    assert client.get("/v1/secret").status_code == 401
    assert client.get("/v1/secret", headers=ADMIN).status_code == 200


def test_the_page_of_the_api_needs_no_key(locked: httpx.Client) -> None:
    assert "/openapi.json" in locked.get("/docs").text
    security = locked.get("/openapi.json").json()["paths"]["/v1/tasks/{task}"]
    assert security["delete"]["security"] == [{"adminKey": []}]

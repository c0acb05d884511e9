"""The table of errors is complete, and an error of ours says nothing of its insides."""

from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from medley.errors import BundleError, MedleyError
from service.errors import STATUS, QueueFullError, problem, status_of
from service.middleware import RequestContext
from service.problems import install
from service.signals.metrics import Metrics


def classes(base: type[MedleyError]) -> set[type[MedleyError]]:
    return {base}.union(*(classes(child) for child in base.__subclasses__()))


def test_every_error_class_has_a_status() -> None:
    ours = {one for one in classes(MedleyError) if one.__module__.startswith(("medley", "service"))}

    assert ours == set(STATUS)


def test_a_refused_bundle_lists_its_problems() -> None:
    assert problem(BundleError(["a", "b"]))["problems"] == ["a", "b"]


@pytest.mark.parametrize("error", [MedleyError("secret"), ZeroDivisionError("secret")])
def test_a_bug_of_ours_is_a_500_with_an_id_and_without_its_text(error: Exception) -> None:
    app = FastAPI()
    install(app)
    app.add_middleware(RequestContext, metrics=Metrics(), generation=lambda: 7)

    @app.get("/fails")
    def fails() -> None:
        raise error

    response = TestClient(app).get("/fails")

    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["code"] == "internal"
    assert response.json()["request_id"] == response.headers["x-request-id"]
    assert response.headers["x-registry-generation"] == "7"


def test_a_full_queue_says_when_to_come_again() -> None:
    assert status_of(QueueFullError("full")) == 429
    assert problem(QueueFullError("full"))["retry_after_s"] == 1


def test_no_code_is_documented_that_does_not_exist() -> None:
    """Every code in the table of docs/api.md is raised somewhere."""
    root = Path(__file__).parents[2]
    table = (root / "docs/api.md").read_text().partition("## Problems")[2]
    codes = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    source = "".join(
        path.read_text() for top in ("medley", "service") for path in (root / top).rglob("*.py")
    )

    assert codes
    assert {code for code in codes if f'"{code}"' not in source} <= {
        *("not_found", "method_not_allowed", "bad_request")  # from http.HTTPStatus
    }

"""The OpenAPI document: what it says of every route is so, and the written copy is the true one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts
from jsonschema_rs import validator_for

from service.app import create_app
from service.settings import Settings
from service.wire.examples import EXAMPLES
from service.wire.openapi import operations
from service.wire.openapi_file import document_text
from tests.service.conftest import MakeBundle, OpenApp

WRITTEN = Path(__file__).parents[3] / "docs" / "openapi.json"
ELSEWHERE = (  # they need what is not there: an operation, an image, a second version, ...
    "/v1/tasks/{task}/rollout",
    "/v1/operations/{operation}",
    "/v1/unclaimed/{image}",
    "/v1/tasks/{task}/versions/{version}",
    "/v2/repository/models/{model}/unload",
)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(Settings()).openapi()


def test_the_written_document_is_the_true_one() -> None:
    """`python -m service.wire.openapi_file docs/openapi.json` writes it."""
    assert WRITTEN.read_text() == document_text()


def test_no_route_lets_the_framework_read_its_body() -> None:
    """It would read to the end, however long that is; ours are bounded in bytes and time."""
    app = create_app(Settings())
    read = [r.path for r in iter_route_contexts(app.routes) if getattr(r, "body_field", None)]

    assert read == []


def test_every_operation_is_named_and_documents_its_problems(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for _, _, operation in operations(document)]

    assert len(set(ids)) == len(ids)
    for path, method, operation in operations(document):
        assert operation["summary"], path
        assert operation.get("description"), f"{method} {path} says nothing of itself"
        (media,) = operation["responses"]["default"]["content"]
        openai = path.startswith(("/v1/models", "/v1/embeddings"))
        assert media == ("application/json" if openai else "application/problem+json")
        assert "422" not in operation["responses"]  # a problem like every other


def test_every_operation_has_an_example(document: dict[str, Any]) -> None:
    assert EXAMPLES.keys() == {(method, path) for path, method, _ in operations(document)}


def examples(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Where an example is, its schema, and the example."""
    for path, method, operation in operations(document):
        found = EXAMPLES[method, path]
        bodies = operation.get("requestBody", {}).get("content", {})
        if "application/json" in bodies:
            body = bodies["application/json"]
            yield f"{method} {path} body", body["schema"], body["example"]
        if found.answer is not None:
            content = operation["responses"][str(found.status)]["content"]
            (answer,) = content.values()
            yield f"{method} {path} answer", answer["schema"], answer["example"]


def test_every_example_fits_its_schema(document: dict[str, Any]) -> None:
    seen = 0
    for where, schema, example in examples(document):
        whole = schema | {"components": document["components"]}
        found = [error.message for error in validator_for(whole).iter_errors(example)]
        assert not found, where
        seen += 1
    assert seen > len(EXAMPLES)


def test_an_example_s_body_works(open_app: OpenApp, make: MakeBundle) -> None:
    """Of each route that asks the model something; flowers are served as in the examples."""
    flowers = make(task="flowers", class_names=("rose", "tulip"))[1]
    names = {"model": "flowers", "version": "1", "task": "flowers", "alias": "live"}
    with open_app() as http:
        http.put("/v1/tasks/flowers/versions/1", content=flowers)
        for (method, path), example in EXAMPLES.items():
            asked = example.body is not None or method == "GET"
            if not asked or path in ELSEWHERE:
                continue
            response = http.request(method, path.format(**names), json=example.body)
            assert response.status_code == example.status, response.text
            if isinstance(example.answer, dict):
                assert response.json().keys() == example.answer.keys(), path

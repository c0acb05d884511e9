"""What FastAPI cannot see by itself: bodies in several forms, problems, keys, examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.access import RULES, Level
from service.problems import PROBLEM_JSON
from service.wire.examples import EXAMPLES, Example
from service.wire.headers import MIN_GENERATION_HEADER, TIMEOUT_HEADER
from service.wire.openai_schemas import EmbeddingsRequest, ErrorAnswer
from service.wire.rollout_schemas import Rollout
from service.wire.schemas import ClassifyOptions, ClassifyRequest, Problem
from service.wire.v2_schemas import (
    IndexRequest,
    InferRequest,
    LoadRequest,
    UnloadRequest,
    V2Problem,
)

__all__ = [
    "CLASSIFY_BODY",
    "OPENAI_RESPONSES",
    "PROBLEM_RESPONSES",
    "V2_RESPONSES",
    "describe",
    "json_body",
    "operations",
]

_REF = "#/components/schemas/{model}"
_JSON = "application/json"
_BINARY = {"type": "string", "format": "binary"}


_TIMEOUT: dict[str, Any] = {
    "name": TIMEOUT_HEADER,
    "in": "header",
    "description": "Milliseconds until the answer is of no use any more",
    "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999_999},
}


_MIN_GENERATION: dict[str, Any] = {
    "name": MIN_GENERATION_HEADER,
    "in": "header",
    "description": "Answer from this generation of the registry, or a later one",
    "schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999_999_999},
}


def _plain_options() -> dict[str, Any]:
    """The options of a classification as text has them: absent, but never null."""
    schemas = ClassifyOptions.model_json_schema()["properties"]
    plain = {}
    for name, schema in schemas.items():
        some, *_ = schema.pop("anyOf", [{}])
        plain[name] = schema | some
        if plain[name].get("default", "") is None:
            del plain[name]["default"]
    return plain


CLASSIFY_BODY: dict[str, Any] = {
    "parameters": [
        *({"name": n, "in": "query", "schema": schema} for n, schema in _plain_options().items()),
        _TIMEOUT,
    ],
    "requestBody": {
        "required": True,
        "content": {
            _JSON: {"schema": {"$ref": _REF.format(model="ClassifyRequest")}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": _plain_options()
                    | {"file": {"type": "array", "items": _BINARY, "minItems": 1}},
                    "required": ["file"],
                    "additionalProperties": False,
                }
            },
            "image/*": {"schema": _BINARY},
            "application/octet-stream": {"schema": _BINARY},
        },
    },
}
PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "A problem (RFC 9457)",
        "content": {PROBLEM_JSON: {"schema": {"$ref": _REF.format(model="Problem")}}},
    }
}
V2_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "A problem (RFC 9457) with the protocol's `error`",
        "content": {PROBLEM_JSON: {"schema": {"$ref": _REF.format(model="V2Problem")}}},
    }
}
OPENAI_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {"description": "A problem in OpenAI's shape", "model": ErrorAnswer}
}
_MODELS: list[type[BaseModel]] = [  # those that only a reference names
    ClassifyRequest,
    EmbeddingsRequest,
    IndexRequest,
    InferRequest,
    LoadRequest,
    Problem,
    Rollout,
    UnloadRequest,
    V2Problem,
]
_KEYS = {
    "adminKey": {"type": "http", "scheme": "bearer", "description": "MEDLEY_ADMIN_KEY"},
    "readKey": {"type": "http", "scheme": "bearer", "description": "MEDLEY_READ_KEY, if it is set"},
}
_SECURITY: dict[Level, list[dict[str, list[str]]]] = {
    Level.OPEN: [],
    Level.READ: [{}, {"readKey": []}, {"adminKey": []}],
    Level.CHANGE: [{"adminKey": []}],
}


def json_body(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """The body of a route that reads it itself, so that it can bound it."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    content = {_JSON: {"schema": schema}}
    body = {"required": required, "content": content}
    return {"parameters": [_TIMEOUT], "requestBody": body}


def describe(app: FastAPI) -> None:
    """Complete the OpenAPI document of `app`."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(plain())
        return plain()

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any]) -> None:
    _, extra = models_json_schema([(m, "validation") for m in _MODELS], ref_template=_REF)
    document["components"]["schemas"] |= extra["$defs"]
    document["components"]["securitySchemes"] = _KEYS
    for path, method, operation in operations(document):
        level = RULES.get(path, {}).get(method, Level.CHANGE)
        operation["security"] = _SECURITY[level]
        if level is not Level.OPEN:
            operation["parameters"] = [*operation.get("parameters", ()), _MIN_GENERATION]
        operation["responses"].setdefault("default", PROBLEM_RESPONSES["default"])
        if (method, path) in EXAMPLES:
            _show(EXAMPLES[method, path], operation)


def _show(example: Example, operation: dict[str, Any]) -> None:
    """Put an example where the pages that show the document look for it."""
    if example.body is not None:
        operation["requestBody"]["content"][_JSON]["example"] = example.body
    if example.answer is not None:
        content = operation["responses"][str(example.status)]["content"]
        next(iter(content.values()))["example"] = example.answer


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Path, method and description of each operation of a document."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method.upper(), operation

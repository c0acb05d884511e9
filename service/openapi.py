"""What FastAPI cannot see by itself: the three forms of a classification, and problems."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from service.problems import PROBLEM_JSON
from service.schemas import ClassifyOptions, ClassifyRequest, Problem

__all__ = ["CLASSIFY_BODY", "PROBLEM_RESPONSES", "describe"]

_REF = "#/components/schemas/{model}"
_BINARY = {"type": "string", "format": "binary"}

CLASSIFY_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": _REF.format(model="ClassifyRequest")}},
            "multipart/form-data": {
                "schema": {
                    "allOf": [
                        {"$ref": _REF.format(model="ClassifyOptions")},
                        {"type": "object", "properties": {"file": _BINARY}, "required": ["file"]},
                    ]
                }
            },
            "image/*": {"schema": _BINARY},
        },
    }
}
PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "A problem (RFC 9457)",
        "content": {PROBLEM_JSON: {"schema": {"$ref": _REF.format(model="Problem")}}},
    }
}


def describe(app: FastAPI) -> None:
    """Add the schemas that `CLASSIFY_BODY` and `PROBLEM_RESPONSES` name."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            models: list[Any] = [ClassifyRequest, ClassifyOptions, Problem]
            _, extra = models_json_schema([(m, "validation") for m in models], ref_template=_REF)
            plain()["components"]["schemas"] |= extra["$defs"]
        return plain()

    app.openapi = openapi  # type: ignore[method-assign]

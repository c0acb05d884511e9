"""Every error as an answer, whoever raised it and whatever protocol the route speaks.

All are `application/problem+json` with the same fields. Routes of the Open Inference Protocol have
`error`, a string, beside them; routes in OpenAI's shape answer by its nested `error` alone.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from medley.errors import MedleyError
from service.errors import EngineError, SyntaxProblemError, problem, problem_fields
from service.intake.forms import field_errors
from service.signals.notes import noted

__all__ = ["PROBLEM_JSON", "answer", "install", "internal_error", "speaks_openai"]

PROBLEM_JSON = "application/problem+json"
_OPENAI_TYPES = {  # what OpenAI's clients call them; others by whose fault it is
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def install(app: FastAPI) -> None:
    """Let `app` answer its errors by these."""
    app.add_exception_handler(MedleyError, _answer)
    app.add_exception_handler(RequestValidationError, _answer)
    app.add_exception_handler(HTTPException, _answer)
    app.add_exception_handler(ClientDisconnect, _ended_early)


def internal_error(request: Request) -> JSONResponse:
    """What the client hears of our own bug: the request's id and nothing else."""
    return answer(request, EngineError("unexpected"))


def answer(request: Request, error: Exception) -> JSONResponse:
    """An error as this request's protocol has it."""
    fields, headers = _fields(error)
    noted().problems[fields["code"]] += 1
    request_id = request.scope["request_id"]
    fields |= {"instance": f"{request.url.path}#{request_id}", "request_id": request_id}
    if "retry_after_s" in fields:
        headers["Retry-After"] = str(fields["retry_after_s"])
    if fields["status"] == HTTPStatus.REQUEST_TIMEOUT:
        headers["Connection"] = "close"  # the rest of the body, if it ever comes, is not read
    if fields["status"] == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if speaks_openai(request.url.path):
        return JSONResponse({"error": _openai(fields)}, fields["status"], headers)
    if _below(request.url.path, "/v2"):
        fields["error"] = fields["detail"]
    return JSONResponse(fields, fields["status"], headers, media_type=PROBLEM_JSON)


def speaks_openai(path: str) -> bool:
    """Whether the route of this path answers in OpenAI's shape."""
    return path == "/v1/embeddings" or _below(path, "/v1/models")


async def _answer(request: Request, error: Exception) -> JSONResponse:
    return answer(request, error)


async def _ended_early(request: Request, error: Exception) -> JSONResponse:
    """Nobody hears this answer, but the metrics count it as the client's."""
    early = SyntaxProblemError("the request ended early", code="request_ended_early")
    return answer(request, early)


def _fields(error: Exception) -> tuple[dict[str, Any], dict[str, str]]:
    if isinstance(error, HTTPException):
        code = HTTPStatus(error.status_code).name.lower()
        fields = problem_fields(error.status_code, code, str(error.detail))
        return fields, dict(error.headers or {})
    if isinstance(error, RequestValidationError):
        return problem(field_errors(error.errors())), {}
    assert isinstance(error, MedleyError)
    return problem(error), {}


def _openai(fields: dict[str, Any]) -> dict[str, Any]:
    status = fields["status"]
    usual = (
        "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    )
    where = fields["errors"][0]["where"] if "errors" in fields else ""
    return {
        "message": fields["detail"],
        "type": _OPENAI_TYPES.get(status, usual),
        "param": where.removeprefix("query.").partition(".")[0] or None,
        "code": fields["code"],
    }


def _below(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}/")

"""Every error as an `application/problem+json` answer, whoever raised it."""

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
from service.intake import field_errors

__all__ = ["PROBLEM_JSON", "install", "internal_error"]

PROBLEM_JSON = "application/problem+json"


def install(app: FastAPI) -> None:
    """Let `app` answer its errors by these."""
    app.add_exception_handler(MedleyError, _medley_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _ended_early)


def internal_error(request: Request) -> JSONResponse:
    """What the client hears of our own bug: the request's id and nothing else."""
    return _response(request, problem(EngineError("unexpected")))


async def _medley_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MedleyError)
    return _response(request, problem(error))


async def _invalid_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _response(request, problem(field_errors(error.errors())))


async def _ended_early(request: Request, error: Exception) -> JSONResponse:
    """Nobody hears this answer, but the metrics count it as the client's."""
    early = SyntaxProblemError("the request ended early", code="request_ended_early")
    return _response(request, problem(early))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).name.lower()
    fields = problem_fields(error.status_code, code, str(error.detail))
    return _response(request, fields, dict(error.headers or {}))


def _response(
    request: Request, fields: dict[str, Any], headers: dict[str, str] | None = None
) -> JSONResponse:
    request_id = request.scope["request_id"]
    fields |= {"instance": f"{request.url.path}#{request_id}", "request_id": request_id}
    headers = headers or {}
    if "retry_after_s" in fields:
        headers["Retry-After"] = str(fields["retry_after_s"])
    if fields["status"] == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(fields, fields["status"], headers, media_type=PROBLEM_JSON)

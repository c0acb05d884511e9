"""`/v1/unified`: the unified models that versions are loaded from."""

from __future__ import annotations

from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse

from service.errors import MediaTypeError
from service.intake.uploads import BYTES, body_of, kind_of
from service.state import CurrentService
from service.versions.unified import UnifiedModel
from service.wire.openapi import PROBLEM_RESPONSES
from service.wire.unified_schemas import UnifiedAnswer, UnifiedModelsAnswer

__all__ = ["routes"]

routes = APIRouter(prefix="/v1/unified", tags=["tasks"], responses=PROBLEM_RESPONSES)
Digest = Annotated[
    str, Path(pattern=r"^sha256:[0-9a-f]{64}$", description="What identifies it: the seal inside")
]
BODY = {
    "requestBody": {
        "required": True,
        "content": {BYTES: {"schema": {"type": "string", "format": "binary"}}},
    }
}
RECEIVED: dict[int | str, dict[str, Any]] = {
    200: {"description": "It was here; its bytes are written anew"},
    201: {"model": UnifiedAnswer},
}


@routes.get("")
async def list_unified(service: CurrentService) -> UnifiedModelsAnswer:
    """All unified models that versions name, or that wait to be named."""
    desired = service.tasks.live.snapshot.desired
    found = await service.unified.all(desired)
    return UnifiedModelsAnswer(
        generation=desired.generation, unified=[_answer(one) for one in found]
    )


@routes.put("/{digest}", openapi_extra=BODY, response_model=UnifiedAnswer, responses=RECEIVED)
async def put_unified(digest: Digest, request: Request, service: CurrentService) -> JSONResponse:
    """Take in a unified model, before the first version that names it is registered.

    Versions that have failed for want of it are tried again.
    """
    if kind_of(request) not in ("", BYTES):
        raise MediaTypeError(f"send the unified model as {BYTES}")
    settings = service.settings
    body = body_of(
        request, max_bytes=settings.max_unified_bytes, timeout_s=settings.upload_timeout_s
    )
    desired = service.tasks.live.snapshot.desired
    received, new = await service.unified.receive(digest, body, desired)
    await service.tasks.retry_from(digest)
    answer = _answer(received).model_dump()
    return JSONResponse(answer, HTTPStatus.CREATED if new else HTTPStatus.OK)


def _answer(model: UnifiedModel) -> UnifiedAnswer:
    return UnifiedAnswer(**asdict(model))

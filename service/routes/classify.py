"""`POST /v1/classify`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.intake.call import call_of, until_gone
from service.intake.forms import read_classification
from service.state import CurrentService
from service.wire.openapi import CLASSIFY_BODY, PROBLEM_RESPONSES
from service.wire.schemas import ClassifyResponse

__all__ = ["routes"]

routes = APIRouter(prefix="/v1", tags=["classify"], responses=PROBLEM_RESPONSES)


@routes.post("/classify", response_model=ClassifyResponse, openapi_extra=CLASSIFY_BODY)
async def classify(request: Request, service: CurrentService) -> Response:
    """Classify images: JSON with base64, multipart with files, or one raw image.

    Options are fields of the JSON, form fields, or query parameters.
    """
    call = call_of(request, service.settings)
    with service.bodies.open(request, call) as bounded:
        intake = await read_classification(bounded, service.settings)
        timed = await until_gone(request, service.classification.classify(intake, call))
    headers = {
        "Server-Timing": call.server_timing(timed.stages_s),
        "X-Registry-Generation": str(timed.response.generation),
    }
    body = timed.response.model_dump_json(exclude_none=True)
    return Response(body, media_type="application/json", headers=headers)

"""`/v2`: the Open Inference Protocol V2 (REST), with Triton's binary and repository extensions.

A model is whatever `/v1/classify` takes as `model`; its input are image files.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from service.answers.oip import Body, answered, asked_of
from service.errors import ConflictError, RequestError, UnavailableError
from service.intake.call import call_of, until_gone
from service.intake.forms import check_counts
from service.intake.json_bodies import read_json
from service.routes.probes import check_live, check_ready
from service.signals.metrics import package_version
from service.state import CurrentService, Service
from service.versions.live import Key, Snapshot
from service.wire.openapi import V2_RESPONSES, json_body
from service.wire.v2_schemas import (
    INPUTS,
    OUTPUTS,
    IndexEntry,
    IndexRequest,
    InferRequest,
    InferResponse,
    LoadRequest,
    ModelMetadata,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
    UnloadRequest,
)

__all__ = ["routes"]

routes = APIRouter(prefix="/v2", tags=["open inference protocol"], responses=V2_RESPONSES)
EXTENSIONS = ["binary_tensor_data", "model_repository", "parameters"]
JSON_SIZE = "Inference-Header-Content-Length"
OWN = ("auto", "base")  # models that are no task


@routes.get("")
async def server_metadata() -> ServerMetadata:
    """What server this is."""
    return ServerMetadata(name="medley", version=package_version(), extensions=EXTENSIONS)


@routes.get("/health/live")
async def server_live(request: Request) -> ServerLive:
    """As `/livez`."""
    check_live(request.app)
    return ServerLive(live=True)


@routes.get("/health/ready")
async def server_ready(request: Request) -> ServerReady:
    """As `/readyz`; a version that failed after the start does not count."""
    check_ready(request.app)
    return ServerReady(ready=True, live=True)


@routes.get("/models/{model}", response_model_exclude_none=True)
async def model_metadata(model: str, service: CurrentService) -> ModelMetadata:
    """What a model takes and gives, and which versions it has."""
    return _metadata(service.tasks.live.snapshot, model, model)


@routes.get("/models/{model}/versions/{version}", response_model_exclude_none=True)
async def version_metadata(model: str, version: str, service: CurrentService) -> ModelMetadata:
    """What one version takes and gives; all of a model do the same."""
    return _metadata(service.tasks.live.snapshot, model, f"{model}@{version}")


@routes.get("/models/{model}/ready")
async def model_ready(model: str, service: CurrentService) -> ModelReady:
    """Whether a model can be asked; 503 if this server could not load it."""
    return _ready(service.tasks.live.snapshot, model, model)


@routes.get("/models/{model}/versions/{version}/ready")
async def version_ready(model: str, version: str, service: CurrentService) -> ModelReady:
    """Whether one version can be asked; 503 if this server could not load it."""
    return _ready(service.tasks.live.snapshot, model, f"{model}@{version}")


@routes.post(
    "/models/{model}/infer", response_model=InferResponse, openapi_extra=json_body(InferRequest)
)
async def infer(model: str, request: Request, service: CurrentService) -> Response:
    """Classify images; labels and templates may be among the request's parameters.

    The protocol knows no error of one image: one that cannot be used fails the request.
    """
    return await _infer(model, model, request, service)


@routes.post(
    "/models/{model}/versions/{version}/infer",
    response_model=InferResponse,
    openapi_extra=json_body(InferRequest),
)
async def infer_by_version(
    model: str, version: str, request: Request, service: CurrentService
) -> Response:
    """Classify images by one version of a task."""
    return await _infer(model, f"{model}@{version}", request, service)


@routes.post(
    "/repository/index",
    response_model=list[IndexEntry],
    openapi_extra=json_body(IndexRequest, required=False),
)
async def repository_index(request: Request, service: CurrentService) -> Response:
    """All versions of all tasks; READY is what is on the device."""
    asked = await read_json(IndexRequest, request, service, empty=b"{}")
    snapshot = service.tasks.live.snapshot
    entries = [IndexEntry(name=name, state="READY") for name in OWN]
    entries += [_entry(snapshot, key) for key in snapshot.desired.records]
    listed = [
        e.model_dump(exclude_none=True) for e in entries if e.state == "READY" or not asked.ready
    ]
    return JSONResponse(listed)


@routes.post(
    "/repository/models/{model}/load", openapi_extra=json_body(LoadRequest, required=False)
)
async def load(model: str, request: Request, service: CurrentService) -> dict[str, str]:
    """Bring a registered version to the device; also one that failed before."""
    await read_json(LoadRequest, request, service, empty=b"{}")
    key = service.tasks.live.snapshot.key_of(model)
    if key is not None:
        await service.residency.bring(key, again=True)
    return {}


@routes.post(
    "/repository/models/{model}/unload", openapi_extra=json_body(UnloadRequest, required=False)
)
async def unload(model: str, request: Request, service: CurrentService) -> dict[str, str]:
    """Take a version off the device; its file stays, and a request for it brings it back.

    A version that is live, pinned or named by an alias stays: 409.
    """
    await read_json(UnloadRequest, request, service, empty=b"{}")
    snapshot = service.tasks.live.snapshot
    key = snapshot.key_of(model)
    if key is None:
        raise ConflictError(f"{model} is always there", code="version_in_use")
    service.residency.unload(key)
    return {}


def _metadata(snapshot: Snapshot, model: str, selector: str) -> ModelMetadata:
    key = snapshot.key_of(selector)
    versions = [record.version for record in snapshot.desired.tasks[key[0]]] if key else None
    return ModelMetadata(
        name=model,
        versions=versions,
        platform="medley_bundle" if key else "medley_backbone",
        inputs=INPUTS,
        outputs=OUTPUTS,
    )


def _ready(snapshot: Snapshot, model: str, selector: str) -> ModelReady:
    key = snapshot.key_of(selector)
    if key in snapshot.failed:
        raise UnavailableError(f"{'@'.join(key)} could not be loaded", code="version_failed")
    return ModelReady(name=model, ready=True)


async def _infer(model: str, selector: str, request: Request, service: Service) -> Response:
    call = call_of(request, service.settings)
    with service.bodies.open(request, call) as bounded:
        body = Body(await bounded.body(), _json_bytes(request))
        asked = asked_of(body, model, selector)
        check_counts(asked.intake, service.settings)
        timed = await until_gone(request, service.classification.classify(asked.intake, call))
    answer = answered(asked, timed.response)
    headers = {"Server-Timing": call.server_timing(timed.stages_s)}
    if answer.json_bytes is None:
        return Response(answer.content, media_type="application/json", headers=headers)
    headers[JSON_SIZE] = str(answer.json_bytes)
    return Response(answer.content, media_type="application/octet-stream", headers=headers)


def _entry(snapshot: Snapshot, key: Key) -> IndexEntry:
    task, version = key
    if key in snapshot.failed:
        return IndexEntry(
            name=task, version=version, state="UNAVAILABLE", reason=snapshot.failed[key]
        )
    tier = snapshot.tier(key)
    if tier == "device":
        return IndexEntry(name=task, version=version, state="READY")
    reason = f"on {tier}; a request brings it back"
    return IndexEntry(name=task, version=version, state="UNAVAILABLE", reason=reason)


def _json_bytes(request: Request) -> int | None:
    """How much of the body is JSON, if not all of it."""
    value = request.headers.get(JSON_SIZE)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= 12):
        raise RequestError(f"{JSON_SIZE} must be a number of bytes")
    return int(value)

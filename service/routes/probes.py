"""`/startupz`, `/livez`, `/readyz` and `/metrics`: cheap, and the first three without a key.

Three truths: it has started; it should not be killed; traffic should come here.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.errors import UnavailableError
from service.lifecycle import Lifecycle
from service.replicas.board import Phase
from service.state import CurrentService, Service, service_of

__all__ = ["check_live", "check_ready", "phase_of", "routes"]

routes = APIRouter(tags=["probes"])
BEATS = 3  # an engine may miss two heartbeats and still be ready
LAST_BEATS = 30  # one without any success for so long will not recover by itself
STALLED_S = 30.0  # no image waits this long while the engine works
_PHASES: dict[str, Phase] = {"starting": "starting", "draining": "draining"}  # by code


@routes.get("/startupz")
async def startupz(service: CurrentService) -> dict[str, bool]:
    """Whether the server has started; until then 503 with the step it is at."""
    return {"started": True}


@routes.get("/livez")
async def livez(request: Request) -> dict[str, bool]:
    """Whether the process should go on: 503 if only a new one can help."""
    check_live(request.app)
    return {"live": True}


@routes.get("/readyz")
async def readyz(request: Request) -> JSONResponse:
    """Whether traffic should come here; 503 without a recent forward that succeeded."""
    check_ready(request.app)
    service = service_of(request)
    snapshot = service.tasks.live.snapshot
    state: dict[str, Any] = {
        "ready": True,
        "generation": snapshot.desired.generation,
        "backbone": service.backbone.name,
        "fingerprint": service.backbone.fingerprint,
        "last_forward_age_s": round(service.engine.last_success_age_s(), 3),
        "live_tasks": len(snapshot.live),
        "failed_versions": [f"{task}@{version}" for task, version in snapshot.failed],
    }
    return JSONResponse(state)


@routes.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    registry = request.app.state.metrics.registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def check_live(app: FastAPI) -> None:
    """Let a server live that starts, leaves, or has a forward succeed now and then.

    Raises:
        UnavailableError: its engine is dead, or as good as dead.
    """
    service: Service | None = app.state.service
    if service is None:
        return
    engine, heartbeat_s = service.engine, service.settings.heartbeat_s
    if not engine.alive or engine.last_success_age_s() > LAST_BEATS * heartbeat_s:
        raise UnavailableError("the engine is dead", code="engine_dead")


def check_ready(app: FastAPI) -> None:
    """Let traffic come to a server that has started, stays, and computes.

    Raises:
        UnavailableError: it should go elsewhere.
    """
    lifecycle: Lifecycle = app.state.lifecycle
    service: Service | None = app.state.service
    if lifecycle.draining:
        raise UnavailableError("the server is shutting down", code="draining")
    if service is None:
        raise UnavailableError(f"the server is starting: {lifecycle.step}", code="starting")
    engine = service.engine
    stale = engine.last_success_age_s() > BEATS * service.settings.heartbeat_s
    if stale or engine.oldest_wait_s() > STALLED_S or not engine.alive:
        raise UnavailableError("no forward has succeeded lately", code="not_ready")


def phase_of(app: FastAPI) -> Phase:
    """The same as a word."""
    try:
        check_ready(app)
    except UnavailableError as error:
        return _PHASES.get(error.code, "not_ready")
    return "ready"

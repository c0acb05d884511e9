"""`/livez`, `/readyz` and `/metrics`: cheap, without a key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.errors import UnavailableError
from service.state import CurrentService

__all__ = ["routes"]

routes = APIRouter(tags=["probes"])
BEATS = 3  # an engine may miss two heartbeats
STALLED_S = 30.0  # no image waits this long while the engine works


@routes.get("/livez")
async def livez(service: CurrentService) -> dict[str, bool]:
    """Whether the process should go on; 503 when its engine's thread has died."""
    if not service.engine.alive:
        raise UnavailableError("the engine's thread has died", code="engine_dead")
    return {"live": True}


@routes.get("/readyz")
async def readyz(service: CurrentService) -> JSONResponse:
    """Whether traffic should come here; 503 without a recent forward that succeeded."""
    engine = service.engine
    age_s = engine.last_success_age_s()
    stale = age_s > BEATS * service.settings.heartbeat_s
    if stale or engine.oldest_wait_s() > STALLED_S or not engine.alive:
        raise UnavailableError("no forward has succeeded lately", code="not_ready")
    snapshot = service.tasks.live.snapshot
    state: dict[str, Any] = {
        "ready": True,
        "generation": snapshot.desired.generation,
        "backbone": service.backbone.name,
        "fingerprint": service.backbone.fingerprint,
        "last_forward_age_s": round(age_s, 3),
        "live_tasks": len(snapshot.live),
        "failed_versions": [f"{task}@{version}" for task, version in snapshot.failed],
    }
    return JSONResponse(state)


@routes.get("/metrics")
async def metrics(service: CurrentService) -> Response:
    """Prometheus text."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

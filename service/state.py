"""What the routes work with: made when the app starts, handed to each route by `service_of`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from medley.backbone import Backbone
from service.bodies import Bodies
from service.classification import Classification
from service.engine import Engine
from service.errors import UnavailableError
from service.inference import Inference
from service.labels import LabelCache
from service.metrics import Metrics
from service.reservoir import Reservoir
from service.residency import Residency
from service.rollouts import Rollouts
from service.settings import Settings
from service.signals import Signals
from service.tasks import Tasks

__all__ = ["CurrentService", "Service", "service_of"]


@dataclass(frozen=True)
class Service:
    """One running server."""

    settings: Settings
    backbone: Backbone
    engine: Engine
    tasks: Tasks
    residency: Residency
    labels: LabelCache
    bodies: Bodies
    inference: Inference
    rollouts: Rollouts
    classification: Classification
    signals: Signals
    reservoir: Reservoir
    metrics: Metrics


def service_of(request: Request) -> Service:
    """The server that this request came to.

    Raises:
        UnavailableError: it is still starting.
    """
    service: Service | None = request.app.state.service
    if service is None:
        step = request.app.state.lifecycle.step
        raise UnavailableError(f"the server is starting: {step}", code="starting")
    return service


async def _current(request: Request) -> Service:
    """A coroutine, as FastAPI sends plain functions to a thread and back (0.2 ms, 2026-11)."""
    return service_of(request)


CurrentService = Annotated[Service, Depends(_current)]

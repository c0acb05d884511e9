"""What the routes work with: made when the app starts, handed to each route by `service_of`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from medley.backbone import Backbone
from service.answers.classification import Classification
from service.answers.engine import Engine
from service.answers.inference import Inference
from service.answers.labels import LabelCache
from service.answers.planning import Policy
from service.answers.rollouts import Rollouts
from service.errors import UnavailableError
from service.intake.bodies import Bodies
from service.replicas.board import Board
from service.replicas.follower import Follower
from service.replicas.heartbeat import Heartbeat
from service.replicas.quorum import Quorum
from service.replicas.told import ToldOperations
from service.settings import Settings
from service.signals.metrics import Metrics
from service.signals.reservoir import Reservoir
from service.signals.signals import Signals
from service.versions.residency import Residency
from service.versions.tasks import Tasks
from service.versions.unified import UnifiedModels

__all__ = ["CurrentService", "Service", "service_of"]


@dataclass(frozen=True)
class Service:
    """One running server."""

    settings: Settings
    backbone: Backbone
    engine: Engine
    tasks: Tasks
    unified: UnifiedModels
    residency: Residency
    follower: Follower
    board: Board
    heartbeat: Heartbeat
    quorum: Quorum
    told: ToldOperations
    labels: LabelCache
    policy: Policy
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

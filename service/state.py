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
from service.residency import Residency
from service.settings import Settings
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
    classification: Classification
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


CurrentService = Annotated[Service, Depends(service_of)]

"""`/v1/models`: what a request may name as its model, as OpenAI's clients ask for it."""

from __future__ import annotations

from datetime import datetime

from fastapi import APIRouter

from service.registry.desired import VersionRecord
from service.state import CurrentService, Service
from service.wire.openai_schemas import ModelAnswer, ModelsAnswer
from service.wire.openapi import OPENAI_RESPONSES

__all__ = ["routes"]

routes = APIRouter(prefix="/v1/models", tags=["models"], responses=OPENAI_RESPONSES)


@routes.get("")
async def list_models(service: CurrentService) -> ModelsAnswer:
    """`auto`, `base` and every live task."""
    live = service.tasks.live.snapshot.live
    tasks = [_task(name, resident.record) for name, resident in live.items()]
    return ModelsAnswer(data=[_own("auto", service), _own("base", service), *tasks])


@routes.get("/{model}")
async def get_model(model: str, service: CurrentService) -> ModelAnswer:
    """Whatever a request may name; a version or an alias too, which the list leaves out."""
    snapshot = service.tasks.live.snapshot
    key = snapshot.key_of(model)
    return _own(model, service) if key is None else _task(model, snapshot.desired.records[key])


def _own(name: str, service: Service) -> ModelAnswer:
    return ModelAnswer(id=name, created=0, root=service.backbone.fingerprint)


def _task(name: str, record: VersionRecord) -> ModelAnswer:
    created = int(datetime.fromisoformat(record.created_at).timestamp())
    return ModelAnswer(id=name, created=created, parent="base", root=record.digest)

"""`/v1/tasks`: what is served, and every change of it."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, Response

from service.errors import NotFoundError
from service.live import Snapshot
from service.openapi import PROBLEM_RESPONSES
from service.registry import VersionRecord
from service.schemas import LiveRequest, TaskAnswer, TasksAnswer, VersionAnswer
from service.state import CurrentService, may_change

__all__ = ["routes"]

routes = APIRouter(prefix="/v1/tasks", tags=["tasks"], responses=PROBLEM_RESPONSES)
changes = [Depends(may_change)]
BUNDLE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@routes.get("")
async def list_tasks(service: CurrentService) -> TasksAnswer:
    """All tasks with their versions."""
    snapshot = service.tasks.live.snapshot
    tasks = [_task(snapshot, task) for task in snapshot.desired.tasks]
    return TasksAnswer(generation=snapshot.desired.generation, tasks=tasks)


@routes.get("/{task}")
async def get_task(task: str, service: CurrentService) -> TaskAnswer:
    """One task."""
    return _task(service.tasks.live.snapshot, task)


@routes.put(
    "/{task}/versions/{version}",
    dependencies=changes,
    openapi_extra=BUNDLE_BODY,
    responses={200: {"description": "That very bundle was there"}, 201: {"model": TaskAnswer}},
)
async def register(
    task: str,
    version: str,
    request: Request,
    response: Response,
    service: CurrentService,
    activate: bool = True,
) -> TaskAnswer:
    """Take in a bundle (the raw body) as a version, prove it on the device, make it live."""
    registered = await service.tasks.register(task, version, request.stream(), activate=activate)
    response.status_code = 201 if registered.created else 200
    return _task(service.tasks.live.snapshot, task)


@routes.put("/{task}/live", dependencies=changes)
async def set_live(task: str, wanted: LiveRequest, service: CurrentService) -> TaskAnswer:
    """Make a registered version live."""
    await service.tasks.activate(task, wanted.version)
    return _task(service.tasks.live.snapshot, task)


@routes.post("/{task}:rollback", dependencies=changes)
async def rollback(task: str, service: CurrentService) -> TaskAnswer:
    """Make the version live that was live before."""
    await service.tasks.rollback(task)
    return _task(service.tasks.live.snapshot, task)


@routes.delete("/{task}/versions/{version}", dependencies=changes, status_code=204)
async def delete_version(task: str, version: str, service: CurrentService) -> None:
    """Remove a version that is not live."""
    await service.tasks.delete_version(task, version)


@routes.delete("/{task}", dependencies=changes, status_code=204)
async def delete_task(task: str, service: CurrentService) -> None:
    """Remove a task with all its versions."""
    await service.tasks.delete_task(task)


def _task(snapshot: Snapshot, task: str) -> TaskAnswer:
    records = snapshot.desired.tasks.get(task)
    if records is None:
        raise NotFoundError(f"no task {task}")
    live = snapshot.live.get(task)
    return TaskAnswer(
        task=task,
        live=snapshot.desired.live.get(task),
        versions=[_version(snapshot, record) for record in records],
        class_names=list(live.own.names) if live else [],
        templates=list(live.templates) if live else [],
        generation=snapshot.desired.generation,
    )


def _version(snapshot: Snapshot, record: VersionRecord) -> VersionAnswer:
    reason = snapshot.failed.get((record.task, record.version))
    is_live = snapshot.desired.live.get(record.task) == record.version
    return VersionAnswer(
        version=record.version,
        digest=record.digest,
        created_at=record.created_at,
        state="failed" if reason is not None else "live" if is_live else "ready",
        reason=reason,
    )

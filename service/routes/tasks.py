"""`/v1/tasks`: what is served, and every change of it."""

from __future__ import annotations

from dataclasses import replace
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse

from service.errors import MediaTypeError, NotFoundError
from service.intake.forms import checked
from service.intake.uploads import BYTES, JSON, body_of, kind_of
from service.registry.desired import VersionRecord
from service.replicas.quorum import Reached, read_wanted
from service.routes.operations import answer_of
from service.settings import Settings
from service.state import CurrentService, Service
from service.versions.live import Key, Snapshot
from service.versions.operations import Started
from service.versions.tasks import Registered, Then, Wanted
from service.wire import etags
from service.wire.etags import IfMatchHeader
from service.wire.openapi import PROBLEM_RESPONSES
from service.wire.replica_schemas import ReachedAnswer
from service.wire.task_schemas import (
    AliasName,
    ChangeAnswer,
    OperationAnswer,
    RegistrationAnswer,
    SourceRequest,
    TaskAnswer,
    TasksAnswer,
    VersionAnswer,
    VersionRequest,
)

__all__ = ["routes"]

routes = APIRouter(prefix="/v1/tasks", tags=["tasks"], responses=PROBLEM_RESPONSES)
Responses = dict[int | str, dict[str, Any]]
MAX_JSON_BYTES = 64 * 1024
VERSION_BODY = {
    "requestBody": {
        "required": True,
        "content": {JSON: {"schema": VersionRequest.model_json_schema()}},
    }
}
BUNDLE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            BYTES: {"schema": {"type": "string", "format": "binary"}},
            JSON: {"schema": SourceRequest.model_json_schema()},
        },
    }
}
REGISTRATIONS: Responses = {
    200: {"description": "That very bundle was there"},
    201: {"model": RegistrationAnswer},
    202: {
        "model": OperationAnswer,
        "description": "It takes longer; `Location` says where to ask what became of it",
    },
}
UNCHANGED: Responses = {304: {"description": "The client has this already"}}
NOT_YET: Responses = {
    202: {
        "model": ChangeAnswer,
        "description": "It is made, and fewer replicas have it than were wanted",
    }
}
QUORUM_S = 60.0  # longest wait of an operation for other replicas
WaitQuery = Annotated[
    float, Query(ge=0, le=600, description="Seconds to wait for the end; then 202")
]
ReplicasQuery = Annotated[
    str | None,
    Query(description="How many replicas have to have it: all, majority, or a number"),
]
IfNoneMatchHeader = Annotated[str | None, Header(description="ETags that the client has")]


@routes.get("", response_model=TasksAnswer, responses=UNCHANGED)
async def list_tasks(service: CurrentService, if_none_match: IfNoneMatchHeader = None) -> Response:
    """All tasks with their versions."""
    snapshot = service.tasks.live.snapshot
    generation = snapshot.desired.generation
    tasks = [_task(snapshot, task) for task in snapshot.desired.tasks]
    return _tagged(TasksAnswer(generation=generation, tasks=tasks), generation, if_none_match)


@routes.get("/{task}", response_model=TaskAnswer, responses=UNCHANGED)
async def get_task(
    task: str, service: CurrentService, if_none_match: IfNoneMatchHeader = None
) -> Response:
    """One task; its ETag is what a change may ask for in If-Match."""
    answer = _task(service.tasks.live.snapshot, task)
    return _tagged(answer, answer.changed, if_none_match)


@routes.put(
    "/{task}/versions/{version}",
    openapi_extra=BUNDLE_BODY,
    response_model=RegistrationAnswer,
    responses=REGISTRATIONS,
)
async def register(
    task: str,
    version: str,
    request: Request,
    service: CurrentService,
    activate: Annotated[bool, Query(description="Make it live as well")] = True,
    wait: WaitQuery = 30.0,
    replicas: ReplicasQuery = None,
    if_match: IfMatchHeader = None,
    if_none_match: Annotated[
        str | None, Header(description="*: only if this version is not there, with no digest")
    ] = None,
) -> Response:
    """Take in a bundle as a version, prove it on the device, make it live.

    The bundle is the raw body, or JSON says where it is, if this server fetches bundles at all.
    """
    wanted = Wanted(
        task, version, activate, etags.if_match(if_match), etags.only_new(if_none_match)
    )
    spread = await _quorum(service, replicas)
    started = await _start(wanted, request, service, spread)
    registered = await started.result(wait)
    if registered is None or not (registered.reached is None or registered.reached.enough):
        return await _accepted(service, started)
    answer = RegistrationAnswer(
        **_task(registered.snapshot, task).model_dump(),
        warnings=list(registered.warnings),
        replicas=_reached(registered.reached),
    )
    status = HTTPStatus.CREATED if registered.created else HTTPStatus.OK
    return _answer(answer, answer.changed, status)


@routes.delete("/{task}/versions/{version}", status_code=204)
async def delete_version(
    task: str, version: str, service: CurrentService, if_match: IfMatchHeader = None
) -> None:
    """Remove a version that no alias names."""
    await service.tasks.delete_version(task, version, if_match=etags.if_match(if_match))


@routes.put("/{task}/versions/{version}/pin", response_model=TaskAnswer)
async def pin(
    task: str, version: str, service: CurrentService, if_match: IfMatchHeader = None
) -> Response:
    """Keep a version on the device, whatever else wants its place."""
    snapshot = await service.tasks.set_pinned(
        task, version, True, if_match=etags.if_match(if_match)
    )
    return _changed(snapshot, task)


@routes.delete("/{task}/versions/{version}/pin", response_model=TaskAnswer)
async def unpin(
    task: str, version: str, service: CurrentService, if_match: IfMatchHeader = None
) -> Response:
    """Let a version be evicted again when its place is needed."""
    snapshot = await service.tasks.set_pinned(
        task, version, False, if_match=etags.if_match(if_match)
    )
    return _changed(snapshot, task)


@routes.put(
    "/{task}/aliases/{alias}",
    openapi_extra=VERSION_BODY,
    response_model=ChangeAnswer,
    responses=NOT_YET,
)
async def set_alias(
    task: str,
    alias: AliasName,
    request: Request,
    service: CurrentService,
    wait: WaitQuery = 30.0,
    replicas: ReplicasQuery = None,
    if_match: IfMatchHeader = None,
) -> Response:
    """Let an alias name a registered version; the alias `live` makes it live."""
    if kind_of(request) != JSON:
        raise MediaTypeError(f"send the version as {JSON}")
    wanted = checked(VersionRequest, await _json(request, service.settings))
    spread = await _quorum(service, replicas)
    snapshot = await service.tasks.set_alias(
        task, alias, wanted.version, if_match=etags.if_match(if_match)
    )
    return await _spread(service, snapshot, (task, wanted.version), spread, wait)


@routes.delete("/{task}/aliases/{alias}", response_model=TaskAnswer)
async def delete_alias(
    task: str, alias: AliasName, service: CurrentService, if_match: IfMatchHeader = None
) -> Response:
    """Forget an alias; without `live` a task answers only those who name a version."""
    snapshot = await service.tasks.delete_alias(task, alias, if_match=etags.if_match(if_match))
    return _changed(snapshot, task)


@routes.post("/{task}:rollback", response_model=ChangeAnswer, responses=NOT_YET)
async def rollback(
    task: str,
    service: CurrentService,
    wait: WaitQuery = 30.0,
    replicas: ReplicasQuery = None,
    if_match: IfMatchHeader = None,
) -> Response:
    """Make the version live that was live before."""
    spread = await _quorum(service, replicas)
    snapshot = await service.tasks.rollback(task, if_match=etags.if_match(if_match))
    return await _spread(service, snapshot, snapshot.key(task), spread, wait)


@routes.delete("/{task}", status_code=204)
async def delete_task(task: str, service: CurrentService, if_match: IfMatchHeader = None) -> None:
    """Remove a task with all its versions."""
    await service.tasks.delete_task(task, if_match=etags.if_match(if_match))


async def _quorum(service: Service, replicas: str | None) -> int | None:
    """How many replicas were asked for by `replicas`, before anything changes."""
    return None if replicas is None else await service.quorum.needed(read_wanted(replicas))


async def _spread(
    service: Service, snapshot: Snapshot, key: Key, needed: int | None, wait_s: float
) -> Response:
    """The answer to a change, when enough replicas have it or the time is over."""
    answer = ChangeAnswer(**_task(snapshot, key[0]).model_dump())
    if needed is None:
        return _answer(answer, answer.changed)
    generation = snapshot.desired.generation
    reached = await service.quorum.wait(
        needed, "@".join(key), generation=generation, timeout_s=wait_s
    )
    answer.replicas = _reached(reached)
    status = HTTPStatus.OK if reached.enough else HTTPStatus.ACCEPTED
    return _answer(answer, answer.changed, status)


def _then(service: Service, needed: int | None) -> Then:
    """What is left of a registration once this replica serves it."""

    async def then(registered: Registered) -> Registered:
        if needed is None:
            return registered
        record, generation = registered.record, registered.snapshot.desired.generation
        version = f"{record.task}@{record.version}"
        reached = await service.quorum.wait(
            needed, version, generation=generation, timeout_s=QUORUM_S
        )
        warnings = registered.warnings
        if not reached.enough:
            warnings += (f"{reached.reached} replicas have it, {reached.wanted} were wanted",)
        return replace(registered, reached=reached, warnings=warnings)

    return then


def _reached(reached: Reached | None) -> ReachedAnswer | None:
    if reached is None:
        return None
    return ReachedAnswer.model_validate(reached, from_attributes=True)


async def _start(
    wanted: Wanted, request: Request, service: Service, spread: int | None
) -> Started[Registered]:
    kind, settings, then = kind_of(request), service.settings, _then(service, spread)
    if kind == JSON:
        asked = checked(SourceRequest, await _json(request, settings))
        return await service.tasks.fetch(wanted, asked.source, then=then)
    if kind not in ("", BYTES):
        raise MediaTypeError(f"send the bundle as {BYTES}, or its source as {JSON}")
    body = body_of(
        request, max_bytes=settings.max_bundle_bytes, timeout_s=settings.upload_timeout_s
    )
    return await service.tasks.receive(wanted, body, then=then)


async def _json(request: Request, settings: Settings) -> bytes:
    body = body_of(request, max_bytes=MAX_JSON_BYTES, timeout_s=settings.upload_timeout_s)
    return b"".join([chunk async for chunk in body])


async def _accepted(service: Service, started: Started[Registered]) -> Response:
    operation = answer_of(await service.told.tell(started.id))
    where = {"Location": f"/v1/operations/{started.id}"}
    return JSONResponse(operation.model_dump(mode="json"), HTTPStatus.ACCEPTED, where)


def _changed(snapshot: Snapshot, task: str) -> Response:
    answer = _task(snapshot, task)
    return _answer(answer, answer.changed)


def _tagged(answer: TaskAnswer | TasksAnswer, generation: int, known: str | None) -> Response:
    if etags.is_same(known, generation):
        headers = {"ETag": etags.etag(generation)}
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return _answer(answer, generation)


def _answer(
    answer: TaskAnswer | TasksAnswer, generation: int, status: HTTPStatus = HTTPStatus.OK
) -> Response:
    headers = {"ETag": etags.etag(generation)}
    not_asked = {"replicas"} if getattr(answer, "replicas", None) is None else set()
    return JSONResponse(answer.model_dump(mode="json", exclude=not_asked), status, headers)


def _task(snapshot: Snapshot, task: str) -> TaskAnswer:
    desired = snapshot.desired
    if task not in desired.tasks:
        raise NotFoundError(f"no task {task}", code="unknown_task")
    live = snapshot.live.get(task)
    return TaskAnswer(
        task=task,
        live=desired.live.get(task),
        aliases=desired.aliases.get(task, {}),
        versions=[_version(snapshot, record) for record in desired.tasks[task]],
        class_names=list(live.own.names) if live else [],
        templates=list(live.templates) if live else [],
        changed=desired.changed[task],
        generation=desired.generation,
    )


def _version(snapshot: Snapshot, record: VersionRecord) -> VersionAnswer:
    desired, key = snapshot.desired, (record.task, record.version)
    names = desired.aliases.get(record.task, {})
    reason = snapshot.failed.get(key)
    is_live = desired.live.get(record.task) == record.version
    return VersionAnswer(
        version=record.version,
        digest=record.digest,
        created_at=record.created_at,
        state="failed" if reason is not None else "live" if is_live else "ready",
        reason=reason,
        tier=snapshot.tier(key),
        pinned=key in desired.pinned,
        aliases=[alias for alias, version in names.items() if version == record.version],
        size_bytes=record.size_bytes,
        method=record.method,
        unified=record.unified or None,
    )

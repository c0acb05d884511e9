"""`/v1/tasks`: what is served, and every change of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse

from service.errors import MediaTypeError, NotFoundError, PayloadError, RequestTimeoutError
from service.intake.forms import checked
from service.routes.operations import answer_of
from service.settings import Settings
from service.state import CurrentService, Service
from service.versions.desired import VersionRecord
from service.versions.live import Snapshot
from service.versions.operations import Started
from service.versions.tasks import Registered, Wanted
from service.wire import etags
from service.wire.etags import IfMatchHeader
from service.wire.openapi import PROBLEM_RESPONSES
from service.wire.task_schemas import (
    AliasName,
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
_JSON, _BYTES = "application/json", "application/octet-stream"
VERSION_BODY = {
    "requestBody": {
        "required": True,
        "content": {_JSON: {"schema": VersionRequest.model_json_schema()}},
    }
}
BUNDLE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            _BYTES: {"schema": {"type": "string", "format": "binary"}},
            _JSON: {"schema": SourceRequest.model_json_schema()},
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
    wait: Annotated[
        float, Query(ge=0, le=600, description="Seconds to wait for the end; then 202")
    ] = 30.0,
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
    started = await _start(wanted, request, service)
    registered = await started.result(wait)
    if registered is None:
        return _accepted(service, started)
    answer = RegistrationAnswer(
        **_task(registered.snapshot, task).model_dump(), warnings=list(registered.warnings)
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


@routes.put("/{task}/aliases/{alias}", openapi_extra=VERSION_BODY, response_model=TaskAnswer)
async def set_alias(
    task: str,
    alias: AliasName,
    request: Request,
    service: CurrentService,
    if_match: IfMatchHeader = None,
) -> Response:
    """Let an alias name a registered version; the alias `live` makes it live."""
    if _kind(request) != _JSON:
        raise MediaTypeError(f"send the version as {_JSON}")
    wanted = checked(VersionRequest, await _json(request, service.settings))
    snapshot = await service.tasks.set_alias(
        task, alias, wanted.version, if_match=etags.if_match(if_match)
    )
    return _changed(snapshot, task)


@routes.delete("/{task}/aliases/{alias}", response_model=TaskAnswer)
async def delete_alias(
    task: str, alias: AliasName, service: CurrentService, if_match: IfMatchHeader = None
) -> Response:
    """Forget an alias; without `live` a task answers only those who name a version."""
    snapshot = await service.tasks.delete_alias(task, alias, if_match=etags.if_match(if_match))
    return _changed(snapshot, task)


@routes.post("/{task}:rollback", response_model=TaskAnswer)
async def rollback(task: str, service: CurrentService, if_match: IfMatchHeader = None) -> Response:
    """Make the version live that was live before."""
    snapshot = await service.tasks.rollback(task, if_match=etags.if_match(if_match))
    return _changed(snapshot, task)


@routes.delete("/{task}", status_code=204)
async def delete_task(task: str, service: CurrentService, if_match: IfMatchHeader = None) -> None:
    """Remove a task with all its versions."""
    await service.tasks.delete_task(task, if_match=etags.if_match(if_match))


async def _start(wanted: Wanted, request: Request, service: Service) -> Started[Registered]:
    kind, settings = _kind(request), service.settings
    if kind == _JSON:
        asked = checked(SourceRequest, await _json(request, settings))
        return await service.tasks.fetch(wanted, asked.source)
    if kind not in ("", _BYTES):
        raise MediaTypeError(f"send the bundle as {_BYTES}, or its source as {_JSON}")
    return await service.tasks.receive(wanted, _body(request, settings.max_bundle_bytes, settings))


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _json(request: Request, settings: Settings) -> bytes:
    return b"".join([chunk async for chunk in _body(request, MAX_JSON_BYTES, settings)])


async def _body(request: Request, max_bytes: int, settings: Settings) -> AsyncIterator[bytes]:
    """The request's body as it arrives; a length that is declared too large ends it unread."""
    too_large = PayloadError(f"the body is larger than {max_bytes} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    end_s = asyncio.get_running_loop().time() + settings.upload_timeout_s
    stream, seen = request.stream(), 0
    while True:
        try:
            async with asyncio.timeout_at(end_s):
                chunk = await anext(stream, None)
        except TimeoutError as error:
            raise RequestTimeoutError(
                f"the body did not arrive within {settings.upload_timeout_s:g} s"
            ) from error
        if chunk is None:
            return
        seen += len(chunk)
        if seen > max_bytes:
            raise too_large
        yield chunk


def _accepted(service: Service, started: Started[Registered]) -> Response:
    operation = answer_of(service.tasks.operations.get(started.id))
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
    return JSONResponse(answer.model_dump(mode="json"), status, headers)


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
    )

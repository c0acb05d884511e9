"""`/v1/tasks/{task}/rollout`: a candidate version beside the live one."""

from __future__ import annotations

import uuid
from contextlib import suppress

from fastapi import APIRouter, Request, Response

from service.answers.rollouts import Rollouts
from service.errors import ConflictError, NotFoundError, PreconditionError
from service.intake.json_bodies import read_json
from service.registry.desired import LIVE, IfMatch
from service.state import CurrentService
from service.versions.live import Snapshot
from service.wire import etags
from service.wire.etags import IfMatchHeader
from service.wire.openapi import PROBLEM_RESPONSES, json_body
from service.wire.rollout_schemas import Rollout, RolloutAnswer, RolloutRecord, read_record

__all__ = ["routes"]

routes = APIRouter(prefix="/v1/tasks", tags=["rollouts"], responses=PROBLEM_RESPONSES)


@routes.get("/{task}/rollout")
async def get_rollout(task: str, service: CurrentService, response: Response) -> RolloutAnswer:
    """How the task's rollout stands; the counts are this server's own."""
    snapshot = service.tasks.live.snapshot
    return _answer(snapshot, task, service.rollouts, response)


@routes.put("/{task}/rollout", openapi_extra=json_body(Rollout))
async def start(
    task: str,
    request: Request,
    service: CurrentService,
    response: Response,
    if_match: IfMatchHeader = None,
) -> RolloutAnswer:
    """Try a registered version on a share of the live version's images, in place of any other."""
    wanted = await read_json(Rollout, request, service)
    await service.tasks.catch_up()
    snapshot = service.tasks.live.snapshot
    key = snapshot.key(task, wanted.version)
    if key[1] != wanted.version:
        raise NotFoundError(f"{task} has no version {wanted.version}", code="unknown_version")
    if snapshot.key(task)[1] == wanted.version:
        raise ConflictError(f"{task}@{wanted.version} is live already", code="version_live")
    text = RolloutRecord(id=uuid.uuid4().hex, rollout=wanted).model_dump_json()
    after = await service.tasks.set_rollout(
        task, text, version=wanted.version, if_match=etags.if_match(if_match)
    )
    return _answer(after, task, service.rollouts, response)


@routes.delete("/{task}/rollout", status_code=204)
async def stop(task: str, service: CurrentService, if_match: IfMatchHeader = None) -> None:
    """End the rollout; the live version stays."""
    await service.tasks.catch_up()
    _record(service.tasks.live.snapshot, task)
    await service.tasks.set_rollout(task, None, if_match=etags.if_match(if_match))


@routes.post("/{task}/rollout:promote")
async def promote(
    task: str, service: CurrentService, response: Response, if_match: IfMatchHeader = None
) -> RolloutAnswer:
    """Make the candidate live and end the rollout, also one that has been stopped."""
    await service.tasks.catch_up()
    record = _record(service.tasks.live.snapshot, task)
    answer = _answer(service.tasks.live.snapshot, task, service.rollouts, response)
    version = record.rollout.version
    after = await service.tasks.set_alias(task, LIVE, version, if_match=etags.if_match(if_match))
    with suppress(PreconditionError):  # somebody has begun another meanwhile: it stays
        unchanged = IfMatch(frozenset({after.desired.changed[task]}))
        after = await service.tasks.set_rollout(task, None, if_match=unchanged)
    changed = {"live": version, "generation": after.desired.generation}
    response.headers["ETag"] = etags.etag(after.desired.changed[task])
    return answer.model_copy(update=changed)


def _record(snapshot: Snapshot, task: str) -> RolloutRecord:
    if task not in snapshot.desired.tasks:
        raise NotFoundError(f"no task {task}", code="unknown_task")
    text = snapshot.desired.rollouts.get(task)
    if text is None:
        raise NotFoundError(f"{task} has no rollout", code="no_rollout")
    return read_record(text)


def _answer(snapshot: Snapshot, task: str, rollouts: Rollouts, response: Response) -> RolloutAnswer:
    record = _record(snapshot, task)
    tally = rollouts.tally(task, record)
    response.headers["ETag"] = etags.etag(snapshot.desired.changed[task])
    return RolloutAnswer(
        task=task,
        live=snapshot.desired.live.get(task),
        rollout=record.rollout,
        stopped=record.stopped,
        same=tally.same,
        different=tally.different,
        errors=tally.error,
        generation=snapshot.desired.generation,
    )

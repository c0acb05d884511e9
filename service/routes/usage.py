"""`GET /v1/tasks/{task}/usage`: what a task costs, for who pays for the device."""

from __future__ import annotations

from fastapi import APIRouter

from service.errors import NotFoundError
from service.state import CurrentService
from service.wire.openapi import PROBLEM_RESPONSES
from service.wire.signal_schemas import UsageAnswer

__all__ = ["routes"]

routes = APIRouter(prefix="/v1/tasks", tags=["signals"], responses=PROBLEM_RESPONSES)


@routes.get("/{task}/usage")
async def usage(task: str, service: CurrentService) -> UsageAnswer:
    """What a task has used on this server since it started, and what it occupies now."""
    snapshot, signals = service.tasks.live.snapshot, service.signals
    records = snapshot.desired.tasks.get(task)
    if records is None:
        raise NotFoundError(f"no task {task}", code="unknown_task")
    used, total_s = signals.used(task), signals.total.forward_s
    return UsageAnswer(
        task=task,
        since=signals.since,
        images=used.images,
        forward_s=used.forward_s,
        forward_share=used.forward_s / total_s if total_s else 0.0,
        resident_bytes=sum(r.size_bytes for (t, _), r in snapshot.residents.items() if t == task),
        bundle_bytes=sum(record.size_bytes or 0 for record in records),
    )

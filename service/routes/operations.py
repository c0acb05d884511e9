"""`/v1/operations`: what became of work that outlasted its request."""

from __future__ import annotations

from fastapi import APIRouter

from service.state import CurrentService
from service.versions.operations import Operation
from service.wire.openapi import PROBLEM_RESPONSES
from service.wire.task_schemas import OperationAnswer, OperationsAnswer

__all__ = ["answer_of", "routes"]

routes = APIRouter(prefix="/v1/operations", tags=["operations"], responses=PROBLEM_RESPONSES)


@routes.get("")
async def list_operations(service: CurrentService) -> OperationsAnswer:
    """The operations of this server since it started, latest first; the last 1,000."""
    return OperationsAnswer(operations=[answer_of(one) for one in service.tasks.operations.all()])


@routes.get("/{operation}")
async def get_operation(operation: str, service: CurrentService) -> OperationAnswer:
    """One operation, whichever replica runs it."""
    return answer_of(await service.told.get(operation))


def answer_of(operation: Operation) -> OperationAnswer:
    """As it goes over the wire."""
    return OperationAnswer.model_validate(operation, from_attributes=True)

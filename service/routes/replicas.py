"""`/v1/replicas`: who serves what."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from fastapi import APIRouter

from service.replicas.board import Replica
from service.state import CurrentService
from service.wire.openapi import PROBLEM_RESPONSES
from service.wire.replica_schemas import ReplicaAnswer, ReplicasAnswer

__all__ = ["routes"]

routes = APIRouter(prefix="/v1/replicas", tags=["replicas"], responses=PROBLEM_RESPONSES)


@routes.get("")
async def list_replicas(service: CurrentService) -> ReplicasAnswer:
    """All replicas that were heard of lately, and what each has; 503 if the registry is away."""
    me = service.heartbeat.replica()
    told = await asyncio.to_thread(service.board.replicas)
    others = [one for one in told if one.id != me.id]
    return ReplicasAnswer(
        generation=me.generation,
        replicas=[
            _answer(one, this=one is me)
            for one in sorted([me, *others], key=lambda one: (one.name, one.id))
        ],
    )


def _answer(replica: Replica, *, this: bool) -> ReplicaAnswer:
    return ReplicaAnswer(this=this, ready=replica.ready, **asdict(replica))

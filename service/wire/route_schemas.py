"""The wire of `POST /v1/route`. No behaviour."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from service.wire.schemas import Failure, Path, TaskScore

__all__ = ["Decision", "RouteResponse", "RouteScore"]


class RouteScore(TaskScore):
    """What DDAS thinks of one image and one live task, and whether the task may have it."""

    margin: float | None = Field(
        default=None, description="Threshold less score: how much more foreign an image might be"
    )
    eligible: bool = Field(description="Whether model and labels of the request leave the choice")


class Decision(BaseModel):
    """What a classification would do with one image."""

    path: Path
    routed_by: Literal["auto", "labels", "explicit"]
    scores: dict[str, RouteScore] = Field(description="Every live task's")


class RouteResponse(BaseModel):
    """One decision per image, in the order of the request."""

    generation: int
    results: list[Decision | Failure]

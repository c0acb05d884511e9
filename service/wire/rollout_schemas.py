"""Rollouts on the wire and in the registry: what is wanted of one, and how it stands."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from service.registry.desired import Desired

__all__ = ["Rollout", "RolloutAnswer", "RolloutRecord", "candidates", "read_record"]


class Rollout(BaseModel):
    """A candidate version, and when it is to be taken out by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str = Field(min_length=1, max_length=200, description="The candidate")
    mode: Literal["shadow", "canary"] = Field(
        default="shadow", description="Whether the candidate only computes, or answers"
    )
    share: float = Field(
        default=0.1, gt=0, le=1, description="Of the images that the live version answers"
    )
    min_images: int = Field(
        default=100, ge=1, description="Compared before disagreement can stop the rollout"
    )
    max_disagreement: float = Field(
        default=0.1, ge=0, le=1, description="Share of compared images with another label"
    )
    max_errors: int = Field(default=0, ge=0, description="Images that the candidate may fail")


class RolloutRecord(BaseModel):
    """A rollout as the registry keeps it, as JSON: with the reason, if it has been stopped."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(description="Of this start: the same rollout again counts from nothing")
    rollout: Rollout
    stopped: str | None = None


@lru_cache(maxsize=1024)
def read_record(text: str) -> RolloutRecord:
    """Read what the registry keeps."""
    return RolloutRecord.model_validate_json(text)


def candidates(desired: Desired) -> frozenset[tuple[str, str]]:
    """Task and version of every candidate that is being tried."""
    records = {task: read_record(text) for task, text in desired.rollouts.items()}
    running = {task: record for task, record in records.items() if record.stopped is None}
    return frozenset((task, record.rollout.version) for task, record in running.items())


class RolloutAnswer(BaseModel):
    """A rollout, and what this server has seen of it since it began here."""

    task: str
    live: str | None
    rollout: Rollout
    stopped: str | None = Field(default=None, description="Why it was taken out by itself")
    same: int = Field(description="Images on whose label both versions agree")
    different: int
    errors: int = Field(description="Images that the candidate failed")
    generation: int

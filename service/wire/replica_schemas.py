"""The wire of replicas: what each of them says of itself, and how far a change has come."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

__all__ = [
    "LackingAnswer",
    "ReachedAnswer",
    "RefusalAnswer",
    "ReplicaAnswer",
    "ReplicaVersionAnswer",
    "ReplicasAnswer",
]


class ReplicaVersionAnswer(BaseModel):
    """One version on one replica."""

    digest: str
    state: Literal["live", "ready", "loading", "failed"]
    tier: Literal["device", "host", "disk"]
    reason: str | None = Field(default=None, description="Why it failed there")
    attempts: int = Field(default=0, description="Loads that failed, one after the other")
    retry_s: float | None = Field(default=None, description="When it is tried again by itself")


class LackingAnswer(BaseModel):
    """A version that a replica cannot have now, which keeps it at its generation."""

    version: str = Field(description="As task@version")
    reason: str
    attempts: int
    retry_s: float | None = Field(default=None, description="When it is tried again")


class ReplicaAnswer(BaseModel):
    """One server process, by its own word, which may be some seconds old."""

    id: str = Field(description="Of this process; a name may be that of several")
    name: str
    this: bool = Field(description="Whether it is the one that answers")
    phase: Literal["starting", "ready", "not_ready", "draining"]
    ready: bool
    generation: int = Field(description="That it answers from")
    version: str = Field(description="Of Medley")
    fingerprint: str = Field(description="Of its backbone")
    since: str
    versions: dict[str, ReplicaVersionAnswer] = Field(description="By task@version")
    lacking: list[LackingAnswer]


class ReplicasAnswer(BaseModel):
    """All replicas that were heard of lately, by name."""

    generation: int = Field(description="That the replica which answers serves")
    replicas: list[ReplicaAnswer]


class RefusalAnswer(BaseModel):
    """A replica that has seen a change and cannot serve the version."""

    replica: str = Field(description="Its id")
    name: str
    reason: str


class ReachedAnswer(BaseModel):
    """How far a change has come; it stands, whatever this says."""

    generation: int
    wanted: int
    reached: int = Field(description="Replicas that serve this generation and have the version")
    alive: int
    failed: list[RefusalAnswer]

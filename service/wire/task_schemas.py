"""The wire of tasks, versions, aliases and operations. No behaviour beyond checking fields."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.wire.replica_schemas import ReachedAnswer
from service.wire.schemas import Problem

__all__ = [
    "AliasName",
    "ChangeAnswer",
    "OperationAnswer",
    "OperationsAnswer",
    "RegistrationAnswer",
    "SourceRequest",
    "TaskAnswer",
    "TasksAnswer",
    "VersionAnswer",
    "VersionRequest",
]

AliasName = Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z._-]{0,30}$")]


class VersionAnswer(BaseModel):
    """One version of a task and its state on this server."""

    version: str
    digest: str
    created_at: str
    state: Literal["live", "ready", "failed"]
    reason: str | None = Field(default=None, description="Why it failed")
    tier: Literal["device", "host", "disk"] = Field(description="Where this server has it now")
    pinned: bool = Field(description="Whether it has to stay on the device")
    aliases: list[str] = Field(description="The names it has besides its own, such as live")
    size_bytes: int | None = Field(default=None, description="Of its bundle, where it is known")
    method: str = Field(default="moe_adapter", description="How it was learnt")
    unified: str | None = Field(
        default=None, description="Digest of the unified model that it is loaded from, if any"
    )


class TaskAnswer(BaseModel):
    """One task; classes and templates are those of the live version."""

    task: str
    live: str | None
    aliases: dict[str, str] = Field(description="Which version each alias names; live among them")
    versions: list[VersionAnswer]
    class_names: list[str]
    templates: list[str]
    changed: int = Field(description="Generation of the task's last change; its ETag")
    generation: int


class ChangeAnswer(TaskAnswer):
    """The task after a change."""

    replicas: ReachedAnswer | None = Field(
        default=None, description="How far it has come, where `replicas` was asked for"
    )


class RegistrationAnswer(ChangeAnswer):
    """The task after a registration, and what the registrar should look at."""

    warnings: list[str]


class TasksAnswer(BaseModel):
    """All tasks, by name."""

    generation: int
    tasks: list[TaskAnswer]


class VersionRequest(BaseModel):
    """Which version an alias is to name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: str = Field(min_length=1, max_length=200)


class SourceRequest(BaseModel):
    """Where the server can get a bundle from, under one of MEDLEY_BUNDLE_SOURCES."""

    model_config = ConfigDict(extra="forbid", strict=True)

    source: str = Field(min_length=1, max_length=2000)


class OperationAnswer(BaseModel):
    """Work that may outlast its request."""

    id: str
    kind: Literal["register"]
    task: str
    version: str
    state: Literal["running", "succeeded", "failed"]
    created_at: str
    finished_at: str | None = None
    error: Problem | None = Field(default=None, description="Why it failed")
    warnings: list[str] = Field(default=[], description="As a registration's answer has them")
    replicas: ReachedAnswer | None = Field(
        default=None, description="How far it has come, where `replicas` was asked for"
    )


class OperationsAnswer(BaseModel):
    """The operations since the server started, as far as they are remembered; latest first."""

    operations: list[OperationAnswer]

"""The wire of unified models. No behaviour beyond checking fields."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

__all__ = ["UnifiedAnswer", "UnifiedModelsAnswer"]


class UnifiedAnswer(BaseModel):
    """One unified model, and which versions are loaded from it."""

    digest: str
    method: Literal["lora", "finetune"]
    here: bool = Field(description="Whether this server has its bytes")
    size_bytes: int | None = Field(default=None, description="Where this server has it")
    versions: list[str] = Field(description="Those that name it, as task@version")


class UnifiedModelsAnswer(BaseModel):
    """All that versions name, or that were taken in to be named; by digest."""

    generation: int
    unified: list[UnifiedAnswer]

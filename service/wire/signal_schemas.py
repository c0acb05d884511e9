"""The wire of what the traffic says: usage of tasks, the sample of unclaimed images."""

from __future__ import annotations

from pydantic import BaseModel, Field

__all__ = ["UnclaimedAnswer", "UnclaimedImage", "UsageAnswer"]


class UsageAnswer(BaseModel):
    """What one task has used on this server since it started, and what it occupies now."""

    task: str
    since: str = Field(description="When this server started")
    images: int = Field(description="Images that it answered, all versions together")
    forward_s: float = Field(description="Time of forwards, each image its part of its batch")
    forward_share: float = Field(description="Of the time of all images, 0 to 1")
    resident_bytes: int = Field(description="Of its experts and selectors on the device")
    bundle_bytes: int = Field(description="Of its bundles in the store, as far as it is known")


class UnclaimedImage(BaseModel):
    """One image of the sample."""

    id: str
    size_bytes: int
    taken_at: str


class UnclaimedAnswer(BaseModel):
    """The sample of images that no task claims."""

    limit: int = Field(description="Images that are kept at most; 0: none is kept")
    seen: int = Field(description="Images that the sample stands for")
    images: list[UnclaimedImage] = Field(description="Oldest first")

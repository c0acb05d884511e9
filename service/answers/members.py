"""Who answers for an image: one path or, where no task claims it, several together.

docs/aggregation.md has the rules for people. What each of them says of labels is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from medley.aggregation import Weighting, weights
from service.answers.engine import Answer
from service.versions.live import Resident, Snapshot
from service.wire.schemas import Path, PathMember

__all__ = ["Member", "members_of", "path_of", "taken_by"]


@dataclass(frozen=True)
class Member:
    """One of those who answer, and how much it counts; without a resident it is zero-shot."""

    resident: Resident | None
    features_E: Tensor
    weight: float
    similarity: float | None = None  # of the image with the task; zero-shot has none


def members_of(answer: Answer, snapshot: Snapshot, how: Weighting) -> list[Member]:
    """Those who answer, the image's own path first, then its neighbours, the nearest first.

    Args:
        answer: what the engine says of the image.
        snapshot: what it was asked under, still leased.
        how: what the neighbours count.
    """
    own, *shares = weights([other.similarity for other in answer.others], how)
    return [
        Member(snapshot.by_path.get(answer.path), answer.features_E, own),
        *(
            Member(snapshot.by_path[other.path], other.features_E, share, other.similarity)
            for other, share in zip(answer.others, shares, strict=True)
        ),
    ]


def path_of(members: Sequence[Member]) -> Path:
    """How an answer says who gave it."""
    if len(members) == 1:
        return taken_by(members[0].resident)
    told = [
        PathMember(
            **taken_by(member.resident).model_dump(exclude={"members"}),
            similarity=member.similarity,
            weight=member.weight,
        )
        for member in members
    ]
    return Path(kind="aggregate", members=told)


def taken_by(resident: Resident | None) -> Path:
    """How an answer says whose path one image took; None is zero-shot."""
    if resident is None:
        return Path(kind="zero_shot")
    record = resident.record
    return Path(kind="task", task=record.task, version=record.version, digest=record.digest)

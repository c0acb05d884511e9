"""What is measured about tasks of every method: loading, and kinds of traffic. No behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from medley.journal import Conditions

__all__ = ["FULL", "LOADING", "QUICK", "TRAFFIC", "Kind", "Plan", "Traffic"]

# Benches.
LOADING = "loading"  # from the first byte of a bundle to the first answer of its task
TRAFFIC = "traffic"  # saturated, kinds of traffic in turns; a time is that of one image


class Kind(StrEnum):
    """By which method tasks were learnt."""

    EXPERTS = "moe_adapter"
    LORA = "lora"
    FINETUNE = "finetune"


class Traffic(StrEnum):
    """Which requests come; those that name a task do so evenly."""

    NAMED = "all name a task"
    ZERO_SHOT = "half unclaimed, zero-shot"
    AGGREGATED = "half unclaimed, aggregated"
    ALL = "all unclaimed, aggregated"

    @property
    def unclaimed(self) -> tuple[bool, ...]:
        """Of the requests that come one after the other, again and again."""
        match self:
            case Traffic.NAMED:
                return (False,)
            case Traffic.ALL:
                return (True,)
            case _:
                return (False, True)

    @property
    def aggregated(self) -> bool:
        """Whether the nearest tasks answer unclaimed images too."""
        return self in (Traffic.AGGREGATED, Traffic.ALL)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All of a run."""

    tasks: Mapping[Kind, int] = field(
        default_factory=lambda: {Kind.EXPERTS: 16, Kind.LORA: 16, Kind.FINETUNE: 2}
    )
    loads: int = 8  # of each kind; the tasks in turn
    neighbours: int = 4
    rounds: int = 5
    seconds: float = 2.5  # of each traffic in each round
    crowd: int = 16  # visitors, who come again as soon as they are answered
    images: int = 16

    def conditions(self, kind: Kind) -> Conditions:
        """Of a line."""
        return {"method": kind.value, "tasks": self.tasks[kind]}

    @property
    def steps(self) -> int:
        """How many loads and visits a run has."""
        return len(self.tasks) * (self.loads + self.rounds * len(Traffic))


FULL = Plan()
QUICK = Plan(
    tasks={Kind.EXPERTS: 2, Kind.LORA: 2, Kind.FINETUNE: 2}, loads=2, rounds=1, seconds=1.0
)

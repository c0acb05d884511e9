"""What a request asks of the engine: which path, or which paths DDAS may choose from.

The rules are in `docs/api.md` for people. Decided from the snapshot that the request answers from;
nothing here waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medley.aggregation import Weighting
from medley.classifier import Ask
from medley.routed import ZERO_SHOT
from service.registry.desired import LIVE
from service.versions.live import Snapshot
from service.wire.schemas import ClassifyOptions, Unclaimed

__all__ = ["Plan", "Policy", "RoutedBy", "make_plan"]

RoutedBy = Literal["auto", "labels", "explicit"]


@dataclass(frozen=True)
class Policy:
    """Who answers for images that no task claims, as far as their request does not say."""

    unclaimed: Unclaimed
    neighbours: int
    weights: Weighting

    def nearest(self, options: ClassifyOptions) -> int:
        """How many tasks are to answer beside zero-shot then; 0 leaves it alone."""
        if (options.unclaimed or self.unclaimed) == "zero_shot":
            return 0
        return options.neighbours or self.neighbours


@dataclass(frozen=True)
class Plan:
    """What is asked for every image of one request, by the snapshot it started from."""

    snapshot: Snapshot
    ask: Ask
    routed_by: RoutedBy
    lane: str  # whose turn it is in the queue: a task, `auto` or `base`
    follows_live: bool = True  # whether a rollout may try its candidate on these images


def make_plan(
    snapshot: Snapshot, model: str, labels: tuple[str, ...] | None = None, *, nearest: int = 0
) -> Plan:
    """Decide what to ask.

    Args:
        snapshot: what is served.
        model: `auto`, `base`, a task, `task@version` or `task@alias`.
        labels: those that the request chooses among, if it brings any.
        nearest: how many live tasks are to answer beside zero-shot where DDAS chooses none. They
            may be any: not knowing the labels is no reason against a neighbour.

    Raises:
        NotFoundError, UnavailableError: the model cannot be had.
    """
    if model == "auto":
        named = _named_by(snapshot, labels)
        if named is not None:
            return Plan(snapshot, Ask(path=named), "labels", model)
        ask = Ask(eligible=_eligible(snapshot, labels), nearest=nearest, among=snapshot.eligible)
        return Plan(snapshot, ask, "auto", model)
    if model == "base":
        return Plan(snapshot, Ask(path=ZERO_SHOT), "explicit", model, follows_live=False)
    task, at, name = model.partition("@")
    resident = snapshot.find(task, name if at else None)
    follows_live = not at or name == LIVE
    return Plan(snapshot, Ask(path=resident.path), "explicit", task, follows_live=follows_live)


def _named_by(snapshot: Snapshot, labels: tuple[str, ...] | None) -> int | None:
    """The only live task whose classes are exactly the labels: who lists them all means it."""
    wanted = {label.casefold() for label in labels or ()}
    alike = [r.path for r in snapshot.live.values() if wanted == r.own.row_of.keys()]
    return alike[0] if len(alike) == 1 else None


def _eligible(snapshot: Snapshot, labels: tuple[str, ...] | None) -> frozenset[int]:
    """Live tasks that may answer: all, or those whose classes include every label."""
    if labels is None:
        return snapshot.eligible
    wanted = {label.casefold() for label in labels}
    return frozenset(r.path for r in snapshot.live.values() if wanted <= r.own.row_of.keys())

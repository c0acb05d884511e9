"""What a request asks of the engine: which path, or which paths DDAS may choose from.

The rules are in `docs/api.md` for people. Decided from the snapshot that the request answers from;
nothing here waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medley.classifier import Ask
from medley.routed import ZERO_SHOT
from service.registry.desired import LIVE
from service.versions.live import Snapshot

__all__ = ["Plan", "RoutedBy", "make_plan"]

RoutedBy = Literal["auto", "labels", "explicit"]


@dataclass(frozen=True)
class Plan:
    """What is asked for every image of one request, by the snapshot it started from."""

    snapshot: Snapshot
    ask: Ask
    routed_by: RoutedBy
    lane: str  # whose turn it is in the queue: a task, `auto` or `base`
    follows_live: bool = True  # whether a rollout may try its candidate on these images


def make_plan(snapshot: Snapshot, model: str, labels: tuple[str, ...] | None = None) -> Plan:
    """Decide what to ask.

    Args:
        snapshot: what is served.
        model: `auto`, `base`, a task, `task@version` or `task@alias`.
        labels: those that the request chooses among, if it brings any.

    Raises:
        NotFoundError, UnavailableError: the model cannot be had.
    """
    if model == "auto":
        named = _named_by(snapshot, labels)
        if named is not None:
            return Plan(snapshot, Ask(path=named), "labels", model)
        return Plan(snapshot, Ask(eligible=_eligible(snapshot, labels)), "auto", model)
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

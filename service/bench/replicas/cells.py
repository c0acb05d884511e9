"""What is measured about replicas: changes of one kind, in one situation. No behaviour."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from medley.journal import Conditions

__all__ = ["CONVERGENCE", "FULL", "QUICK", "READ", "Cell", "Change", "Plan"]

# Benches.
CONVERGENCE = "convergence"  # until every replica serves the generation, asked by nobody
READ = "read after write"  # until every replica has answered who names the generation


class Change(StrEnum):
    """Of what one replica is told and all have to follow."""

    REGISTER = "registration"  # of a new task: its bytes go through the bundle store
    ACTIVATE = "activation"  # of a version that all have loaded


@dataclass(frozen=True, kw_only=True)
class Cell:
    """So many changes, one after the other, each to another replica."""

    bench: str
    change: Change
    hints: bool
    loaded: bool

    def conditions(self, replicas: int) -> Conditions:
        """Of a line."""
        return {
            "replicas": replicas,
            "change": self.change.value,
            "hints": "yes" if self.hints else "no",
            "load": "half" if self.loaded else "none",
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All cells of a run."""

    replicas: int = 3
    changes: int = 100  # of each cell
    saturation_s: float = 2.5
    percent: int = 50  # of what one server can do alone, for all replicas together
    images: int = 8

    def cells(self, *, hints: bool) -> Iterator[Cell]:
        """Without hints only an idle cluster: there it is the pause between looks that counts."""
        for loaded in (False, True) if hints else (False,):
            for change in Change:
                for bench in (CONVERGENCE, READ):
                    yield Cell(bench=bench, change=change, hints=hints, loaded=loaded)

    @property
    def steps(self) -> int:
        """How many lines the run has."""
        return sum(len(list(self.cells(hints=hints))) for hints in (True, False))


FULL = Plan()
QUICK = Plan(replicas=2, changes=4, saturation_s=1.0, images=2)

"""What one request did, noted along its way: for its log line and its spans, and nothing else.

Whoever works for a request finds its notes by `noted()`. Work for no request notes into the void.
Notes hold names and numbers only: no image, no label, no key.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

__all__ = ["CURRENT", "Notes", "Stage", "noted"]


@dataclass
class Stage:
    """A part of a request: when it began by the wall clock, and how long it took."""

    name: str
    began_ns: int
    duration_s: float = 0.0


@dataclass
class Notes:
    """Notes of one request; used by the event loop's thread only."""

    request_id: str = ""
    trace_id: str = ""
    span_id: str = ""
    answered: Counter[str] = field(default_factory=Counter)  # images by task, zero_shot as one
    stages: list[Stage] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)  # codes, of the request or its images
    generation: int | None = None  # of the registry, that the answer is made from

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Note what happens inside as a stage, also if it fails; its duration is set at the end."""
        stage, start_s = Stage(name, time.time_ns()), time.monotonic()
        self.stages.append(stage)
        try:
            yield stage
        finally:
            stage.duration_s = time.monotonic() - start_s

    def ended(self, name: str, duration_s: float, *, ago_s: float = 0.0) -> None:
        """Note a stage that ended `ago_s` before now."""
        began_ns = time.time_ns() - round((duration_s + ago_s) * 1e9)
        self.stages.append(Stage(name, began_ns, duration_s))

    def stages_ms(self) -> dict[str, float]:
        """How long each stage took, in ms; one that came several times is added up."""
        total_s: Counter[str] = Counter()
        for stage in self.stages:
            total_s[stage.name] += stage.duration_s  # type: ignore[assignment]
        return {name: round(1000 * s, 3) for name, s in total_s.items()}


CURRENT: ContextVar[Notes | None] = ContextVar("medley_notes", default=None)


def noted() -> Notes:
    """The notes of the request that this code works for; new ones that nobody reads if for none."""
    return CURRENT.get() or Notes()

"""What the answers say about the traffic: who answered, how surely, and what nobody claims.

Everything that is counted per image is counted here, under the names of tasks that exist now: an
image of a task that has just been deleted is `other`, so no series outlives its task. Belongs to
the event loop's thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from medley.errors import ImageError
from service.answers.engine import Answer
from service.answers.planning import Plan
from service.intake.forms import ImageSource
from service.registry.desired import now
from service.signals.metrics import ZERO_SHOT_LABEL, Metrics
from service.signals.notes import noted
from service.signals.reservoir import Reservoir
from service.versions.live import Live, Resident

__all__ = ["Became", "Signals", "Used"]

Became = Literal["ok", "client_error", "rejected", "cancelled", "deadline", "error"]


@dataclass
class Used:
    """What one task has used since this server started."""

    images: int = 0
    forward_s: float = 0.0  # each row its part of its batch

    def add(self, forward_s: float, *, images: int = 1) -> None:
        """Add one image, or none where it only helped to answer one."""
        self.images += images
        self.forward_s += forward_s


class Signals:
    """Counts images by what became of them; knows what each task has used."""

    def __init__(self, *, live: Live, metrics: Metrics, reservoir: Reservoir) -> None:
        self._live = live
        self._metrics = metrics
        self._reservoir = reservoir
        self.since = now()
        self._used: dict[str, Used] = {}
        self.total = Used()
        metrics.exists = self._exists

    def answered(self, answer: Answer, plan: Plan, image: ImageSource) -> None:
        """Count an image that has been answered; maybe keep it, if no task claims it."""
        resident = plan.snapshot.by_path.get(answer.path)
        task = resident.record.task if resident else None
        self._metrics.count_image(task, plan.routed_by)
        self._spent(task, answer)
        for other in answer.others:
            self._spent(plan.snapshot.by_path[other.path].record.task, answer, images=0)
        noted().answered[task or ZERO_SHOT_LABEL] += 1
        if plan.routed_by == "auto":
            self._decided(answer, plan, resident, image)

    def refused(self, error: ImageError, plan: Plan, *, alone: bool) -> None:
        """Count an image that cannot be used; `alone`: its error is that of the whole request."""
        self._metrics.count_failures(plan.routed_by, "client_error")
        if not alone:
            noted().problems[error.code] += 1

    def failed(self, plan: Plan, became: Became, *, images: int = 1) -> None:
        """Count images that got no answer."""
        self._metrics.count_failures(plan.routed_by, became, images=images)

    @contextmanager
    def stage(self, name: str, stages_s: dict[str, float]) -> Iterator[None]:
        """Time what is inside as a stage of the request, also if it fails; adds it to `stages_s`.

        The histogram has `decode` by image, from the threads that decode, and so not from here.
        """
        with noted().stage(name) as stage:
            yield
        stages_s[name] = stage.duration_s
        if name != "decode":
            self._metrics.stage_duration_s.labels(name).observe(stage.duration_s)

    def fetched(self, duration_s: float) -> None:
        """Note how long one image took to fetch; a part of the stage `decode` of its request."""
        self._metrics.stage_duration_s.labels("fetch").observe(duration_s)
        noted().ended("fetch", duration_s)

    def computed(self, answers: Sequence[Answer], stages_s: dict[str, float]) -> None:
        """Note how long a request's images, which have just been answered, waited and ran.

        Adds `queue` and `forward` to `stages_s`, each that of the image that took longest.
        """
        queue_s = max((answer.queue_s for answer in answers), default=0.0)
        forward_s = max((answer.forward_s for answer in answers), default=0.0)
        noted().ended("queue", queue_s, ago_s=forward_s)
        noted().ended("forward", forward_s)
        stages_s |= {"queue": queue_s, "forward": forward_s}

    def forget(self, task: str) -> None:
        """Drop what is kept for a task that is not served any more."""
        self._metrics.forget_task(task)
        self._used.pop(task, None)

    def used(self, task: str) -> Used:
        """What a task has used."""
        return self._used.get(task) or Used()

    def _spent(self, task: str | None, answer: Answer, *, images: int = 1) -> None:
        """Count the time of one row: the image's own, or that of a neighbour."""
        row_s = answer.forward_s / answer.batch_rows
        self._metrics.task_forward_s.labels(self._metrics.task_label(task)).inc(row_s)
        self.total.add(row_s, images=images)
        if task is not None and self._exists(task):
            self._used.setdefault(task, Used()).add(row_s, images=images)

    def _decided(
        self, answer: Answer, plan: Plan, resident: Resident | None, image: ImageSource
    ) -> None:
        nearest = resident or _nearest(answer, plan)
        decision = "task" if resident else "unclaimed" if plan.ask.eligible else "no_task"
        self._metrics.router_decisions.labels(decision).inc()
        if answer.others:
            self._metrics.aggregated_images.inc()
        if decision == "unclaimed":
            self._reservoir.offer(image)
        if nearest is not None:
            margin = nearest.threshold - answer.scores.get(nearest.path, math.nan)
            if math.isfinite(margin):  # a task that accepts everything has no margin
                label = self._metrics.task_label(nearest.record.task)
                self._metrics.router_margin.labels(label).observe(margin)

    def _exists(self, task: str) -> bool:
        return task in self._live.snapshot.desired.tasks


def _nearest(answer: Answer, plan: Plan) -> Resident | None:
    """The task that knows an image best among those that might have had it."""
    eligible = plan.ask.eligible or frozenset()
    scores = ((answer.scores.get(path, math.nan), path) for path in eligible)
    best = min((found for found in scores if math.isfinite(found[0])), default=None)
    return plan.snapshot.by_path[best[1]] if best else None

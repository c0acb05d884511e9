"""One classification: decode, ask the engine, choose the label set, name the labels.

The rules (`docs/api.md` has them for people): a path is chosen first, then the labels: those of the
request, else the task's own, else the union of all live tasks' classes.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from medley.backbone import Backbone
from medley.classifier import Ask, logits
from medley.errors import ImageError
from medley.images import ImageLimits, decode
from medley.routed import ZERO_SHOT
from service.engine import Answer, Engine
from service.errors import EngineError, QueueFullError, RequestError, problem
from service.intake import Intake, image_bytes
from service.labels import LabelCache
from service.live import LabelSet, Live, Resident, Snapshot
from service.metrics import Metrics
from service.schemas import (
    Choice,
    ClassifyOptions,
    ClassifyResponse,
    Failure,
    Path,
    Prediction,
    Problem,
    TaskScore,
)

__all__ = ["Classification", "Plan", "Timed", "make_plan"]

RoutedBy = Literal["auto", "labels", "explicit"]


@dataclass(frozen=True)
class Timed:
    """An answer and how long its stages took."""

    response: ClassifyResponse
    stages_s: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """What a request asks of the engine, by the snapshot it started from."""

    snapshot: Snapshot
    options: ClassifyOptions
    ask: Ask
    routed_by: RoutedBy
    labels: tuple[str, ...] | None
    templates: tuple[str, ...] | None


class Classification:
    """Everything between a request's bytes and its answer."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        engine: Engine,
        live: Live,
        labels: LabelCache,
        limits: ImageLimits,
        decoders: ThreadPoolExecutor,
        metrics: Metrics,
    ) -> None:
        self._backbone = backbone
        self._engine = engine
        self._live = live
        self._labels = labels
        self._limits = limits
        self._decoders = decoders
        self._metrics = metrics

    async def classify(self, intake: Intake) -> Timed:
        """Classify every image of a request; the lease lasts from the plan to the last label.

        Raises:
            ImageError: the only image cannot be used.
            NotFoundError, UnavailableError, RequestError: the model or the labels cannot be had.
            QueueFullError: too many images wait.
        """
        with self._live.lease() as snapshot:
            plan = make_plan(snapshot, intake.options)
            start_s = time.monotonic()
            pixels = await asyncio.gather(*[self._pixels(image) for image in intake.images])
            decode_s = time.monotonic() - start_s
            if intake.single and isinstance(pixels[0], ImageError):
                raise pixels[0]
            answers = await self._ask([p for p in pixels if isinstance(p, Tensor)], plan)
            made = iter([await self._predict(answer, plan) for answer in answers])
            results = [_failure(p) if isinstance(p, ImageError) else next(made) for p in pixels]
        stages_s = {
            "decode": decode_s,
            "queue": max((a.queue_s for a in answers), default=0.0),
            "forward": max((a.forward_s for a in answers), default=0.0),
        }
        response = ClassifyResponse(generation=snapshot.desired.generation, results=results)
        return Timed(response, stages_s)

    async def _pixels(self, image: bytes | str) -> Tensor | ImageError:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._decoders, self._decode, image)
        except ImageError as error:
            self._metrics.count_image(None, "none", "client_error")
            return error

    def _decode(self, image: bytes | str) -> Tensor:
        """Runs on a decode thread."""
        with self._metrics.stage_duration_s.labels("decode").time():
            return self._backbone.pixels(decode(image_bytes(image), self._limits))

    async def _ask(self, pixels: Sequence[Tensor], plan: Plan) -> list[Answer]:
        try:
            futures = self._engine.submit(pixels, plan.ask)
            return await asyncio.gather(*[asyncio.wrap_future(future) for future in futures])
        except (QueueFullError, EngineError) as error:
            outcome = "rejected" if isinstance(error, QueueFullError) else "error"
            for _ in pixels:
                self._metrics.count_image(None, plan.routed_by, outcome)
            raise

    async def _predict(self, answer: Answer, plan: Plan) -> Prediction:
        resident = plan.snapshot.by_path.get(answer.path)
        label_set = await self._label_set(resident, plan)
        with self._metrics.stage_duration_s.labels("head").time():
            choices = self._choices(answer, label_set, plan.options.top_k)
        self._count(resident, plan)
        return Prediction(
            label=choices[0].label,
            probability=choices[0].probability,
            top_k=choices,
            path=_path(resident),
            routed_by=plan.routed_by,
            label_set=label_set.kind,
            scores=_scores(answer, plan.snapshot) if plan.options.explain else None,
        )

    async def _label_set(self, resident: Resident | None, plan: Plan) -> LabelSet:
        if plan.labels is not None:
            return await self._labels.get(resident, plan.labels, plan.templates)
        label_set = resident.own if resident else plan.snapshot.union
        assert label_set is not None  # make_plan refuses zero-shot without any labels
        return label_set

    def _choices(self, answer: Answer, label_set: LabelSet, top_k: int) -> list[Choice]:
        logits_C = logits(answer.features_E, label_set.features_CE, self._backbone.logit_scale)
        top = torch.softmax(logits_C, dim=-1).topk(min(top_k, len(label_set.names)))
        return [
            Choice(label=label_set.names[index], probability=value)
            for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]

    def _count(self, resident: Resident | None, plan: Plan) -> None:
        task = resident.record.task if resident else None
        self._metrics.count_image(task, plan.routed_by, "ok")
        if plan.routed_by == "auto":
            self._metrics.router_decisions.labels("task" if task else "zero_shot").inc()


def make_plan(snapshot: Snapshot, options: ClassifyOptions) -> Plan:
    """Decide what to ask of the engine; see `Classification.classify` for what it raises."""
    labels = tuple(options.labels) if options.labels is not None else None
    templates = tuple(options.templates) if options.templates is not None else None
    routed_by: RoutedBy = "explicit"
    if options.model == "auto":
        named = _named_by(snapshot, labels)
        ask = Ask(path=named) if named is not None else Ask(eligible=_eligible(snapshot, labels))
        routed_by = "auto" if named is None else "labels"
    elif options.model == "base":
        ask = Ask(path=ZERO_SHOT)
    else:
        task, at, version = options.model.partition("@")
        ask = Ask(path=snapshot.find(task, version if at else None).path)
    if ask.path in (None, ZERO_SHOT) and labels is None and snapshot.union is None:
        raise RequestError("no task is live, so labels are needed", code="labels_needed")
    return Plan(snapshot, options, ask, routed_by, labels, templates)


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


def _path(resident: Resident | None) -> Path:
    if resident is None:
        return Path(kind="zero_shot")
    record = resident.record
    return Path(kind="task", task=record.task, version=record.version, digest=record.digest)


def _scores(answer: Answer, snapshot: Snapshot) -> dict[str, TaskScore]:
    return {
        task: TaskScore(
            score=_finite(answer.scores[resident.path]),
            threshold=_finite(resident.threshold),
            accepted=answer.accepted[resident.path],
        )
        for task, resident in snapshot.live.items()
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _failure(error: ImageError) -> Failure:
    return Failure(error=Problem(**problem(error)))

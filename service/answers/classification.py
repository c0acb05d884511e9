"""Answers to labels: choose the label set, name the most probable labels.

The rules (`docs/api.md` has them for people): a path is chosen first, then the labels: those of the
request, else the task's own, else the union of all live tasks' classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from medley.classifier import logits
from medley.errors import ImageError
from medley.routed import ZERO_SHOT
from service.answers.engine import Answer
from service.answers.inference import Inference
from service.answers.labels import LabelCache
from service.answers.planning import Plan
from service.errors import RequestError, problem
from service.intake.call import Call
from service.intake.forms import Intake
from service.versions.live import LabelSet, Resident, Snapshot
from service.wire.schemas import (
    Choice,
    ClassifyOptions,
    ClassifyResponse,
    Failure,
    Path,
    Prediction,
    Problem,
    TaskScore,
)

__all__ = ["Classification", "Timed", "failure_of", "path_of", "scores_of"]


@dataclass(frozen=True)
class Timed:
    """An answer and how long its stages took."""

    response: ClassifyResponse
    stages_s: dict[str, float]


class Classification:
    """What `POST /v1/classify` does with a request that has been read."""

    def __init__(self, inference: Inference, labels: LabelCache, *, logit_scale: float) -> None:
        self._inference = inference
        self._labels = labels
        self._logit_scale = logit_scale

    async def classify(self, intake: Intake, call: Call) -> Timed:
        """Classify every image of a request; the lease lasts from the plan to the last label.

        Raises:
            ImageError: the only image cannot be used.
            NotFoundError, UnavailableError, RequestError: the model or the labels cannot be had.
            DeadlineError, QueueFullError, EngineError: see `Inference.run`.
        """
        options = intake.options
        labels = _tuple(options.labels)
        async with self._inference.planned(options.model, call, labels=labels) as plan:
            _check_labels(plan, labels)

            async def predict(answer: Answer) -> Prediction:
                return await self._predict(answer, plan, options)

            outcome = await self._inference.run(intake.images, plan, call, predict)
        outcome.raise_alone()
        results = [failure_of(r) if isinstance(r, ImageError) else r for r in outcome.results]
        response = ClassifyResponse(generation=plan.snapshot.desired.generation, results=results)
        return Timed(response, outcome.stages_s)

    async def _predict(self, answer: Answer, plan: Plan, options: ClassifyOptions) -> Prediction:
        resident = plan.snapshot.by_path.get(answer.path)
        label_set = await self._label_set(resident, plan.snapshot, options)
        choices = self._choices(answer, label_set, options.top_k)
        return Prediction(
            label=choices[0].label,
            probability=choices[0].probability,
            top_k=choices,
            path=path_of(resident),
            routed_by=plan.routed_by,
            label_set=label_set.kind,
            scores=scores_of(answer, plan.snapshot) if options.explain else None,
        )

    async def _label_set(
        self, resident: Resident | None, snapshot: Snapshot, options: ClassifyOptions
    ) -> LabelSet:
        labels = _tuple(options.labels)
        if labels is not None:
            return await self._labels.get(resident, labels, _tuple(options.templates))
        label_set = resident.own if resident else snapshot.union
        assert label_set is not None  # _check_labels refuses zero-shot without any labels
        return label_set

    def _choices(self, answer: Answer, label_set: LabelSet, top_k: int) -> list[Choice]:
        logits_C = logits(answer.features_E, label_set.features_CE, self._logit_scale)
        top = torch.softmax(logits_C, dim=-1).topk(min(top_k, len(label_set.names)))
        return [
            Choice(label=label_set.names[index], probability=value)
            for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]


def _check_labels(plan: Plan, labels: tuple[str, ...] | None) -> None:
    may_be_zero_shot = plan.ask.path in (None, ZERO_SHOT)
    if may_be_zero_shot and labels is None and plan.snapshot.union is None:
        raise RequestError("no task is live, so labels are needed", code="labels_needed")


def _tuple(texts: list[str] | None) -> tuple[str, ...] | None:
    return None if texts is None else tuple(texts)


def path_of(resident: Resident | None) -> Path:
    """How an answer says whose path it took; None is zero-shot."""
    if resident is None:
        return Path(kind="zero_shot")
    record = resident.record
    return Path(kind="task", task=record.task, version=record.version, digest=record.digest)


def scores_of(answer: Answer, snapshot: Snapshot) -> dict[str, TaskScore]:
    """What every live task thinks of an image."""
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


def failure_of(error: ImageError) -> Failure:
    """How an answer says that one image of several cannot be used."""
    return Failure(error=Problem(**problem(error)))

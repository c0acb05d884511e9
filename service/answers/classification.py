"""Answers to labels: choose the label set, name the most probable labels.

The rules (`docs/api.md` has them for people): a path is chosen first, then the labels: those of the
request, else the task's own, else the union of all live tasks' classes. Where several paths answer
together, each has the same names by the same templates, in its own text features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medley.aggregation import averaged
from medley.classifier import logits
from medley.errors import ImageError
from medley.prompts import DEFAULT_TEMPLATES
from medley.routed import ZERO_SHOT
from service.answers.engine import Answer
from service.answers.inference import Inference
from service.answers.labels import LabelCache
from service.answers.members import Member, members_of, path_of
from service.answers.planning import Plan, Policy
from service.answers.unions import Unions
from service.errors import RequestError, problem
from service.intake.call import Call
from service.intake.forms import Intake
from service.versions.live import LabelSet, Resident, Snapshot
from service.wire.schemas import (
    Choice,
    ClassifyOptions,
    ClassifyResponse,
    Failure,
    Prediction,
    Problem,
    TaskScore,
)

__all__ = ["Classification", "Timed", "failure_of", "scores_of"]


@dataclass(frozen=True)
class Timed:
    """An answer and how long its stages took."""

    response: ClassifyResponse
    stages_s: dict[str, float]


class Classification:
    """What `POST /v1/classify` does with a request that has been read."""

    def __init__(
        self,
        inference: Inference,
        labels: LabelCache,
        unions: Unions,
        *,
        policy: Policy,
        logit_scale: float,
    ) -> None:
        """Take the parts.

        Args:
            inference: images to features.
            labels: label sets of requests.
            unions: those of neighbours, where a request brings none.
            policy: who answers what no task claims.
            logit_scale: of the backbone.
        """
        self._inference = inference
        self._labels = labels
        self._unions = unions
        self._policy = policy
        self._logit_scale = logit_scale

    async def classify(self, intake: Intake, call: Call) -> Timed:
        """Classify every image of a request; the lease lasts from the plan to the last label.

        Raises:
            ImageError: the only image cannot be used.
            NotFoundError, UnavailableError, RequestError: the model or the labels cannot be had.
            DeadlineError, QueueFullError, EngineError: see `Inference.run`.
        """
        options = intake.options
        labels, nearest = _tuple(options.labels), self._policy.nearest(options)
        planned = self._inference.planned(options.model, call, labels=labels, nearest=nearest)
        async with planned as plan:
            _check_labels(plan, labels)
            label_sets = _LabelSets(plan.snapshot, options, self._labels, self._unions)

            async def predict(answer: Answer) -> Prediction:
                return await self._predict(answer, plan, options, label_sets)

            outcome = await self._inference.run(intake.images, plan, call, predict)
        outcome.raise_alone()
        results = [failure_of(r) if isinstance(r, ImageError) else r for r in outcome.results]
        response = ClassifyResponse(generation=plan.snapshot.desired.generation, results=results)
        return Timed(response, outcome.stages_s)

    async def _predict(
        self, answer: Answer, plan: Plan, options: ClassifyOptions, label_sets: _LabelSets
    ) -> Prediction:
        members = members_of(answer, plan.snapshot, self._policy.weights)
        found = [await label_sets.get(m.resident, alone=len(members) == 1) for m in members]
        choices = _choices(self._logits(members, found), found[0], options.top_k)
        return Prediction(
            label=choices[0].label,
            probability=choices[0].probability,
            top_k=choices,
            path=path_of(members),
            routed_by=plan.routed_by,
            label_set=found[0].kind,
            scores=scores_of(answer, plan.snapshot) if options.explain else None,
        )

    def _logits(self, members: Sequence[Member], label_sets: Sequence[LabelSet]) -> Tensor:
        said = [
            logits(member.features_E, label_set.features_CE, self._logit_scale)
            for member, label_set in zip(members, label_sets, strict=True)
        ]
        return averaged(said, [member.weight for member in members])


class _LabelSets:
    """The label sets that the answers to one request need; each is put together once."""

    def __init__(
        self, snapshot: Snapshot, options: ClassifyOptions, labels: LabelCache, unions: Unions
    ) -> None:
        self._snapshot = snapshot
        self._labels, self._templates = _tuple(options.labels), _tuple(options.templates)
        self._cache = labels
        self._unions = unions
        self._made: dict[tuple[int | None, bool], LabelSet] = {}

    async def get(self, resident: Resident | None, *, alone: bool) -> LabelSet:
        """What a path chooses among: by itself, or as one of several that answer together."""
        key = (resident.path if resident else None, alone)
        if key not in self._made:
            self._made[key] = await (self._own(resident) if alone else self._common(resident))
        return self._made[key]

    async def _own(self, resident: Resident | None) -> LabelSet:
        if self._labels is not None:
            return await self._cache.get(resident, self._labels, self._templates)
        return resident.own if resident else self._union()

    async def _common(self, resident: Resident | None) -> LabelSet:
        """The same names by the same templates, whoever answers."""
        if self._labels is not None:
            templates = self._templates or DEFAULT_TEMPLATES
            return await self._cache.get(resident, self._labels, templates)
        return await self._unions.get(resident, self._snapshot) if resident else self._union()

    def _union(self) -> LabelSet:
        assert self._snapshot.union is not None  # _check_labels refuses zero-shot without labels
        return self._snapshot.union


def _choices(logits_C: Tensor, label_set: LabelSet, top_k: int) -> list[Choice]:
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

"""`POST /v1/route`: which task would answer, and why; no labels.

No expert computes, but for those of neighbours where they would answer what no task claims.
"""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request, Response

from medley.errors import ImageError
from medley.routed import ZERO_SHOT
from service.answers.classification import failure_of, scores_of
from service.answers.engine import Answer
from service.answers.inference import Inference
from service.answers.members import members_of, path_of, taken_by
from service.answers.planning import Plan, Policy, make_plan
from service.intake.call import Call, call_of, until_gone
from service.intake.forms import Intake, read_classification
from service.state import CurrentService
from service.wire.openapi import CLASSIFY_BODY, PROBLEM_RESPONSES
from service.wire.route_schemas import Decision, RouteResponse, RouteScore

__all__ = ["routes"]

routes = APIRouter(prefix="/v1", tags=["classify"], responses=PROBLEM_RESPONSES)


@routes.post("/route", response_model=RouteResponse, openapi_extra=CLASSIFY_BODY)
async def route(request: Request, service: CurrentService) -> Response:
    """Say what a classification would do: the same request, decided but not carried out."""
    call = call_of(request, service.settings)
    with service.bodies.open(request, call) as bounded:
        intake = await read_classification(bounded, service.settings)
        work = _decided(service.inference, service.policy, intake, call)
        answer, stages_s = await until_gone(request, work)
    headers = {
        "Server-Timing": call.server_timing(stages_s),
        "X-Registry-Generation": str(answer.generation),
    }
    body = answer.model_dump_json(exclude_none=True)
    return Response(body, media_type="application/json", headers=headers)


async def _decided(
    inference: Inference, policy: Policy, intake: Intake, call: Call
) -> tuple[RouteResponse, dict[str, float]]:
    options = intake.options
    labels = tuple(options.labels) if options.labels is not None else None
    nearest = policy.nearest(options)
    async with inference.planned(options.model, call, labels=labels, nearest=nearest) as plan:

        async def decision(answer: Answer) -> Decision:
            return _decision(answer, plan, policy)

        look = _look(plan)
        outcome = await inference.run(intake.images, look, call, decision)
    outcome.raise_alone()
    results = [failure_of(r) if isinstance(r, ImageError) else r for r in outcome.results]
    generation = plan.snapshot.desired.generation
    return RouteResponse(generation=generation, results=results), outcome.stages_s


def _look(plan: Plan) -> Plan:
    """All scores are there, whatever path is taken; neighbours are, if none is to be taken."""
    look = make_plan(plan.snapshot, "base")
    if not plan.ask.nearest:
        return look
    return replace(look, ask=replace(plan.ask, eligible=frozenset()))


def _decision(answer: Answer, plan: Plan, policy: Policy) -> Decision:
    resident = plan.snapshot.by_path.get(_path(answer, plan))
    unclaimed = path_of(members_of(answer, plan.snapshot, policy.weights))
    return Decision(
        path=taken_by(resident) if resident else unclaimed,
        routed_by=plan.routed_by,
        scores=_route_scores(answer, plan),
    )


def _path(answer: Answer, plan: Plan) -> int:
    """The rule of `SelectorBank.decide`, on the scores that it would have decided by."""
    if plan.ask.path is not None:
        return plan.ask.path
    claimed = [p for p in plan.ask.eligible or () if answer.accepted.get(p)]
    return min(claimed, key=lambda p: (answer.scores[p], p), default=ZERO_SHOT)


def _route_scores(answer: Answer, plan: Plan) -> dict[str, RouteScore]:
    live = plan.snapshot.live
    return {
        task: RouteScore(
            **score.model_dump(),
            margin=_margin(score.score, score.threshold),
            eligible=_eligible(live[task].path, plan),
        )
        for task, score in scores_of(answer, plan.snapshot).items()
    }


def _eligible(path: int, plan: Plan) -> bool:
    return path == plan.ask.path or path in (plan.ask.eligible or ())


def _margin(score: float | None, threshold: float | None) -> float | None:
    return None if score is None or threshold is None else threshold - score

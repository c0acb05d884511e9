"""`POST /v1/embeddings`: images and texts as unit vectors, as OpenAI's clients ask for them.

Vectors of one model can be compared with each other; hence `auto` is no model here.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import replace

from fastapi import APIRouter, Request, Response
from torch import Tensor

from medley.errors import ImageError
from service.answers.engine import Answer
from service.answers.planning import Plan
from service.errors import PayloadError, RequestError
from service.intake.call import Call, call_of, until_gone
from service.intake.forms import DataUri, ImageSource, Url, checked
from service.settings import Settings
from service.state import CurrentService, Service
from service.versions.live import Resident
from service.wire.openai_schemas import EmbeddingAnswer, EmbeddingsAnswer, EmbeddingsRequest
from service.wire.openapi import OPENAI_RESPONSES, json_body

__all__ = ["routes"]

routes = APIRouter(prefix="/v1", tags=["embeddings"], responses=OPENAI_RESPONSES)
_MAX_TEXT = 500  # characters, as a label in a template may have
_AS_IT_IS = ("{}",)  # the template that adds nothing
_DATA = "data:"


@routes.post(
    "/embeddings", response_model=EmbeddingsAnswer, openapi_extra=json_body(EmbeddingsRequest)
)
async def embeddings(request: Request, service: CurrentService) -> Response:
    """Embed images (data URIs, or URLs where the server fetches any) or texts.

    Texts are embedded as they are, without a prompt around them. One bad input fails the request.
    """
    call = call_of(request, service.settings)
    with service.bodies.open(request, call) as body:
        asked = checked(EmbeddingsRequest, await body.body())
        answer, stages_s = await until_gone(request, _embedded(asked, service, call))
    headers = {"Server-Timing": call.server_timing(stages_s)}
    return Response(answer.model_dump_json(), media_type="application/json", headers=headers)


async def _embedded(
    asked: EmbeddingsRequest, service: Service, call: Call
) -> tuple[EmbeddingsAnswer, dict[str, float]]:
    inputs = [asked.input] if isinstance(asked.input, str) else asked.input
    if asked.model == "auto":
        raise _wrong("model", "embeddings of several models cannot be compared: name one")
    images = _are_images(asked, inputs)
    _check_inputs(inputs, service.settings, images=images)
    async with service.inference.planned(asked.model, call) as found:
        plan = replace(found, follows_live=False)  # a canary's vectors would be another version's
        resident = plan.snapshot.by_path.get(-1 if plan.ask.path is None else plan.ask.path)
        if images:
            vectors, stages_s = await _of_images(inputs, plan, service, call)
        else:
            vectors, stages_s = await _of_texts(inputs, resident, service, call)
    data = [
        EmbeddingAnswer(index=index, embedding=_written(vector_E, asked.encoding_format))
        for index, vector_E in enumerate(vectors)
    ]
    return EmbeddingsAnswer(data=data, model=_name(resident)), stages_s


async def _of_images(
    inputs: Sequence[str], plan: Plan, service: Service, call: Call
) -> tuple[list[Tensor], dict[str, float]]:
    async def features(answer: Answer) -> Tensor:
        return answer.features_E

    outcome = await service.inference.run(_sources(inputs), plan, call, features)
    vectors: list[Tensor] = []
    for index, result in enumerate(outcome.results):
        if isinstance(result, ImageError):
            raise ImageError(f"input.{index}: {result}", code=result.code) from result
        vectors.append(result)
    return vectors, outcome.stages_s


async def _of_texts(
    inputs: Sequence[str], resident: Resident | None, service: Service, call: Call
) -> tuple[list[Tensor], dict[str, float]]:
    start_s = time.monotonic()
    async with call.in_time():
        encoded = await service.labels.get(resident, tuple(inputs), _AS_IT_IS)
    return list(encoded.features_CE), {"text": time.monotonic() - start_s}


def _are_images(asked: EmbeddingsRequest, inputs: Sequence[str]) -> bool:
    if asked.modality is not None:
        return asked.modality == "image"
    kinds = {_is_data_uri(text) for text in inputs}
    if len(kinds) > 1:
        raise _wrong("input", "some are data URIs and some are not: say which modality is meant")
    return kinds.pop()


def _check_inputs(inputs: Sequence[str], settings: Settings, *, images: bool) -> None:
    limit = settings.max_images if images else settings.max_labels
    if len(inputs) > limit:
        raise PayloadError(f"{len(inputs)} inputs, limit {limit}", code="too_many_inputs")
    if not images and any(len(text) > _MAX_TEXT for text in inputs):
        raise PayloadError(f"a text is longer than {_MAX_TEXT} characters")


def _sources(inputs: Sequence[str]) -> list[ImageSource]:
    return [DataUri(text) if _is_data_uri(text) else Url(text) for text in inputs]


def _is_data_uri(text: str) -> bool:
    return text[: len(_DATA)].lower() == _DATA


def _written(vector_E: Tensor, encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector_E.numpy().astype("<f4").tobytes()).decode()
    return vector_E.tolist()


def _name(resident: Resident | None) -> str:
    return "base" if resident is None else f"{resident.record.task}@{resident.record.version}"


def _wrong(where: str, what: str) -> RequestError:
    return RequestError(f"{where}: {what}", errors=[{"where": where, "what": what}])

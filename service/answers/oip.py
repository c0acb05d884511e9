"""An inference request of the Open Inference Protocol to a classification, and its answer back.

Knows the protocol's tensors; of images and tasks only what the native API says of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from medley.errors import ImageError
from service.errors import RequestError
from service.intake.forms import Base64, ImageSource, Intake, checked, field_errors
from service.wire.schemas import ClassifyOptions, ClassifyResponse, Failure, Prediction
from service.wire.tensors import read_values, written_floats, written_texts
from service.wire.v2_schemas import (
    OUTPUTS,
    BinarySize,
    InferInput,
    InferParameters,
    InferRequest,
    InferResponse,
    OutputTensor,
    TensorMetadata,
)

__all__ = ["Asked", "Body", "answered", "asked_of"]

_NOT_BY_VERSION = ("auto", "base")


@dataclass(frozen=True)
class Asked:
    """A request in the protocol's words and in ours."""

    model: str
    request: InferRequest
    intake: Intake


@dataclass(frozen=True)
class Body:
    """A body: JSON, and behind its first `json_bytes` bytes binary data, if there are any."""

    content: bytes
    json_bytes: int | None


def asked_of(body: Body, model: str, selector: str) -> Asked:
    """Read a request.

    Args:
        body: as it came.
        model: its name in the address.
        selector: what `/v1/classify` calls the model, with the version if the address has one.

    Raises:
        SyntaxProblemError, RequestError: it cannot be read.
    """
    end = body.json_bytes if body.json_bytes is not None else len(body.content)
    if end > len(body.content):
        raise RequestError("Inference-Header-Content-Length is more than the body has")
    request = checked(InferRequest, body.content[:end])
    images = _images(request.inputs[0], body.content[end:])
    options = _options(selector, request.parameters or InferParameters())
    return Asked(model, request, Intake(images, options))


def answered(asked: Asked, response: ClassifyResponse) -> Body:
    """Write the answer; whichever outputs are asked for as binary come behind the JSON.

    Raises:
        ImageError: an image cannot be used; the protocol has no error of one value.
    """
    found = _predictions(response)
    columns: dict[str, list[str] | list[float]] = {
        "label": [one.label for one in found],
        "probability": [one.probability for one in found],
        "task": [one.path.task or "" for one in found],
        "version": [one.path.version or "" for one in found],
    }
    tensors, binary = [], b""
    for output in OUTPUTS:
        as_binary = _wanted(asked.request, output.name)
        if as_binary is None:
            continue
        tensor, data = _tensor(output, columns[output.name], binary=as_binary)
        tensors.append(tensor)
        binary += data
    answer = InferResponse(
        model_name=asked.model,
        model_version=_version(asked, found),
        id=asked.request.id,
        parameters=_parameters(response, found),
        outputs=tensors,
    )
    text = answer.model_dump_json(exclude_none=True).encode()
    return Body(text + binary, len(text) if binary else None)


def _parameters(response: ClassifyResponse, found: Sequence[Prediction]) -> dict[str, str | int]:
    """What the outputs do not say: of how many values several paths are the authors."""
    parameters: dict[str, str | int] = {"generation": response.generation}
    aggregated = sum(one.path.kind == "aggregate" for one in found)
    return parameters | ({"aggregated": aggregated} if aggregated else {})


def _images(tensor: InferInput, behind: bytes) -> list[ImageSource]:
    """The images, from the JSON or from behind it; exactly as many as the shape says."""
    size = tensor.parameters.binary_data_size if tensor.parameters else None
    images: list[ImageSource]
    if size is not None:
        if tensor.data is not None or size != len(behind):
            raise _wrong("binary_data_size is not what stands behind the JSON")
        images = [*read_values(behind)]
    elif tensor.data is None or behind:
        raise _wrong("give either data or binary_data_size")
    else:
        images = [Base64(text) for text in tensor.data]
    if len(images) != tensor.shape[0]:
        raise _wrong(f"the shape says {tensor.shape[0]} values, the data have {len(images)}")
    if not images:
        raise _wrong("at least one image is needed")
    return images


def _options(selector: str, parameters: InferParameters) -> ClassifyOptions:
    try:
        own = parameters.model_dump(exclude={"binary_data_output"})
        return ClassifyOptions(model=selector, top_k=1, **own)
    except ValidationError as error:
        raise field_errors(error.errors()) from None


def _predictions(response: ClassifyResponse) -> list[Prediction]:
    found = []
    for index, result in enumerate(response.results):
        if isinstance(result, Failure):
            problem = result.error
            raise ImageError(f"inputs.0.data.{index}: {problem.detail}", code=problem.code)
        found.append(result)
    return found


def _wanted(request: InferRequest, name: str) -> bool | None:
    """Whether an output is wanted as binary; None if it is not wanted at all."""
    default = request.parameters is not None and request.parameters.binary_data_output
    if not request.outputs:
        return default
    for output in request.outputs:
        if output.name == name:
            own = output.parameters.binary_data if output.parameters else None
            return default if own is None else own
    return None


def _tensor(
    output: TensorMetadata, values: Sequence[str] | Sequence[float], *, binary: bool
) -> tuple[OutputTensor, bytes]:
    tensor = OutputTensor(name=output.name, datatype=output.datatype, shape=[len(values)])
    if not binary:
        return tensor.model_copy(update={"data": values}), b""
    texts = [value for value in values if isinstance(value, str)]
    numbers = [value for value in values if isinstance(value, float)]
    data = written_texts(texts) if output.datatype == "BYTES" else written_floats(numbers)
    return tensor.model_copy(update={"parameters": BinarySize(binary_data_size=len(data))}), data


def _version(asked: Asked, found: Sequence[Prediction]) -> str | None:
    """The one that answered; `auto` and `base` have none, and a canary may make it two."""
    if asked.intake.options.model in _NOT_BY_VERSION:
        return None
    versions = {one.path.version for one in found}
    return versions.pop() if len(versions) == 1 else None


def _wrong(what: str) -> RequestError:
    return RequestError(f"inputs.0: {what}", errors=[{"where": "inputs.0", "what": what}])

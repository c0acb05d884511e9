"""The wire of the Open Inference Protocol V2 (REST), its binary and its repository extension.

No behaviour but checks; names and shapes are the protocol's own.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Json

from service.wire.schemas import MAX_NEIGHBOURS, Problem, Unclaimed

__all__ = [
    "INPUTS",
    "OUTPUTS",
    "IndexEntry",
    "IndexRequest",
    "InferInput",
    "InferRequest",
    "InferResponse",
    "LoadRequest",
    "ModelMetadata",
    "ModelReady",
    "OutputTensor",
    "ServerLive",
    "ServerMetadata",
    "ServerReady",
    "TensorMetadata",
    "UnloadRequest",
    "V2Problem",
]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class V2Problem(Problem):
    """A problem, with its text where the protocol looks for it."""

    error: str


class ServerMetadata(BaseModel):
    """What server this is."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(BaseModel):
    """The process should go on."""

    live: bool


class ServerReady(BaseModel):
    """Traffic should come here; `live` beside `ready` as the protocol's text has it."""

    ready: bool
    live: bool


class TensorMetadata(BaseModel):
    """An input or an output; -1 is the number of images."""

    name: str
    datatype: Literal["BYTES", "FP32"]
    shape: list[int] = [-1]


class ModelMetadata(BaseModel):
    """What a model takes and gives; `versions` are all that may be asked for."""

    name: str
    versions: list[str] | None = None
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(BaseModel):
    """Whether a model can be asked."""

    name: str
    ready: bool


INPUTS = [TensorMetadata(name="image", datatype="BYTES")]
OUTPUTS = [
    TensorMetadata(name="label", datatype="BYTES"),
    TensorMetadata(name="probability", datatype="FP32"),
    TensorMetadata(name="task", datatype="BYTES"),
    TensorMetadata(name="version", datatype="BYTES"),
]


class InferParameters(_Asked):
    """The request's own: labels to choose among, as a list or as that list in JSON."""

    labels: list[str] | Json[list[str]] | None = None
    templates: list[str] | Json[list[str]] | None = None
    unclaimed: Unclaimed | None = None
    neighbours: int | None = Field(default=None, ge=1, le=MAX_NEIGHBOURS)
    binary_data_output: bool = False


class InputParameters(_Asked):
    """How an input's data come."""

    content_type: Literal["base64"] | None = None
    binary_data_size: int | None = Field(default=None, ge=0)


class InferInput(_Asked):
    """The images: files in base64 in `data`, or as they are behind the JSON."""

    name: Literal["image"]
    shape: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, max_length=1)
    datatype: Literal["BYTES"]
    parameters: InputParameters | None = None
    data: list[str] | None = None


class OutputParameters(_Asked):
    """Whether an output is to come behind the JSON."""

    binary_data: bool | None = None


class InferOutput(_Asked):
    """An output that is wanted."""

    name: Literal["label", "probability", "task", "version"]
    parameters: OutputParameters | None = None


class InferRequest(_Asked):
    """One input, `image`; all outputs unless some are named."""

    id: str | None = Field(default=None, max_length=200)
    parameters: InferParameters | None = None
    inputs: list[InferInput] = Field(min_length=1, max_length=1)
    outputs: list[InferOutput] | None = None


class BinarySize(BaseModel):
    """How many bytes behind the JSON are an output's."""

    binary_data_size: int


class OutputTensor(BaseModel):
    """One output, one value for each image."""

    name: str
    datatype: Literal["BYTES", "FP32"]
    shape: list[int]
    parameters: BinarySize | None = None
    data: list[str] | list[float] | None = None


class InferResponse(BaseModel):
    """The answers; `model_version` is absent where each image may have another."""

    model_name: str
    model_version: str | None = None
    id: str | None = None
    parameters: dict[str, str | int] = {}
    outputs: list[OutputTensor]


class IndexRequest(_Asked):
    """Which models to list: all, or those that are ready."""

    ready: bool = False


class IndexEntry(BaseModel):
    """One version of one model."""

    name: str
    version: str | None = None
    state: Literal["READY", "UNAVAILABLE"]
    reason: str = ""


class LoadRequest(_Asked):
    """Nothing may be said: a model's files and settings never come in a request."""

    parameters: dict[str, Any] = Field(default={}, max_length=0)


class UnloadParameters(_Asked):
    """Nothing depends on a version, so this changes nothing."""

    unload_dependents: bool = False


class UnloadRequest(_Asked):
    """As Triton's clients send it."""

    parameters: UnloadParameters = UnloadParameters()

"""The wire of the routes in OpenAI's shape: models and embeddings. No behaviour but checks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "EmbeddingAnswer",
    "EmbeddingsAnswer",
    "EmbeddingsRequest",
    "ErrorAnswer",
    "ModelAnswer",
    "ModelsAnswer",
    "Usage",
]

Input = Annotated[str, Field(min_length=1)]


class ModelAnswer(BaseModel):
    """Something that a request may name as its `model`."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time of its registration; 0 for `auto` and `base`")
    owned_by: Literal["medley"] = "medley"
    parent: str | None = Field(default=None, description="What a task was learnt on top of")
    root: str | None = Field(default=None, description="The weights: a digest")


class ModelsAnswer(BaseModel):
    """All that is live."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class EmbeddingsRequest(BaseModel):
    """What to embed, all of it images or all of it texts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str = Field(
        min_length=1, max_length=200, description="`base`, a task, `task@version` or `task@alias`"
    )
    input: Input | list[Input] = Field(
        min_length=1, description="Images as data URIs, or texts, which are taken as they are"
    )
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="Numbers, or base64 of little-endian float32"
    )
    modality: Literal["image", "text"] | None = Field(
        default=None, description='Without it an input that begins with "data:" is an image'
    )
    user: str | None = Field(default=None, description="Ignored")


class EmbeddingAnswer(BaseModel):
    """One embedding, of unit length."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Nobody pays by the token here; OpenAI's clients want the field."""

    prompt_tokens: int = 0
    total_tokens: int = 0


class EmbeddingsAnswer(BaseModel):
    """One embedding for each input, in order; `model` is what answered, with its version."""

    object: Literal["list"] = "list"
    data: list[EmbeddingAnswer]
    model: str
    usage: Usage = Usage()


class ErrorFields(BaseModel):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """A problem in OpenAI's shape."""

    error: ErrorFields

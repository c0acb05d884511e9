"""The wire: what a request may say and what an answer says. No behaviour beyond checking fields."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = [
    "MAX_NEIGHBOURS",
    "Choice",
    "ClassifyOptions",
    "ClassifyRequest",
    "ClassifyResponse",
    "Failure",
    "ImageInput",
    "Path",
    "PathMember",
    "Prediction",
    "Problem",
    "TaskScore",
    "Unclaimed",
]

Unclaimed = Literal["zero_shot", "aggregate"]
MAX_NEIGHBOURS = 16
Label = Annotated[str, Field(min_length=1, max_length=200)]
Template = Annotated[str, Field(max_length=300)]


class ClassifyOptions(BaseModel):
    """How to classify, whatever form the images come in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        default="auto",
        min_length=1,
        max_length=200,
        description="`auto`, `base`, a task, `task@version` or `task@alias`",
    )
    labels: list[Label] | None = Field(
        default=None, description="Choose among these instead of a task's"
    )
    templates: list[Template] | None = Field(
        default=None, description='Prompts for the labels, each with one "{}"'
    )
    top_k: int = Field(default=5, ge=1, le=1000, description="How many labels to name")
    explain: bool = Field(default=False, description="Add every live task's score and threshold")
    unclaimed: Unclaimed | None = Field(
        default=None, description="Who answers what no task claims; else as the server is set"
    )
    neighbours: int | None = Field(
        default=None,
        ge=1,
        le=MAX_NEIGHBOURS,
        description="How many tasks answer beside zero-shot then; fewer if there are fewer",
    )

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, labels: list[str] | None) -> list[str] | None:
        if labels is not None:
            if not labels:
                raise ValueError("at least one label is needed")
            if any(not label.strip() for label in labels):
                raise ValueError("a label is blank")
            if len({label.casefold().strip() for label in labels}) < len(labels):
                raise ValueError("labels must differ")
        return labels

    @model_validator(mode="after")
    def _templates_fit(self) -> ClassifyOptions:
        if self.templates is not None:
            if self.labels is None:
                raise ValueError("templates need labels")
            if not self.templates or any(t.count("{}") != 1 for t in self.templates):
                raise ValueError('every template needs one "{}"')
        return self

    @model_validator(mode="after")
    def _neighbours_fit(self) -> ClassifyOptions:
        if self.neighbours is not None and self.unclaimed == "zero_shot":
            raise ValueError("zero_shot has no neighbours")
        return self


class ImageInput(BaseModel):
    """One image of a JSON request."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes_b64: str | None = Field(default=None, description="The image file, base64")
    data_uri: str | None = Field(default=None, description="`data:image/...;base64,...`")
    url: str | None = Field(
        default=None, max_length=4096, description="http(s); where the server fetches images at all"
    )

    @model_validator(mode="after")
    def _one_source(self) -> ImageInput:
        if [self.bytes_b64, self.data_uri, self.url].count(None) != 2:
            raise ValueError("give one of bytes_b64, data_uri and url")
        return self


class ClassifyRequest(ClassifyOptions):
    """The JSON form: one `image` or a list of `images`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    image: ImageInput | None = None
    images: list[ImageInput] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_form(self) -> ClassifyRequest:
        if (self.image is None) == (self.images is None):
            raise ValueError("give either image or images")
        return self


class Choice(BaseModel):
    """A label with its probability among the label set."""

    label: str
    probability: float


class PathMember(BaseModel):
    """One of those who answer together for an image."""

    kind: Literal["task", "zero_shot"]
    task: str | None = None
    version: str | None = None
    digest: str | None = None
    similarity: float | None = Field(
        default=None, description="Cosine with the nearest prototype; zero-shot has none"
    )
    weight: float = Field(description="Share of its logits in the mean; all add up to 1")


class Path(BaseModel):
    """How an image was computed."""

    kind: Literal["task", "zero_shot", "aggregate"]
    task: str | None = None
    version: str | None = None
    digest: str | None = None
    members: list[PathMember] | None = Field(
        default=None, description="Of an aggregate: zero-shot, then the nearest tasks"
    )


class TaskScore(BaseModel):
    """What DDAS thinks of one image and one live task; smaller is more familiar."""

    score: float | None = Field(default=None, description="Absent if it is not a finite number")
    threshold: float | None = Field(
        default=None, description="Accepted up to here; absent if any score is"
    )
    accepted: bool


class Prediction(BaseModel):
    """The answer for one image."""

    label: str
    probability: float
    top_k: list[Choice]
    path: Path
    routed_by: Literal["auto", "labels", "explicit"]
    label_set: Literal["task", "request", "union"]
    scores: dict[str, TaskScore] | None = None


class Problem(BaseModel):
    """RFC 9457 problem details."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    code: str
    detail: str


class Failure(BaseModel):
    """The answer for one image, among several, that cannot be used."""

    error: Problem


class ClassifyResponse(BaseModel):
    """One result per image, in the order of the request."""

    generation: int
    results: list[Prediction | Failure]

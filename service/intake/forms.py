"""From an HTTP request to images, as they came, and options.

Three forms are read: JSON with base64, multipart with files, and one raw image with the options in
the query. What is read is bounded by `bodies.py`. Nothing is fetched or decoded here.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import QueryParams, UploadFile

from medley.errors import ImageError
from service.errors import MediaTypeError, PayloadError, RequestError, SyntaxProblemError
from service.settings import Settings
from service.wire.schemas import ClassifyOptions, ClassifyRequest, ImageInput

__all__ = [
    "Base64",
    "DataUri",
    "ImageSource",
    "Intake",
    "Url",
    "check_counts",
    "checked",
    "field_errors",
    "image_bytes",
    "image_source",
    "read_classification",
]

_MAX_PARTS = 20_000  # of a form; its bytes are bounded, and the counts are checked afterwards
_DATA_URI = re.compile(r"data:[^,]{0,200};base64", re.IGNORECASE)
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Base64:
    """An image file as text; whether it is valid is found out where it is decoded."""

    text: str


@dataclass(frozen=True)
class DataUri:
    """An image file as a `data:` URI of base64; checked where it is decoded."""

    text: str


@dataclass(frozen=True)
class Url:
    """Where an image is to be fetched."""

    text: str


ImageSource = bytes | Base64 | DataUri | Url  # `bytes` are the image file


@dataclass(frozen=True)
class Intake:
    """What a request brought: images and how to classify them."""

    images: list[ImageSource]
    options: ClassifyOptions


async def read_classification(request: Request, settings: Settings) -> Intake:
    """Read the body in whichever of the three forms it says it has.

    Args:
        request: one of `Bodies.open`, whose errors pass through.
        settings: how many images and labels there may be.

    Raises:
        SyntaxProblemError, RequestError, PayloadError, MediaTypeError.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        intake = _from_json(await request.body(), request.query_params)
    elif kind == "multipart/form-data":
        intake = await _from_form(request)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        intake = Intake([await request.body()], _options(request.query_params.multi_items()))
    else:
        raise MediaTypeError("send application/json, multipart/form-data or image/*")
    check_counts(intake, settings)
    return intake


def image_source(image: ImageInput) -> ImageSource:
    """The image of a JSON request."""
    if image.bytes_b64 is not None:
        return Base64(image.bytes_b64)
    if image.data_uri is not None:
        return DataUri(image.data_uri)
    assert image.url is not None  # the schema wants one of the three
    return Url(image.url)


def image_bytes(image: bytes | Base64 | DataUri) -> bytes:
    """The file's bytes.

    Raises:
        ImageError: `bad_base64` or `bad_data_uri`.
    """
    if isinstance(image, bytes):
        return image
    try:
        return base64.b64decode(_base64_text(image), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("the image is not base64", code="bad_base64") from error


def checked(model: type[Model], body: bytes) -> Model:
    """Read a JSON body into `model`; see `read_classification` for what it raises."""
    with _request_errors():
        return model.model_validate_json(body)


def field_errors(errors: Iterable[Mapping[str, Any]]) -> RequestError:
    """One error of ours for a list of pydantic's: where and what, never the value."""
    found = [{"where": ".".join(map(str, e["loc"])), "what": str(e["msg"])} for e in errors]
    detail = "; ".join(f"{e['where']}: {e['what']}" if e["where"] else e["what"] for e in found)
    return RequestError(detail, errors=found)


def _base64_text(image: Base64 | DataUri) -> str:
    if isinstance(image, Base64):
        return image.text
    head, comma, data = image.text.partition(",")
    if not comma or not _DATA_URI.fullmatch(head):
        raise ImageError("the data URI is not data:<type>;base64,<data>", code="bad_data_uri")
    return data


def _from_json(body: bytes, query: QueryParams) -> Intake:
    if query:
        raise RequestError("a JSON request has its options in the body, not in the query")
    request = checked(ClassifyRequest, body)
    images = [request.image] if request.image else request.images or []
    return Intake([image_source(image) for image in images], request)


async def _from_form(request: Request) -> Intake:
    form = await request.form(max_files=_MAX_PARTS, max_fields=_MAX_PARTS)
    try:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files:
            raise RequestError("the form has no file")
        fields = [(name, v) for name, v in form.multi_items() if isinstance(v, str)]
        options = _options([*request.query_params.multi_items(), *fields])
        return Intake([await file.read() for file in files], options)
    finally:
        await form.close()


def _options(items: Iterable[tuple[str, str]]) -> ClassifyOptions:
    """Options as text, where `labels` and `templates` may come several times."""
    fields: dict[str, str | list[str]] = {}
    for name, value in items:
        if name in ("labels", "templates"):
            several = fields.setdefault(name, [])
            assert isinstance(several, list)
            several.append(value)
        else:
            fields[name] = value
    with _request_errors():
        return ClassifyOptions.model_validate(fields)


def check_counts(intake: Intake, settings: Settings) -> None:
    """Refuse more images, labels or prompts than one request may bring, by PayloadError."""
    options = intake.options
    labels, templates = len(options.labels or ()), len(options.templates or (None,))
    if len(intake.images) > settings.max_images:
        raise PayloadError(
            f"{len(intake.images)} images, limit {settings.max_images}", code="too_many_images"
        )
    if labels > settings.max_labels:
        raise PayloadError(f"{labels} labels, limit {settings.max_labels}", code="too_many_labels")
    if labels * templates > settings.max_prompts:
        raise PayloadError(
            f"{labels} labels x {templates} templates, limit {settings.max_prompts} prompts",
            code="too_many_labels",
        )


@contextmanager
def _request_errors() -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        if any(e["type"] == "json_invalid" and not e["loc"] for e in problems):
            raise SyntaxProblemError("the body is not JSON") from None
        raise field_errors(problems) from None

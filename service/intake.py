"""From an HTTP request to images, as they came, and options.

Three forms are read: JSON with base64, multipart with files, and one raw image with the options in
the query. Every read is bounded. Nothing is fetched from anywhere: no URL, no path.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import QueryParams, UploadFile
from starlette.types import Message, Receive

from medley.errors import ImageError
from service.errors import MediaTypeError, PayloadError, RequestError, SyntaxProblemError
from service.schemas import ClassifyOptions, ClassifyRequest
from service.settings import Settings

__all__ = [
    "Base64",
    "ImageSource",
    "Intake",
    "checked",
    "field_errors",
    "image_bytes",
    "read_classification",
]

_MAX_PARTS = 20_000  # of a form; its bytes are bounded, and the counts are checked afterwards
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Base64:
    """An image file as text; whether it is valid is found out where it is decoded."""

    text: str


ImageSource = bytes | Base64  # `bytes` are the image file


@dataclass(frozen=True)
class Intake:
    """What a request brought: images and how to classify them."""

    images: list[ImageSource]
    options: ClassifyOptions


async def read_classification(request: Request, settings: Settings) -> Intake:
    """Read the body in whichever of the three forms it says it has.

    Raises:
        SyntaxProblemError, RequestError, PayloadError, MediaTypeError.
    """
    bounded = Request(request.scope, _bounded(request, settings.max_request_bytes))
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        intake = _from_json(await bounded.body(), request.query_params)
    elif kind == "multipart/form-data":
        intake = await _from_form(bounded)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        intake = Intake([await bounded.body()], _options(request.query_params.multi_items()))
    else:
        raise MediaTypeError("send application/json, multipart/form-data or image/*")
    _check_counts(intake, settings)
    return intake


def image_bytes(image: ImageSource) -> bytes:
    """The file's bytes.

    Raises:
        ImageError: the base64 is not valid.
    """
    if isinstance(image, bytes):
        return image
    try:
        return base64.b64decode(image.text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("bytes_b64 is not base64", code="bad_base64") from error


def checked(model: type[Model], body: bytes) -> Model:
    """Read a JSON body into `model`; see `read_classification` for what it raises."""
    with _request_errors():
        return model.model_validate_json(body)


def field_errors(errors: Iterable[Mapping[str, Any]]) -> RequestError:
    """One error of ours for a list of pydantic's: where and what, never the value."""
    found = [{"where": ".".join(map(str, e["loc"])), "what": str(e["msg"])} for e in errors]
    detail = "; ".join(f"{e['where']}: {e['what']}" if e["where"] else e["what"] for e in found)
    return RequestError(detail, errors=found)


def _from_json(body: bytes, query: QueryParams) -> Intake:
    if query:
        raise RequestError("a JSON request has its options in the body, not in the query")
    request = checked(ClassifyRequest, body)
    images = [request.image] if request.image else request.images or []
    return Intake([Base64(image.bytes_b64) for image in images], request)


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


def _check_counts(intake: Intake, settings: Settings) -> None:
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


def _bounded(request: Request, max_bytes: int) -> Receive:
    """The request's body, cut off with PayloadError where it exceeds the limit."""
    too_large = PayloadError(f"the request is larger than {max_bytes} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    seen = 0

    async def receive() -> Message:
        nonlocal seen
        message = await request.receive()
        seen += len(message.get("body", b""))
        if seen > max_bytes:
            raise too_large
        return message

    return receive


@contextmanager
def _request_errors() -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        if any(e["type"] == "json_invalid" for e in problems):
            raise SyntaxProblemError("the body is not JSON") from None
        raise field_errors(problems) from None

"""What goes wrong in the service, and what each error is in HTTP (RFC 9457 problem+json).

The table below is complete for `MedleyError`'s tree (a test walks it). Whatever is not in that
tree is our bug: the middleware answers 500 with the request's id and keeps the exception's text in
the log.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from medley.errors import (
    BackboneError,
    BundleError,
    CapacityError,
    DataError,
    ImageError,
    MedleyError,
)

__all__ = [
    "STATUS",
    "STATUS_OF_CODE",
    "AccessError",
    "BusyError",
    "ConflictError",
    "DeadlineError",
    "EngineError",
    "FetchError",
    "MediaTypeError",
    "NotFoundError",
    "OutOfMemoryError",
    "PayloadError",
    "PreconditionError",
    "QueueFullError",
    "RegistryError",
    "RequestError",
    "RequestTimeoutError",
    "ServiceError",
    "StorageError",
    "SyntaxProblemError",
    "UnavailableError",
    "problem",
    "problem_fields",
    "status_of",
]


class ServiceError(MedleyError):
    """Base of the service's own errors."""

    code = "service"


class SyntaxProblemError(ServiceError):
    """The body cannot be read as what it says it is."""

    code = "bad_json"


class RequestError(ServiceError):
    """The request is readable and asks for something that makes no sense.

    `errors` lists single fields as `{"where", "what"}`; it never repeats the value.
    """

    code = "invalid_request"

    def __init__(
        self, message: str, *, code: str | None = None, errors: list[dict[str, str]] | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.errors = errors or []


class PayloadError(ServiceError):
    """A body or a list in it is larger than this server takes."""

    code = "too_large"


class MediaTypeError(ServiceError):
    """The content type is none that this route reads."""

    code = "unsupported_media_type"


class NotFoundError(ServiceError):
    """No such thing.

    Codes: unknown_task, unknown_version, unknown_alias, unknown_operation, no_live_version,
    no_rollout.
    """

    code = "unknown_task"


class ConflictError(ServiceError):
    """The registry says otherwise.

    Codes: version_exists, version_live, version_in_use, alias_conflict, no_earlier_version,
    too_few_replicas.
    """

    code = "conflict"


class PreconditionError(ServiceError):
    """What a request asks for in If-Match or If-None-Match is not so any more."""

    code = "precondition_failed"


class AccessError(ServiceError):
    """Without the right to it; codes: unauthorized (401), changes_disabled, cross_origin (403)."""

    code = "unauthorized"


class QueueFullError(ServiceError):
    """More images wait than this server lets wait; `retry_after_s` says when to come again."""

    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BusyError(QueueFullError):
    """All requests together hold as many images, or as many bytes, as this server takes in."""

    code = "busy"


class RequestTimeoutError(ServiceError):
    """The body did not arrive in time."""

    code = "request_timeout"


class FetchError(ImageError):
    """An image's URL; codes: url_refused, fetch_failed, too_large. Silent on what is there."""

    code = "fetch_failed"


class DeadlineError(ServiceError):
    """The time that the client gave has passed; nothing was computed for it."""

    code = "deadline_passed"


class UnavailableError(ServiceError):
    """Not able to answer now.

    Codes: starting, not_ready, draining, engine_dead, version_failed, registry_unavailable, behind,
    replica_gone.
    """

    code = "not_ready"


class RegistryError(UnavailableError):
    """A registry that is none for this server: a start ends there, waiting does not help.

    It is another store's, another backbone's, a newer Medley's, or no registry at all; or its
    address or password is wrong.
    """

    code = "registry_foreign"


class StorageError(ServiceError):
    """The store cannot take the bytes or give them: full, not writable, or (shared) away."""

    code = "storage_full"


class EngineError(ServiceError):
    """A batch failed; the cause is in the log under the request's id."""

    code = "internal"


class OutOfMemoryError(EngineError):
    """The device has no memory to compute even one image, or one job, alone."""

    code = "out_of_memory"


STATUS: dict[type[MedleyError], int] = {
    MedleyError: 500,
    BackboneError: 500,
    BundleError: 422,
    CapacityError: 507,
    DataError: 422,
    ImageError: 422,
    ServiceError: 500,
    SyntaxProblemError: 400,
    RequestError: 422,
    PayloadError: 413,
    MediaTypeError: 415,
    NotFoundError: 404,
    ConflictError: 409,
    PreconditionError: 412,
    AccessError: 401,
    QueueFullError: 429,
    BusyError: 429,
    RequestTimeoutError: 408,
    FetchError: 422,
    UnavailableError: 503,
    RegistryError: 503,
    StorageError: 507,
    EngineError: 500,
    DeadlineError: 504,
    OutOfMemoryError: 503,
}
STATUS_OF_CODE = {  # a code that says more than its class
    "too_large": 413,
    "too_many_pixels": 413,
    "not_an_image": 415,
    "changes_disabled": 403,
    "sources_disabled": 403,
    "cross_origin": 403,
    "store_unavailable": 503,
}
RETRY_AFTER_S = {  # where waiting helps; an error that knows better says so itself
    "starting": 1,
    "draining": 1,
    "not_ready": 5,
    "registry_unavailable": 1,
    "store_unavailable": 5,
    "behind": 1,
}


def status_of(error: MedleyError) -> int:
    """HTTP status of `error`: by its code if that is listed, by its class otherwise."""
    return STATUS_OF_CODE.get(error.code) or STATUS[type(error)]


def problem(error: MedleyError) -> dict[str, Any]:
    """The RFC 9457 fields of `error`, without `instance`, which only the request knows."""
    status = status_of(error)
    detail = "The server failed; see its log." if status == 500 else str(error)
    fields = problem_fields(status, error.code if status != 500 else "internal", detail)
    if isinstance(error, BundleError):
        fields["problems"] = error.problems
    if isinstance(error, RequestError) and error.errors:
        fields["errors"] = error.errors
    retry_after_s = getattr(error, "retry_after_s", RETRY_AFTER_S.get(error.code))
    if retry_after_s is not None:
        fields["retry_after_s"] = retry_after_s
    return fields


def problem_fields(status: int, code: str, detail: str) -> dict[str, Any]:
    """The fields that every problem has."""
    return {
        "type": f"urn:medley:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": detail,
    }

"""What a client can ask of a server: each request as a value, with how its answer is read.

No I/O: `service/client.py` sends them, waiting or awaiting. Light to import: no torch.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from pydantic import BaseModel

from service.wire.openai_schemas import EmbeddingsAnswer
from service.wire.replica_schemas import ReplicasAnswer
from service.wire.rollout_schemas import Rollout, RolloutAnswer
from service.wire.route_schemas import RouteResponse
from service.wire.schemas import ClassifyOptions, ClassifyResponse
from service.wire.signal_schemas import UsageAnswer
from service.wire.task_schemas import (
    ChangeAnswer,
    OperationAnswer,
    OperationsAnswer,
    RegistrationAnswer,
    TaskAnswer,
    TasksAnswer,
)
from service.wire.unified_schemas import UnifiedAnswer, UnifiedModelsAnswer

__all__ = [
    "AwaitedUpload",
    "Exchange",
    "OnProgress",
    "Upload",
    "classify",
    "delete",
    "delete_alias",
    "embed_images",
    "embed_texts",
    "operation",
    "operations",
    "pin",
    "promote",
    "register",
    "register_from",
    "replicas",
    "rollback",
    "rollout",
    "route",
    "set_alias",
    "start_rollout",
    "stop_rollout",
    "task",
    "tasks",
    "unified",
    "upload_unified",
    "usage",
]

CHUNK_BYTES = 1024 * 1024
T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)
OnProgress = Callable[[int], None]  # hears how many bytes went since it last heard


class Upload:
    """A file's bytes for httpx, from the start each time they are asked for.

    Raises:
        OSError: there is no such file.
    """

    def __init__(self, path: Path, on_progress: OnProgress) -> None:
        self._path = path
        self._on_progress = on_progress
        self.size_bytes = path.stat().st_size

    def __iter__(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
                self._on_progress(len(chunk))


class AwaitedUpload:
    """An upload for those who await; httpx takes what can do both for one that cannot."""

    def __init__(self, upload: Upload) -> None:
        self._upload = upload

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._upload:  # a local disk: not worth a thread
            yield chunk


@dataclass(frozen=True)
class Exchange(Generic[T]):
    """One request, and what its answer's body means; `options` are httpx's.

    `long` is a change that may have to bring a version to the device first; `outlasts` one that
    goes on as an operation if it takes too long; `again` tells whether a second attempt does no
    harm, and is answered like the first, after one whose answer was lost.
    """

    method: str
    path: str
    read: Callable[[bytes], T]
    options: Mapping[str, Any] = field(default_factory=dict)
    upload: Upload | None = None
    long: bool = False
    outlasts: bool = False
    again: bool = True

    @property
    def changes(self) -> bool:
        """Whether it changes what is served."""
        return self.method != "GET" and self.path.startswith("/v1/tasks")


def classify(images: Sequence[bytes], options: ClassifyOptions) -> Exchange[ClassifyResponse]:
    """Classify image files."""
    return _with_images("/v1/classify", images, options, ClassifyResponse)


def route(images: Sequence[bytes], options: ClassifyOptions) -> Exchange[RouteResponse]:
    """Ask which path each image would take."""
    which = {"model", "labels", "unclaimed", "neighbours"}
    return _with_images("/v1/route", images, options, RouteResponse, only=which)


def embed_texts(texts: Sequence[str], model: str) -> Exchange[EmbeddingsAnswer]:
    """Ask for the features of texts, as they are."""
    body = {"model": model, "input": list(texts), "modality": "text"}
    return Exchange("POST", "/v1/embeddings", _model(EmbeddingsAnswer), {"json": body})


def embed_images(images: Sequence[bytes], model: str) -> Exchange[EmbeddingsAnswer]:
    """Ask for the features of image files; one that cannot be used fails them all."""
    inputs = [f"data:image/*;base64,{base64.b64encode(image).decode()}" for image in images]
    body = {"model": model, "input": inputs, "modality": "image"}
    return Exchange("POST", "/v1/embeddings", _model(EmbeddingsAnswer), {"json": body})


def tasks() -> Exchange[TasksAnswer]:
    """All tasks."""
    return Exchange("GET", "/v1/tasks", _model(TasksAnswer))


def task(name: str) -> Exchange[TaskAnswer]:
    """One task."""
    return Exchange("GET", _task(name), _model(TaskAnswer))


def usage(name: str) -> Exchange[UsageAnswer]:
    """What a task has used."""
    return Exchange("GET", _task(name, "usage"), _model(UsageAnswer))


def register(
    name: str,
    version: str,
    bundle: Path,
    *,
    activate: bool,
    replicas: str | None,
    wait_s: float,
    on_progress: OnProgress,
) -> Exchange[RegistrationAnswer]:
    """Upload a bundle as a version of a task."""
    upload = Upload(bundle, on_progress)
    options = {
        "headers": _bytes(upload),
        "params": {"activate": activate, "wait": wait_s, **_wanted(replicas)},
    }
    return Exchange(
        "PUT",
        _task(name, "versions", version),
        _model(RegistrationAnswer),
        options,
        upload=upload,
        long=True,
        outlasts=True,
        again=False,
    )


def register_from(
    name: str, version: str, source: str, *, activate: bool, replicas: str | None, wait_s: float
) -> Exchange[RegistrationAnswer]:
    """Let the server get a bundle from a URL that it allows."""
    params = {"activate": activate, "wait": wait_s, **_wanted(replicas)}
    options = {"json": {"source": source}, "params": params}
    path = _task(name, "versions", version)
    return Exchange("PUT", path, _model(RegistrationAnswer), options, long=True, outlasts=True)


def unified() -> Exchange[UnifiedModelsAnswer]:
    """The unified models that versions are loaded from."""
    return Exchange("GET", "/v1/unified", _model(UnifiedModelsAnswer))


def upload_unified(digest: str, path: Path, *, on_progress: OnProgress) -> Exchange[UnifiedAnswer]:
    """Upload a unified model, before the versions that name it."""
    upload = Upload(path, on_progress)
    return Exchange(
        "PUT",
        f"/v1/unified/{quote(digest, safe='')}",
        _model(UnifiedAnswer),
        {"headers": _bytes(upload)},
        upload=upload,
        long=True,
        again=False,
    )


def operation(id: str) -> Exchange[OperationAnswer]:
    """What became of work that outlasted its request."""
    return Exchange("GET", f"/v1/operations/{quote(id, safe='')}", _model(OperationAnswer))


def replicas() -> Exchange[ReplicasAnswer]:
    """All replicas that were heard of lately."""
    return Exchange("GET", "/v1/replicas", _model(ReplicasAnswer))


def operations() -> Exchange[OperationsAnswer]:
    """All operations that the server remembers."""
    return Exchange("GET", "/v1/operations", _model(OperationsAnswer))


def set_alias(
    name: str, alias: str, version: str, *, replicas: str | None
) -> Exchange[ChangeAnswer]:
    """Let an alias name a version; `live` is one."""
    options = {"json": {"version": version}, "params": _wanted(replicas)}
    return Exchange("PUT", _task(name, "aliases", alias), _model(ChangeAnswer), options, long=True)


def delete_alias(name: str, alias: str) -> Exchange[TaskAnswer]:
    """Forget an alias."""
    return Exchange("DELETE", _task(name, "aliases", alias), _model(TaskAnswer), again=False)


def rollback(name: str, *, replicas: str | None) -> Exchange[ChangeAnswer]:
    """Make the version live that was live before; a second attempt would go back twice."""
    path, options = f"{_task(name)}:rollback", {"params": _wanted(replicas)}
    return Exchange("POST", path, _model(ChangeAnswer), options, long=True, again=False)


def pin(name: str, version: str, *, pinned: bool) -> Exchange[TaskAnswer]:
    """Let a version stay on the device, or no more."""
    method = "PUT" if pinned else "DELETE"
    path = _task(name, "versions", version, "pin")
    return Exchange(method, path, _model(TaskAnswer), long=True)


def delete(name: str, version: str | None) -> Exchange[None]:
    """Remove a task, or one version of it."""
    path = _task(name) if version is None else _task(name, "versions", version)
    return Exchange("DELETE", path, _nothing, again=False)


def rollout(name: str) -> Exchange[RolloutAnswer]:
    """How a task's rollout stands."""
    return Exchange("GET", _task(name, "rollout"), _model(RolloutAnswer))


def start_rollout(name: str, wanted: Rollout) -> Exchange[RolloutAnswer]:
    """Try a candidate beside the live version."""
    body = wanted.model_dump(mode="json")
    path = _task(name, "rollout")
    return Exchange("PUT", path, _model(RolloutAnswer), {"json": body}, long=True)


def stop_rollout(name: str) -> Exchange[None]:
    """End a task's rollout."""
    return Exchange("DELETE", _task(name, "rollout"), _nothing, again=False)


def promote(name: str) -> Exchange[RolloutAnswer]:
    """Make a rollout's candidate live."""
    path = f"{_task(name, 'rollout')}:promote"
    return Exchange("POST", path, _model(RolloutAnswer), long=True, again=False)


def _with_images(
    path: str,
    images: Sequence[bytes],
    options: ClassifyOptions,
    answer: type[Model],
    *,
    only: set[str] | None = None,
) -> Exchange[Model]:
    if not images:
        raise ValueError("no images")  # httpx would send another kind of form
    files = [("file", (str(index), image)) for index, image in enumerate(images)]
    chosen = options.model_dump(exclude_none=True, include=only)
    form = {name: _text(value) for name, value in chosen.items()}
    return Exchange("POST", path, _model(answer), {"files": files, "data": form})


def _wanted(replicas: str | None) -> dict[str, str]:
    """How many replicas have to have a change before it is answered, if that was asked for."""
    return {} if replicas is None else {"replicas": replicas}


def _bytes(upload: Upload) -> dict[str, str]:
    """The headers of a file's bytes."""
    return {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(upload.size_bytes),
    }


def _task(name: str, *parts: str) -> str:
    return "/".join(["/v1/tasks", *(quote(part, safe="") for part in (name, *parts))])


def _model(model: type[Model]) -> Callable[[bytes], Model]:
    return model.model_validate_json


def _nothing(body: bytes) -> None:
    """Read an answer that says no more than its status."""


def _text(value: Any) -> Any:
    """A form's value: text, or a list of texts."""
    if isinstance(value, bool):
        return str(value).lower()
    return [str(one) for one in value] if isinstance(value, list) else str(value)

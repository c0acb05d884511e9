"""What a client can ask of a server: each request as a value, with how its answer is read.

No I/O: `service/client.py` sends them, waiting or awaiting. Light to import: no torch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from pydantic import BaseModel

from service.openai_schemas import EmbeddingsAnswer
from service.rollout_schemas import Rollout, RolloutAnswer
from service.route_schemas import RouteResponse
from service.schemas import ClassifyOptions, ClassifyResponse
from service.task_schemas import OperationAnswer, RegistrationAnswer, TaskAnswer, TasksAnswer

__all__ = [
    "Exchange",
    "OnProgress",
    "classify",
    "delete",
    "delete_alias",
    "embed_texts",
    "operation",
    "pin",
    "promote",
    "register",
    "register_from",
    "rollback",
    "rollout",
    "route",
    "set_alias",
    "start_rollout",
    "stop_rollout",
    "task",
    "tasks",
]

CHUNK_BYTES = 1024 * 1024
T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)
OnProgress = Callable[[int], None]  # hears how many bytes went since it last heard


@dataclass(frozen=True)
class Exchange(Generic[T]):
    """One request, and what its answer's body means; `options` are httpx's.

    `long` is a change that may take minutes; `again` tells whether a failed attempt may be
    repeated as it is.
    """

    method: str
    path: str
    read: Callable[[bytes], T]
    options: Mapping[str, Any] = field(default_factory=dict)
    long: bool = False
    again: bool = True


class Upload:
    """A file's bytes for httpx, from the start each time they are asked for."""

    def __init__(self, path: Path, on_progress: OnProgress) -> None:
        self._path = path
        self._on_progress = on_progress

    def __iter__(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
                self._on_progress(len(chunk))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:  # a local disk: not worth a thread
            yield chunk


def classify(images: Sequence[bytes], options: ClassifyOptions) -> Exchange[ClassifyResponse]:
    """Classify image files."""
    return _with_images("/v1/classify", images, options, ClassifyResponse)


def route(images: Sequence[bytes], options: ClassifyOptions) -> Exchange[RouteResponse]:
    """Ask which path each image would take."""
    asked = options.model_copy(update={"templates": None})
    return _with_images("/v1/route", images, asked, RouteResponse, only={"model", "labels"})


def embed_texts(texts: Sequence[str], model: str) -> Exchange[EmbeddingsAnswer]:
    """Ask for the features of texts, as they are."""
    body = {"model": model, "input": list(texts), "modality": "text"}
    return Exchange("POST", "/v1/embeddings", _model(EmbeddingsAnswer), {"json": body})


def tasks() -> Exchange[TasksAnswer]:
    """All tasks."""
    return Exchange("GET", "/v1/tasks", _model(TasksAnswer))


def task(name: str) -> Exchange[TaskAnswer]:
    """One task."""
    return Exchange("GET", _task(name), _model(TaskAnswer))


def register(
    name: str, version: str, bundle: Path, *, activate: bool, wait_s: int, on_progress: OnProgress
) -> Exchange[RegistrationAnswer]:
    """Upload a bundle as a version of a task."""
    options = {
        "content": Upload(bundle, on_progress),
        "headers": {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(bundle.stat().st_size),
        },
        "params": {"activate": activate, "wait": wait_s},
    }
    path = _task(name, "versions", version)
    return Exchange("PUT", path, _model(RegistrationAnswer), options, long=True, again=False)


def register_from(
    name: str, version: str, source: str, *, activate: bool, wait_s: int
) -> Exchange[RegistrationAnswer]:
    """Let the server get a bundle from a URL that it allows."""
    options = {"json": {"source": source}, "params": {"activate": activate, "wait": wait_s}}
    path = _task(name, "versions", version)
    return Exchange("PUT", path, _model(RegistrationAnswer), options, long=True)


def operation(id: str) -> Exchange[OperationAnswer]:
    """What became of work that outlasted its request."""
    return Exchange("GET", f"/v1/operations/{quote(id, safe='')}", _model(OperationAnswer))


def set_alias(name: str, alias: str, version: str) -> Exchange[TaskAnswer]:
    """Let an alias name a version; `live` is one."""
    return Exchange(
        "PUT", _task(name, "aliases", alias), _model(TaskAnswer), {"json": {"version": version}}
    )


def delete_alias(name: str, alias: str) -> Exchange[TaskAnswer]:
    """Forget an alias."""
    return Exchange("DELETE", _task(name, "aliases", alias), _model(TaskAnswer))


def rollback(name: str) -> Exchange[TaskAnswer]:
    """Make the version live that was live before; not repeated, as it would go back twice."""
    return Exchange("POST", f"{_task(name)}:rollback", _model(TaskAnswer), again=False)


def pin(name: str, version: str, *, pinned: bool) -> Exchange[TaskAnswer]:
    """Let a version stay on the device, or no more."""
    method = "PUT" if pinned else "DELETE"
    return Exchange(method, _task(name, "versions", version, "pin"), _model(TaskAnswer))


def delete(name: str, version: str | None) -> Exchange[None]:
    """Remove a task, or one version of it."""
    path = _task(name) if version is None else _task(name, "versions", version)
    return Exchange("DELETE", path, _nothing)


def rollout(name: str) -> Exchange[RolloutAnswer]:
    """How a task's rollout stands."""
    return Exchange("GET", _task(name, "rollout"), _model(RolloutAnswer))


def start_rollout(name: str, wanted: Rollout) -> Exchange[RolloutAnswer]:
    """Try a candidate beside the live version."""
    body = wanted.model_dump(mode="json")
    return Exchange("PUT", _task(name, "rollout"), _model(RolloutAnswer), {"json": body})


def stop_rollout(name: str) -> Exchange[None]:
    """End a task's rollout."""
    return Exchange("DELETE", _task(name, "rollout"), _nothing)


def promote(name: str) -> Exchange[RolloutAnswer]:
    """Make a rollout's candidate live."""
    return Exchange("POST", f"{_task(name, 'rollout')}:promote", _model(RolloutAnswer), again=False)


def _with_images(
    path: str,
    images: Sequence[bytes],
    options: ClassifyOptions,
    answer: type[Model],
    *,
    only: set[str] | None = None,
) -> Exchange[Model]:
    files = [("file", (str(index), image)) for index, image in enumerate(images)]
    chosen = options.model_dump(exclude_none=True, include=only)
    form = {name: _text(value) for name, value in chosen.items()}
    return Exchange("POST", path, _model(answer), {"files": files, "data": form})


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

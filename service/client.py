"""A small typed client of one server, waiting (`Client`) or awaiting (`AsyncClient`).

What it can ask is in `service/exchanges.py`. A server that is busy, starting or briefly away is
asked again, as long as it says or with growing pauses. Light to import: no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from httpx_retries import Retry, RetryTransport
from pydantic import SecretStr

from service import exchanges
from service.exchanges import Exchange, OnProgress
from service.openai_schemas import EmbeddingsAnswer
from service.rollout_schemas import Rollout, RolloutAnswer
from service.route_schemas import RouteResponse
from service.schemas import ClassifyOptions, ClassifyResponse
from service.task_schemas import OperationAnswer, RegistrationAnswer, TaskAnswer, TasksAnswer

__all__ = ["AsyncClient", "Client", "RefusedError", "StillRunningError", "UnreachableError"]

RETRIES = 3
LONG = 10  # a long change may take this many times the timeout
_ONCE = Retry(total=0)
T = TypeVar("T")


def _ignore(sent_bytes: int) -> None:
    """Nobody watches."""


class RefusedError(Exception):
    """The server answered with a problem; `code` and `problems` are the problem's own."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        super().__init__(problem.get("detail") or f"the server answered {status}")
        self.status = status
        self.code = str(problem.get("code", "unknown"))
        self.problems: list[str] = list(problem.get("problems", []))


class StillRunningError(Exception):
    """A change takes longer than the client waits; `operation` tells what becomes of it."""

    def __init__(self, operation: OperationAnswer) -> None:
        super().__init__(f"it still runs on the server, as operation {operation.id}")
        self.operation = operation


class UnreachableError(Exception):
    """No answer from the server."""


class _Calls:
    """What both clients share: how a request is made and an answer understood.

    Args:
        url: such as "http://127.0.0.1:8000".
        key: a read or admin key, if the server has one.
        timeout_s: of every request; a change that loads a bundle may take ten times as long.
        retries: how often a request is repeated, if repeating it can do no harm.
    """

    def __init__(
        self,
        url: str,
        *,
        key: SecretStr | None = None,
        timeout_s: float = 30.0,
        retries: int = RETRIES,
    ) -> None:
        self._timeout_s = timeout_s
        self._wait_s = int(LONG * timeout_s)
        self._settings: dict[str, Any] = {
            "base_url": url,
            "headers": {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {},
            "timeout": timeout_s,
            "transport": RetryTransport(retry=_retry(retries)),
        }

    def _options(self, exchange: Exchange[T]) -> dict[str, Any]:
        options = dict(exchange.options)
        if exchange.long:
            options["timeout"] = (LONG + 1) * self._timeout_s
        if not exchange.again:
            options["extensions"] = {"retry": _ONCE}
        return options


class Client(_Calls):
    """Talks to one server; a context manager. See `_Calls` for its arguments.

    Every method raises RefusedError where the server answers with a problem, and UnreachableError
    where it does not answer.
    """

    def __enter__(self) -> Self:
        self._http = httpx.Client(**self._settings)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def send(self, exchange: Exchange[T]) -> T:
        """Send one of `service.exchanges`."""
        with _reached():
            response = self._http.request(exchange.method, exchange.path, **self._options(exchange))
        return _read(exchange, response)

    def classify(
        self, images: Sequence[bytes], options: ClassifyOptions | None = None
    ) -> ClassifyResponse:
        """Classify image files; a bad one among several is a `Failure` in its place."""
        return self.send(exchanges.classify(images, options or ClassifyOptions()))

    def route(
        self, images: Sequence[bytes], options: ClassifyOptions | None = None
    ) -> RouteResponse:
        """Which path each image would take, and why; only model and labels count."""
        return self.send(exchanges.route(images, options or ClassifyOptions()))

    def embed_texts(self, texts: Sequence[str], *, model: str = "base") -> EmbeddingsAnswer:
        """Features of texts, as they are."""
        return self.send(exchanges.embed_texts(texts, model))

    def tasks(self) -> TasksAnswer:
        """All tasks."""
        return self.send(exchanges.tasks())

    def task(self, task: str) -> TaskAnswer:
        """One task."""
        return self.send(exchanges.task(task))

    def register(
        self,
        task: str,
        version: str,
        bundle: Path,
        *,
        activate: bool = True,
        on_progress: OnProgress = _ignore,
    ) -> RegistrationAnswer:
        """Upload a bundle as a version of a task; StillRunningError if it takes too long."""
        return self.send(
            exchanges.register(
                task,
                version,
                bundle,
                activate=activate,
                wait_s=self._wait_s,
                on_progress=on_progress,
            )
        )

    def register_from(
        self, task: str, version: str, source: str, *, activate: bool = True
    ) -> RegistrationAnswer:
        """Let the server get a bundle from a URL that it allows."""
        return self.send(
            exchanges.register_from(task, version, source, activate=activate, wait_s=self._wait_s)
        )

    def operation(self, id: str) -> OperationAnswer:
        """What became of work that outlasted its request."""
        return self.send(exchanges.operation(id))

    def set_alias(self, task: str, alias: str, version: str) -> TaskAnswer:
        """Let an alias name a version; `live` is one."""
        return self.send(exchanges.set_alias(task, alias, version))

    def delete_alias(self, task: str, alias: str) -> TaskAnswer:
        """Forget an alias."""
        return self.send(exchanges.delete_alias(task, alias))

    def rollback(self, task: str) -> TaskAnswer:
        """Make the version live that was live before."""
        return self.send(exchanges.rollback(task))

    def pin(self, task: str, version: str, *, pinned: bool = True) -> TaskAnswer:
        """Let a version stay on the device, or no more."""
        return self.send(exchanges.pin(task, version, pinned=pinned))

    def delete(self, task: str, version: str | None = None) -> None:
        """Remove a task, or one version of it that no alias names."""
        self.send(exchanges.delete(task, version))

    def rollout(self, task: str) -> RolloutAnswer:
        """How a task's rollout stands."""
        return self.send(exchanges.rollout(task))

    def start_rollout(self, task: str, wanted: Rollout) -> RolloutAnswer:
        """Try a candidate beside the live version."""
        return self.send(exchanges.start_rollout(task, wanted))

    def stop_rollout(self, task: str) -> None:
        """End a task's rollout."""
        self.send(exchanges.stop_rollout(task))

    def promote(self, task: str) -> RolloutAnswer:
        """Make a rollout's candidate live."""
        return self.send(exchanges.promote(task))


class AsyncClient(_Calls):
    """The same, to be awaited; an asynchronous context manager."""

    async def __aenter__(self) -> Self:
        self._http = httpx.AsyncClient(**self._settings)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def send(self, exchange: Exchange[T]) -> T:
        """Send one of `service.exchanges`."""
        with _reached():
            response = await self._http.request(
                exchange.method, exchange.path, **self._options(exchange)
            )
        return _read(exchange, response)

    async def classify(
        self, images: Sequence[bytes], options: ClassifyOptions | None = None
    ) -> ClassifyResponse:
        """Classify image files; a bad one among several is a `Failure` in its place."""
        return await self.send(exchanges.classify(images, options or ClassifyOptions()))

    async def route(
        self, images: Sequence[bytes], options: ClassifyOptions | None = None
    ) -> RouteResponse:
        """Which path each image would take, and why; only model and labels count."""
        return await self.send(exchanges.route(images, options or ClassifyOptions()))

    async def embed_texts(self, texts: Sequence[str], *, model: str = "base") -> EmbeddingsAnswer:
        """Features of texts, as they are."""
        return await self.send(exchanges.embed_texts(texts, model))

    async def tasks(self) -> TasksAnswer:
        """All tasks."""
        return await self.send(exchanges.tasks())

    async def task(self, task: str) -> TaskAnswer:
        """One task."""
        return await self.send(exchanges.task(task))

    async def register(
        self,
        task: str,
        version: str,
        bundle: Path,
        *,
        activate: bool = True,
        on_progress: OnProgress = _ignore,
    ) -> RegistrationAnswer:
        """Upload a bundle as a version of a task; StillRunningError if it takes too long."""
        return await self.send(
            exchanges.register(
                task,
                version,
                bundle,
                activate=activate,
                wait_s=self._wait_s,
                on_progress=on_progress,
            )
        )

    async def register_from(
        self, task: str, version: str, source: str, *, activate: bool = True
    ) -> RegistrationAnswer:
        """Let the server get a bundle from a URL that it allows."""
        return await self.send(
            exchanges.register_from(task, version, source, activate=activate, wait_s=self._wait_s)
        )

    async def operation(self, id: str) -> OperationAnswer:
        """What became of work that outlasted its request."""
        return await self.send(exchanges.operation(id))

    async def set_alias(self, task: str, alias: str, version: str) -> TaskAnswer:
        """Let an alias name a version; `live` is one."""
        return await self.send(exchanges.set_alias(task, alias, version))

    async def delete_alias(self, task: str, alias: str) -> TaskAnswer:
        """Forget an alias."""
        return await self.send(exchanges.delete_alias(task, alias))

    async def rollback(self, task: str) -> TaskAnswer:
        """Make the version live that was live before."""
        return await self.send(exchanges.rollback(task))

    async def pin(self, task: str, version: str, *, pinned: bool = True) -> TaskAnswer:
        """Let a version stay on the device, or no more."""
        return await self.send(exchanges.pin(task, version, pinned=pinned))

    async def delete(self, task: str, version: str | None = None) -> None:
        """Remove a task, or one version of it that no alias names."""
        await self.send(exchanges.delete(task, version))

    async def rollout(self, task: str) -> RolloutAnswer:
        """How a task's rollout stands."""
        return await self.send(exchanges.rollout(task))

    async def start_rollout(self, task: str, wanted: Rollout) -> RolloutAnswer:
        """Try a candidate beside the live version."""
        return await self.send(exchanges.start_rollout(task, wanted))

    async def stop_rollout(self, task: str) -> None:
        """End a task's rollout."""
        await self.send(exchanges.stop_rollout(task))

    async def promote(self, task: str) -> RolloutAnswer:
        """Make a rollout's candidate live."""
        return await self.send(exchanges.promote(task))


def _retry(retries: int) -> Retry:
    """Where the server says when to come again, then; a request that timed out is not repeated."""
    return Retry(
        total=retries,
        allowed_methods=["GET", "PUT", "POST", "DELETE"],
        status_forcelist=[429, 502, 503],
        retry_on_exceptions=[httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError],
        backoff_factor=0.2,
        max_backoff_wait=10.0,
    )


def _read(exchange: Exchange[T], response: httpx.Response) -> T:
    if response.is_error:
        raise RefusedError(response.status_code, _problem(response))
    if response.status_code == httpx.codes.ACCEPTED:
        raise StillRunningError(OperationAnswer.model_validate_json(response.content))
    return exchange.read(response.content)


def _problem(response: httpx.Response) -> dict[str, Any]:
    try:
        problem = response.json()
    except ValueError:
        return {}
    if isinstance(problem, dict) and isinstance(problem.get("error"), dict):  # OpenAI's shape
        error = problem["error"]
        return {"detail": error.get("message"), "code": error.get("code")}
    return problem if isinstance(problem, dict) else {}


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        raise UnreachableError(
            f"no answer from the server: {str(error) or type(error).__name__}"
        ) from error

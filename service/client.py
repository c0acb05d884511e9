"""A small typed client of one server, waiting (`Client`) or awaiting (`AsyncClient`).

What it can ask is in `service/exchanges.py`. A server that is busy, starting or briefly away is
asked again, as long as it says or with growing pauses. Light to import: no torch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from httpx_retries import Retry, RetryTransport
from pydantic import SecretStr, ValidationError

from service import exchanges
from service.address import authorization, server_url
from service.exchanges import AwaitedUpload, Exchange, OnProgress
from service.wire.headers import GENERATION_HEADER, MIN_GENERATION_HEADER
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
    "AsyncClient",
    "Client",
    "ClientError",
    "RefusedError",
    "StillRunningError",
    "UnreachableError",
]

RETRIES = 3
LONG = 10  # a long change may take this many times the timeout
LONGEST_S = 600.0  # that a server lets a registration wait
LOOK_AGAIN_S = 0.5
T = TypeVar("T")


def _ignore(sent_bytes: int) -> None:
    """Nobody watches."""


class ClientError(Exception):
    """The server has not done what it was asked for."""


class RefusedError(ClientError):
    """The server answered with a problem; `code` and `problems` are the problem's own."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        super().__init__(problem.get("detail") or f"the server answered {status}")
        self.status = status
        self.code = str(problem.get("code", "unknown"))
        problems = problem.get("problems")
        self.problems: list[str] = problems if isinstance(problems, list) else []
        self.request_id: str | None = problem.get("request_id")  # the server's log has it too


class StillRunningError(ClientError):
    """A registration takes longer than the client waits, or fewer replicas have it than it wanted.

    `operation` tells what becomes of it.
    """

    def __init__(self, operation: OperationAnswer) -> None:
        super().__init__(f"not done everywhere yet: see operation {operation.id} on the server")
        self.operation = operation


class UnreachableError(ClientError):
    """No answer, or none that a Medley server gives."""


class _Calls:
    """What both clients share: how a request is made and an answer understood.

    Args:
        url: such as "http://127.0.0.1:8000".
        key: a read or admin key, if the server has one.
        timeout_s: the longest silence of the server; ten times as long for a change that may have
            to load a bundle.
        retries: how often a request is repeated. One whose repetition could do harm is repeated
            only as long as no connection comes about.
        own_changes: whichever replica answers, it has to know of all changes made here before. Not
            for servers behind one address that share no registry.

    Raises:
        ValueError: url or key cannot be one.
    """

    def __init__(
        self,
        url: str,
        *,
        key: SecretStr | None = None,
        timeout_s: float = 30.0,
        retries: int = RETRIES,
        own_changes: bool = True,
    ) -> None:
        self._open(server_url(url), authorization(key))
        self._own_changes = own_changes
        self._generation = 0  # of the last change that was made here
        self._timeout_s = timeout_s
        self._wait_s = min(LONG * timeout_s, LONGEST_S)
        self._retry = Retry(
            total=retries,
            allowed_methods=["GET", "PUT", "POST", "DELETE"],
            status_forcelist=[429, 502, 503],
            retry_on_exceptions=[httpx.NetworkError, httpx.RemoteProtocolError],
            backoff_factor=0.2,
            max_backoff_wait=30.0,  # the longest that a server asks for
        )
        # 0 is no status: of an empty list the library makes its own.
        self._retry_unsent = self._retry.copy_with(
            status_forcelist=[0], retry_on_exceptions=[httpx.ConnectError]
        )

    def _open(self, url: httpx.URL, headers: dict[str, str]) -> None:
        raise NotImplementedError

    def _options(self, exchange: Exchange[T], if_match: int | None) -> dict[str, Any]:
        headers = dict(exchange.options.get("headers", {}))
        if if_match is not None:
            headers["If-Match"] = f'"{if_match}"'
        if self._own_changes and self._generation:
            headers[MIN_GENERATION_HEADER] = str(self._generation)
        again = exchange.again and if_match is None
        timeout_s = self._timeout_s + (self._wait_s if exchange.long else 0.0)
        return {
            **exchange.options,
            "headers": headers,
            # Any number of requests may wait for a connection: that is no silence of the server.
            "timeout": httpx.Timeout(timeout_s, pool=None),
            "extensions": {"retry": self._retry if again else self._retry_unsent},
        }

    def _read(self, exchange: Exchange[T], response: httpx.Response) -> T:
        told = response.headers.get(GENERATION_HEADER, "")
        if exchange.changes and response.is_success and told.isdecimal():
            self._generation = max(self._generation, int(told))
        return _read(exchange, response)


class Client(_Calls):
    """Talks to one server, from any thread; a context manager. See `_Calls` for its arguments.

    Every method raises RefusedError where the server answers with a problem, and UnreachableError
    where it does not answer. A change with `if_match` is refused (`precondition_failed`) if the
    task has changed since: it is `TaskAnswer.changed`. With `replicas` ("all", "majority" or a
    number) it is answered when so many have it, or with `replicas` in the answer saying how far it
    has come; refused (`too_few_replicas`) if there are not so many.
    """

    def _open(self, url: httpx.URL, headers: dict[str, str]) -> None:
        transport = RetryTransport(httpx.HTTPTransport())
        self._http = httpx.Client(base_url=url, headers=headers, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; `with` does the same."""
        self._http.close()

    def send(self, exchange: Exchange[T], *, if_match: int | None = None) -> T:
        """Send one of `service.exchanges`."""
        options = self._options(exchange, if_match)
        if exchange.upload is not None:
            options["content"] = exchange.upload
        with _reached():
            response = self._http.request(exchange.method, exchange.path, **options)
        return self._read(exchange, response)

    def classify(
        self, images: Sequence[bytes], options: ClassifyOptions | None = None
    ) -> ClassifyResponse:
        """Classify image files; a bad one among several is a `Failure` in its place."""
        return self.send(exchanges.classify(images, options or ClassifyOptions()))

    def route(
        self, images: Sequence[bytes], options: ClassifyOptions | None = None
    ) -> RouteResponse:
        """Which path each image would take, and why; top_k, templates, explain do not count."""
        return self.send(exchanges.route(images, options or ClassifyOptions()))

    def embed_texts(self, texts: Sequence[str], *, model: str = "base") -> EmbeddingsAnswer:
        """Features of texts, as they are."""
        return self.send(exchanges.embed_texts(texts, model))

    def embed_images(self, images: Sequence[bytes], *, model: str = "base") -> EmbeddingsAnswer:
        """Features of image files; one that cannot be used fails them all."""
        return self.send(exchanges.embed_images(images, model))

    def tasks(self) -> TasksAnswer:
        """All tasks."""
        return self.send(exchanges.tasks())

    def task(self, task: str) -> TaskAnswer:
        """One task."""
        return self.send(exchanges.task(task))

    def usage(self, task: str) -> UsageAnswer:
        """What a task has used on this server since it started."""
        return self.send(exchanges.usage(task))

    def register(
        self,
        task: str,
        version: str,
        bundle: Path,
        *,
        activate: bool = True,
        replicas: str | None = None,
        if_match: int | None = None,
        on_progress: OnProgress = _ignore,
    ) -> RegistrationAnswer:
        """Upload a bundle as a version of a task; StillRunningError if it takes too long."""
        return self.send(
            exchanges.register(
                task,
                version,
                bundle,
                activate=activate,
                replicas=replicas,
                wait_s=self._wait_s,
                on_progress=on_progress,
            ),
            if_match=if_match,
        )

    def register_from(
        self,
        task: str,
        version: str,
        source: str,
        *,
        activate: bool = True,
        replicas: str | None = None,
        if_match: int | None = None,
    ) -> RegistrationAnswer:
        """Let the server get a bundle from a URL that it allows."""
        return self.send(
            exchanges.register_from(
                task, version, source, activate=activate, replicas=replicas, wait_s=self._wait_s
            ),
            if_match=if_match,
        )

    def unified(self) -> UnifiedModelsAnswer:
        """The unified models that versions are loaded from."""
        return self.send(exchanges.unified())

    def upload_unified(
        self, digest: str, path: Path, *, on_progress: OnProgress = _ignore
    ) -> UnifiedAnswer:
        """Upload a unified model, before the versions that name it by this digest."""
        return self.send(exchanges.upload_unified(digest, path, on_progress=on_progress))

    def operation(self, id: str) -> OperationAnswer:
        """What became of work that outlasted its request."""
        return self.send(exchanges.operation(id))

    def replicas(self) -> ReplicasAnswer:
        """All replicas that were heard of lately, and what each has."""
        return self.send(exchanges.replicas())

    def operations(self) -> OperationsAnswer:
        """All that the server remembers, latest first."""
        return self.send(exchanges.operations())

    def ended(self, id: str) -> OperationAnswer:
        """Ask for an operation until it has ended, well or not."""
        while True:
            operation = self.operation(id)
            if operation.state != "running":
                return operation
            time.sleep(LOOK_AGAIN_S)

    def set_alias(
        self,
        task: str,
        alias: str,
        version: str,
        *,
        replicas: str | None = None,
        if_match: int | None = None,
    ) -> ChangeAnswer:
        """Let an alias name a version; `live` is one."""
        exchange = exchanges.set_alias(task, alias, version, replicas=replicas)
        return self.send(exchange, if_match=if_match)

    def delete_alias(self, task: str, alias: str, *, if_match: int | None = None) -> TaskAnswer:
        """Forget an alias."""
        return self.send(exchanges.delete_alias(task, alias), if_match=if_match)

    def rollback(
        self, task: str, *, replicas: str | None = None, if_match: int | None = None
    ) -> ChangeAnswer:
        """Make the version live that was live before."""
        return self.send(exchanges.rollback(task, replicas=replicas), if_match=if_match)

    def pin(
        self, task: str, version: str, *, pinned: bool = True, if_match: int | None = None
    ) -> TaskAnswer:
        """Let a version stay on the device, or no more."""
        return self.send(exchanges.pin(task, version, pinned=pinned), if_match=if_match)

    def delete(self, task: str, version: str | None = None, *, if_match: int | None = None) -> None:
        """Remove a task, or one version of it that no alias names."""
        self.send(exchanges.delete(task, version), if_match=if_match)

    def rollout(self, task: str) -> RolloutAnswer:
        """How a task's rollout stands."""
        return self.send(exchanges.rollout(task))

    def start_rollout(
        self, task: str, wanted: Rollout, *, if_match: int | None = None
    ) -> RolloutAnswer:
        """Try a candidate beside the live version."""
        return self.send(exchanges.start_rollout(task, wanted), if_match=if_match)

    def stop_rollout(self, task: str, *, if_match: int | None = None) -> None:
        """End a task's rollout."""
        self.send(exchanges.stop_rollout(task), if_match=if_match)

    def promote(self, task: str, *, if_match: int | None = None) -> RolloutAnswer:
        """Make a rollout's candidate live."""
        return self.send(exchanges.promote(task), if_match=if_match)


class AsyncClient(_Calls):
    """The same, to be awaited; an asynchronous context manager."""

    def _open(self, url: httpx.URL, headers: dict[str, str]) -> None:
        transport = RetryTransport(httpx.AsyncHTTPTransport())
        self._http = httpx.AsyncClient(base_url=url, headers=headers, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; `async with` does the same."""
        await self._http.aclose()

    async def send(self, exchange: Exchange[T], *, if_match: int | None = None) -> T:
        """Send one of `service.exchanges`."""
        options = self._options(exchange, if_match)
        if exchange.upload is not None:
            options["content"] = AwaitedUpload(exchange.upload)
        with _reached():
            response = await self._http.request(exchange.method, exchange.path, **options)
        return self._read(exchange, response)

    async def classify(
        self, images: Sequence[bytes], options: ClassifyOptions | None = None
    ) -> ClassifyResponse:
        """Classify image files; a bad one among several is a `Failure` in its place."""
        return await self.send(exchanges.classify(images, options or ClassifyOptions()))

    async def route(
        self, images: Sequence[bytes], options: ClassifyOptions | None = None
    ) -> RouteResponse:
        """Which path each image would take, and why; top_k, templates, explain do not count."""
        return await self.send(exchanges.route(images, options or ClassifyOptions()))

    async def embed_texts(self, texts: Sequence[str], *, model: str = "base") -> EmbeddingsAnswer:
        """Features of texts, as they are."""
        return await self.send(exchanges.embed_texts(texts, model))

    async def embed_images(
        self, images: Sequence[bytes], *, model: str = "base"
    ) -> EmbeddingsAnswer:
        """Features of image files; one that cannot be used fails them all."""
        return await self.send(exchanges.embed_images(images, model))

    async def tasks(self) -> TasksAnswer:
        """All tasks."""
        return await self.send(exchanges.tasks())

    async def task(self, task: str) -> TaskAnswer:
        """One task."""
        return await self.send(exchanges.task(task))

    async def usage(self, task: str) -> UsageAnswer:
        """What a task has used on this server since it started."""
        return await self.send(exchanges.usage(task))

    async def register(
        self,
        task: str,
        version: str,
        bundle: Path,
        *,
        activate: bool = True,
        replicas: str | None = None,
        if_match: int | None = None,
        on_progress: OnProgress = _ignore,
    ) -> RegistrationAnswer:
        """Upload a bundle as a version of a task; StillRunningError if it takes too long."""
        return await self.send(
            exchanges.register(
                task,
                version,
                bundle,
                activate=activate,
                replicas=replicas,
                wait_s=self._wait_s,
                on_progress=on_progress,
            ),
            if_match=if_match,
        )

    async def register_from(
        self,
        task: str,
        version: str,
        source: str,
        *,
        activate: bool = True,
        replicas: str | None = None,
        if_match: int | None = None,
    ) -> RegistrationAnswer:
        """Let the server get a bundle from a URL that it allows."""
        return await self.send(
            exchanges.register_from(
                task, version, source, activate=activate, replicas=replicas, wait_s=self._wait_s
            ),
            if_match=if_match,
        )

    async def unified(self) -> UnifiedModelsAnswer:
        """The unified models that versions are loaded from."""
        return await self.send(exchanges.unified())

    async def upload_unified(
        self, digest: str, path: Path, *, on_progress: OnProgress = _ignore
    ) -> UnifiedAnswer:
        """Upload a unified model, before the versions that name it by this digest."""
        return await self.send(exchanges.upload_unified(digest, path, on_progress=on_progress))

    async def operation(self, id: str) -> OperationAnswer:
        """What became of work that outlasted its request."""
        return await self.send(exchanges.operation(id))

    async def replicas(self) -> ReplicasAnswer:
        """All replicas that were heard of lately, and what each has."""
        return await self.send(exchanges.replicas())

    async def operations(self) -> OperationsAnswer:
        """All that the server remembers, latest first."""
        return await self.send(exchanges.operations())

    async def ended(self, id: str) -> OperationAnswer:
        """Ask for an operation until it has ended, well or not."""
        while True:
            operation = await self.operation(id)
            if operation.state != "running":
                return operation
            await asyncio.sleep(LOOK_AGAIN_S)

    async def set_alias(
        self,
        task: str,
        alias: str,
        version: str,
        *,
        replicas: str | None = None,
        if_match: int | None = None,
    ) -> ChangeAnswer:
        """Let an alias name a version; `live` is one."""
        exchange = exchanges.set_alias(task, alias, version, replicas=replicas)
        return await self.send(exchange, if_match=if_match)

    async def delete_alias(
        self, task: str, alias: str, *, if_match: int | None = None
    ) -> TaskAnswer:
        """Forget an alias."""
        return await self.send(exchanges.delete_alias(task, alias), if_match=if_match)

    async def rollback(
        self, task: str, *, replicas: str | None = None, if_match: int | None = None
    ) -> ChangeAnswer:
        """Make the version live that was live before."""
        return await self.send(exchanges.rollback(task, replicas=replicas), if_match=if_match)

    async def pin(
        self, task: str, version: str, *, pinned: bool = True, if_match: int | None = None
    ) -> TaskAnswer:
        """Let a version stay on the device, or no more."""
        return await self.send(exchanges.pin(task, version, pinned=pinned), if_match=if_match)

    async def delete(
        self, task: str, version: str | None = None, *, if_match: int | None = None
    ) -> None:
        """Remove a task, or one version of it that no alias names."""
        await self.send(exchanges.delete(task, version), if_match=if_match)

    async def rollout(self, task: str) -> RolloutAnswer:
        """How a task's rollout stands."""
        return await self.send(exchanges.rollout(task))

    async def start_rollout(
        self, task: str, wanted: Rollout, *, if_match: int | None = None
    ) -> RolloutAnswer:
        """Try a candidate beside the live version."""
        return await self.send(exchanges.start_rollout(task, wanted), if_match=if_match)

    async def stop_rollout(self, task: str, *, if_match: int | None = None) -> None:
        """End a task's rollout."""
        await self.send(exchanges.stop_rollout(task), if_match=if_match)

    async def promote(self, task: str, *, if_match: int | None = None) -> RolloutAnswer:
        """Make a rollout's candidate live."""
        return await self.send(exchanges.promote(task), if_match=if_match)


def _read(exchange: Exchange[T], response: httpx.Response) -> T:
    if response.is_error:
        raise RefusedError(response.status_code, _problem(response))
    try:
        if exchange.outlasts and response.status_code == httpx.codes.ACCEPTED:
            raise StillRunningError(OperationAnswer.model_validate_json(response.content))
        if response.is_success:
            return exchange.read(response.content)
    except ValidationError as error:
        raise _foreign(response) from error
    raise _foreign(response)


def _foreign(response: httpx.Response) -> UnreachableError:
    return UnreachableError(
        f"what answers there is no Medley server of this version: "
        f"{response.status_code} to {response.request.method} {response.request.url.path}"
    )


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
    except httpx.RequestError as error:
        raise UnreachableError(
            f"no answer from the server: {str(error) or type(error).__name__}"
        ) from error

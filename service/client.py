"""A small typed client of one server; no retries, no cache. Light to import: no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from pydantic import SecretStr

from service.schemas import ClassifyOptions, ClassifyResponse, TaskAnswer, TasksAnswer

__all__ = ["Client", "RefusedError", "UnreachableError"]

CHUNK_BYTES = 1024 * 1024


class RefusedError(Exception):
    """The server answered with a problem; `code` and `problems` are the problem's own."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        super().__init__(problem.get("detail") or f"the server answered {status}")
        self.status = status
        self.code = str(problem.get("code", "unknown"))
        self.problems: list[str] = list(problem.get("problems", []))


class UnreachableError(Exception):
    """No answer from the server."""


class Client:
    """Talks to one server; a context manager.

    Args:
        url: such as "http://127.0.0.1:8000".
        key: the admin key, if changes need one.
        timeout_s: of every request but registration, which may take ten times as long.
    """

    def __init__(self, url: str, *, key: SecretStr | None = None, timeout_s: float = 30.0) -> None:
        headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        self._timeout_s = timeout_s
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def classify(
        self, images: Sequence[bytes], options: ClassifyOptions | None = None
    ) -> ClassifyResponse:
        """Classify image files; a bad one among several is a `Failure` in its place."""
        chosen = (options or ClassifyOptions()).model_dump(exclude_none=True)
        files = [("file", (str(index), image)) for index, image in enumerate(images)]
        form = {name: _text(value) for name, value in chosen.items()}
        answer = self._send("POST", "/v1/classify", files=files, data=form)
        return ClassifyResponse.model_validate_json(answer)

    def tasks(self) -> TasksAnswer:
        """All tasks."""
        return TasksAnswer.model_validate_json(self._send("GET", "/v1/tasks"))

    def task(self, task: str) -> TaskAnswer:
        """One task."""
        return TaskAnswer.model_validate_json(self._send("GET", f"/v1/tasks/{task}"))

    def register(
        self, task: str, version: str, bundle: Path, *, activate: bool = True
    ) -> TaskAnswer:
        """Upload a bundle as a version of a task."""
        answer = self._send(
            "PUT",
            f"/v1/tasks/{task}/versions/{version}",
            content=_chunks(bundle),
            params={"activate": activate},
            timeout=10 * self._timeout_s,
        )
        return TaskAnswer.model_validate_json(answer)

    def set_live(self, task: str, version: str) -> TaskAnswer:
        """Make a registered version live."""
        answer = self._send("PUT", f"/v1/tasks/{task}/live", json={"version": version})
        return TaskAnswer.model_validate_json(answer)

    def rollback(self, task: str) -> TaskAnswer:
        """Make the version live that was live before."""
        return TaskAnswer.model_validate_json(self._send("POST", f"/v1/tasks/{task}:rollback"))

    def delete(self, task: str, version: str | None = None) -> None:
        """Remove a task, or one version of it that is not live."""
        one = "" if version is None else f"/versions/{version}"
        self._send("DELETE", f"/v1/tasks/{task}{one}")

    def _send(self, method: str, path: str, **options: Any) -> bytes:
        with _reached():
            response = self._http.request(method, path, **options)
        if response.is_error:
            raise RefusedError(response.status_code, _problem(response))
        return response.content


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _text(value: Any) -> Any:
    """A form's value: text, or a list of texts."""
    if isinstance(value, bool):
        return str(value).lower()
    return [str(one) for one in value] if isinstance(value, list) else str(value)


def _problem(response: httpx.Response) -> dict[str, Any]:
    try:
        problem = response.json()
    except ValueError:
        return {}
    return problem if isinstance(problem, dict) else {}


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        raise UnreachableError(f"no answer from the server: {error}") from error

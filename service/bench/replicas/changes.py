"""Changes to replicas in turn, and how long it is until all of them are where a change leads."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx

from service.bench.load import LoadError
from service.bench.served import FIRST, SECOND, name_of
from service.bench.servers import Server
from service.wire.headers import MIN_GENERATION_HEADER

__all__ = ["KEPT", "Changed", "Changes"]

LOOK_EVERY_S = 0.002  # of who waits for a generation; a look itself takes about as long
LIMIT_S = 60.0
KEPT = 8  # tasks beside task 0; the oldest makes room for the next
GENERATION = "x-registry-generation"


@dataclass(frozen=True)
class Changed:
    """A change that was acknowledged: whose answers it changed, since when, how long it took."""

    model: str
    generation: int
    took_s: float


class Changes:
    """Changes, one after the other; end with a `with` block. Task 0 has two versions.

    Args:
        servers: the replicas, which are told in turn.
        bundles: of tasks 1, 2, ..., which are registered in turn, for ever.
        image: what is asked for.
    """

    def __init__(self, servers: Sequence[Server], bundles: Sequence[Path], image: Path) -> None:
        self._clients = [httpx.Client(base_url=server.url, timeout=LIMIT_S) for server in servers]
        self._turns = itertools.cycle(self._clients)
        self._tasks = itertools.cycle(enumerate(bundles, start=1))
        self._versions = itertools.cycle((FIRST, SECOND))
        self._registered: list[str] = []
        self._image = image.read_bytes()
        self._pool = ThreadPoolExecutor(len(servers))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        for client in self._clients:
            client.close()

    def register(self, task: str, version: str, data: bytes) -> Changed:
        """Register a version, live at once.

        Raises:
            LoadError: a replica refuses; so for all changes.
        """
        return self._send("PUT", f"/v1/tasks/{task}/versions/{version}", model=task, content=data)

    def next_task(self) -> Changed:
        """Register the next task; that the oldest makes room is waited for and not timed."""
        if len(self._registered) == KEPT:
            gone = self._registered.pop(0)
            self.converge(self._send("DELETE", f"/v1/tasks/{gone}", model=gone))
        number, path = next(self._tasks)
        self._registered.append(name_of(number))
        return self.register(name_of(number), FIRST, path.read_bytes())

    def activate(self) -> Changed:
        """Make the other version of task 0 live."""
        task, version = name_of(0), {"version": next(self._versions)}
        return self._send("PUT", f"/v1/tasks/{task}/aliases/live", model=task, json=version)

    def converge(self, changed: Changed) -> float:
        """Wait until every replica serves a change; nobody asks them to. Returns how long.

        Raises:
            LoadError: it takes too long.
        """

        def reach(client: httpx.Client) -> None:
            give_up_s = time.monotonic() + LIMIT_S
            while int(client.get("/livez").headers[GENERATION]) < changed.generation:
                if time.monotonic() > give_up_s:
                    raise LoadError(f"generation {changed.generation} is not reached everywhere")
                threading.Event().wait(LOOK_EVERY_S)

        return self._until_all(reach)

    def read(self, changed: Changed) -> float:
        """Ask every replica at once for an answer of that generation. Returns how long all took.

        Raises:
            LoadError: one has another answer than that.
        """
        headers = {"content-type": "image/jpeg", MIN_GENERATION_HEADER: str(changed.generation)}

        def ask(client: httpx.Client) -> None:
            path = f"/v1/classify?model={changed.model}"
            answer = client.post(path, content=self._image, headers=headers)
            if not answer.is_success or int(answer.headers[GENERATION]) < changed.generation:
                raise LoadError(f"generation {changed.generation} was asked for: {answer.text}")

        return self._until_all(ask)

    def _until_all(self, arrive: Callable[[httpx.Client], None]) -> float:
        begun_s = time.perf_counter()
        list(self._pool.map(arrive, self._clients))
        return time.perf_counter() - begun_s

    def _send(
        self,
        method: str,
        path: str,
        *,
        model: str,
        content: bytes | None = None,
        json: object = None,
    ) -> Changed:
        begun_s = time.perf_counter()
        try:
            answer = next(self._turns).request(method, path, content=content, json=json)
        except httpx.TransportError as error:
            raise LoadError(f"a change got no answer: {error}") from error
        took_s = time.perf_counter() - begun_s
        if not answer.is_success:
            raise LoadError(f"a change was refused: {answer.text}")
        return Changed(model, int(answer.headers[GENERATION]), took_s)

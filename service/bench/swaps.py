"""A task that gets another version every second while the server is under load."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx

from service.bench.load import LoadError

__all__ = ["Swaps", "swapping"]

EVERY_S = 1.0


class Swaps:
    """Two versions of a task that take each other's place; the first is live."""

    def __init__(self, client: httpx.Client, task: str, versions: Mapping[str, bytes]) -> None:
        self.times_s: list[float] = []  # of each, from its bundle's first byte until it was live
        self._client, self._versions = client, versions
        self._live, self._other = versions
        self._first = self._live
        self._at = f"/v1/tasks/{task}/versions"

    @property
    def at_rest(self) -> bool:
        """Whether the first version is live again."""
        return self._live == self._first

    def swap(self) -> None:
        """Register the other version, live at once, and remove the one that was.

        Raises:
            LoadError: the server refuses.
        """
        start_s = time.perf_counter()
        self._send("PUT", self._other, self._versions[self._other])
        self.times_s.append(time.perf_counter() - start_s)
        self._send("DELETE", self._live)
        self._live, self._other = self._other, self._live

    def _send(self, method: str, version: str, body: bytes = b"") -> None:
        try:
            answer = self._client.request(method, f"{self._at}/{version}", content=body)
        except httpx.TransportError as error:
            raise LoadError(f"a swap got no answer: {error}") from error
        if not answer.is_success:
            raise LoadError(f"a swap was refused: {answer.text}")


@contextmanager
def swapping(url: str, task: str, versions: Mapping[str, bytes]) -> Iterator[Swaps]:
    """Swap once a second while the block runs, and once more if that leaves the second live.

    Args:
        url: of the server.
        task: whose versions.
        versions: two bundles by version; the first is live.

    Raises:
        LoadError: the server refused a swap.
    """
    over, failures = threading.Event(), list[LoadError]()
    with httpx.Client(base_url=url, timeout=60) as client:
        swaps = Swaps(client, task, versions)
        thread = threading.Thread(target=_every_second, args=(swaps, over, failures))
        thread.start()
        try:
            yield swaps
        finally:
            over.set()
            thread.join()
    if failures:
        raise failures[0]


def _every_second(swaps: Swaps, over: threading.Event, failures: list[LoadError]) -> None:
    start_s, count = time.monotonic(), 1
    try:
        while not over.wait(max(0.0, start_s + EVERY_S * count - time.monotonic())):
            swaps.swap()
            count += 1
        if not swaps.at_rest:
            swaps.swap()
    except LoadError as error:
        failures.append(error)

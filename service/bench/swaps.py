"""A task that gets another version every second while the server is under load."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from service.bench.load import LoadError

__all__ = ["Swapped", "swapping"]

EVERY_S = 1.0


@dataclass
class Swapped:
    """How long each swap took, from the first byte of the bundle until it was live."""

    times_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@contextmanager
def swapping(url: str, task: str, versions: Mapping[str, bytes]) -> Iterator[Swapped]:
    """Register the versions in turn, one a second, each live at once, and remove the one before.

    Args:
        url: of the server; the first version is live.
        task: whose.
        versions: two bundles by version.

    Raises:
        LoadError: the server refused a swap.
    """
    swapped, over = Swapped(), threading.Event()
    thread = threading.Thread(target=_swap, args=(url, task, versions, swapped, over))
    thread.start()
    try:
        yield swapped
    finally:
        over.set()
        thread.join()
    if swapped.failures:
        raise LoadError(f"a swap failed: {swapped.failures[0]}")


def _swap(
    url: str, task: str, versions: Mapping[str, bytes], swapped: Swapped, over: threading.Event
) -> None:
    one, other = versions
    start_s, count = time.monotonic(), 0
    with httpx.Client(base_url=f"{url}/v1/tasks/{task}/versions", timeout=60) as client:
        # An even number of them, so that the first version is live again at the end.
        while not (over.wait(start_s + EVERY_S * (count + 1) - time.monotonic()) and not count % 2):
            new, old = (one, other) if count % 2 else (other, one)
            begun_s = time.perf_counter()
            try:
                client.put(f"/{new}", content=versions[new]).raise_for_status()
                swapped.times_s.append(time.perf_counter() - begun_s)
                client.delete(f"/{old}").raise_for_status()
            except httpx.HTTPError as error:
                swapped.failures.append(str(error))
                return
            count += 1

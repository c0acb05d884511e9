"""Clients that load a server from threads: each asks on one connection, and reconnects if it ends.

They count answers by their bytes and look into none, so that they cost the machine little.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.service.raw import Answer, Raw

__all__ = ["Tally", "loading"]

BACK_OFF_S = 0.02
GIVE_UP_S = 60.0


@dataclass
class Tally:
    """What clients have seen; complete after the `with` block of `loading`."""

    answers: Counter[tuple[str, int, bytes]] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)  # why a request was sent once more
    torn: int = 0  # answers that broke off
    late_s: float = 0.0  # how far behind its schedule the last request was sent

    def add(self, other: Tally) -> None:
        self.answers += other.answers
        self.again += other.again
        self.torn += other.torn
        self.late_s = max(self.late_s, other.late_s)

    @property
    def statuses(self) -> Counter[int]:
        found: Counter[int] = Counter()
        for (_, status, _), count in self.answers.items():
            found[status] += count
        return found


@contextmanager
def loading(
    url: str, requests: Sequence[tuple[str, bytes]], *, clients: int = 4, per_s: float = 0.0
) -> Iterator[Tally]:
    """Ask in turns from several clients while the block runs; each has asked before it begins.

    Args:
        url: of the server.
        requests: a name for each, and its bytes.
        clients: how many; no more requests than that are in flight.
        per_s: requests a second of all of them together; 0 for as many as they get answered.
    """
    tally, stop = Tally(), threading.Event()
    begun = threading.Barrier(clients + 1)
    every_s = clients / per_s if per_s else 0.0
    asking = [_Client(url, requests, first, every_s, stop, begun.wait) for first in range(clients)]
    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client.run) for client in asking]
        begun.wait()
        try:
            yield tally
        finally:
            stop.set()
        for one in running:
            tally.add(one.result())


class _Client:
    def __init__(
        self,
        url: str,
        requests: Sequence[tuple[str, bytes]],
        first: int,
        every_s: float,
        stop: threading.Event,
        on_first: Callable[[], object],
    ) -> None:
        self._url = url
        self._requests = requests
        self._turn = first
        self._every_s = every_s
        self._stop = stop
        self._on_first = on_first
        self._raw: Raw | None = None
        self._tally = Tally()

    def run(self) -> Tally:
        try:
            self._ask()
            self._on_first()
            due_s = time.monotonic()
            while not self._stop.wait(max(0.0, due_s - time.monotonic())):
                self._tally.late_s = time.monotonic() - due_s
                self._ask()
                due_s += self._every_s
            self._ask()
        finally:
            self._hang_up()
        return self._tally

    def _ask(self) -> None:
        """Ask until there is an answer that is not "come again"."""
        name, request = self._requests[self._turn % len(self._requests)]
        self._turn += 1
        give_up_s = time.monotonic() + GIVE_UP_S
        while (answer := self._answer(request)) is None:
            assert time.monotonic() < give_up_s, "no answer"
            self._stop.wait(BACK_OFF_S)
        self._tally.answers[name, answer.status, answer.body] += 1

    def _answer(self, request: bytes) -> Answer | None:
        try:
            self._raw = self._raw or Raw(self._url)
            answer = self._raw.ask(request)
        except ConnectionError as error:
            self._hang_up()
            self._tally.torn += "within" in str(error)
            self._tally.again[type(error).__name__] += 1
            return None
        if answer.headers.get("connection") == "close":
            self._hang_up()
        if answer.status == 503 and answer.json()["code"] == "starting":
            self._tally.again["starting"] += 1
            return None
        return answer

    def _hang_up(self) -> None:
        if self._raw is not None:
            self._raw.close()
            self._raw = None

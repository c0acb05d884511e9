"""Visits to several servers at once, at a fixed rate each, for as long as a block takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from service.bench.load import Order, Ready, visiting
from service.bench.traffic import arrivals

__all__ = ["VISITORS", "Underload", "underload"]

VISITORS = 16
ORDER_S = 2.0  # of visits that are ordered at a time


@dataclass
class Underload:
    """What became of the visits; complete after the block."""

    visits: int = 0
    errors: int = 0  # answers other than 200, and none


@contextmanager
def underload(
    urls: Sequence[str], requests: Sequence[Ready], rate_hz: float
) -> Iterator[Underload]:
    """Visit each server at a mean rate, from a process of visitors for each.

    Raises:
        LoadError: such a process has ended.
    """
    found, over = Underload(), threading.Event()
    if not urls:
        yield found
        return
    with ThreadPoolExecutor(len(urls)) as pool:
        running = [
            pool.submit(_visit, url, requests, rate_hz, n, over) for n, url in enumerate(urls)
        ]
        try:
            yield found
        finally:
            over.set()
        for one in running:
            part = one.result()
            found.visits += part.visits
            found.errors += part.errors


def _visit(
    url: str, requests: Sequence[Ready], rate_hz: float, seed: int, over: threading.Event
) -> Underload:
    found = Underload()
    with visiting() as load:
        while not over.is_set():
            seed += 1000
            due_s = arrivals(rate_hz, ORDER_S, seed=seed)
            picks = [visit % len(requests) for visit in range(len(due_s))]
            visits = load.visit(
                Order(url=url, requests=requests, picks=picks, due_s=due_s, visitors=VISITORS)
            )
            found.visits += len(visits.status)
            found.errors += sum(status != 200 for status in visits.status)
    return found

"""What a process of visitors is told and what it tells back; the process itself is `visitors.py`.

Light on purpose: the visitors' process imports it, and has no torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import IO

__all__ = ["Load", "LoadError", "Order", "Ready", "Visits", "visiting"]


class LoadError(Exception):
    """The process that makes the load ended, or a server that is measured did not do its part."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A request that only has to be sent."""

    path: str  # of the URL, with its query
    content_type: str
    body_file: str


@dataclass(frozen=True, kw_only=True)
class Order:
    """Visits to make. The i-th begins at `due_s[i]` and sends `requests[picks[i]]`.

    With `stop_s` nothing begins after it, however many are due: a closed loop is an order whose
    visits are all due at once.
    """

    url: str
    requests: Sequence[Ready]
    picks: Sequence[int]
    due_s: Sequence[float]
    visitors: int  # at most so many requests at a time
    stop_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Visits:
    """What became of an order: one entry a visit, in the order in which they ended.

    Times are seconds since the beginning. A status of 0 is a connection that failed.
    """

    due_s: Sequence[float]
    sent_s: Sequence[float]
    done_s: Sequence[float]
    status: Sequence[int]
    cpu_s: float  # that the visitors' own process took


class Load:
    """The process of visitors, which takes one order after the other."""

    def __init__(self, orders: IO[str], answers: IO[str]) -> None:
        self._orders, self._answers = orders, answers

    def visit(self, order: Order) -> Visits:
        """Have an order carried out and wait until its last answer.

        Raises:
            LoadError: the process has ended.
        """
        self._orders.write(json.dumps(asdict(order)) + "\n")
        self._orders.flush()
        line = self._answers.readline()
        if not line:
            raise LoadError("the process that makes the load has ended")
        return Visits(**json.loads(line))


@contextmanager
def visiting() -> Iterator[Load]:
    """Start the process of visitors; it ends with the block."""
    command = [sys.executable, "-m", "service.bench.visitors"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Load(process.stdin, process.stdout)
        finally:
            process.stdin.close()  # it ends with its orders

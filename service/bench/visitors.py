"""The process that makes the load: locust's users, who wait for arrivals that were fixed before.

`python -m service.bench.visitors` reads orders as JSON lines and answers each with a line. gevent
patches this process, and so it imports nothing of ours but `load.py`. An arrival is due whether or
not earlier ones are answered; one that finds no free visitor waits, and the wait counts.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path

import gevent
from gevent.event import AsyncResult
from locust import FastHttpUser, task
from locust.env import Environment
from locust.exception import StopUser

from service.bench.load import Order, Ready, Visits

__all__ = ["visit"]

TIMEOUT_S = 120.0


class Desk:
    """Hands arrivals to visitors, the one who came back last first: few connections, all warm."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._idle: list[AsyncResult[int | None]] = []
        self._waiting: deque[int] = deque()
        self._closed = False
        self._start_s = time.perf_counter()

    def now_s(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._start_s

    def next(self) -> int | None:
        """Wait for the next arrival and return its number; None: there are no more."""
        if self._waiting:
            return self._waiting.popleft()
        if self._closed:
            return None
        call: AsyncResult[int | None] = AsyncResult()
        self._idle.append(call)
        arrival: int | None = call.get()
        return arrival

    def open(self) -> None:
        """Let the arrivals in as they become due, then close."""
        self._start_s = time.perf_counter()
        for number, due_s in enumerate(self._order.due_s):
            if due_s > self.now_s():
                gevent.sleep(max(0.0, due_s - self.now_s()))
            if self._idle:
                self._idle.pop().set(number)
            else:
                self._waiting.append(number)
        if self._order.stop_s is not None:
            gevent.sleep(max(0.0, self._order.stop_s - self.now_s()))
            self._waiting.clear()
        self._closed = True
        for call in self._idle:
            call.set(None)


class Diary:
    """What happened to each visit."""

    def __init__(self) -> None:
        self.sent_s: list[float] = []
        self.done_s: list[float] = []
        self.due_s: list[float] = []
        self.status: list[int] = []

    def write(self, due_s: float, sent_s: float, done_s: float, status: int) -> None:
        """Add one visit."""
        self.due_s.append(round(due_s, 6))
        self.sent_s.append(round(sent_s, 6))
        self.done_s.append(round(done_s, 6))
        self.status.append(status)


def visit(order: Order) -> Visits:
    """Carry out an order."""
    desk, diary = Desk(order), Diary()
    bodies = {one.body_file: Path(one.body_file).read_bytes() for one in order.requests}

    class Visitor(FastHttpUser):
        connection_timeout = network_timeout = TIMEOUT_S

        @task
        def come(self) -> None:
            number = desk.next()
            if number is None:
                raise StopUser
            request, sent_s = order.requests[order.picks[number]], desk.now_s()
            response = self.client.post(
                request.path,
                data=bodies[request.body_file],  # type: ignore[arg-type]  # bytes go as they are
                headers={"Content-Type": request.content_type},
                name="visit",
            )
            diary.write(order.due_s[number], sent_s, desk.now_s(), response.status_code)

    environment = Environment(user_classes=[Visitor], host=order.url)
    runner = environment.create_local_runner()
    cpu_s = time.process_time()
    runner.start(order.visitors, spawn_rate=order.visitors)
    assert runner.spawning_greenlet is not None
    runner.spawning_greenlet.join()
    desk.open()
    runner.user_greenlets.join()
    runner.quit()
    return Visits(
        due_s=diary.due_s,
        sent_s=diary.sent_s,
        done_s=diary.done_s,
        status=diary.status,
        cpu_s=time.process_time() - cpu_s,
    )


def main() -> None:
    """Take orders until there are no more."""
    for line in sys.stdin:
        fields = json.loads(line)
        fields["requests"] = [Ready(**one) for one in fields["requests"]]
        sys.stdout.write(json.dumps(asdict(visit(Order(**fields)))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

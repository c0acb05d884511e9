"""A server under load while tasks come and go: no failure, no wrong answer, no growth.

Each answer is compared, byte for byte, with the one that its state of the registry must give. The
states repeat, so they are asked beforehand; an answer names its state by the generation in it.
"""

from __future__ import annotations

import itertools
import logging
import re
import resource
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.service.conftest import MakeBundle, ServerProcess, StartServer
from tests.service.load import Tally, loading
from tests.service.raw import Raw, post
from tests.service.versions.test_tasks import put

log = logging.getLogger(__name__)
State = tuple[str, int | None]  # live version of "swap", which guest is there
REQUESTS = {
    "stable": "/v1/classify?model=stable",
    "swap": "/v1/classify?model=swap&explain=true",
    "auto": "/v1/classify?explain=true",
    "base": "/v1/classify?model=base&labels=cat&labels=dog",
}
GUESTS = (4, 5)  # seeds of their weights; all are called guest@1
CLIENTS = 8
SHARE = 0.8  # of what the server can do
CALIBRATION_S = 2.0
CHANGES_PER_S = 4  # each second one of each kind
WARM = 1 / 3  # of the samples of memory, which are left out: pools and caches fill
GENERATION = re.compile(rb'^\{"generation":(\d+),')


@dataclass
class Changes:
    """Four kinds of change in turn, and which state each generation is."""

    http: httpx.Client
    guests: dict[int, bytes]
    states: dict[int, State] = field(default_factory=dict)

    @cached_property
    def running(self) -> Iterator[State]:
        """The changes, each done when it is asked for."""
        return self._steps()

    def _steps(self) -> Iterator[State]:
        for seed in itertools.cycle(GUESTS):
            yield self._changed(put(self.http, self.guests[seed], "guest"), ("1", seed))
            alias = "/v1/tasks/swap/aliases/live"
            yield self._changed(self.http.put(alias, json={"version": "2"}), ("2", seed))
            yield self._changed(self.http.post("/v1/tasks/swap:rollback"), ("1", seed))
            yield self._changed(self.http.delete("/v1/tasks/guest"), ("1", None))

    def _changed(self, response: httpx.Response, state: State) -> State:
        response.raise_for_status()
        self.states[int(response.headers["x-registry-generation"])] = state
        return state


@pytest.mark.parametrize("seconds", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_tasks_come_and_go_under_load_and_nobody_notices(
    start_server: StartServer, make: MakeBundle, image: bytes, tmp_path: Path, seconds: int
) -> None:
    with start_server(tmp_path) as server:
        soak(server, make, image, seconds=seconds)


def soak(server: ServerProcess, make: MakeBundle, image: bytes, *, seconds: float) -> None:
    requests = [(n, post(path, image, content_type="image/png")) for n, path in REQUESTS.items()]
    with server.client() as http:
        changes = Changes(http, {seed: make(task="guest", seed=seed)[1] for seed in GUESTS})
        for task, version, seed in (("stable", "1", 1), ("swap", "2", 3), ("swap", "1", 2)):
            data = make(task=task, version=version, seed=seed)[1]
            put(http, data, task, version).raise_for_status()
        expected = dry_run(server, changes, requests)
        with loading(server.url, requests, clients=CLIENTS) as most:
            pause(CALIBRATION_S)
        per_s = SHARE * most.answers.total() / CALIBRATION_S
        memory = []
        begun_s = time.monotonic()
        with loading(server.url, requests, clients=CLIENTS, per_s=per_s) as tally:
            for step in range(1, int(seconds * CHANGES_PER_S) + 1):
                next(changes.running)
                memory.append(resident_bytes(server.process.pid))
                pause(begun_s + step / CHANGES_PER_S - time.monotonic())
        took_s = time.monotonic() - begun_s
    growth_bytes = growth(memory)
    log.info(
        "%d answers at %.0f/s of %.0f/s, %d changes in %.0f s, memory %.1f MB, growth %.2f MB",
        *(tally.answers.total(), tally.answers.total() / took_s, per_s / SHARE, len(memory)),
        *(took_s, memory[-1] / 1e6, growth_bytes / 1e6),
    )
    check_answers(tally, changes, expected)
    registered_bytes = sum(map(len, changes.guests.values())) / len(GUESTS) * len(memory) / 4
    assert growth_bytes < (1 - WARM) * registered_bytes / 4, "one bundle in four stays in memory"


def dry_run(
    server: ServerProcess, changes: Changes, requests: list[tuple[str, bytes]]
) -> dict[tuple[str, State], bytes]:
    """What each request is answered in each state, without the generation."""
    expected = {}
    with Raw(server.url) as raw:
        for state in itertools.islice(changes.running, 4 * len(GUESTS)):
            for name, request in requests:
                answer = raw.ask(request)
                assert answer.status == 200
                expected[name, state] = GENERATION.sub(b"", answer.body)
    assert len({body for (name, _), body in expected.items() if name == "stable"}) == 1
    assert len({body for (name, _), body in expected.items() if name == "auto"}) > len(GUESTS)
    return expected


def check_answers(tally: Tally, changes: Changes, expected: dict[tuple[str, State], bytes]) -> None:
    assert not tally.again, "a connection was lost"
    assert set(tally.statuses) == {200}
    wrong = 0
    for (name, _, body), count in tally.answers.items():
        found = GENERATION.match(body)
        assert found is not None
        state = changes.states[int(found[1])]
        wrong += count * (GENERATION.sub(b"", body) != expected[name, state])
    assert wrong == 0


def growth(samples: list[int]) -> float:
    """By how much a straight line through the samples rises, the first third left out."""
    rest = samples[int(WARM * len(samples)) :]
    slope, _ = np.polyfit(np.arange(len(rest)), rest, 1)
    return float(slope) * len(rest)


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def pause(seconds: float) -> None:
    """Let time pass: here it is what is tested."""
    threading.Event().wait(max(0.0, seconds))

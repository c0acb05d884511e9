"""Faults in any order, one after the other, while changes and requests never stop.

A change that was refused may have been made or not. What was acknowledged is there at the end, a
generation means the same on every replica for ever, and all is level again without a hand.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from tests.replicas.cluster import Cluster, Replica, eventually, pause
from tests.replicas.witness import Witness
from tests.service.conftest import MakeBundle
from tests.service.load import Tally
from tests.service.versions.test_tasks import put

log = logging.getLogger(__name__)
LEVEL_S = 60.0
GUESTS = 6


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_whatever_breaks_in_whatever_order_nothing_said_is_lost(
    seed: int, fragile: Cluster, witness: Witness, make: MakeBundle, image: bytes
) -> None:
    names = ("a", "b", "c")
    replicas = [fragile.start(name, wired=True) for name in names]
    for replica in replicas:
        replica.await_ready()
    witness.prepare(replicas[0], make)
    generation = fragile.until_level()
    chaos = Chaos(fragile, witness, random.Random(seed), make)
    with witness.recording(*replicas) as tallies, chaos.changing():
        for number in range(12):
            fault = chaos.random.choice(chaos.faults)
            log.info("fault %d: %s", number, fault.__name__)
            fault()
            pause(chaos.random.uniform(0, 0.5))
    now = fragile.until_level(within_s=LEVEL_S)
    log.info("%d changes, generation %d to %d", len(chaos.acknowledged), generation, now)
    chaos.check(tallies)
    for replica in fragile.all:
        eventually(replica.is_ready)
        assert chaos.guests <= replica.live().keys()
        for guest in chaos.guests:
            assert replica.classify(image, guest).status_code == 200
    lives = [replica.live() for replica in fragile.all]
    assert lives[0] == lives[1] == lives[2]
    newest = max(chaos.acknowledged)
    assert now >= newest
    assert len(chaos.acknowledged) > 10


@dataclass
class Chaos:
    """Faults, and changes that go on meanwhile."""

    cluster: Cluster
    witness: Witness
    random: random.Random
    make: MakeBundle
    acknowledged: dict[int, str] = field(default_factory=dict)  # generation: live version of swap
    guests: set[str] = field(default_factory=set)  # tasks whose registration was acknowledged

    @property
    def faults(self) -> list[Callable[[], None]]:
        return [
            self.redis_dies,
            self.redis_forgets,
            self.redis_goes_back,
            self.redis_freezes,
            self.a_wire_is_cut,
            self.a_wire_is_silent,
            self.a_replica_dies,
            self.a_replica_freezes,
        ]

    def redis_dies(self) -> None:
        self.cluster.redis.kill()
        self.a_while()
        self.cluster.redis.restart()

    def redis_forgets(self) -> None:
        self.cluster.redis.kill()
        self.a_while()
        self.cluster.redis.restart(empty=True)

    def redis_goes_back(self) -> None:
        """To what it was a while ago; from then on it keeps nothing else."""
        with self.cluster.redis.client() as client:
            client.save()
        self.a_while()
        self.cluster.redis.kill()
        self.cluster.redis.options = ()
        self.cluster.redis.restart()

    def redis_freezes(self) -> None:
        self.cluster.redis.freeze()
        self.a_while()
        self.cluster.redis.thaw()

    def a_wire_is_cut(self) -> None:
        wire = self.anyone().wire
        assert wire is not None
        wire.cut()
        self.a_while()
        wire.mend()

    def a_wire_is_silent(self) -> None:
        wire = self.anyone().wire
        assert wire is not None
        wire.block()
        self.a_while()
        wire.mend()

    def a_replica_dies(self) -> None:
        victim = self.anyone()
        victim.kill()
        self.a_while()
        self.cluster.restart(victim, wired=True)

    def a_replica_freezes(self) -> None:
        victim = self.anyone()
        victim.freeze()
        self.a_while()
        victim.thaw()

    def anyone(self) -> Replica:
        return self.random.choice(self.cluster.all)

    def a_while(self) -> None:
        pause(self.random.uniform(0, 1.5))

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change without a pause, at one replica after the other, while the block runs."""
        over = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(self._change, over)
            try:
                yield
            finally:
                over.set()
            running.result()

    def _change(self, over: threading.Event) -> None:
        turn, chance = 0, random.Random(self.random.random())
        while not over.wait(0.05):
            turn += 1
            replica = chance.choice(self.cluster.all)
            with httpx.Client(base_url=replica.url, timeout=10) as http:
                try:
                    self._change_once(http, turn)
                except httpx.TransportError:
                    continue  # it is dead, or frozen

    def _change_once(self, http: httpx.Client, turn: int) -> None:
        if turn % 10 == 0 and len(self.guests) < GUESTS:
            task = f"guest-{len(self.guests)}"
            answer = put(http, self.make(task=task, seed=9)[1], task)
        else:
            version = "12"[turn % 2]
            answer = http.put("/v1/tasks/swap/aliases/live", json={"version": version})
        if answer.status_code == 503:
            return
        answer.raise_for_status()
        if "swap" in str(answer.url):
            generation = int(answer.headers["x-registry-generation"])
            self._note(generation, answer.json()["live"])
        else:
            self.guests.add(task)

    def _note(self, generation: int, version: str) -> None:
        before = self.acknowledged.setdefault(generation, version)
        assert before == version, f"generation {generation} was {before}, now {version}"

    def check(self, tallies: list[Tally]) -> None:
        """Every answer of one generation is the same, and that which was acknowledged."""
        seen: dict[int, set[str]] = {}
        for tally in tallies:
            assert set(tally.statuses) == {200}
            assert not tally.torn or tally.again
            for generation, versions in self.witness.seen(tally).items():
                seen.setdefault(generation, set()).update(versions)
        assert all(len(versions) == 1 for versions in seen.values()), seen
        for generation, version in self.acknowledged.items():
            assert seen.get(generation, {version}) == {version}, generation

"""A replica dies, by SIGKILL, at each step of a registration and of an activation by another.

The others agree on before or after; nothing that was acknowledged is lost; the same change again
leads to after; and the dead one comes back to it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.redis_server import RedisServer
from tests.replicas.cluster import Cluster, Replica, clustered, eventually, pause
from tests.replicas.witness import Witness
from tests.service.conftest import MakeBundle
from tests.service.versions.test_tasks import put

BEFORE = ["received", "verified", "stored", "admitted"]
UNKNOWN = ["redis-changed", "backed-up"]  # Redis has it, and nobody was told
AFTER = ["committed", "published"]


@dataclass
class Survivors:
    """Two replicas that see others die, and who knows their right answers."""

    cluster: Cluster
    replicas: list[Replica]
    witness: Witness


@pytest.fixture(scope="module")
def survivors(
    redis_server: RedisServer,
    tmp_path_factory: pytest.TempPathFactory,
    make: MakeBundle,
    image: bytes,
) -> Iterator[Survivors]:
    folder = tmp_path_factory.mktemp("killed")
    with clustered(redis_server, f"t-{uuid.uuid4().hex[:8]}", folder) as cluster:
        replicas = cluster.start_all("a", "b")
        witness = Witness(image)
        witness.prepare(replicas[0], make)
        yield Survivors(cluster, replicas, witness)


@pytest.mark.parametrize("step", BEFORE + UNKNOWN + AFTER)
def test_a_replica_that_dies_while_it_registers_leaves_before_or_after(
    step: str, survivors: Survivors, make: MakeBundle, image: bytes
) -> None:
    cluster, others = survivors.cluster, survivors.replicas
    task = f"t-{step}"
    data = make(task=task, seed=5)[1]
    victim = cluster.start(f"dies-{step}", deadly=step)
    victim.await_ready()
    with survivors.witness.watching(*others):
        with pytest.raises(httpx.TransportError):
            put(victim.http, data, task)
        victim.process.join(10)
        assert victim.process.exitcode == -9
        cluster.until_level(of=others)
        there = {task in replica.live() for replica in others}
        assert there in ([{False}] if step in BEFORE else [{True}]), step

        again = put(others[0].http, data, task)
        assert again.status_code == (201 if step in BEFORE else 200), again.text
        generation = again.headers["x-registry-generation"]
        for replica in others:
            assert replica.classify(image, task, generation).status_code == 200
        back = cluster.restart(victim)
        back.await_ready()
        assert back.classify(image, task).status_code == 200
    survivors.witness.agree([*others, back])
    back.kill()


@pytest.mark.parametrize("step", UNKNOWN)
def test_a_replica_that_dies_while_it_activates_leaves_before_or_after(
    step: str, survivors: Survivors, make: MakeBundle
) -> None:
    cluster, others, witness = survivors.cluster, survivors.replicas, survivors.witness
    before = witness.live[max(witness.live)]
    after = "2" if before == "1" else "1"
    victim = cluster.start(f"activates-{step}", deadly=step)
    victim.await_ready()
    generation = cluster.until_level(of=others)
    witness.live[generation + 1] = after  # once it is said to be live, it is from there on
    with witness.watching(*others):
        with pytest.raises(httpx.TransportError):
            witness.try_to_activate(victim, after)
        victim.process.join(10)
        eventually(lambda: all(r.generation() > generation for r in others))
        assert {replica.live()["swap"] for replica in others} == {after}
    witness.agree(others)


def test_a_replica_that_dies_again_and_again_under_change_misses_nothing(
    survivors: Survivors,
) -> None:
    """Killed at whatever it does, mostly following, it comes back to the newest each time."""
    cluster, others, witness = survivors.cluster, survivors.replicas, survivors.witness
    victim = cluster.start("mortal")
    with witness.watching(*others):
        for number in range(6):
            witness.activate(others[number % 2], "12"[number % 2])
            pause(0.03 * number)
            victim.kill()
            witness.activate(others[number % 2], "21"[number % 2])
            victim = cluster.restart(victim)
        victim.await_ready()
        cluster.until_level(of=[*others, victim])
    witness.agree([*others, victim])
    victim.kill()
    eventually(lambda: others[0].metric("medley_replicas") == 2, what="the dead are missed")
    assert not list((Path(victim.store) / "incoming").iterdir())

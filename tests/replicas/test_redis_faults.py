"""Redis dies, freezes, forgets: answers go on, changes are refused, and nothing said is lost.

Every change that was acknowledged before is there afterwards, on every replica, without a hand.
"""

from __future__ import annotations

import time

import httpx
import pytest

from tests.redis_server import RedisServer
from tests.replicas.cluster import Cluster, Replica, eventually, until
from tests.replicas.witness import Witness
from tests.service.conftest import MakeBundle
from tests.service.load import Tally
from tests.service.versions.test_tasks import put

BOUND_S = 10.0  # a change that is refused says so within it; its time-outs are tenths of seconds
LATE_S = 2.0  # no request waits for Redis: two cores for all of it are what takes this long


@pytest.mark.parametrize("left", ["everything", "an older dump", "nothing"])
def test_redis_is_killed_and_comes_back_with(
    left: str, fragile: Cluster, witness: Witness, make: MakeBundle, image: bytes
) -> None:
    replicas = fragile.start_all("a", "b", "c")
    a, b, c = replicas
    witness.prepare(a, make)
    with fragile.redis.client() as client:
        client.save()  # the older dump
    witness.activate(b, "2")
    put(c.http, make()[1]).raise_for_status()
    generation = fragile.until_level()

    with witness.watching(*replicas) as tallies:
        fragile.redis.kill()
        goes_on_without_redis(replicas, witness)
        come_back(fragile.redis, left)
        witness.note(until(lambda: changed(b, witness, "1"), what="changes are taken again"), "1")
        assert fragile.until_level() > generation
    no_request_waited(tallies)
    witness.agree(replicas)
    for replica in replicas:
        assert replica.metric("medley_registry_up") == 1
        assert replica.metric("medley_registry_lag_seconds") == 0
        assert replica.live() == {"pets": "1", "stable": "1", "swap": "1"}
        assert replica.classify(image, "pets").status_code == 200
    recoveries = sum(r.metric("medley_registry_recoveries_total") for r in replicas)
    assert recoveries >= (left != "everything")
    rolled_back = a.http.post("/v1/tasks/swap:rollback")
    assert witness.note(rolled_back, "2") > generation, "what was live before is known too"
    fragile.until_level()
    witness.agree(replicas)


def test_redis_is_emptied_while_it_runs(
    fragile: Cluster, witness: Witness, make: MakeBundle
) -> None:
    """By FLUSHALL, so that no connection breaks."""
    a, b = replicas = fragile.start_all("a", "b")
    witness.prepare(a, make)
    fragile.until_level()
    with witness.watching(*replicas):
        with fragile.redis.client() as client:
            client.flushall()
        witness.note(until(lambda: changed(b, witness, "2"), what="changes are taken"), "2")
        fragile.until_level()
    witness.agree(replicas)


def test_redis_and_every_replica_are_lost_and_the_store_knows_it_all(
    fragile: Cluster, witness: Witness, make: MakeBundle
) -> None:
    a, b = fragile.start_all("a", "b")
    witness.prepare(a, make)
    witness.activate(b, "2")
    fragile.until_level()
    for replica in (a, b):
        replica.kill()
    fragile.redis.kill()
    come_back(fragile.redis, "nothing")

    replicas = [fragile.restart(a), fragile.restart(b)]
    for replica in replicas:
        replica.await_ready()

    fragile.until_level()
    witness.agree(replicas)
    assert replicas[0].live() == {"stable": "1", "swap": "2"}
    witness.note(replicas[1].http.post("/v1/tasks/swap:rollback"), "1")
    fragile.until_level()
    witness.agree(replicas)


def test_redis_is_frozen_for_longer_than_anybody_waits(
    fragile: Cluster, witness: Witness, make: MakeBundle
) -> None:
    """A change that was refused meanwhile may be there or not, on all replicas alike."""
    replicas = fragile.start_all("a", "b", "c")
    witness.prepare(replicas[0], make)
    generation = fragile.until_level()
    with witness.watching(*replicas) as tallies:
        fragile.redis.freeze()
        begun_s = time.monotonic()
        refused = put(replicas[1].http, make()[1])
        assert (refused.status_code, refused.json()["code"]) == (503, "registry_unavailable")
        assert time.monotonic() - begun_s < BOUND_S
        goes_on_without_redis(replicas, witness)
        fragile.redis.thaw()
        witness.note(until(lambda: changed(replicas[2], witness, "2"), what="it goes on"), "2")
        assert fragile.until_level() > generation
    no_request_waited(tallies)
    witness.agree(replicas)
    lives = [replica.live() for replica in replicas]
    assert lives[0] == lives[1] == lives[2]
    assert put(replicas[0].http, make()[1]).status_code in (200, 201)
    fragile.until_level()
    assert all(replica.live().get("pets") == "1" for replica in replicas)


def test_a_replica_starts_while_redis_is_away_and_is_ready_once_it_is_back(
    fragile: Cluster, witness: Witness, make: MakeBundle
) -> None:
    (a,) = fragile.start_all("a")
    witness.prepare(a, make)
    fragile.redis.kill()
    late = fragile.start("late")
    eventually(lambda: late.http.get("/livez").status_code == 200)
    waiting = until(lambda: step_of(late, "registry"), what="it says what it waits for")
    assert waiting.status_code == 503
    assert not late.is_ready()

    come_back(fragile.redis, "everything")

    late.await_ready()
    fragile.until_level()
    witness.agree([a, late])


def goes_on_without_redis(replicas: list[Replica], witness: Witness) -> None:
    """Every replica says that it has no registry, is ready all the same, and refuses changes."""
    for replica in replicas:
        eventually(lambda at=replica: at.metric("medley_registry_up") == 0)  # type: ignore[misc]
        assert replica.is_ready()
        begun_s = time.monotonic()
        refused = witness.try_to_activate(replica, "1")
        assert (refused.status_code, refused.json()["code"]) == (503, "registry_unavailable")
        assert refused.headers["retry-after"]
        assert time.monotonic() - begun_s < BOUND_S


def changed(replica: Replica, witness: Witness, version: str) -> httpx.Response | None:
    """The answer to an activation, unless the registry is still away."""
    answer = witness.try_to_activate(replica, version)
    if answer.status_code == 503 and answer.json()["code"] == "registry_unavailable":
        return None
    answer.raise_for_status()
    return answer


def come_back(redis: RedisServer, left: str) -> None:
    if left == "nothing":
        redis.restart(empty=True)
    elif left == "an older dump":
        redis.options = ()  # without its append-only file it reads the dump
        redis.restart()
    else:
        redis.restart()


def no_request_waited(tallies: list[Tally]) -> None:
    assert max(tally.late_s for tally in tallies) < LATE_S


def step_of(replica: Replica, word: str) -> httpx.Response | None:
    answer = replica.http.get("/startupz")
    return answer if word in answer.json().get("detail", "") else None

"""The network between one replica and Redis: cut, silent, slow. The others do not notice."""

from __future__ import annotations

import time

import pytest

from tests.replicas.cluster import Cluster, Replica, eventually, pause
from tests.replicas.witness import Witness
from tests.service.conftest import MakeBundle
from tests.service.versions.test_tasks import put


@pytest.mark.parametrize("how", ["cut", "block"])
def test_one_replica_cannot_reach_redis(
    how: str, cluster: Cluster, witness: Witness, make: MakeBundle, image: bytes
) -> None:
    a, b, c = replicas = three_one_wired(cluster)
    witness.prepare(a, make)
    before = cluster.until_level()
    assert b.wire is not None
    with witness.watching(*replicas):
        b.wire.cut() if how == "cut" else b.wire.block()
        eventually(lambda: b.metric("medley_registry_up") == 0)
        after = witness.activate(a, "2")
        eventually(lambda: c.generation() == after)

        assert b.generation() == before
        assert b.is_ready()
        behind = b.classify(image, "swap", str(after))
        assert (behind.status_code, behind.json()["code"]) == (503, "behind")
        refused = witness.try_to_activate(b, "1")
        assert (refused.status_code, refused.json()["code"]) == (503, "registry_unavailable")
        eventually(lambda: a.metric("medley_replicas") == 2, what="it is missed by the others")

        b.wire.mend()
        mended_s = time.monotonic()
        cluster.until_level()
        assert time.monotonic() - mended_s < 12
    witness.agree(replicas)
    assert b.classify(image, "swap", str(after)).status_code == 200
    eventually(lambda: a.metric("medley_replicas") == 3)
    witness.activate(b, "1")
    cluster.until_level()
    witness.agree(replicas)


def test_a_replica_whose_wire_is_slow_is_late_and_right(
    cluster: Cluster, witness: Witness, make: MakeBundle
) -> None:
    a, b, _ = replicas = three_one_wired(cluster)
    witness.prepare(a, make)
    assert b.wire is not None
    b.wire.slow(0.1)
    with witness.watching(*replicas):
        for number in range(4):
            witness.activate(replicas[number % 3], "12"[number % 2])
        cluster.until_level()
    b.wire.mend()
    witness.agree(replicas)


def test_a_wire_that_breaks_again_and_again_loses_nothing(
    cluster: Cluster, witness: Witness, make: MakeBundle
) -> None:
    a, b, _ = replicas = three_one_wired(cluster)
    witness.prepare(a, make)
    assert b.wire is not None
    with witness.watching(*replicas):
        for number in range(8):
            b.wire.cut()
            witness.activate(a, "21"[number % 2])
            b.wire.mend()
            pause(0.05)
        cluster.until_level()
    witness.agree(replicas)


def test_who_wants_all_replicas_is_told_which_one_does_not_follow(
    cluster: Cluster, witness: Witness, make: MakeBundle
) -> None:
    a, b, _ = three_one_wired(cluster)
    witness.prepare(a, make)
    cluster.until_level()
    eventually(lambda: a.metric("medley_replicas") == 3)
    path, wanted = "/v1/tasks/swap/aliases/live?replicas=all", {"version": "2"}
    all_followed = a.http.put(path, json=wanted)
    assert all_followed.status_code == 200, all_followed.text
    assert all_followed.json()["replicas"]["reached"] == 3

    b.freeze()
    two = a.http.put(f"{path}&wait=0.3", json={"version": "1"})
    assert two.status_code == 202, two.text
    assert two.json()["replicas"]["reached"] == 2
    assert two.json()["replicas"]["alive"] == 3
    b.thaw()
    cluster.until_level()

    put(a.http, make()[1]).raise_for_status()
    too_many = a.http.put("/v1/tasks/swap/aliases/live?replicas=4", json={"version": "2"})
    assert (too_many.status_code, too_many.json()["code"]) == (409, "too_few_replicas")


def three_one_wired(cluster: Cluster) -> list[Replica]:
    """Three replicas; the wire of the second may be broken."""
    replicas = [
        cluster.start("a"),
        cluster.start("b", wired=True, generation_wait_s=0.3),
        cluster.start("c"),
    ]
    for replica in replicas:
        replica.await_ready()
    return replicas

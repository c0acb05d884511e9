"""The bundle store is gone, hangs, or lies: what is served stays, what was missed is caught up."""

from __future__ import annotations

import os

import pytest

from tests.replicas.cluster import Cluster, Replica, eventually, pause
from tests.replicas.witness import Witness
from tests.service.conftest import MakeBundle
from tests.service.versions.test_tasks import put


def test_a_registration_while_the_store_is_gone_is_refused_and_changes_nothing(
    cluster: Cluster, witness: Witness, make: MakeBundle
) -> None:
    a, b, c = replicas = cluster.start_all("a", "b", "c")
    witness.prepare(a, make)
    generation = cluster.until_level()
    away = cluster.folder / "away"
    with witness.watching(*replicas):
        cluster.bundles.rename(away)
        cluster.bundles.write_text("not a folder")
        refused = put(b.http, make()[1])
        assert refused.status_code in (503, 507), refused.text
        assert refused.headers["content-type"] == "application/problem+json"
        assert cluster.until_level() == generation
        assert all(replica.is_ready() for replica in replicas)
        cluster.bundles.unlink()
        away.rename(cluster.bundles)
        put(c.http, make()[1]).raise_for_status()
        cluster.until_level()
    witness.agree(replicas)
    assert all(replica.live()["pets"] == "1" for replica in replicas)


@pytest.mark.parametrize("how", ["gone", "hanging"])
def test_a_replica_that_cannot_read_the_store_stays_where_it_is_and_catches_up(
    how: str, cluster: Cluster, witness: Witness, make: MakeBundle, image: bytes
) -> None:
    """It answers by the generation that it has whole; never by half of the next one."""
    (a,) = cluster.start_all("a")
    witness.prepare(a, make)
    b = looking_elsewhere(cluster, "b")
    before = cluster.until_level()
    view, (_, data) = cluster.folder / "b-bundles", make(task="pets", seed=4)
    with witness.watching(a, b):
        if how == "gone":
            view.rename(cluster.folder / "away")
        else:
            hang(cluster, make, "pets")
        put(a.http, data).raise_for_status()
        witness.activate(a, "2")
        eventually(lambda: b.metric("medley_registry_lag_seconds") > 0)
        for _ in range(10):
            assert b.generation() == before
            assert b.is_ready()
            pause(0.1)
        assert b.classify(image, "pets").status_code == 404
        eventually(lambda: lacking(b) == ["pets@1"], what="it says what it lacks")
        if how == "gone":
            eventually(lambda: b.metric("medley_store_up") == 0)
        if how == "gone":
            cluster.bring(cluster.folder / "away")
            (cluster.folder / "away").rename(view)
        else:
            cluster.bring(view)
        cluster.until_level()
    witness.agree([a, b])
    assert b.live() == {"pets": "1", "stable": "1", "swap": "2"}


@pytest.mark.parametrize("damage", ["lost", "cut short", "another one"])
def test_a_bundle_that_the_store_lost_fails_with_its_reason_and_the_rest_goes_on(
    damage: str, cluster: Cluster, witness: Witness, make: MakeBundle, image: bytes
) -> None:
    (a,) = cluster.start_all("a")
    witness.prepare(a, make)
    bundle, data = make(task="pets", seed=4)
    put(a.http, data).raise_for_status()
    (path,) = cluster.files(bundle.digest)
    path.unlink()
    if damage != "lost":
        path.write_bytes(data[:500] if damage == "cut short" else make(task="other", seed=6)[1])

    alone = cluster.start("b", replica_ttl_s=1.5)
    a.kill()  # nobody has it loaded any more, so nobody waits for it
    alone.await_ready()

    (version,) = alone.http.get("/v1/tasks/pets").json()["versions"]
    assert version["state"] == "failed"
    assert version["reason"]
    assert str(cluster.folder) not in version["reason"]
    refused = alone.classify(image, "pets")
    assert (refused.status_code, refused.json()["code"]) == (503, "version_failed")
    witness.agree([alone])
    put(alone.http, data).raise_for_status()
    assert alone.classify(image, "pets").status_code == 200
    assert [path.read_bytes() for path in cluster.files(bundle.digest)] == [data]


def test_files_of_others_in_the_store_are_left_alone(
    cluster: Cluster, witness: Witness, make: MakeBundle
) -> None:
    cluster.bundles.mkdir()
    foreign = {
        cluster.bundles / "README": b"hello",
        cluster.bundles / "bundles" / "holiday.jpg": b"\xff\xd8",
        cluster.bundles / "registry" / "notes.json": b"[]",
    }
    for path, data in foreign.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)

    replicas = cluster.start_all("a", "b", keep_unused_s=0)
    witness.prepare(replicas[0], make)
    cluster.until_level()
    witness.agree(replicas)
    replicas[0].http.delete("/v1/tasks/stable").raise_for_status()
    cluster.until_level()

    assert {path: path.read_bytes() for path in foreign} == foreign


def lacking(replica: Replica) -> list[str]:
    """The versions that keep a replica where it is, by its own word on the board."""
    seen = replica.http.get("/v1/replicas").json()["replicas"]
    return [one["version"] for who in seen if who["this"] for one in who["lacking"]]


def looking_elsewhere(cluster: Cluster, name: str) -> Replica:
    """A replica that sees the store at a place of its own, where a test can break it."""
    view = cluster.view(name)
    replica = cluster.start(name, bundle_store=str(view))
    replica.await_ready()
    return replica


def hang(cluster: Cluster, make: MakeBundle, task: str) -> None:
    """Where b looks, reading the bundle of a task never ends."""
    bundle, _ = make(task=task, seed=4)
    known, _ = make(task="stable", seed=1)
    (pattern,) = cluster.files(known.digest, under=cluster.folder / "b-bundles")
    old, new = (one.digest.rpartition(":")[2] for one in (known, bundle))
    os.mkfifo(pattern.with_name(pattern.name.replace(old, new)))

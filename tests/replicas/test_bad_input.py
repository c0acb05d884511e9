"""A cluster that is set up wrongly: one line where somebody types a command, and a status.

Commands are run as people type them; the registry and the store are real.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from redis import Redis

from tests.redis_server import free_port, redis_server
from tests.replicas.cluster import Cluster, Ended, clustered, command, eventually
from tests.replicas.witness import Witness
from tests.service.conftest import MakeBundle
from tests.service.scripted import Answer, scripted
from tests.service.versions.test_tasks import put

SECRET = "sesame-open"


@pytest.mark.parametrize(
    ("registry", "says"),
    [
        ("http://127.0.0.1:6379", "redis://"),
        ("redis://127.0.0.1:notaport/0", "registry"),
        ("redis://127.0.0.1:6379/zero", "registry"),
        ("redis+sentinel://127.0.0.1:26379", "service"),
        ("127.0.0.1:6379", "redis://"),
    ],
)
def test_a_registry_that_is_no_address_is_one_line(
    registry: str, says: str, tmp_path: Path
) -> None:
    ended = serve(tmp_path, registry=registry)
    assert ended.status in (1, 2)
    assert says in one_line(ended)


def test_a_registry_without_a_store_is_one_line(tmp_path: Path) -> None:
    words = ["serve", "--port", "0", "--store", str(tmp_path / "own")]
    ended = command(words, {"MEDLEY_REGISTRY": "redis://127.0.0.1:6379"}, tmp_path)
    assert ended.status == 2
    assert "bundle_store" in one_line(ended)


def test_a_redis_that_nobody_answers_for_is_one_line_after_the_wait(tmp_path: Path) -> None:
    url = f"redis://:{SECRET}@127.0.0.1:{free_port()}/0"
    ended = serve(tmp_path, registry=url, registry_wait_s="0.5")
    assert ended.status == 1
    assert SECRET not in "".join(ended.said)
    assert "registry" in one_line(ended)


def test_something_else_than_a_redis_is_one_line(tmp_path: Path) -> None:
    with scripted(Answer(200, b"hello")) as other:
        url = other.url.replace("http://", "redis://")
        ended = serve(tmp_path, registry=url, registry_wait_s="0.5")
    assert ended.status == 1
    assert "registry" in one_line(ended)


def test_a_wrong_password_is_one_line_that_does_not_tell_it(tmp_path: Path) -> None:
    with redis_server(tmp_path / "redis", "--requirepass", "another") as redis:
        for given in ({"registry_password": SECRET}, {}):
            ended = serve(tmp_path, registry=redis.url, **given)
            assert ended.status == 1
            assert "password" in one_line(ended)
            assert SECRET not in "".join(ended.said)


def test_another_backbone_does_not_join(cluster: Cluster, make: MakeBundle) -> None:
    """The command serves medley-mini, the cluster the tests' tiny backbone."""
    (a,) = cluster.start_all("a")
    put(a.http, make()[1]).raise_for_status()
    ended = join(cluster)
    assert ended.status == 1
    assert "backbone" in one_line(ended)
    assert a.is_ready()
    assert a.states("pets") == {"1": "live"}


def test_two_clusters_do_not_share_a_prefix(
    cluster: Cluster, witness: Witness, make: MakeBundle, tmp_path: Path
) -> None:
    (a,) = cluster.start_all("a")
    witness.prepare(a, make)
    stranger = cluster.start("stranger", bundle_store=str(tmp_path / "another-store"))
    stranger.process.join(30)
    assert stranger.process.exitcode == 1
    assert "a prefix of its own" in stranger.said().splitlines()[-1]
    witness.agree([a])

    with clustered(cluster.redis, f"{cluster.prefix}-2", tmp_path / "second") as second:
        (b,) = second.start_all("b")
        assert b.live() == {}
        put(b.http, make()[1]).raise_for_status()
    assert "pets" not in a.live()
    witness.agree([a])


@pytest.mark.parametrize("found", ["a newer format", "no document", "another type"])
def test_data_of_another_version_in_redis_is_one_line_and_stays_as_it_is(
    found: str, cluster: Cluster, witness: Witness, make: MakeBundle
) -> None:
    (a,) = cluster.start_all("a")
    witness.prepare(a, make)
    a.kill()
    key = f"{{{cluster.prefix}}}:state"
    with Redis(port=cluster.redis.port) as redis:
        if found == "another type":
            redis.delete(key)
            redis.rpush(key, "x")
        elif found == "no document":
            redis.hset(key, "document", "\x00 nothing of ours")
        else:
            state = json.loads(redis.hget(key, "document"))
            redis.hset(key, "document", json.dumps(state | {"format": 99}))
        left = redis.dump(key)
        ended = join(cluster)
        assert ended.status == 1
        assert "registry" in one_line(ended)
        assert redis.dump(key) == left


def test_garbage_that_somebody_writes_into_redis_stops_changes_and_not_answers(
    cluster: Cluster, witness: Witness, make: MakeBundle
) -> None:
    a, b = replicas = cluster.start_all("a", "b")
    witness.prepare(a, make)
    cluster.until_level()
    key = f"{{{cluster.prefix}}}:state"
    with Redis(port=cluster.redis.port) as redis:
        kept = redis.dump(key)
        with witness.watching(*replicas):
            redis.set(key, "garbage")
            eventually(lambda: b.metric("medley_registry_up") == 0)
            refused = witness.try_to_activate(a, "2")
            assert (refused.status_code, refused.json()["code"]) == (503, "registry_unavailable")
            assert a.is_ready()
            assert redis.get(key) == b"garbage", "it is for people to look at"
            redis.restore(key, 0, kept, replace=True)
            eventually(lambda: b.metric("medley_registry_up") == 1)
            witness.activate(a, "2")
            cluster.until_level()
    witness.agree(replicas)


def serve(folder: Path, **settings: str) -> Ended:
    """`medley serve` with a registry and a store."""
    given = {"bundle_store": str(folder / "bundles"), "registry_timeout_s": "0.5"} | settings
    environment = {f"MEDLEY_{name.upper()}": value for name, value in given.items()}
    environment |= {"MEDLEY_LOG_LEVEL": "error"}
    return command(["serve", "--port", "0", "--store", str(folder / "own")], environment, folder)


def join(cluster: Cluster, **settings: str) -> Ended:
    """`medley serve` with the registry of a cluster."""
    given = {
        "registry": cluster.redis.url,
        "registry_prefix": cluster.prefix,
        "bundle_store": str(cluster.bundles),
    }
    return serve(cluster.folder, **(given | settings))


def one_line(ended: Ended) -> str:
    """What a command has said: one line, no traceback."""
    assert len(ended.said) == 1, ended.said
    assert ended.said[0].startswith("medley: ")
    return ended.said[0]

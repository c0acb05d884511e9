"""Several servers on one Redis and one bundle store: what one takes in, all answer with."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from service.app import create_app
from service.errors import RegistryError, ServiceError
from service.settings import Settings
from tests.models import tiny_backbone
from tests.redis_server import RedisServer, free_port
from tests.redis_server import redis_server as running_redis
from tests.service.conftest import MakeBundle, OpenApp
from tests.service.routes.test_classify import classify
from tests.service.versions.test_tasks import put


@dataclass
class Cluster:
    """Opens replicas that share what is under one folder and one prefix."""

    open_app: OpenApp
    folder: Path
    fields: dict[str, Any]

    def replica(self, name: str, **fields: object) -> AbstractContextManager[httpx.Client]:
        given = {"store": self.folder / name, "replica": name} | self.fields | fields
        return self.open_app(**given)


@pytest.fixture
def cluster(redis_server: RedisServer, open_app: OpenApp, tmp_path: Path) -> Cluster:
    """A cluster of its own on the Redis that tests share."""
    fields = {
        "registry": redis_server.url,
        "registry_prefix": uuid.uuid4().hex,
        "bundle_store": str(tmp_path / "shared"),
        "poll_s": 0.2,
        "replica_ttl_s": 2.0,
    }
    return Cluster(open_app, tmp_path, fields)


@pytest.fixture
def three(cluster: Cluster) -> Iterator[list[httpx.Client]]:
    """Three replicas that know of each other."""
    with ExitStack() as stack:
        opened = [stack.enter_context(cluster.replica(f"r{n}")) for n in range(3)]
        until(lambda: [one["ready"] for one in listed(opened[0])] == [True] * 3)
        yield opened


def until(condition: Callable[[], bool], *, timeout_s: float = 20.0) -> None:
    """Ask again and again, each time with a round trip or more, until it is so."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not become so"


def generation(http: httpx.Client) -> int:
    return int(http.get("/v1/tasks").json()["generation"])


def until_at(http: httpx.Client, wanted: int) -> None:
    """Wait until a replica serves this generation."""
    until(lambda: generation(http) >= wanted)


def test_what_one_replica_registers_all_answer_with(
    three: list[httpx.Client], make: MakeBundle, image: bytes
) -> None:
    bundle, data = make()
    created = put(three[0], data)
    assert created.status_code == 201
    for other in three:
        until_at(other, created.json()["generation"])
        (result,) = classify(other, image, model="pets", labels=None).json()["results"]
        assert result["path"]["digest"] == bundle.digest


def versions_of(http: httpx.Client) -> dict[str, str]:
    """What a replica says it is, by task@version."""
    tasks = http.get("/v1/tasks").json()["tasks"]
    return {f"{t['task']}@{v['version']}": v["state"] for t in tasks for v in t["versions"]}


def test_every_change_of_one_is_followed_by_all(
    three: list[httpx.Client], make: MakeBundle, image: bytes
) -> None:
    put(three[0], make()[1])
    put(three[1], make(version="2", seed=2)[1], version="2")  # it has caught up before it changes
    assert three[2].post("/v1/tasks/pets:rollback").json()["live"] == "1"
    three[0].put("/v1/tasks/pets/aliases/next", json={"version": "2"})
    for http in three:
        until_at(http, 4)
        assert versions_of(http) == {"pets@1": "live", "pets@2": "ready"}
        (result,) = classify(http, image, model="pets@next", labels=None).json()["results"]
        assert result["path"]["version"] == "2"

    three[2].delete("/v1/tasks/pets")
    for http in three:
        until_at(http, 5)
        assert classify(http, image, model="pets").json()["code"] == "unknown_task"
        assert 'task="pets"' not in http.get("/metrics").text


def test_a_change_on_one_that_lags_is_made_of_what_is_there_by_now(
    cluster: Cluster, make: MakeBundle
) -> None:
    slow = {"poll_s": 3600.0}
    with cluster.replica("a", **slow) as a, cluster.replica("b", **slow) as b:
        tag = put(a, make()[1]).headers["etag"]
        same = put(b, make()[1])
        other = put(b, make(seed=5)[1])
        assert (same.status_code, other.json()["code"]) == (200, "version_exists")
        url, wanted = "/v1/tasks/pets/aliases/x", {"version": "1"}
        assert b.put(url, json=wanted, headers={"if-match": tag}).status_code == 200
        stale = a.put(url, json=wanted, headers={"if-match": tag})
        assert (stale.status_code, stale.json()["code"]) == (412, "precondition_failed")


def test_the_same_bundle_given_to_all_at_once_is_registered_once(
    three: list[httpx.Client], make: MakeBundle
) -> None:
    for version in "12345":
        data = make(version=version, seed=int(version))[1]
        with ThreadPoolExecutor() as threads:
            answers = list(threads.map(lambda http: put(http, data, version=version), three))  # noqa: B023
        assert sorted(answer.status_code for answer in answers) == [200, 200, 201]
    until_at(three[0], 5)
    assert versions_of(three[0])["pets@5"] == "live"
    assert generation(three[0]) == 5


def test_a_rollout_is_everybodys(three: list[httpx.Client], make: MakeBundle) -> None:
    put(three[0], make()[1])
    url = "/v1/tasks/pets/versions/2?activate=false"
    three[1].put(url, content=make(version="2", seed=2)[1])
    assert three[2].put("/v1/tasks/pets/rollout", json={"version": "2"}).status_code == 200
    for http in three:
        until_at(http, 3)
        assert http.get("/v1/tasks/pets/rollout").json()["rollout"]["version"] == "2"
        until(lambda http=http: "pets@2" in on_device(http))  # type: ignore[misc]
    assert three[0].post("/v1/tasks/pets/rollout:promote").json()["live"] == "2"
    until_at(three[1], 5)
    assert three[1].get("/v1/tasks/pets/rollout").json()["code"] == "no_rollout"


def on_device(http: httpx.Client) -> set[str]:
    """The versions that a replica has on its device, as task@version."""
    tasks = http.get("/v1/tasks").json()["tasks"]
    found = ((t["task"], v) for t in tasks for v in t["versions"])
    return {f"{task}@{v['version']}" for task, v in found if v["tier"] == "device"}


def test_replicas_say_who_serves_what(three: list[httpx.Client], make: MakeBundle) -> None:
    bundle, data = make()
    put(three[0], data, version="1")
    until(lambda: {r["generation"] for r in listed(three[1])} == {1})
    found = listed(three[1])
    assert [(r["name"], r["this"], r["phase"]) for r in found] == [
        ("r0", False, "ready"),
        ("r1", True, "ready"),
        ("r2", False, "ready"),
    ]
    for replica in found:
        assert replica["versions"]["pets@1"]["digest"] == bundle.digest
        assert replica["versions"]["pets@1"]["state"] == "live"
        assert replica["lacking"] == []
    assert len({r["id"] for r in found}) == 3
    assert three[0].get("/readyz").headers["x-replica"] == "r0"


def listed(http: httpx.Client) -> list[dict[str, Any]]:
    """What a replica knows of all."""
    replicas: list[dict[str, Any]] = http.get("/v1/replicas").json()["replicas"]
    return replicas


def test_one_that_leaves_is_gone_from_the_board_at_once(cluster: Cluster) -> None:
    with cluster.replica("stays", replica_ttl_s=60.0) as http:
        with cluster.replica("leaves", replica_ttl_s=60.0):
            until(lambda: len(listed(http)) == 2)
        assert [one["name"] for one in listed(http)] == ["stays"]


def test_two_replicas_of_one_name_are_two(cluster: Cluster, make: MakeBundle) -> None:
    with (
        cluster.replica("a", replica="twin") as a,
        cluster.replica("b", replica="twin") as b,
    ):
        until(lambda: [one["ready"] for one in listed(a)] == [True, True])
        answer = a.put("/v1/tasks/pets/versions/1?replicas=2", content=make()[1])
        assert answer.json()["replicas"]["reached"] == 2
        assert [one["name"] for one in listed(b)] == ["twin", "twin"]


@pytest.mark.parametrize("wanted", ["all", "majority", "3"])
def test_a_change_waits_for_as_many_replicas_as_it_is_told(
    three: list[httpx.Client], make: MakeBundle, wanted: str
) -> None:
    number = 2 if wanted == "majority" else 3
    created = three[0].put(f"/v1/tasks/pets/versions/1?replicas={wanted}", content=make()[1])
    assert created.status_code == 201
    assert created.json()["replicas"]["wanted"] == number
    assert created.json()["replicas"]["reached"] >= number
    assert sum(generation(http) >= 1 for http in three) >= number

    three[0].put("/v1/tasks/pets/versions/2", content=make(version="2", seed=2)[1])
    rolled = three[1].post(f"/v1/tasks/pets:rollback?replicas={wanted}")
    assert (rolled.status_code, rolled.json()["live"]) == (200, "1")
    named = three[2].put(f"/v1/tasks/pets/aliases/live?replicas={wanted}", json={"version": "2"})
    assert named.json()["replicas"] | {"reached": 0} == {
        "generation": 4,
        "wanted": number,
        "reached": 0,
        "alive": 3,
        "failed": [],
    }
    assert sum(versions_of(http)["pets@2"] == "live" for http in three) >= number


@pytest.mark.parametrize("nonsense", ["0", "-1", "some", "1.5", "", "1e3"])
def test_a_number_of_replicas_that_makes_no_sense_is_refused(
    http: httpx.Client, nonsense: str
) -> None:
    answer = http.put(f"/v1/tasks/pets/versions/1?replicas={nonsense}", content=b"")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert answer.json()["errors"][0]["where"] == "query.replicas"


def test_more_replicas_than_are_alive_change_nothing(cluster: Cluster, make: MakeBundle) -> None:
    with cluster.replica("a") as http:
        answer = http.put("/v1/tasks/pets/versions/1?replicas=2", content=make()[1])
        assert (answer.status_code, answer.json()["code"]) == (409, "too_few_replicas")
        assert versions_of(http) == {}


def test_who_wants_all_is_told_which_replica_refuses_the_version(
    cluster: Cluster, make: MakeBundle
) -> None:
    with cluster.replica("a") as a, cluster.replica("b", **BROKEN) as b:
        until(lambda: [one["ready"] for one in listed(a)] == [True, True])
        accepted = a.put("/v1/tasks/pets/versions/1?replicas=all", content=make()[1])
        assert accepted.status_code == 202
        assert versions_of(a) == {"pets@1": "live"}
        for asked in (a, b):
            found = asked.get(accepted.headers["location"]).json()
            assert (found["state"], found["replicas"]["reached"]) == ("succeeded", 1)
            assert found["replicas"]["failed"][0]["name"] == "b"
            assert found["warnings"][-1] == "1 replicas have it, 2 were wanted"

        named = a.put("/v1/tasks/pets/aliases/x?replicas=all", json={"version": "1"})
        assert (named.status_code, named.json()["aliases"]["x"]) == (202, "1")
        assert named.json()["replicas"]["failed"][0]["reason"]


def test_who_does_not_wait_asks_any_replica_for_the_end(
    three: list[httpx.Client], make: MakeBundle
) -> None:
    accepted = three[0].put("/v1/tasks/pets/versions/1?replicas=all&wait=0", content=make()[1])
    assert (accepted.status_code, accepted.json()["state"]) == (202, "running")
    location = accepted.headers["location"]
    for http in three:
        until(lambda: bool(three[2].get(location).json()["state"] == "succeeded"))
        assert http.get(location).json()["replicas"]["reached"] == 3
        assert versions_of(http) == {"pets@1": "live"}


BROKEN = {"slots": 1}  # too little for any bundle here


def test_an_operation_of_a_replica_that_is_gone_has_failed(
    cluster: Cluster, make: MakeBundle
) -> None:
    with cluster.replica("stays") as stays:
        with cluster.replica("leaves") as leaves:
            bundle = make()[1]
            accepted = leaves.put("/v1/tasks/pets/versions/1?wait=0", content=bundle)
            location = accepted.headers["location"]
            until(lambda: stays.get(location).json()["state"] == "succeeded")
        assert stays.get(location).json()["state"] == "succeeded"
        assert stays.get("/v1/operations/none").json()["code"] == "unknown_operation"


def test_one_that_joins_late_is_ready_with_everything(
    cluster: Cluster, make: MakeBundle, image: bytes
) -> None:
    with cluster.replica("first") as first:
        put(first, make()[1])
        put(first, make(task="tools", seed=1)[1], "tools")
        with cluster.replica("late") as late:
            assert generation(late) == generation(first) == 2
            assert versions_of(late) == {"pets@1": "live", "tools@1": "live"}
            ours, theirs = (classify(one, image, labels=None).json() for one in (first, late))
            assert ours["results"] == theirs["results"]


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis to be harmed."""
    with running_redis(tmp_path / "redis") as started:
        yield started


def test_without_redis_answers_go_on_and_changes_are_refused_until_it_is_back(
    cluster: Cluster, own_redis: RedisServer, make: MakeBundle, image: bytes
) -> None:
    own = {"registry": own_redis.url, "registry_timeout_s": 0.5}
    with cluster.replica("a", **own) as a, cluster.replica("b", **own) as b:
        put(a, make()[1])
        until_at(b, 1)
        own_redis.kill()
        for http in (a, b):
            until(lambda http=http: metric(http, "medley_registry_up") == 0)  # type: ignore[misc]
            assert classify(http, image, model="pets").status_code == 200
            refused = put(http, make(version="2", seed=2)[1], version="2")
            assert (refused.status_code, refused.json()["code"]) == (503, "registry_unavailable")
            assert refused.headers["retry-after"]
            assert http.get("/readyz").status_code == 200
            assert http.get("/v1/replicas").json()["code"] == "registry_unavailable"

        own_redis.restart(empty=True)
        until(lambda: metric(a, "medley_registry_up") == metric(b, "medley_registry_up") == 1)
        until(lambda: len(listed(a)) == 2)
        after = put(b, make(version="2", seed=2)[1], version="2")
        assert after.status_code == 201
        until_at(a, after.json()["generation"])
        assert versions_of(a) == versions_of(b) == {"pets@1": "ready", "pets@2": "live"}
        recoveries = [metric(http, "medley_registry_recoveries_total") for http in (a, b)]
        assert sum(recoveries) >= 1
        assert metric(a, "medley_registry_backup_generation") == after.json()["generation"]


def metric(http: httpx.Client, name: str, **labels: str) -> float:
    """One number of /metrics."""
    families = text_string_to_metric_families(http.get("/metrics").text)
    (found,) = (
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and sample.labels == labels
    )
    return float(found)


def test_while_bundles_cannot_be_had_a_replica_stays_where_it_is_and_says_so(
    cluster: Cluster, make: MakeBundle, image: bytes, tmp_path: Path
) -> None:
    link = tmp_path / "link"  # how only one of them comes to the store
    with cluster.replica("a") as a:
        link.symlink_to(tmp_path / "shared")
        with cluster.replica("b", bundle_store=str(link)) as b:
            put(a, make()[1])
            until_at(b, 1)
            link.unlink()
            put(a, make(version="2", seed=2)[1], version="2")
            until(lambda: bool(listed(b)[1]["lacking"]))
            (lacking,) = listed(b)[1]["lacking"]
            assert (lacking["version"], lacking["attempts"] >= 1) == ("pets@2", True)
            assert lacking["retry_s"] is None or lacking["retry_s"] > 0
            assert metric(b, "medley_registry_lag_seconds") > 0
            assert metric(b, "medley_registry_generation", kind="desired") == 2
            assert metric(b, "medley_registry_generation", kind="observed") == 1
            assert metric(b, "medley_store_up") == 0
            assert metric(b, "medley_follows_total", result="unavailable") >= 1
            (result,) = classify(b, image, model="pets", labels=None).json()["results"]
            assert result["path"]["version"] == "1"
            refused = b.put("/v1/tasks/pets/aliases/x", json={"version": "1"})
            assert refused.status_code == 503

            link.symlink_to(tmp_path / "shared")
            until_at(b, 2)
            (result,) = classify(b, image, model="pets", labels=None).json()["results"]
            assert result["path"]["version"] == "2"
            assert metric(b, "medley_registry_lag_seconds") == 0
            assert listed(b)[1]["lacking"] == []


def test_one_that_joins_is_not_ready_without_what_another_has(
    cluster: Cluster, make: MakeBundle, tmp_path: Path
) -> None:
    bundle, data = make()
    with cluster.replica("first") as first, ThreadPoolExecutor() as threads:
        put(first, data)
        path = tmp_path / "shared" / "bundles" / f"{bundle.digest.removeprefix('sha256:')}"
        path = path.with_suffix(".safetensors")
        lost = path.rename(tmp_path / "lost")
        late = cluster.replica("late")
        joining = threads.submit(late.__enter__)
        try:
            until(lambda: [one["phase"] for one in listed(first)] == ["ready", "starting"])
            until(lambda: states_of(listed(first)[1]) == {"pets@1": "failed"})
            assert "lost" in listed(first)[1]["versions"]["pets@1"]["reason"]
            assert not joining.done()
        finally:
            lost.rename(path)
            http = joining.result(60)
        with closing_both(late):
            assert versions_of(http) == {"pets@1": "live"}


def states_of(replica: dict[str, Any]) -> dict[str, str]:
    """The state of each version that a replica tells of."""
    return {version: one["state"] for version, one in replica["versions"].items()}


@contextmanager
def closing_both(context: AbstractContextManager[httpx.Client]) -> Iterator[None]:
    """Leave a context that was entered elsewhere."""
    try:
        yield
    finally:
        context.__exit__(None, None, None)


def test_a_version_that_no_replica_can_load_keeps_nobody_from_joining(
    cluster: Cluster, make: MakeBundle, tmp_path: Path
) -> None:
    bundle, data = make()
    name = f"{bundle.digest.removeprefix('sha256:')}.safetensors"
    with cluster.replica("a") as a:
        put(a, data)
        put(a, make(task="tools", seed=1)[1], "tools")
    (tmp_path / "shared" / "bundles" / name).unlink()
    with cluster.replica("b") as b:
        assert versions_of(b) == {"pets@1": "failed", "tools@1": "live"}
        assert b.get("/readyz").json()["failed_versions"] == ["pets@1"]
        assert put(b, data).status_code == 200
        assert versions_of(b) == {"pets@1": "live", "tools@1": "live"}
    with cluster.replica("c") as c:
        assert versions_of(c) == {"pets@1": "live", "tools@1": "live"}


def test_numbers_say_how_far_each_replica_is(three: list[httpx.Client], make: MakeBundle) -> None:
    put(three[0], make()[1])
    for http in three:
        until_at(http, 1)
        for kind in ("desired", "observed"):
            assert metric(http, "medley_registry_generation", kind=kind) == 1
        assert metric(http, "medley_registry_lag_seconds") == 0
        assert metric(http, "medley_follows_total", result="ok") >= 1
        assert metric(http, "medley_follow_seconds_count") >= 1
        assert metric(http, "medley_versions", state="live") == 1
        assert metric(http, "medley_versions", state="failed") == 0
        assert metric(http, "medley_ready") == metric(http, "medley_store_up") == 1
        until(lambda http=http: metric(http, "medley_replicas") == 3)  # type: ignore[misc]


def test_a_replica_with_another_backbone_does_not_join(
    cluster: Cluster, make: MakeBundle, tmp_path: Path
) -> None:
    with cluster.replica("a") as a:
        put(a, make()[1])
        fields = cluster.fields | {"store": tmp_path / "b", "buckets": (4,)}
        app = create_app(Settings.model_validate(fields), backbone=tiny_backbone(seed=1))
        with pytest.raises(RegistryError, match="another backbone"), TestClient(app):
            pass
        assert [one["name"] for one in listed(a)] == ["a"]


def test_a_redis_that_does_not_answer_ends_a_start_after_a_while(
    cluster: Cluster, tmp_path: Path
) -> None:
    nobody = f"redis://:sesame@127.0.0.1:{free_port()}/0"
    with (
        pytest.raises(ServiceError, match="registry is away") as caught,
        cluster.replica("a", registry=nobody, registry_wait_s=0.6),
    ):
        pass
    assert "sesame" not in str(caught.value)

"""Three replicas that share a registry and a store, and nothing is wrong with any of them."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.replicas.cluster import Cluster, Replica, eventually, pause
from tests.replicas.witness import Witness
from tests.service.conftest import MakeBundle
from tests.service.raw import Raw, post
from tests.service.versions.test_tasks import put

THREE = ("a", "b", "c")


def test_what_is_registered_with_one_is_answered_by_all(
    cluster: Cluster, make: MakeBundle, image: bytes
) -> None:
    replicas = cluster.start_all(*THREE)
    bundle, data = make(task="pets", seed=4)

    created = put(replicas[0].http, data)

    assert created.status_code == 201
    generation = created.headers["x-registry-generation"]
    told = []
    for replica in replicas:
        answer = replica.classify(image, "pets", generation)
        assert answer.status_code == 200, answer.text
        told.append(answer.json())
    assert told[0] == told[1] == told[2]
    assert told[0]["results"][0]["path"]["digest"] == bundle.digest
    for replica in replicas:
        eventually(lambda at=replica: at.metric("medley_replicas") == 3)  # type: ignore[misc]
        seen = replica.http.get("/v1/replicas").json()["replicas"]
        assert sorted(one["name"] for one in seen) == list(THREE)


@pytest.mark.parametrize("changes", [24, pytest.param(400, marks=pytest.mark.slow)])
def test_who_sends_the_generation_is_never_told_that_there_is_no_such_version(
    cluster: Cluster, make: MakeBundle, image: bytes, changes: int
) -> None:
    """Changes go to each replica in turn; clients ask all three for the newest at once."""
    replicas = cluster.start_all(*THREE)
    newest = Newest(image)
    with ThreadPoolExecutor(len(replicas)) as pool:
        asking = [pool.submit(newest.ask, replica) for replica in replicas]
        try:
            for number in range(changes):
                version = str(number % VERSIONS)
                data = make(task="guest", version=version, seed=number % VERSIONS)[1]
                at = replicas[number % len(replicas)].http
                answer = put(at, data, "guest", version)
                answer.raise_for_status()
                newest.is_there("guest", version, answer.headers["x-registry-generation"])
                if number >= KEPT:
                    gone = str((number - KEPT) % VERSIONS)
                    at.delete(f"/v1/tasks/guest/versions/{gone}").raise_for_status()
        finally:
            newest.stop.set()
        asked = sum(one.result() for one in asking)
    assert asked > 5 * changes


VERSIONS, KEPT = 12, 8  # a version is removed when eight newer ones are there, and made again


class Newest:
    """What was registered last, and clients that ask for it with its generation."""

    def __init__(self, image: bytes) -> None:
        self.stop = threading.Event()
        self._image = image
        self._there = threading.Event()
        self._wanted: tuple[str, str, str] = ("", "", "")

    def is_there(self, task: str, version: str, generation: str) -> None:
        self._wanted = task, version, generation
        self._there.set()

    def ask(self, replica: Replica) -> int:
        """Ask until it is enough; how often."""
        asked = 0
        assert self._there.wait(30)
        with Raw(replica.url) as raw:
            while not self.stop.is_set():
                task, version, generation = self._wanted
                answer = raw.ask(self._request(task, version, generation))
                assert answer.status == 200, (replica.name, self._wanted, answer.body)
                assert int(answer.headers["x-registry-generation"]) >= int(generation)
                (result,) = answer.json()["results"]
                assert result["path"]["version"] == version
                asked += 1
        return asked

    def _request(self, task: str, version: str, generation: str) -> bytes:
        request = post(
            f"/v1/classify?model={task}@{version}", self._image, content_type="image/png"
        )
        return request.replace(
            b"Host: x\r\n", f"Host: x\r\nX-Min-Generation: {generation}\r\n".encode(), 1
        )


def test_a_replica_that_joins_late_is_ready_only_when_it_has_everything(
    cluster: Cluster, witness: Witness, make: MakeBundle
) -> None:
    """One bundle cannot be had from where the late one looks; the others have it loaded."""
    first, second = cluster.start_all("a", "b")
    witness.prepare(first, make)
    bundle, data = make(task="pets", seed=4)
    put(second.http, data).raise_for_status()
    cluster.until_level()
    view = cluster.view("late")
    (missing,) = cluster.files(bundle.digest, under=view)
    missing.unlink()

    with witness.watching(first, second):
        late = cluster.start("late", bundle_store=str(view))
        eventually(lambda: late.http.get("/livez").status_code == 200)
        for _ in range(10):
            assert not late.is_ready()
            assert late.metric("medley_ready") == 0
            assert not late.ready.poll(), "it said that it is ready"
            pause(0.1)
        shutil.copy(cluster.bundles / missing.relative_to(view), missing)
        late.await_ready()
        assert late.is_ready()
    witness.agree([first, second, late])
    assert late.states("pets") == {"1": "live"}


def test_a_version_that_no_replica_can_load_keeps_none_from_starting(
    cluster: Cluster, witness: Witness, make: MakeBundle
) -> None:
    (first,) = cluster.start_all("a")
    witness.prepare(first, make)
    bundle, data = make(task="pets", seed=4)
    put(first.http, data).raise_for_status()
    first.kill()
    cluster.lose(bundle.digest)
    shutil.rmtree(first.store)  # its cache had it too

    again = cluster.restart(first)
    again.await_ready()

    assert again.states("pets") == {"1": "failed"}
    assert again.http.get("/readyz").json()["failed_versions"] == ["pets@1"]
    witness.agree([again])


def test_two_replicas_of_one_name_are_two_replicas(cluster: Cluster, make: MakeBundle) -> None:
    first, second = cluster.start_all("a", "b", replica="twin")
    put(first.http, make()[1]).raise_for_status()
    cluster.until_level()
    eventually(lambda: second.metric("medley_replicas") == 2)
    ids = {one["id"] for one in first.http.get("/v1/replicas").json()["replicas"]}
    assert len(ids) == 2
